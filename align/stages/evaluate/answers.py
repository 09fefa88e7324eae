"""Sample responses to the prompts of evaluation tasks from each model, through one engine."""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

from torch import Tensor, dtype

from align.core.artifacts import Artifact
from align.core.errors import ArtifactError
from align.core.types import PromptRow
from align.data.render.chat import ChatFormat
from align.models.loading import saved_weights
from align.models.logprobs import LogprobModel
from align.recipe.schema import EvaluateStage, SamplingSpec, TaskSpec
from align.sampling.engine import RolloutEngine
from align.sampling.push import (
    check_answers,
    measured_rounding,
    probe_logprobs,
    probe_of,
    push,
)
from align.sampling.rollout import Experience, answer_fixed
from align.stages.base import StageContext, chat_format
from align.stages.rollouts import prompt_rows, start_engine
from align.tuning.files import unmerged_adapter
from align.tuning.loading import load_tuned_policy

log = logging.getLogger(__name__)
Answers = dict[str, dict[str, Experience]]
"""Responses of this rank: {task: {model: responses}}."""


def task_rows(
    spec: EvaluateStage, artifact: Artifact, context: StageContext
) -> dict[str, list[PromptRow]]:
    """Return the prompts of every task, tokenized with the baseline's tokenizer."""
    chat = chat_format(artifact.model_dir)
    rows = {task.name: prompt_rows(task, chat, context) for task in spec.all_tasks}
    for name, prompts in rows.items():
        warn_of_duplicates(name, prompts)
    return rows


def warn_of_duplicates(task: str, prompts: Sequence[PromptRow]) -> None:
    """Warn if rows of a task have the same prompt, which is one piece of evidence."""
    num = len({row.input_ids for row in prompts})
    if num < len(prompts):
        log.warning(
            "%s: %d rows have %d different prompts. Rows with the same prompt count as one piece "
            "of evidence in the intervals",
            task,
            len(prompts),
            num,
        )


def sample_all(
    spec: EvaluateStage,
    artifacts: Mapping[str, Artifact],
    rows: Mapping[str, Sequence[PromptRow]],
    *,
    context: StageContext,
) -> tuple[Answers, str]:
    """Return each model's responses to this rank's prompts of all tasks, and the engine's name.

    The weights of the models are loaded into one engine in turn. Every model samples with the same
    seeds, so that comparisons are paired.
    """
    answers: Answers = {task.name: {} for task in spec.all_tasks}
    longest = max(task.max_length for task in spec.all_tasks)
    # One engine serves all tasks, so it needs the room of the longest.
    roomy = spec.model_copy(update={"max_length": longest})
    # An engine ends before the next one starts, and in any case with the stage.
    engines = context.resources.enter_context(ExitStack())
    engine: RolloutEngine | None = None
    held: Artifact | None = None
    names: list[str] = []
    for version, (name, artifact) in enumerate(artifacts.items()):
        chat = chat_format(artifact.model_dir)
        for task_name, prompts in rows.items():
            what = f"{task_name}: model '{name}'"
            # A few rows show another tokenizer or template, which would make the comparison unfair.
            same_tokens(prompts[:8], chat, what=what, baseline=spec.baseline)
        # An engine is built for one architecture and adapter; otherwise only the weights change.
        if engine is None or held is None or _config(held) != _config(artifact):
            engines.close()
            started = start_engine(roomy, artifact.model_dir, chat, context=context)
            engine = engines.enter_context(closing(started))
            held = artifact
            names.append(engine.name)
        with engine.awake():
            if held is not artifact:
                push(engine, saved_weights(artifact.model_dir), version=version)
                _prove(engine, artifact, next(iter(rows.values()))[0].input_ids, spec=spec)
            for i, task in enumerate(spec.all_tasks):
                num = len(rows[task.name]) * task.samples
                log.info("%s: sampling %s responses of %s", task.name, f"{num:,}", name)
                found = _ask(engine, task, rows[task.name], chat=chat, step=i, seed=context.seed)
                answers[task.name][name] = found
        num = sum(len(answers[task][name].completions) for task in answers)
        log.info("%s: %d responses sampled", name, num)
    engines.close()
    return answers, "+".join(dict.fromkeys(names))


def _prove(
    engine: RolloutEngine, artifact: Artifact, prompt: Sequence[int], *, spec: EvaluateStage
) -> None:
    """Raise if the engine does not compute with the weights of a model that were pushed to it."""
    probe = probe_of(prompt)
    cache_dtype = engine.cache_dtype
    logprobs, rounding = trainer_logprobs(artifact, probe, spec, cache_dtype=cache_dtype)
    check_answers(engine, probe, logprobs=logprobs, rounding=rounding)


def _ask(
    engine: RolloutEngine,
    task: TaskSpec,
    rows: Sequence[PromptRow],
    *,
    chat: ChatFormat,
    step: int,
    seed: int,
) -> Experience:
    return answer_fixed(
        engine,
        rows,
        n=task.samples,
        step=step,
        seed=seed,
        sampling=SamplingSpec(**task.sampling.model_dump()),
        stop_token_ids=chat.stop_token_ids,
    )


def _config(artifact: Artifact) -> Any:
    """Return what an engine is built for: the architecture, and an adapter that is not merged."""
    config = json.loads((artifact.model_dir / "config.json").read_text(encoding="utf-8"))
    return config, unmerged_adapter(artifact.model_dir)


def same_tokens(rows: Sequence[PromptRow], chat: ChatFormat, *, what: str, baseline: str) -> None:
    """Raise ArtifactError if a model's tokenizer or template gives other prompt tokens."""
    for row in rows:
        ids = chat.prompt_ids(row.prompt, tools=row.tools, template_kwargs=row.template_kwargs)
        if list(row.input_ids) != ids:
            raise ArtifactError(
                f"{what}: {row.source} has other prompt tokens than with '{baseline}'. "
                "Compare models that share a tokenizer and a chat template"
            )


def trainer_logprobs(
    artifact: Artifact,
    ids: Sequence[int],
    spec: EvaluateStage,
    *,
    cache_dtype: dtype | None,
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of tokens 1 .. T-1 under a saved model, and their rounding."""
    model = LogprobModel(load_tuned_policy(artifact.model_dir, dtype=spec.dtype)).eval()
    logprobs = probe_logprobs(model, ids)
    return logprobs, measured_rounding(model, ids, logprobs, cache_dtype=cache_dtype)
