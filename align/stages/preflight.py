"""The preflight checks of each family of stages, and the token views of the report."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from align.core.artifacts import Artifact
from align.core.types import Example, PromptRow, TokenRow
from align.data.load import load_examples
from align.data.render.chat import ChatFormat
from align.data.render.encoder_pairs import PairedFormat
from align.data.store.rows import StoredRows
from align.data.token_view import NUM_SHOWN, View, view_of
from align.models.decoder import plain_table
from align.models.logprobs import LogprobModel
from align.preflight.checks import Check, Finding, spread
from align.preflight.offline import loss_checks, sides_of, start_checks, stop_check
from align.preflight.rewards import judge_test, reward_checks
from align.preflight.sampling import Probe
from align.preflight.tokens import prompt_checks, row_checks
from align.recipe.schema import BaseStage, EvaluateStage, OfflineStage
from align.recipe.schema.evaluate import OWN_TASK
from align.stages.base import StageContext, chat_format
from align.stages.evaluate.measure import TaskRewards
from align.training.task import OfflineTask
from reward_models.base import RewardFunction

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
"""Conversations of one and of several turns, for stages without data."""


def row_views(rows: Sequence[Any], chat: ChatFormat | PairedFormat) -> list[View]:
    """Return token views of some rows of a training stage; of a pair, both sides."""
    few = [sides_of(row) for row in spread(rows, NUM_SHOWN)]
    # One pair has two sides, which fill the view already.
    few = few[:1] if len(few[0]) > 1 else few
    names = ("chosen", "rejected") if len(few[0]) > 1 else ("row",)
    return [
        view_of(side, chat, side=name)
        for sides in few
        for name, side in zip(names, sides, strict=True)
    ]


def base_checks(model_dir: Path) -> list[Check]:
    """Return the checks on an imported model, made with sample conversations."""
    chat = chat_format(model_dir)
    return prompt_checks(chat, [chat.prompt_row(e) for e in MADE_UP], model_dir=model_dir)


def corpus_checks(spec: BaseStage, context: StageContext) -> list[Check]:
    """Return the check on the corpus, which runs before a model is built."""

    def corpus() -> Finding:
        texts = [
            str(e.completion) for e in load_examples(spec.data, kind="corpus", seed=context.seed)
        ]
        empty = sum(not text.strip() for text in texts)
        return Finding(
            f"{len(texts):,} texts, {sum(map(len, texts)):,} characters, {empty} empty",
            "none empty",
            "fail" if empty else "ok",
            "remove the empty rows",
        )

    return [("corpus", corpus)]


def offline_checks(
    spec: OfflineStage,
    *,
    chat: ChatFormat,
    source: Artifact,
    module: nn.Module,
    model: "PreTrainedModel",
    task: OfflineTask[Any],
    examples: Sequence[Example],
) -> list[Check]:
    """Return the checks of an offline stage: its rows, the model it starts from, its loss.

    Args:
        module: passed to the loss. model: the transformers or peft model inside it.
        task: rows, batches and loss. examples: some of the examples behind its rows.
    """
    # Rows of stores are not listed: they may not fit into memory.
    stored = isinstance(task.rows, StoredRows)
    flat = task.rows if stored else [side for row in task.rows for side in sides_of(row)]
    vocab_size: int = plain_table(model.get_input_embeddings()).num_embeddings
    stops: list[Check] = []
    if isinstance(module, LogprobModel):
        stops.append(stop_check(module, task.rows, chat.stop_token_ids))
    return [
        *row_checks(chat, flat, examples, model_dir=source.model_dir),
        *start_checks(spec, model, source),
        *loss_checks(spec, module, task, vocab_size=vocab_size),
        *stops,
    ]


def answer_views(probe: Probe, chat: ChatFormat) -> list[View]:
    """Return token views of some sampled responses after their prompts."""
    prompts, completions = probe.own_answers()
    found = []
    for prompt, said in spread(list(zip(prompts, completions, strict=True)), NUM_SHOWN):
        head, answer = prompt.input_ids, said.token_ids
        trained = (False,) * len(head) + (True,) * len(answer)
        row = TokenRow((*head, *answer), trained, prompt.source)
        found.append(view_of(row, chat, side="sampled response"))
    return found


def evaluate_checks(
    spec: EvaluateStage,
    model_dir: Path,
    *,
    rows: Mapping[str, Sequence[PromptRow]],
    rewards: TaskRewards,
    judge: RewardFunction | None,
) -> list[Check]:
    """Return the checks of an evaluation: its prompts, graders and judges.

    ``judge`` is the function that compares responses of two models, if there is one.
    """
    chat = chat_format(model_dir)
    everything = [row for task in rows.values() for row in task]
    checks = [*prompt_checks(chat, everything, model_dir=model_dir)]
    for task in spec.all_tasks:
        grader, deciding = rewards[task.name]
        prompts, own = rows[task.name], "" if task.name == OWN_TASK else f"{task.name}: "
        checks += reward_checks(f"{own}score", task.grader, grader, prompts=prompts, answers=None)
        if task.judge:
            checks += reward_checks(
                f"{own}judge", task.judge, deciding, prompts=prompts, answers=None
            )
        elif judge is not None:
            checks.append((f"{own}pairwise {judge.name}", partial(judge_test, judge, prompts)))
    return checks
