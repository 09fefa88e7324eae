"""Options that are set and change nothing: one small rule for each part of a recipe.

A value is told from one that was left out by comparing it with its default, so a recipe that is
written out in full (``align show``) stays right. What two keys of one part say of each other is
checked by the part itself; here stand the rules that take a wider look, each at its own key.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from align.recipe.algorithms import defaults_of
from align.recipe.schema import references
from align.recipe.schema.common import (
    ClipSpec,
    DataSpec,
    ImportanceSpec,
    KlSpec,
    OptimSpec,
    SamplingSpec,
    Spec,
    ZeroSpec,
)
from align.recipe.schema.evaluate import EvaluateStage, MergeStage, TaskSampling, TaskSpec
from align.recipe.schema.offline import (
    BaseStage,
    ClassifyStage,
    EncoderStage,
    OfflineStage,
    RewardStage,
    TrainingStage,
)
from align.recipe.schema.online import GrpoStage, OnlineStage, PpoStage
from align.recipe.schema.trl import TrlStage
from align.recipe.schema.tuning import METHODS
from reward_models.specs import EnsembleSpec, LengthSpec, MathSpec

Idle = tuple[str, str]
"""A dotted key below a stage, and why its value has no effect or cannot work."""


def idle_options(spec: Spec, key: str = "") -> Iterator[Idle]:
    """Find the options of a stage, or of a part of one, that are set without effect.

    Args:
        spec: a valid stage or part. key: its own dotted key below the stage.

    Yields:
        The dotted key of each such option below the stage, and the reason.
    """
    here = f"{key}." if key else ""
    for kind, rule in RULES:
        if isinstance(spec, kind):
            yield from ((here + name, reason) for name, reason in rule(spec))
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        if isinstance(value, Spec):
            yield from idle_options(value, here + name)
        if isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, Spec):
                    yield from idle_options(item, f"{here}{name}.{i}")
            yield from ((f"{here}{name}.{k}", reason) for k, reason in _mixture(value))


def changed(spec: Spec, *names: str) -> list[str]:
    """Give those of ``names`` whose value is not the default."""
    fields = type(spec).model_fields
    return [
        n for n in names if getattr(spec, n) != fields[n].get_default(call_default_factory=True)
    ]


def _mixture(sources: list[Any]) -> Iterator[Idle]:
    if len(sources) == 1 and isinstance(sources[0], DataSpec) and changed(sources[0], "weight"):
        yield "0.weight", "has no effect on a single source; 'rows' takes fewer of its rows"


def _data(spec: DataSpec) -> Iterator[Idle]:
    if spec.split == "all" and changed(spec, "heldout_frac"):
        yield "heldout_frac", "has no effect with split: all; write split: train or heldout"
    if spec.phrasing is not None and spec.templates is None:
        yield "phrasing", "has no effect without 'templates'; remove it"
    if spec.world is not None:
        for name in changed(spec, "rename", "format"):
            yield name, "has no effect on rows that are made; remove it"


def _optim(spec: OptimSpec) -> Iterator[Idle]:
    idle = ("warmup_frac", "min_lr_frac") if spec.schedule == "slanted" else ("cut_frac", "ratio")
    for name in changed(spec, *idle):
        yield name, f"has no effect with schedule {spec.schedule}; remove it"
    if spec.schedule == "constant" and changed(spec, "min_lr_frac"):
        yield "min_lr_frac", "has no effect with schedule constant, which never falls"
    if max(spec.betas) >= 1.0:
        yield "betas", f"found {list(spec.betas)}; a mean with weight 1 never moves: below 1"


def _zero(spec: ZeroSpec) -> Iterator[Idle]:
    if spec.stage == 0 and spec.offload != "none":
        yield "offload", "has no effect with stage 0; write stage: 1, 2 or 3"


def _sampling(spec: SamplingSpec) -> Iterator[Idle]:
    if spec.engine == "hf":
        for name in changed(spec, "memory_frac", "cache_gib"):
            yield name, "has no effect with engine hf, which keeps no cache between calls"


def _greedy(spec: Any) -> Iterator[Idle]:
    if spec.temperature == 0.0 and changed(spec, "top_p"):
        yield "top_p", "has no effect at temperature 0, the most likely token; write top_p: 1.0"


def _kl(spec: KlSpec) -> Iterator[Idle]:
    if spec.target is None and changed(spec, "horizon"):
        yield "horizon", "has no effect without 'target': the coefficient stays as it is"
    if spec.coef == 0.0 and spec.corrected:
        yield "corrected", "has no effect with coef 0"
    if spec.coef == 0.0 and spec.target is not None:
        yield "target", "has no effect with coef 0; give a starting coef"


def _importance(spec: ImportanceSpec) -> Iterator[Idle]:
    idle = {"none": ("cap", "level", "floor"), "truncate": ("floor",), "mask": ()}
    for name in changed(spec, *idle[spec.mode]):
        yield name, f"has no effect with mode {spec.mode}; remove it"


def _training(spec: TrainingStage) -> Iterator[Idle]:
    if not spec.checkpoint_every and changed(spec, "keep_checkpoints"):
        yield "keep_checkpoints", "has no effect with checkpoint_every 0, which keeps none"


def _offline(spec: OfflineStage) -> Iterator[Idle]:
    if spec.steps is not None and changed(spec, "epochs"):
        yield "epochs", "has no effect beside 'steps', which says how long; give one of them"
    yield from _heldout(spec)


def _heldout(spec: OfflineStage | TrlStage) -> Iterator[Idle]:
    if not spec.heldout:
        for name in changed(spec, "eval_every", "max_contaminated_frac"):
            yield name, "has no effect without 'heldout' rows"


def _base(spec: BaseStage) -> Iterator[Idle]:
    if spec.path is not None:
        for name in changed(spec, "batch_size", "max_length", "micro_tokens", "optim", "ranks"):
            yield name, "has no effect with 'path': nothing is trained"
    if spec.build is not None and spec.build.hidden_size % spec.build.num_heads:
        yield "build.num_heads", f"must divide hidden_size {spec.build.hidden_size}"
    if spec.build is not None and spec.build.num_heads % spec.build.num_kv_heads:
        yield "build.num_kv_heads", f"must divide num_heads {spec.build.num_heads}"


def _preset(spec: OnlineStage, block: str) -> Mapping[str, Any]:
    """Return what the stage's algorithm sets in a block, which is no choice of the recipe's."""
    return defaults_of(getattr(spec, "algorithm", None)).get(block, {})


def _online(spec: OnlineStage) -> Iterator[Idle]:
    if spec.minibatches * spec.update_epochs == 1:
        plain = ClipSpec(**_preset(spec, "clip"))
        for name in ClipSpec.model_fields:
            if getattr(spec.clip, name) != getattr(plain, name):
                yield (
                    f"clip.{name}",
                    "has no effect with one optimiser step per rollout, where every ratio is 1; "
                    "raise minibatches or update_epochs",
                )
    if all(reward.weight == 0.0 for reward in spec.rewards):
        yield "rewards", "all weights are 0: every answer scores the same"
    if spec.watch is not None and spec.watch.guard is not None:
        guard = spec.watch.guard
        looks = 1 + -(-spec.steps // spec.watch.every)
        needed = guard.window + (guard.patience - 1 if guard.stop_on else 0)
        if looks < needed:
            yield (
                "watch.guard",
                f"has no effect: it needs {needed} evaluations to raise an alarm, and {spec.steps} "
                f"steps with every {spec.watch.every} make {looks}",
            )


def _kl_of_stage(spec: PpoStage | GrpoStage) -> Iterator[Idle]:
    named = KlSpec(**_preset(spec, "kl"))
    usual = [("reward", "k1"), ("loss", "k3"), (named.place, named.estimator)]
    if spec.kl.coef == 0.0 and (spec.kl.place, spec.kl.estimator) not in usual:
        yield (
            "kl.estimator",
            f"'{spec.kl.estimator}' in the {spec.kl.place} has no effect, coef is 0",
        )


def _ppo(spec: PpoStage) -> Iterator[Idle]:
    if spec.critic.warmup_steps >= spec.steps:
        yield "critic.warmup_steps", f"leaves none of the {spec.steps} steps to the policy"


def _grpo(spec: GrpoStage) -> Iterator[Idle]:
    if not spec.dynamic_sampling and changed(spec, "max_draws"):
        yield "max_draws", "has no effect without dynamic_sampling"
    if spec.dynamic_sampling and spec.max_draws == 1:
        yield "max_draws", "1 draw leaves dynamic_sampling without effect; write 2 or more"


def _repeats(spec: Any) -> Iterator[Idle]:
    if spec.samples > 1 and spec.sampling.temperature == 0.0:
        yield "samples", "has no effect at temperature 0: every answer of a prompt is the same"


def _evaluate(spec: EvaluateStage) -> Iterator[Idle]:
    for i, reward in enumerate(spec.scores):
        if changed(reward, "weight"):
            yield f"scores.{i}.weight", "has no effect: each score has a column; weigh in 'judge'"
    if spec.pairs and not spec.reward_models:
        yield "pairs", "has no effect without 'reward_models'"
    if spec.reference is not None and not any(
        task.sampling.temperature == 1.0 and "kl" in task.reported for task in spec.all_tasks
    ):
        yield "reference", "has no effect: KL is measured on answers drawn at temperature 1 only"


def _merge(spec: MergeStage) -> Iterator[Idle]:
    if len(spec.alphas) == 1:
        names = ("tolerance", "samples", "sampling", "dtype", "max_length", "max_lost_frac")
        for name in changed(spec, *names):
            yield name, "has no effect with a single alpha, which is merged without scoring"
    if spec.base in (spec.tuned, *spec.others):
        yield "base", f"'{spec.base}' is what it is merged with: nothing would change"


def _trl(spec: TrlStage) -> Iterator[Idle]:
    if changed(spec.optim, "min_lr_frac"):
        yield "optim.min_lr_frac", "has no effect in a trl stage; remove it"
    if spec.columns and spec.rows == "prompts":
        yield "columns", "has no effect: trainers on prompts are given all columns; remove it"
    if spec.optim.schedule == "slanted":
        yield "optim.schedule", "TRL's trainers have no slanted schedule; write cosine or linear"


def _ensemble(spec: EnsembleSpec) -> Iterator[Idle]:
    if spec.combine != "mean_minus_std" and changed(spec, "kappa"):
        yield "kappa", f"has no effect with combine {spec.combine}"


def _math(spec: MathSpec) -> Iterator[Idle]:
    if not spec.latex and changed(spec, "timeout_s"):
        yield "timeout_s", "has no effect without latex: numbers are compared at once"


def _length(spec: LengthSpec) -> Iterator[Idle]:
    if spec.limit <= spec.target:
        yield "limit", f"found {spec.limit}; expected more words than target {spec.target}"


RULES: list[tuple[type[Spec], Callable[[Any], Iterator[Idle]]]] = [
    (DataSpec, _data),
    (OptimSpec, _optim),
    (ZeroSpec, _zero),
    (SamplingSpec, _sampling),
    (SamplingSpec, _greedy),
    (TaskSampling, _greedy),
    (KlSpec, _kl),
    (ImportanceSpec, _importance),
    (TrainingStage, _training),
    (OfflineStage, _offline),
    (BaseStage, _base),
    (TrlStage, _heldout),
    (TrlStage, _trl),
    (MergeStage, _merge),
    (OnlineStage, _online),
    (PpoStage, _kl_of_stage),
    (GrpoStage, _kl_of_stage),
    (PpoStage, _ppo),
    (GrpoStage, _grpo),
    (EvaluateStage, _evaluate),
    (EvaluateStage, _repeats),
    (TaskSpec, _repeats),
    (EnsembleSpec, _ensemble),
    (MathSpec, _math),
    (LengthSpec, _length),
]
"""Part of a recipe and what must hold of it; a part that is several kinds meets all its rules."""


WHOLE = ("init", "base", "tuned", "others", "critic")
"""Keys that name a model of which only the weights are read, but for ``init`` where it trains."""


def start_problem(method: str) -> str:
    """Say why training cannot start on top of an adapter, and what can be done."""
    if METHODS[method].continues:
        way = (
            f"repeat the same 'tuning' block, which goes on training this {method} adapter (not "
            "in a reward or classify stage, whose model is another one)"
        )
    else:
        way = "only its virtual tokens are saved, not what made them, so it cannot be trained on"
    return f"{_unmerged(method)}; {way}; or tune the earlier stage with a method that merges (lora)"


def adapter_problems(stages: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Find stages that would leave out, or cannot hold, an earlier stage's unmerged adapter.

    Args:
        stages: stage name to spec, None for one that is not valid by itself.

    Returns:
        (stage, dotted key) to what is wrong.
    """
    found = {}
    for name, spec in stages.items():
        for key, reference in references(spec).items() if spec is not None else ():
            made_by = getattr(stages.get(reference), "tuning", None)
            if made_by is not None and not made_by.merges:
                problem = _problem(spec, key, made_by)
                if problem is not None:
                    found[name, key] = problem
    return found


def _problem(spec: Any, key: str, made_by: Any) -> str | None:
    """Say what is wrong where ``key`` names a model whose adapter is not merged."""
    part = key.partition(".")[0]
    if part == "init" and isinstance(spec, TrainingStage):
        if spec.new_head is not None or spec.tuning != made_by or not made_by.continues:
            return start_problem(made_by.method)
        if isinstance(spec, PpoStage) and spec.critic.init is None:
            return (
                f"{_unmerged(made_by.method)}, and the critic, which would start from it, takes "
                "weights alone; name a merged policy or a reward model in 'critic.init'"
            )
    elif part in WHOLE:
        return (
            f"{_unmerged(made_by.method)}, and a {spec.kind} stage takes weights alone here; tune "
            "that stage with a method that merges (lora)"
        )
    elif part == "models" and isinstance(spec, EvaluateStage) and spec.sampling.engine == "vllm":
        return f"{_unmerged(made_by.method)}; write sampling.engine: hf (or auto, which takes it)"
    return None


def _unmerged(method: str) -> str:
    return f"the model was tuned with {method}, whose adapter cannot be merged into its weights"


Problem = tuple[str, str]
"""A dotted key below a stage, and what is wrong with its value."""


def encoder_problems(stages: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Find settings that need a decoder where the recipe names an encoder.

    Args:
        stages: stage name to spec, None for one that is not valid by itself.

    Returns:
        (stage, dotted key) to what is wrong.
    """
    found: dict[tuple[str, str], str] = {}
    for name, spec in stages.items():
        problems: list[Problem] = []
        if isinstance(spec, RewardStage | ClassifyStage) and is_encoder(spec.init, stages):
            problems = list(_head(spec))
        if isinstance(spec, PpoStage) and _scores_whole_texts(spec.critic.init, stages):
            problems = [
                (
                    "critic.init",
                    "it scores whole texts (its init is an encoder), and a critic judges every "
                    "token; remove it, and the critic begins from the policy, or name a decoder's "
                    "scorer",
                )
            ]
        found |= {(name, key): problem for key, problem in problems}
    return found


def is_encoder(reference: str, stages: Mapping[str, Any]) -> bool:
    """Say whether a stage's name or an artefact's folder is that of an encoder."""
    if reference in stages:
        return isinstance(stages[reference], EncoderStage)
    return _read(Path(reference) / "manifest.json").get("kind") == "encoder"


def _scores_whole_texts(reference: str | None, stages: Mapping[str, Any]) -> bool:
    if reference is None:
        return False
    if reference in stages:
        spec = stages[reference]
        return isinstance(spec, RewardStage) and is_encoder(spec.init, stages)
    return _read(Path(reference) / "model" / "scorer.json").get("reads") == "first"


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON mapping; what is none is reported where the reference itself is checked."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _head(spec: RewardStage | ClassifyStage) -> Iterator[Problem]:
    method = spec.tuning.method
    if spec.tuning.virtual:
        yield (
            "tuning.method",
            f"{method} puts virtual tokens before the text of a decoder, and init is an encoder; "
            "use lora or bottleneck",
        )
    if isinstance(spec, ClassifyStage):
        return
    if spec.supervision == "steps":
        yield (
            "supervision",
            "an encoder gives one score to a whole text, none to the steps so far; begin from a "
            "policy (kind: base), or take pairs or answers",
        )
    if spec.norm_sampling is not None:
        yield (
            "norm_sampling",
            "an encoder cannot answer prompts; remove it, and the answers of 'data' set mean and "
            "std",
        )
