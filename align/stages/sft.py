"""Stage sft: maximum likelihood of the assistant turns, mean over the tokens of the batch."""

from collections.abc import Sequence
from functools import partial
from operator import mul

from torch import Tensor, nn

from align.core.types import TokenRow
from align.losses.supervised import nll
from align.preflight.checks import Seen
from align.recipe.schema import SftStage
from align.stages.base import StageContext, StageResult, chat_format
from align.stages.offline import build_policy, offline_rows, start_of, train_policy
from align.stages.preflight import preflight_offline
from align.training.batch import PackedBatch, pack
from align.training.offline import OfflineTask


def run(spec: SftStage, context: StageContext) -> StageResult:
    """Fine-tune ``spec.init`` on the rows of ``spec.data``."""
    source = start_of(spec, context)
    chat = chat_format(source.model_dir)
    render = Seen(chat.sft_row)
    rows, watched = offline_rows(spec, context, kind="sft", render=render)
    module = build_policy(spec, source.model_dir, seed=context.seed)
    loss_fn = partial(sft_loss, label_smoothing=spec.label_smoothing)
    task = OfflineTask(rows, watched, length_of, collate, loss_fn)
    preflight_offline(
        spec,
        context,
        chat=chat,
        source=source,
        module=module,
        model=module.model,
        task=task,
        examples=render.examples,
    )
    return train_policy(spec, module, task, source=source, chat=chat, context=context)


def length_of(row: TokenRow) -> int:
    """Give a row's tokens."""
    return len(row.input_ids)


def collate(rows: Sequence[TokenRow], batch: Sequence[TokenRow]) -> PackedBatch:
    """Pack rows; the global count is the trained tokens of the whole batch, by their weight.

    A row weighs as much as its label is probable (weak labels; 1 for all others), times the
    weights that its turns or the row itself were given.
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
    """Return what the loss of each token of a row is multiplied by."""
    return [row.label_prob * weight for weight in row.weights or (1.0,) * len(row.input_ids)]


def sft_loss(
    model: nn.Module, batch: PackedBatch, *, label_smoothing: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Give this micro-batch's share of the mean negative log-likelihood per trained token.

    Targets are smoothed while training only: the held-out loss stays the plain one.
    """
    smoothing = label_smoothing if model.training else 0.0
    found = model(batch.input_ids, batch.position_ids, mask=batch.mask, label_smoothing=smoothing)
    weights = batch.per_token.get("weight")
    return nll(found.logprobs, batch.mask, batch.counts["tokens"], weights=weights), {}
