"""Stage merge: interpolate a base and a fine-tuned model; choose alpha by sampled scores."""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from align.core import distributed
from align.core.artifacts import SCRATCH, Artifact
from align.core.errors import ArtifactError
from align.core.types import PromptRow
from align.data.load import fingerprints
from align.evaluation.compare import Triple, as_triple, mean_interval, valid_pairs
from align.evaluation.stats import paired_bootstrap
from align.models.loading import load_policy, load_tokenizer, saved_weights
from align.models.logprobs import LogprobModel
from align.online.scoring import score_answers
from align.preflight.checks import Check, Finding
from align.preflight.rewards import reward_checks
from align.preflight.tokens import prompt_checks
from align.recipe.schema import DataSpec, MergeStage
from align.recipe.schema.tuning import METHODS
from align.sampling.engine import RolloutEngine
from align.sampling.push import check_answers, measured_rounding, probe_logprobs, probe_of, push
from align.sampling.rollout import answer_fixed
from align.stages.base import Prepared, StageContext, StageResult, chat_format
from align.stages.evaluate.answers import same_tokens
from align.stages.rollouts import build_rewards, prompt_rows, start_engine
from align.tuning.interpolate import check_alike, interpolated, write_interpolated
from align.tuning.kit import check_kit, write_by_kit
from reward_models.base import RewardFunction

log = logging.getLogger(__name__)
Point = dict[str, Any]
SETS = ("prompts", "shifted")


@dataclass(frozen=True, slots=True)
class AlphaScores:
    """Scores of all responses of one alpha to one set of prompts.

    Attributes:
        scores: one per response, None if invalid. prompts: prompt number of each.
    """

    scores: list[float | None]
    prompts: list[int]


def prepare(spec: MergeStage, context: StageContext) -> Prepared:
    """Load the models to merge and their preflight checks."""
    if spec.method != "linear":
        check_kit()
    names = (spec.base, spec.tuned, *spec.others)
    sources = [context.artifact(name, "policy") for name in names]
    for name, artifact in zip(names, sources, strict=True):
        _refuse_adapter(name, artifact)
    return Prepared(
        train=partial(merge, spec, context, sources),
        checks=_merge_checks(spec, sources, context),
    )


def merge(spec: MergeStage, context: StageContext, sources: Sequence[Artifact]) -> StageResult:
    """Write the interpolation with the chosen alpha."""
    curve: list[Point] = []
    alpha = spec.alphas[0]
    if len(spec.alphas) > 1:
        curve = _sweep(spec, sources, context)
        alpha = choose(curve, tolerance=spec.tolerance)
    out = context.out / "model"
    distributed.on_first_rank(lambda: write(spec, sources, alpha=alpha, out=out, seed=context.seed))
    log.info("alpha %g written", alpha)
    metrics = {"merge/alpha": alpha}
    # Without a sweep there is no curve, and alpha is the recipe's.
    chosen = next((point for point in curve if point["alpha"] == alpha), None)
    if chosen is not None:
        metrics |= {f"merge/{name}": chosen[name][0] for name in SETS}
    return StageResult(
        metrics, fingerprints(spec.prompts, spec.shifted), {"alpha": alpha, "curve": curve}
    )


def write(
    spec: MergeStage, sources: Sequence[Artifact], *, alpha: float, out: Path, seed: int
) -> None:
    """Write the merged model of one alpha; ``sources`` are the base and the tuned models."""
    base, *tuned = (source.model_dir for source in sources)
    if spec.method == "linear":
        write_interpolated(base, tuned[0], alpha=alpha, out=out)
        return
    density = 0.5 if spec.density is None else spec.density
    write_by_kit(base, tuned, alpha=alpha, out=out, method=spec.method, density=density, seed=seed)


@contextlib.contextmanager
def _merged_weights(
    spec: MergeStage, sources: Sequence[Artifact], *, alpha: float, context: StageContext
) -> Iterator[Callable[[], Iterator[tuple[str, torch.Tensor]]]]:
    """Return a function that yields the merged weights of one alpha on every call."""
    # Linear interpolation is cheap enough to repeat; other methods go through a temporary folder.
    base, tuned = sources[0].model_dir, sources[1].model_dir
    if spec.method == "linear":
        yield partial(interpolated, base, tuned, alpha)
        return
    with tempfile.TemporaryDirectory(dir=context.out, prefix=SCRATCH) as place:
        write(spec, sources, alpha=alpha, out=Path(place) / "model", seed=context.seed)
        yield partial(saved_weights, Path(place) / "model")


def _merge_checks(
    spec: MergeStage, sources: Sequence[Artifact], context: StageContext
) -> list[Check]:
    """Return the checks of a merge: compatible models, and rewards that prefer correct answers."""

    def alike() -> Finding:
        words = load_tokenizer(sources[0].model_dir).get_vocab()
        for name, source in zip((spec.tuned, *spec.others), sources[1:], strict=True):
            check_alike(sources[0].model_dir, source.model_dir)
            if load_tokenizer(source.model_dir).get_vocab() != words:
                raise ArtifactError(
                    f"{name}: its tokenizer differs from that of {spec.base}, so equal rows of the "
                    "embeddings belong to different tokens. Merge models that were fine-tuned from "
                    "the same base"
                )
        names = ", ".join([spec.tuned, *spec.others])
        return Finding(f"{names} and {spec.base} have the same weights by name and shape")

    found: list[Check] = [("alike", alike)]
    if len(spec.alphas) > 1:
        chat = chat_format(sources[0].model_dir)
        rewards = build_rewards(spec.scores, context, chat.tokenizer)
        for name, data in zip(SETS, (spec.prompts, spec.shifted), strict=True):
            rows = _rows(spec, data, context)
            found += prompt_checks(chat, rows, model_dir=sources[0].model_dir)
            found += reward_checks(
                f"{name}: score", spec.scores, rewards, prompts=rows, answers=None
            )
    return found


def _refuse_adapter(name: str, artifact: Artifact) -> None:
    """Raise ArtifactError for a policy whose adapter is separate from its weights.

    Raises:
        ArtifactError: its stage tuned by a method that cannot be merged.
    """
    tuning = artifact.manifest.get("spec", {}).get("tuning") or {}
    method = tuning.get("method", "full")
    if not METHODS[method].merges:
        raise ArtifactError(
            f"{name}: tuned by {method}, whose adapter is not part of the weights. "
            "Interpolate models with full or LoRA-like tuning"
        )


def _sweep(spec: MergeStage, sources: Sequence[Artifact], context: StageContext) -> list[Point]:
    """Return the scores of every alpha on both sets of prompts, sampled by one engine."""
    base, tuned = sources[:2]
    chat = chat_format(base.model_dir)
    sets = {name: _rows(spec, getattr(spec, name), context) for name in SETS}
    # Scores are comparable only if both models see the same prompt tokens.
    other = chat_format(tuned.model_dir)
    for rows in sets.values():
        same_tokens(rows[:8], other, what=f"model '{spec.tuned}'", baseline=spec.base)
    rewards = build_rewards(spec.scores, context, chat.tokenizer)
    trainer = LogprobModel(load_policy(base.model_dir, dtype=spec.dtype)).eval()
    metrics = context.metrics(len(spec.alphas))
    found: dict[float, dict[str, AlphaScores]] = {}
    with contextlib.closing(start_engine(spec, base.model_dir, chat, context=context)) as engine:
        # One engine for all alphas: only its weights change.
        for i, alpha in enumerate(spec.alphas):
            merged = _merged_weights(spec, sources, alpha=alpha, context=context)
            with engine.awake(), merged as weights:
                _push_merged(engine, trainer, weights=weights, rows=sets["prompts"], version=i + 1)
                found[alpha] = {
                    name: answer(
                        engine,
                        rows,
                        rewards,
                        spec=spec,
                        stop_token_ids=chat.stop_token_ids,
                        context=context,
                    )
                    for name, rows in sets.items()
                }
            seen = {
                f"merge/{name}": point[0]
                for name, a in found[alpha].items()
                if (point := as_triple(mean_interval(a.scores, a.prompts, seed=context.seed)))[0]
                is not None
            }
            metrics.log(i + 1, {"merge/alpha": alpha, **seen})
    metrics.close()
    return curve_of(found, seed=context.seed)


def _rows(spec: MergeStage, data: list[DataSpec], context: StageContext) -> list[PromptRow]:
    chat = chat_format(context.artifact(spec.base, "policy").model_dir)
    return prompt_rows(spec.model_copy(update={"prompts": data}), chat, context)


@torch.no_grad()
def _push_merged(
    engine: RolloutEngine,
    trainer: LogprobModel,
    *,
    weights: Callable[[], Iterator[tuple[str, torch.Tensor]]],
    rows: Sequence[PromptRow],
    version: int,
) -> None:
    """Push merged weights into the engine and verify that it uses them."""
    # The trainer's copy gets the same weights, to compare log-probabilities with the engine's.
    named = dict(trainer.model.named_parameters())
    for name, tensor in weights():
        named[name].copy_(tensor)
    push(engine, weights(), version=version)
    probe = probe_of(rows[0].input_ids)
    logprobs = probe_logprobs(trainer, probe)
    rounding = measured_rounding(trainer, probe, logprobs, cache_dtype=engine.cache_dtype)
    check_answers(engine, probe, logprobs=logprobs, rounding=rounding)


def answer(
    engine: RolloutEngine,
    rows: Sequence[PromptRow],
    rewards: Sequence[RewardFunction],
    *,
    spec: MergeStage,
    stop_token_ids: tuple[int, ...],
    context: StageContext,
) -> AlphaScores:
    """Sample responses to this rank's prompts and return the scores of all ranks."""
    held = answer_fixed(
        engine,
        rows,
        n=spec.samples,
        step=0,  # the same seeds for every alpha, so that comparisons are paired
        seed=context.seed,
        sampling=spec.sampling,
        stop_token_ids=stop_token_ids,
    )
    scores = score_answers(held.prompts, held.completions, rewards).total
    # Rows with the same prompt are one piece of evidence, so they have one number.
    numbers: dict[tuple[int, ...], int] = {}
    prompts = [numbers.setdefault(row.input_ids, len(numbers)) for row in rows]
    parts = distributed.gather_objects((scores, [prompts[g] for g in held.group_ids.tolist()]))
    return AlphaScores(
        [s for part, _ in parts for s in part], [g for _, part in parts for g in part]
    )


def curve_of(found: Mapping[float, Mapping[str, AlphaScores]], *, seed: int) -> list[Point]:
    """Return each alpha's score on both sets, and its paired difference to alpha 1.

    Returns:
        Points with ``alpha``, ``prompts`` and ``shifted`` ([value, low, high]), and
        ``prompts_gain`` and ``shifted_gain``, the same of the difference.
    """
    curve = []
    for alpha, sets in sorted(found.items()):
        point: Point = {"alpha": alpha}
        for name, mine in sets.items():
            point[name] = as_triple(mean_interval(mine.scores, mine.prompts, seed=seed))
            # The gain over alpha 1, the fine-tuned model itself, paired by prompt.
            a, b, clusters = valid_pairs(mine.scores, found[1.0][name].scores, mine.prompts)
            gain = paired_bootstrap(a, b, clusters=clusters, seed=seed) if a else None
            point[f"{name}_gain"] = as_triple(gain)
        curve.append(point)
    return curve


def choose(curve: Sequence[Mapping[str, Any]], *, tolerance: float) -> float:
    """Return the alpha with the best shifted score among those that keep the prompts score.

    Args:
        curve: see ``curve_of``; must contain alpha 1. tolerance: how far below the score of alpha 1
            on ``prompts`` an alpha may be.

    Returns:
        The alpha; of equally good ones the largest. Scores are compared by their gain over alpha 1,
        on the responses that are valid in both: an alpha whose responses to difficult prompts have
        no score is not better for it.

    Raises:
        ArtifactError: no response of alpha 1 could be scored.
    """

    def number(triple: Triple) -> float:
        return float("-inf") if triple[0] is None else triple[0]

    def rank(point: Mapping[str, Any]) -> tuple[float, float, float]:
        gain = number(point["shifted_gain"])
        # Alpha 1 may have no valid score there; then the scores themselves decide.
        alone = number(point["shifted"]) if gain == float("-inf") else 0.0
        return gain, alone, point["alpha"]

    # Keep the score on the training prompts, then maximize the one on shifted prompts (WiSE-FT,
    # arXiv:2109.01903).
    if next(point["prompts"][0] for point in curve if point["alpha"] == 1.0) is None:
        raise ArtifactError(
            "merge: no response of the fine-tuned model could be scored. Check the rewards"
        )
    kept = [point for point in curve if number(point["prompts_gain"]) >= -tolerance]
    return max(kept, key=rank)["alpha"]
