"""LoReFT: edit hidden states in a subspace, h + R^T (W h + b - R h), R with orthonormal rows.

R is the transposed Q of the QR decomposition of a trained matrix, so its rows stay orthonormal
under any optimizer. W starts as R and b as zero, so the initial model is unchanged.

Either all tokens are edited, or the first f and last l tokens of the prompt. In a packed row, a
prompt ends where its responses branch off, or else at the first token of the response. In other
rows, the input that begins at position 0 is the prompt, and later decoded tokens are not edited.

Reference: arXiv:2404.03592 eq. 2. Deviation: W starts as R; the paper initializes it randomly.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft.config import PeftConfig
from torch import Tensor, nn

from align.models.attention import Segments
from align.tuning.inserted import InsertedModel, register

NAME = "LOREFT"


@dataclass
class LoreftConfig(PeftConfig):
    """Layers after which states are edited, the number of dimensions, and the edited tokens."""

    target_modules: list[str] = field(default_factory=list)
    rank: int = 4
    first: int | None = None
    last: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NAME  # pyright: ignore[reportAttributeAccessIssue]


class Loreft(nn.Module):
    """Compute R^T (W h + b - R h) at the edited tokens and 0 elsewhere."""

    def __init__(self, width: int, rank: int, *, first: int | None, last: int | None) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.basis = nn.Parameter(torch.randn(width, rank))
        self.source = nn.Parameter(_orthonormal(self.basis.detach()).clone())
        self.bias = nn.Parameter(torch.zeros(rank))

    def forward(self, hidden: Tensor, call: dict[str, Any]) -> Tensor:
        """Return the change to ``hidden`` (B, T, H); ``call`` contains the layer's other inputs."""
        rows = _orthonormal(self.basis)  # (r, H)
        state = hidden.float()
        # (W - R) h, not W h - R h, so that the initial change is exactly zero.
        change = (state @ (self.source.float() - rows).T + self.bias.float()) @ rows
        if self.first is not None or self.last is not None:
            change = change * self._edited(hidden, call).unsqueeze(-1)
        return change.to(hidden.dtype)

    def _edited(self, hidden: Tensor, call: dict[str, Any]) -> Tensor:
        first, last = self.first or 0, self.last or 0
        segments = call.get("segments")
        if segments is not None:
            at, end = segments.positions, prompt_ends(segments)
            return ((at < end) & ((at < first) | (at >= end - last))).unsqueeze(0)
        length = hidden.shape[1]
        column = torch.arange(length, device=hidden.device).unsqueeze(0)
        at = call.get("position_ids")
        at = column if at is None else at
        # A decoding step begins after position 0: its tokens are no longer the prompt.
        begins = (at == 0).any()
        return ((at < first) | (column >= length - last)) & begins


def _orthonormal(basis: Tensor) -> Tensor:
    """Return (r, H) orthonormal rows from (H, r)."""
    return torch.linalg.qr(basis.float()).Q.T


def prompt_ends(segments: Segments) -> Tensor:
    """Return, for each token of a packed row, the position where its sequence's prompt ends.
    The prompt ends where responses branch off, or else at the first token in ``segments.answers``.
    Without either, the whole sequence is the prompt.
    """
    positions = segments.positions
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[1:] = positions[1:] != positions[:-1] + 1
    number = begins.cumsum(0) - 1  # (N,) sequence of each token
    starts = begins.nonzero().squeeze(1)
    # Leading tokens that a sequence has in common with its root; 0 for a root itself.
    shared = positions[starts]  # (S,)
    # Without branches or responses, the prompt ends with the last token of the sequence.
    ends = shared.new_zeros(len(starts)).scatter_reduce_(0, number, positions + 1, "amax")
    if segments.answers is not None:
        candidates = torch.where(segments.answers, positions, ends[number])
        # A branched sequence takes the prompt end of its root sequence.
        ends = ends.scatter_reduce(0, number, candidates, "amin")
    # Number of the root that each sequence branches from.
    order = torch.arange(len(starts), device=positions.device)
    root = torch.where(shared == 0, order, 0).cummax(0).values
    branches = shared > 0
    ends = ends.scatter(0, root[branches], shared[branches])
    return ends[root][number]


class LoreftModel(InsertedModel):
    """A model whose states are edited after whole layers."""

    def build(self, config: LoreftConfig, width: int) -> nn.Module:
        """Return one edit network."""
        return Loreft(width, config.rank, first=config.first, last=config.last)


register(NAME, LoreftConfig, LoreftModel)
