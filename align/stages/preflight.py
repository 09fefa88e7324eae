"""The preflight of a stage: put its checks together, keep the card, stop where a line failed."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from align.core import distributed
from align.core.artefacts import Artefact, write_json_atomic
from align.core.card import CARD_FILE, Card, table
from align.core.errors import PreflightError
from align.core.types import Example, PairRow, PromptRow, TokenRow
from align.data.chat import ChatFormat
from align.data.load import load_examples
from align.models.logprobs import LogprobModel
from align.online.engine import RolloutEngine
from align.preflight.checks import Check, Finding, examine
from align.preflight.offline import loss_checks, start_checks
from align.preflight.rewards import reward_checks
from align.preflight.sampling import Probe
from align.preflight.tokens import prompt_checks, row_checks
from align.recipe.evaluate_schema import OWN_TASK
from align.recipe.schema import BaseStage, EvaluateStage, OfflineStage, OnlineStage
from align.stages.base import StageContext, chat_format
from align.stages.measuring import TaskRewards
from align.training.offline import OfflineTask
from reward_models.base import RewardFunction

log = logging.getLogger(__name__)


MADE_UP = [
    Example(
        prompt=[{"role": "user", "content": "What is the capital of France?"}], source="made up"
    ),
    Example(
        prompt=[
            {"role": "user", "content": "Count to three."},
            {"role": "assistant", "content": "1, 2, 3"},
            {"role": "user", "content": "And on?"},
        ],
        source="made up",
    ),
]
"""Conversations of one turn and of several, for models that bring no data with them."""


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


def base_checks(model_dir: Path) -> list[Check]:
    """Give the checks on a model that was brought in: made-up conversations are rendered."""
    chat = chat_format(model_dir)
    return prompt_checks(chat, [chat.prompt_row(e) for e in MADE_UP], model_dir=model_dir)


def corpus_checks(spec: BaseStage, context: StageContext) -> list[Check]:
    """Give what can be checked before a model is built: that there is text to learn from."""

    def corpus() -> Finding:
        texts = [
            str(e.completion) for e in load_examples(spec.data, kind="corpus", seed=context.seed)
        ]
        empty = sum(not text.strip() for text in texts)
        return Finding(
            f"{len(texts):,} texts, {sum(map(len, texts)):,} characters, {empty} empty",
            "none empty", "fail" if empty else "ok", "remove the empty rows",
        )  # fmt: skip

    return [("corpus", corpus)]


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


def preflight_online(
    spec: OnlineStage,
    context: StageContext,
    *,
    chat: ChatFormat,
    source: Artefact,
    prompts: Sequence[PromptRow],
    engine: RolloutEngine,
    module: LogprobModel,
    reference: LogprobModel | None,
    rewards: Sequence[RewardFunction],
) -> None:
    """Check an online stage: prompts, sampler against trainer and reference, rewards.

    The sampler is closed where the stage ends here.
    """
    probe = Probe(
        spec, engine=engine, module=module, reference=reference, prompts=prompts,
        stop_token_ids=chat.stop_token_ids, seed=context.seed,
    )  # fmt: skip
    checks = [
        *prompt_checks(chat, prompts, model_dir=source.model_dir),
        *start_checks(spec, module.model, source),
        *probe.checks(),
        *reward_checks("reward", spec.rewards, rewards, prompts, probe.own_answers),
    ]
    try:
        settle(context, checks)
    except (PreflightError, CheckedOnly):
        engine.close()
        raise


def preflight_evaluate(
    spec: EvaluateStage,
    context: StageContext,
    model_dir: Path,
    *,
    rows: Mapping[str, Sequence[PromptRow]],
    rewards: TaskRewards,
) -> None:
    """Check an evaluation: its prompts, and that graders and judges tell right from wrong."""
    chat = chat_format(model_dir)
    everything = [row for task in rows.values() for row in task]
    checks = [*prompt_checks(chat, everything, model_dir=model_dir)]
    for task in spec.all_tasks:
        grader, judge = rewards[task.name]
        prompts, own = rows[task.name], "" if task.name == OWN_TASK else f"{task.name}: "
        checks += reward_checks(f"{own}score", task.grader, grader, prompts, None)
        if task.judge:
            checks += reward_checks(f"{own}judge", task.judge, judge, prompts, None)
    settle(context, checks)


def _sides(row: Any) -> list[TokenRow]:
    pair = row if isinstance(row, TokenRow | PairRow) else row.pair
    return [pair.chosen, pair.rejected] if isinstance(pair, PairRow) else [pair]
