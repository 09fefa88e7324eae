"""The preflight of a stage: put its checks together, keep the card, stop where a line failed."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from align.core import distributed
from align.core.artefacts import Artefact, write_json_atomic
from align.core.card import CARD_FILE, Card, table
from align.core.errors import PreflightError
from align.core.types import Example, PairRow, TokenRow
from align.data.chat import ChatFormat
from align.preflight.checks import Check, examine
from align.preflight.offline import loss_checks, start_checks
from align.preflight.tokens import row_checks
from align.recipe.schema import OfflineStage
from align.stages.base import StageContext
from align.training.offline import OfflineTask

log = logging.getLogger(__name__)


class CheckedOnly(Exception):
    """End a stage that was started for its checks alone; holds the card."""

    def __init__(self, card: Card) -> None:
        super().__init__(card.stage)
        self.card = card


def settle(context: StageContext, checks: Sequence[Check]) -> None:
    """Run the checks of a stage and keep the card; every rank goes on, or none.

    Raises:
        PreflightError: a line failed.
        CheckedOnly: the stage was started for its checks alone.
    """
    kind = context.recipe.stages[context.name].kind
    card = Card(context.name, kind, distributed.broadcast_object(examine(checks)))
    if context.check_only:
        raise CheckedOnly(card)
    if distributed.rank() == 0:
        write_json_atomic(context.out / CARD_FILE, card.plain())
        for line in table(card):
            log.info("%s", line)
    distributed.barrier()
    if card.failed:
        lines = "\n".join(f"  {x.name}: {x.value}: {x.remedy}" for x in card.failed)
        raise PreflightError(f"{context.name}: the preflight failed, nothing was trained\n{lines}")


def preflight_offline(
    spec: OfflineStage,
    context: StageContext,
    *,
    chat: ChatFormat,
    source: Artefact,
    module: nn.Module,
    model: nn.Module,
    task: OfflineTask[Any],
    examples: Sequence[Example],
) -> None:
    """Check an offline stage: its rows, the model it starts from, its loss.

    Args:
        module: what the loss is called with. model: the transformers or peft model inside it.
        task: rows, batches and loss. examples: some of what its rows were made from.

    """
    flat = [side for row in task.rows for side in _sides(row)]
    vocab_size = model.get_input_embeddings().num_embeddings
    settle(
        context,
        [
            *row_checks(chat, flat, examples, model_dir=source.model_dir),
            *start_checks(spec, model, source),
            *loss_checks(spec, module, task, vocab_size=vocab_size),
        ],
    )


def _sides(row: Any) -> list[TokenRow]:
    pair = row if isinstance(row, TokenRow | PairRow) else row.pair
    return [pair.chosen, pair.rejected] if isinstance(pair, PairRow) else [pair]
