"""Packed batches: what a loss function sees of one micro-batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from align.core import distributed
from align.core.types import PairRow, TokenRow

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences packed end to end into one row without padding.

    Attributes:
        input_ids: (1, N). position_ids: (1, N), restarting at 0 with each sequence, or at p with
            one that continues the first p tokens of the last sequence that began at 0.
        mask: (1, N) bool, True on the tokens that enter the loss.
        segment_ids: (N,) sequence number of each token.
        num: number of sequences; 0 for the placeholder that keeps ranks in step.
        counts: global counts over all ranks and micro-batches of the optimizer step.
        per_token: (1, N) tensors. per_sequence: (num,) tensors.
    """

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor
    segment_ids: Tensor
    num: int
    counts: Mapping[str, float] = field(default_factory=dict)
    per_token: Mapping[str, Tensor] = field(default_factory=dict)
    per_sequence: Mapping[str, Tensor] = field(default_factory=dict)

    def segment_sums(self, x: Tensor) -> Tensor:
        """Return the sum of a (1, N) tensor over each sequence, shape (num,)."""
        # The placeholder has num = 0, but its tokens still need a row to add to.
        out = x.new_zeros(max(self.num, 1)).index_add(0, self.segment_ids, x[0])
        return out[: self.num]


def pack(
    rows: Sequence[TokenRow],
    *,
    counts: Mapping[str, float] | None = None,
    per_token: Mapping[str, Sequence[Sequence[float]]] | None = None,
    per_sequence: Mapping[str, Sequence[float]] | None = None,
    shared: Sequence[int] | None = None,
) -> PackedBatch:
    """Pack rows end to end; no rows give a two-token placeholder that trains nothing.

    Args:
        rows: sequences in order. counts: passed through.
        shared: for each row, how many of its leading tokens it has in common with the last row
            that shares none; they are computed once and must not be trained. None shares nothing.
        per_token: name -> for each row, one float per token.
        per_sequence: name -> one float per row.
    """
    device = distributed.device()
    # A rank without rows still runs one pass, so that all ranks issue the same collectives.
    held = rows or [TokenRow(input_ids=(0, 0), trained=(False, False))]
    skip = shared if rows and shared is not None else [0] * len(held)
    # Shared tokens are computed once: only the row that owns them may train them.
    assert not any(any(row.trained[:n]) for row, n in zip(held, skip, strict=True)), skip
    ids = _joined([row.input_ids for row in held], skip)
    trained = _joined([row.trained for row in held], skip)
    positions = _joined([range(len(row.input_ids)) for row in held], skip)
    lengths = [len(row.input_ids) - n for row, n in zip(held, skip, strict=True)]
    numbers = torch.repeat_interleave(torch.arange(len(held)), torch.tensor(lengths))
    floats = {
        name: torch.tensor(_joined(values, skip) if rows else [0.0] * len(ids))
        for name, values in (per_token or {}).items()
    }
    return PackedBatch(
        input_ids=torch.tensor([ids], device=device),  # (1, N)
        position_ids=torch.tensor([positions], device=device),  # (1, N)
        mask=torch.tensor([trained], device=device),  # (1, N)
        segment_ids=numbers.to(device),  # (N,)
        num=len(rows),
        counts=dict(counts or {}),
        per_token={k: v.float().unsqueeze(0).to(device) for k, v in floats.items()},
        per_sequence={
            k: torch.tensor(list(v), dtype=torch.float32, device=device)
            for k, v in (per_sequence or {}).items()
        },
    )


def _joined(rows: Sequence[Sequence[T]], skip: Sequence[int]) -> list[T]:
    return [x for row, n in zip(rows, skip, strict=True) for x in row[n:]]


def pair_length(pair: PairRow) -> int:
    """Return the number of tokens of a pair: its prompt, computed once, and both responses.

    A pair that shares no prompt counts as the two rows of a padded batch that it fills.
    """
    lengths = len(pair.chosen.input_ids), len(pair.rejected.input_ids)
    return sum(lengths) - pair.num_prompt_tokens if pair.shared else 2 * max(lengths)


def pack_pairs(
    pairs: Sequence[PairRow],
    *,
    counts: Mapping[str, float] | None = None,
    per_sequence: Mapping[str, Sequence[float]] | None = None,
) -> PackedBatch:
    """Pack pairs, each prompt once: sequences 2k and 2k + 1 are chosen and rejected of pair k."""
    shared = [n for pair in pairs for n in (0, pair.num_prompt_tokens * pair.shared)]
    return pack(flatten_pairs(pairs), counts=counts, per_sequence=per_sequence, shared=shared)


def flatten_pairs(pairs: Sequence[PairRow]) -> list[TokenRow]:
    """Return the rows of all pairs: rows 2k and 2k + 1 are chosen and rejected of pair k.

    Text that a template writes after the stop token, such as a line break, is dropped: sampled
    responses end with the stop token, and a scorer must see the ending that it was trained on.
    """
    return [trim_after_last_trained(row) for pair in pairs for row in (pair.chosen, pair.rejected)]


def trim_after_last_trained(row: TokenRow) -> TokenRow:
    """Cut a row after its last trained token."""
    end = max(t for t, trained in enumerate(row.trained) if trained) + 1
    return TokenRow(row.input_ids[:end], row.trained[:end], row.source)


def label_probs(pairs: Sequence[PairRow]) -> dict[str, list[float]]:
    """Return ``label_prob`` twice per pair, or nothing if every label is certain."""
    if all(pair.label_prob == 1.0 for pair in pairs):
        return {}
    return {"label_prob": [pair.label_prob for pair in pairs for _ in range(2)]}
