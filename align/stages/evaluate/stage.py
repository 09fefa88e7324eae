"""Stage evaluate: sample responses to held-out prompts from several models and compare them."""

import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.core import distributed
from align.core.artifacts import Artifact, write_json_atomic
from align.core.expectations import band_text
from align.core.log import CARDS_FILE, MetricsLog
from align.core.types import PromptRow
from align.data.load import fingerprints
from align.evaluation.compare import Record, check_expectations
from align.evaluation.verdict import (
    WIN_RATES,
    Judged,
    Responses,
    preferences_by_score,
    task_block,
    win_matrix,
)
from align.models.loading import load_tokenizer
from align.models.logprobs import LogprobModel
from align.recipe.schema import EvaluateStage, RewardSpec, TaskSpec
from align.recipe.schema.evaluate import OWN_TASK
from align.stages.base import Prepared, StageContext, StageResult, chat_format
from align.stages.evaluate.answers import Answers, sample_all, task_rows
from align.stages.evaluate.harness import harness_blocks
from align.stages.evaluate.judge import judge_all
from align.stages.evaluate.measure import (
    TaskRewards,
    held_out_rows,
    kl_per_answer,
    load_reference,
    row_losses,
    to_records,
    wants_kl,
)
from align.stages.evaluate.reward_cards import CardInput, SampledAnswers, build_cards, headlines
from align.stages.preflight import evaluate_checks
from align.stages.rollouts import build_rewards
from align.tuning.loading import load_tuned_policy
from reward_models.base import RewardFunction

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def prepare(spec: EvaluateStage, context: StageContext) -> Prepared:
    """Load models and task prompts, and build the graders and judges."""
    artifacts = {
        spec.label(name): context.artifact(name, "policy", with_adapter=True)
        for name in spec.models
    }
    if not spec.all_tasks:
        return Prepared(train=partial(evaluate, spec, context, artifacts, rows={}, rewards={}))
    baseline = artifacts[spec.label(spec.baseline)].model_dir
    rows = task_rows(spec, artifacts[spec.label(spec.baseline)], context)
    rewards = _task_rewards(spec, context, load_tokenizer(baseline))
    judge = None
    if spec.pairwise and spec.pairwise.function:
        (judge,) = build_rewards([spec.pairwise.function], context)
    return Prepared(
        train=partial(evaluate, spec, context, artifacts, rows=rows, rewards=rewards, judge=judge),
        checks=evaluate_checks(spec, baseline, rows=rows, rewards=rewards, judge=judge),
    )


def evaluate(
    spec: EvaluateStage,
    context: StageContext,
    artifacts: Mapping[str, Artifact],
    *,
    rows: Mapping[str, Sequence[PromptRow]],
    rewards: TaskRewards,
    judge: RewardFunction | None = None,
) -> StageResult:
    """Sample, score and compare the models; write summary.json and samples.jsonl.

    ``judge`` is the function that compares responses of two models, if the recipe names one.
    """
    baseline = spec.label(spec.baseline)
    answers: Answers = {}
    answered: dict[str, dict[str, Responses]] = {}
    summary: dict[str, Any] = {"engine": "none"}
    # Tasks: sample and measure every model, then compare with the baseline.
    if spec.all_tasks:
        answers, summary["engine"] = sample_all(spec, artifacts, rows, context=context)
        answered = _measure_all(spec, artifacts, answers=answers, rewards=rewards, context=context)
        log.info("comparing the models")
    summary["tasks"] = {
        task.name: summarize(
            spec, task, answered[task.name], rows=rows[task.name], judge=judge, context=context
        )
        for task in spec.all_tasks
    } | harness_blocks(spec, artifacts, context)
    # Reward models: scored on held-out pairs, independent of the tasks.
    cards = reward_cards(
        spec, context, answers=answers, answered=answered, baseline=artifacts[baseline]
    )
    summary["reward_models"] = {name: headlines(card) for name, card in cards.items()}
    summary["expectations"] = check_expectations(summary, spec.expect)
    if distributed.rank() == 0:
        write_json_atomic(context.out / "summary.json", summary)
        _write_samples(context.out / "samples.jsonl", answered)
        if cards:
            write_json_atomic(context.out / CARDS_FILE, cards)
        for line in summary["expectations"]:
            log.info("%s: %s", line["key"], _verdict(line))
    data = [part for task in spec.all_tasks for part in (task.prompts, task.answers)]
    return StageResult(headline(summary), fingerprints(*data, spec.pairs, spec.sets))


def _measure_all(
    spec: EvaluateStage,
    artifacts: Mapping[str, Artifact],
    *,
    answers: Answers,
    rewards: TaskRewards,
    context: StageContext,
) -> dict[str, dict[str, Responses]]:
    """Return the measured responses of all ranks by task and model."""
    tasks = spec.all_tasks
    metrics = context.metrics(len(spec.models))
    chat = chat_format(artifacts[spec.label(spec.baseline)].model_dir)
    # Prepared once for all models: every model is measured on the same tokens.
    heldout = {task.name: held_out_rows(task, chat, context) for task in tasks}
    reference = load_reference(spec, context) if any(map(wants_kl, tasks)) else None
    found: dict[str, dict[str, Responses]] = {task.name: {} for task in tasks}
    for i, (name, artifact) in enumerate(artifacts.items()):
        # One model in memory at a time, plus the reference.
        policy = LogprobModel(load_tuned_policy(artifact.model_dir, dtype=spec.dtype))
        for task in tasks:
            experience = answers[task.name][name]
            kl: Sequence[float | None] = [None] * len(experience.completions)
            if wants_kl(task) and reference is not None:
                kl = kl_per_answer(experience, policy=policy, reference=reference)
            grader, judge = rewards[task.name]
            mine = to_records(experience, kl, scores=grader, judge=judge, by=task.by)
            # Rank order is prompt order, because each rank has a contiguous part of the prompts.
            records = [r for part in distributed.gather_objects(mine) for r in part]
            losses = row_losses(policy, heldout[task.name])
            found[task.name][name] = Responses(records, losses)
        del policy  # before the next one is loaded
        _log_model(metrics, i + 1, name=name, records=found[tasks[0].name][name].records)
    metrics.close()
    return found


def _task_rewards(
    spec: EvaluateStage, context: StageContext, tokenizer: "PreTrainedTokenizerBase"
) -> TaskRewards:
    """Return each task's grader, and the rewards whose weighted sum decides comparisons.

    Args:
        tokenizer: the baseline's, which all models share.
    """

    def build(specs: Sequence[RewardSpec]) -> list[RewardFunction]:
        return build_rewards(list(specs), context, tokenizer)

    return {
        task.name: (
            build(task.grader),
            build(task.judge or ([] if spec.pairwise else task.grader)),
        )
        for task in spec.all_tasks
    }


def summarize(
    spec: EvaluateStage,
    task: TaskSpec,
    answered: Mapping[str, Responses],
    *,
    rows: Sequence[PromptRow],
    judge: RewardFunction | None,
    context: StageContext,
) -> dict[str, Any]:
    """Return the comparison of the models on one task, whose prompts are ``rows``."""
    baseline = spec.label(spec.baseline)
    records = {name: model.records for name, model in answered.items()}
    told: dict[str, Any] = {"description": task.description}
    if spec.pairwise and not task.judge:
        judged, told["judge"] = judge_all(
            spec, answered, function=judge, rows=rows, seed=context.seed
        )
    else:
        judged = {
            name: Judged(preferences_by_score(mine, records[baseline]))
            for name, mine in records.items()
            if name != baseline
        }
        # Scores compare any two models; a judge is asked about pairs with the baseline alone.
        told["win_matrix"] = win_matrix(records)
    metrics = [m for m in task.reported if judged or m not in WIN_RATES]
    block = task_block(
        answered, baseline=baseline, metrics=metrics, judged=judged, seed=context.seed
    )
    return told | block


def headline(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the manifest's metrics: those of each model, prefixed with the task's name."""
    rows = [
        (name if task == OWN_TASK else f"{task}/{name}", row)
        for task, block in summary["tasks"].items()
        for name, row in block["models"].items()
    ]
    rows += summary["reward_models"].items()
    return {
        f"{name}/{metric}": value[0]
        for name, row in rows
        for metric, value in row.items()
        if value[0] is not None
    }


def _verdict(line: Mapping[str, Any]) -> str:
    value = "no value" if line["value"] is None else f"{line['value']:.4g}"
    verdict = "" if line["holds"] else ", which FAILED"
    return f"{value}, expected {band_text(line['band'])}{verdict}"


def _log_model(metrics: MetricsLog, step: int, *, name: str, records: Sequence[Record]) -> None:
    found = {
        f"eval/{name}/{column}": sum(known) / len(known)
        for column in records[0]["scores"]
        if (known := [x for r in records if (x := r["scores"][column]) is not None])
    }
    first = records[0]
    sample = {"prompt": first["prompt"], "completion": first["completion"], "score": first["judge"]}
    metrics.log(step, found, sample=sample)


def _write_samples(path: Path, answered: Mapping[str, Mapping[str, Responses]]) -> None:
    """Write every response as one JSON object per line."""
    with path.open("w", encoding="utf-8") as f:
        for task, models in answered.items():
            for model, found in models.items():
                for row in found.records:
                    line = {"task": task, "model": model, **row, "score": row["judge"]}
                    f.write(json.dumps(line, ensure_ascii=False) + "\n")


def reward_cards(
    spec: EvaluateStage,
    context: StageContext,
    *,
    answers: Answers,
    answered: Mapping[str, Mapping[str, Responses]],
    baseline: Artifact,
) -> dict[str, dict[str, Any]]:
    """Return the cards of the reward models; best-of-n uses the baseline's responses and judge."""
    if not spec.reward_models:
        return {}
    sampled = None
    if OWN_TASK in answered and spec.samples > 1:
        # The baseline's responses, so that all reward models choose among the same ones.
        mine = answers[OWN_TASK][spec.label(spec.baseline)]
        records = answered[OWN_TASK][spec.label(spec.baseline)].records
        rows = [
            (prompt.prompt, answer.text, list(prompt.input_ids), list(answer.token_ids))
            for prompt, answer in zip(mine.prompts, mine.completions, strict=True)
        ]
        sampled = SampledAnswers(
            [row for part in distributed.gather_objects(rows) for row in part],
            [record["prompt_index"] for record in records],
            [record["judge"] for record in records],
            load_tokenizer(baseline.model_dir),
        )
    given = CardInput(
        spec.pairs,
        spec.sets,
        spec.max_length,
        spec.max_lost_frac,
        context.seed,
        sampled,
        context.ledger,
    )
    models = {
        name: context.artifact(name, "reward_model", with_adapter=True)
        for name in spec.reward_models
    }
    return build_cards(models, given)
