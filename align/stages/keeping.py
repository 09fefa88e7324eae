"""What keeps a stage's policy from forgetting: the anchor of EWC, computed before training."""

import logging

from torch import Tensor, nn

from align.core.types import TokenRow
from align.data.chat import ChatFormat
from align.data.load import fit_rows, load_examples
from align.models.logprobs import LogprobModel
from align.recipe.schema import DataSpec, OfflineStage, OnlineStage
from align.stages.base import StageContext
from align.training.batch import pack
from align.tuning.ewc import Anchor, anchor_at, fisher_diagonal, scaled

log = logging.getLogger(__name__)


def build_anchor(
    spec: OfflineStage | OnlineStage, module: LogprobModel, chat: ChatFormat, context: StageContext
) -> Anchor | None:
    """Measure what the old task needs of the policy as it is now; None without ``keep.ewc``."""
    ewc = spec.keep.ewc
    if ewc is None:
        return None
    rows, _ = fit_rows(
        [chat.sft_row(e) for e in load_examples(ewc.data, kind="sft", seed=context.seed)],
        max_length=spec.max_length,
        max_lost_frac=spec.max_lost_frac,
        what=f"{context.name}: keep.ewc.data",
        ledger=context.ledger,
    )
    fisher = scaled(fisher_diagonal(module, rows, log_likelihood), cap=ewc.cap)
    log.info("Fisher information of %d rows of the old task measured", len(rows))
    return anchor_at(module, fisher, coef=ewc.coef)


def replayed(spec: OfflineStage | OnlineStage) -> list[DataSpec]:
    """Give the data of the old task that the stage reads, for the manifest."""
    return [] if spec.keep.ewc is None else spec.keep.ewc.data


def log_likelihood(module: nn.Module, row: TokenRow) -> Tensor:
    """Sum the log-probabilities (nats) of a row's trained tokens."""
    batch = pack([row])
    return module(batch.input_ids, batch.position_ids, mask=batch.mask).logprobs.sum()
