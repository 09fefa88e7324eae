"""Stage sft: supervised fine-tuning on the assistant turns; the loss is a token mean."""

from collections.abc import Sequence
from functools import partial
from operator import mul

from torch import Tensor, nn

from align.core.types import TokenRow
from align.losses.supervised import nll
from align.recipe.schema import SftStage
from align.stages.base import Prepared, StageContext, chat_format
from align.stages.offline import build_policy, load_init, offline_rows, prepare_policy
from align.training.batch import PackedBatch, pack
from align.training.own_code import own_losses
from align.training.task import OfflineTask


def prepare(spec: SftStage, context: StageContext) -> Prepared:
    """Load the rows and build the policy of ``spec.init``."""
    source = load_init(spec, context)
    chat = chat_format(source.model_dir)
    data = offline_rows(spec, context, render=chat.sft_row)
    module = build_policy(spec, source.model_dir, seed=context.seed)
    loss_fn = partial(sft_loss, label_smoothing=spec.label_smoothing, own=spec.own_loss)
    task = OfflineTask(data.training, data.heldout, length_of, collate, loss_fn)
    return prepare_policy(
        spec, context, data=data, module=module, task=task, source=source, chat=chat
    )


def length_of(row: TokenRow) -> int:
    """Return the number of tokens in a row."""
    return len(row.input_ids)


def collate(rows: Sequence[TokenRow], batch: Sequence[TokenRow]) -> PackedBatch:
    """Pack rows; the global count is the sum of the weights of the batch's trained tokens.

    The weight of a token is the label probability of its row (below 1 for weak labels only) times
    the weights of its turn and its row.
    """
    weighed = any(row.label_prob != 1.0 or row.weights for row in rows)
    return pack(
        rows,
        counts={"tokens": float(sum(row.label_prob * _trained(row) for row in batch))},
        per_token={"weight": [weights_of(row) for row in rows]} if weighed else None,
    )


def _trained(row: TokenRow) -> float:
    return sum(map(mul, row.weights, row.trained)) if row.weights else sum(row.trained)


def weights_of(row: TokenRow) -> list[float]:
    """Return the weight of each token of a row in the loss."""
    return [row.label_prob * weight for weight in row.weights or (1.0,) * len(row.input_ids)]


def sft_loss(
    model: nn.Module, batch: PackedBatch, *, label_smoothing: float = 0.0, own: str | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return this micro-batch's part of the mean loss per trained token.

    Args:
        model: returns the log-probabilities. batch: packed rows.
        label_smoothing: applied only during training; the held-out loss is the plain one.
        own: the user's function of the tokens' log-probabilities; None is their negative.
    """
    smoothing = label_smoothing if model.training else 0.0
    found = model(batch.input_ids, batch.position_ids, mask=batch.mask, label_smoothing=smoothing)
    weights = batch.per_token.get("weight")
    # (1, N), 0 where nothing is trained.
    logprobs = found.logprobs
    if own is not None:
        # Only the trained tokens: where no log-probability was computed, it is 0.
        losses = own_losses(own, logprobs[batch.mask], each="trained tokens")
        logprobs = logprobs.masked_scatter(batch.mask, -losses.to(logprobs.dtype))
    return nll(logprobs, batch.mask, batch.counts["tokens"], weights=weights), {}
