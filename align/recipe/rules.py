"""Rules that find options without effect: one small rule for each part of a recipe.

An option counts as set if its value differs from its default, so a recipe with all defaults written
out (``align show``) stays valid. Contradictions between keys of one part are checked by the part's
class; here is every option that another one makes useless, and each is reported at its key.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from align.core.sources import parameters_of
from align.recipe.algorithms import defaults_of
from align.recipe.own_code import no_judge
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
from align.recipe.schema.data_stages import CurateStage, WeakLabelStage
from align.recipe.schema.evaluate import (
    EvaluateStage,
    MergeStage,
    PairwiseSpec,
    TaskSampling,
    TaskSpec,
)
from align.recipe.schema.offline import (
    BaseStage,
    DpoStage,
    OfflineStage,
    RewardStage,
    SftStage,
)
from align.recipe.schema.online import GrpoStage, OnlineStage, PpoStage
from align.recipe.schema.training import TrainingStage
from align.recipe.schema.trl import TrlStage
from reward_models.specs import EnsembleSpec, LengthSpec, MathSpec

Idle = tuple[str, str]
"""A dotted key below a stage, and the reason why its value has no effect or cannot work."""


def idle_options(spec: Spec, key: str = "") -> Iterator[Idle]:
    """Yield the options of a stage, or of a part of it, that have no effect.

    Args:
        spec: a valid stage or part.
        key: dotted key of the part below the stage.

    Yields:
        The dotted key of each such option below the stage, and the reason.
    """
    here = f"{key}." if key else ""
    # The rules of this part itself.
    for kind, rule in RULES:
        if isinstance(spec, kind):
            yield from ((here + name, reason) for name, reason in rule(spec))
    # The parts inside it.
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
    """Return those of ``names`` whose value is not the default."""
    fields = type(spec).model_fields
    return [
        n for n in names if getattr(spec, n) != fields[n].get_default(call_default_factory=True)
    ]


def _mixture(sources: list[Any]) -> Iterator[Idle]:
    if len(sources) == 1 and isinstance(sources[0], DataSpec) and changed(sources[0], "weight"):
        yield "0.weight", "has no effect on a single source; 'rows' takes fewer of its rows"


def _data(spec: DataSpec) -> Iterator[Idle]:
    if spec.path is None:
        for name in changed(spec, "config", "revision"):
            yield name, "has no effect without 'path'; remove it"
    if spec.world is None and spec.tasks:
        yield "tasks", "has no effect without 'world'; remove it"
    if spec.world is not None and spec.templates is not None:
        yield "templates", "has no effect with 'world'; remove it"
    if spec.split == "all" and changed(spec, "heldout_frac"):
        yield "heldout_frac", "has no effect with split: all; write split: train or heldout"
    if spec.phrasing is not None and spec.templates is None:
        yield "phrasing", "has no effect without 'templates'; remove it"
    if spec.labels is not None and changed(spec, "format"):
        yield "format", "has no effect on exported labels; remove it"
    if spec.world is not None:
        for name in changed(spec, "map", "rename", "format"):
            yield name, "has no effect on a synthetic dataset (world); remove it"


def _optim(spec: OptimSpec) -> Iterator[Idle]:
    idle = ("warmup_frac", "min_lr_frac") if spec.schedule == "slanted" else ("cut_frac", "ratio")
    for name in changed(spec, *idle):
        yield name, f"has no effect with schedule {spec.schedule}; remove it"
    if spec.schedule == "constant" and changed(spec, "min_lr_frac"):
        yield "min_lr_frac", "has no effect with schedule constant, which never falls"
    if max(spec.betas) >= 1.0:
        yield "betas", f"found {list(spec.betas)}; expected below 1, or the mean never changes"


def _zero(spec: ZeroSpec) -> Iterator[Idle]:
    if spec.stage == 0 and spec.offload != "none":
        yield "offload", "has no effect with stage 0; write stage: 1, 2 or 3"


def _sampling(spec: SamplingSpec) -> Iterator[Idle]:
    if spec.engine == "hf":
        for name in changed(spec, "memory_frac", "cache_gib"):
            yield name, "has no effect with engine hf, which keeps no cache between calls"
        for name in changed(spec, "tensor_parallel", "max_num_seqs", "cache_dtype"):
            yield name, "has no effect with engine hf; write engine: vllm"


def _greedy(spec: SamplingSpec | TaskSampling) -> Iterator[Idle]:
    if spec.temperature == 0.0 and changed(spec, "top_p"):
        yield "top_p", "has no effect at temperature 0, the most likely token; write top_p: 1.0"


def _kl(spec: KlSpec) -> Iterator[Idle]:
    if spec.target is None and changed(spec, "horizon"):
        yield "horizon", "has no effect without 'target': the coefficient is constant"
    if spec.coef == 0.0 and spec.corrected:
        yield "corrected", "has no effect with coef 0"
    if spec.coef == 0.0 and spec.target is not None:
        yield "target", "has no effect with coef 0; give a starting coef"


def _importance(spec: ImportanceSpec) -> Iterator[Idle]:
    idle = {"none": ("cap", "level", "floor"), "truncate": ("floor",), "mask": ()}
    for name in changed(spec, *idle[spec.mode]):
        yield name, f"has no effect with mode {spec.mode}; remove it"


def _training(spec: TrainingStage) -> Iterator[Idle]:
    method = spec.tuning.method
    if spec.layers is not None and not spec.tuning.inside_layers:
        yield (
            "layers",
            f"has no effect with tuning.method {method}, which trains nothing inside a layer; "
            "remove it, or choose a method such as lora",
        )
    elif spec.layers is not None and spec.layers.freeze_embeddings and method != "full":
        yield (
            "layers.freeze_embeddings",
            f"has no effect with tuning.method {method}, which leaves the embeddings as they are; "
            "remove it",
        )
    if not spec.checkpoint_every and changed(spec, "keep_checkpoints"):
        yield "keep_checkpoints", "has no effect with checkpoint_every 0, which keeps none"


def _offline(spec: OfflineStage) -> Iterator[Idle]:
    if spec.steps is not None and changed(spec, "epochs"):
        yield "epochs", "has no effect if 'steps' is set; give one of them"
    if spec.mix_cap is not None and len(spec.data) < 2:
        yield "mix_cap", "has no effect on a single dataset; remove it"
    yield from _heldout(spec)
    if spec.own_loss:
        yield from _own_loss(spec, spec.own_loss)


OWN_LOSS_OPTIONS = (
    *("label_smoothing", "gamma", "desirable_weight", "undesirable_weight"),
    *("center_coef", "tie_margin"),
)
"""Options of the suite's losses that a loss of the user gets if it names them."""


def idle_loss_options(spec: OfflineStage, taken: Sequence[str] | None) -> list[str]:
    """Return the options of the suite's losses that are set and that the user's do not get.

    Args:
        spec: a stage with a loss of the user.
        taken: the function's parameters; None if they are not known.
    """
    if isinstance(spec, SftStage):
        taken = []  # label_smoothing needs the logits, and the function gets log-probabilities
    if taken is None or "**" in taken:
        return []
    known = [name for name in OWN_LOSS_OPTIONS if name in type(spec).model_fields]
    return [name for name in changed(spec, *known) if name not in taken]


def _own_loss(spec: OfflineStage, loss: str) -> Iterator[Idle]:
    """Yield the options that the user's function does not take."""
    for name in idle_loss_options(spec, parameters_of(loss)):
        yield name, f"has no effect with loss {loss}; remove it"
    if isinstance(spec, RewardStage) and spec.use_margin:
        yield (
            "use_margin",
            f"has no effect with loss {loss}, which gets the margins if it names 'margin'; "
            "remove it",
        )


def _dpo(spec: DpoStage) -> Iterator[Idle]:
    idle = {
        "label_smoothing": bool(spec.label_smoothing) and spec.loss in ("hinge", "ipo", "orpo"),
        "gamma": spec.gamma is not None and spec.loss != "simpo",
        "nll_coef": spec.nll_coef > 0.0 and spec.loss == "orpo",
        "ld_alpha": spec.ld_alpha is not None and spec.on_means,
    }
    if spec.own_loss:
        del idle["gamma"]  # by _own_loss, with the other options of losses
    for name in (name for name, is_idle in idle.items() if is_idle):
        yield name, f"has no effect with loss {spec.loss}; remove it"


def _reward(spec: RewardStage) -> Iterator[Idle]:
    idle: list[str] = []
    if spec.supervision != "pairs":
        idle += ["center_coef", "use_margin", "label_smoothing", "tie_margin", "noise_folds"]
    if spec.supervision == "steps":
        # A process reward is a probability: it is not normalized.
        idle += ["heads", "norm_prompts", "norm_sampling"]
    for name in changed(spec, *idle):
        yield name, f"has no effect with supervision {spec.supervision}; remove it"
    if spec.supervision != "steps" and changed(spec, "step_separator"):
        yield "step_separator", "has no effect without supervision: steps; remove it"
    if spec.norm_sampling is not None and spec.norm_prompts == 0:
        yield "norm_sampling", "has no effect with norm_prompts 0; remove it"


def _heldout(spec: OfflineStage | TrlStage) -> Iterator[Idle]:
    if not spec.heldout:
        for name in changed(spec, "eval_every", "max_contaminated_frac"):
            yield name, "has no effect without 'heldout' rows"


def _base(spec: BaseStage) -> Iterator[Idle]:
    if spec.path is not None:
        for name in changed(
            spec, "data", "steps", "batch_size", "max_length", "micro_tokens", "optim", "ranks"
        ):
            yield name, "has no effect with 'path': nothing is trained"
    if spec.build is None:
        return
    size, left = divmod(spec.build.hidden_size, spec.build.num_heads)
    if left:
        yield "build.num_heads", f"must divide hidden_size {spec.build.hidden_size}"
    elif size % 2:
        # Rotary position embeddings turn pairs of units.
        yield "build.num_heads", f"hidden_size / num_heads is {size}; expected an even number"
    if spec.build.num_heads % spec.build.num_kv_heads:
        yield "build.num_kv_heads", f"must divide num_heads {spec.build.num_heads}"


def _preset(spec: OnlineStage, block: str) -> Mapping[str, Any]:
    """Return the algorithm's defaults of a block, which the recipe did not choose."""
    return defaults_of(getattr(spec, "algorithm", None)).get(block, {})


def _online(spec: OnlineStage) -> Iterator[Idle]:
    if spec.truncation == "mask" and spec.truncated_score is not None:
        yield "truncated_score", "has no effect with truncation: mask; remove it"
    if spec.minibatches * spec.update_epochs == 1:
        plain = ClipSpec(**_preset(spec, "clip"))
        for name in ClipSpec.model_fields:
            if getattr(spec.clip, name) != getattr(plain, name):
                yield (
                    f"clip.{name}",
                    "has no effect with one optimizer step per rollout, where every ratio is 1; "
                    "raise minibatches or update_epochs",
                )
    if all(reward.weight == 0.0 for reward in spec.rewards):
        yield "rewards", "all weights are 0: every response scores the same"
    if spec.watch is not None and spec.watch.guard is not None:
        guard = spec.watch.guard
        # One evaluation before the first step, then one every `every` steps and a last one.
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
        yield "critic.warmup_steps", f"leaves none of the {spec.steps} steps for the policy"


def _grpo(spec: GrpoStage) -> Iterator[Idle]:
    facts = spec.algorithm_facts
    if spec.scale not in facts.scales:
        allowed = " or ".join(facts.scales)
        yield "scale", f"'{spec.scale}' has no effect with {spec.estimator}; write {allowed}"
    if spec.dynamic_sampling and not facts.compares_group:
        yield "dynamic_sampling", f"has no effect with {spec.estimator}; remove it"
    if spec.objective != "clip" and spec.clip.dual is not None:
        yield "clip.dual", f"has no effect with objective {spec.objective}; remove it"
    if not spec.dynamic_sampling and changed(spec, "max_draws"):
        yield "max_draws", "has no effect without dynamic_sampling"
    if spec.dynamic_sampling and spec.max_draws == 1:
        yield "max_draws", "1 draw leaves dynamic_sampling without effect; write 2 or more"


def _repeats(spec: EvaluateStage | TaskSpec) -> Iterator[Idle]:
    if spec.samples > 1 and spec.sampling.temperature == 0.0:
        yield "samples", "has no effect at temperature 0: all responses to a prompt are the same"


def _evaluate(spec: EvaluateStage) -> Iterator[Idle]:
    for i, reward in enumerate(spec.scores):
        if changed(reward, "weight"):
            yield f"scores.{i}.weight", "has no effect: each score has a column; weigh in 'judge'"
    if spec.sets and not spec.reward_models:
        yield "sets", "has no effect without 'reward_models'; remove it"
    if spec.pairwise and all(task.judge for task in spec.all_tasks):
        yield "pairwise", "has no effect: every task has a 'judge' of its own"
    if spec.pairs and not spec.reward_models:
        yield "pairs", "has no effect without 'reward_models'"
    if spec.reference is not None and not any(
        (task.sampling.temperature, task.sampling.top_p) == (1.0, 1.0) and "kl" in task.reported
        for task in spec.all_tasks
    ):
        yield (
            "reference",
            "has no effect: KL is only measured on responses at temperature 1 and top_p 1",
        )


def _pairwise(spec: PairwiseSpec) -> Iterator[Idle]:
    if spec.function is None:
        return
    for name in changed(spec.function, "weight", "prefill"):
        yield f"function.{name}", "has no effect on a judge of pairs; remove it"
    if changed(spec, "criteria"):
        yield "criteria", "has no effect on a function; pass it in its 'args'"
    if problem := no_judge(spec.function.path):
        yield "function.path", problem


def _curate(spec: CurateStage) -> Iterator[Idle]:
    for name in changed(spec, "min_quality", "keep_frac") if not spec.quality else ():
        yield name, "has no effect without 'quality'; remove it"


def _weak_label(spec: WeakLabelStage) -> Iterator[Idle]:
    if spec.of == "sft" and spec.use_given is not None:
        yield "use_given", "has no effect on sft rows, which have no labels; remove it"


def _merge(spec: MergeStage) -> Iterator[Idle]:
    if spec.method in ("linear", "slerp"):
        for name in changed(spec, "others", "density"):
            yield name, f"has no effect with method {spec.method}; remove it"
    if len(spec.alphas) == 1:
        names = ("tolerance", "samples", "sampling", "dtype", "max_length", "max_lost_frac")
        for name in changed(spec, *names):
            yield name, "has no effect with a single alpha, which is merged without scoring"
    if spec.base in (spec.tuned, *spec.others):
        yield "base", f"'{spec.base}' would be merged with itself; name two different models"


def _trl(spec: TrlStage) -> Iterator[Idle]:
    if changed(spec.optim, "min_lr_frac"):
        yield "optim.min_lr_frac", "has no effect in a trl stage; remove it"
    if spec.columns and spec.rows == "prompts":
        yield "columns", "has no effect: trainers on prompts get all columns; remove it"
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
    (DpoStage, _dpo),
    (RewardStage, _reward),
    (BaseStage, _base),
    (CurateStage, _curate),
    (WeakLabelStage, _weak_label),
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
    (PairwiseSpec, _pairwise),
    (TaskSpec, _repeats),
    (EnsembleSpec, _ensemble),
    (MathSpec, _math),
    (LengthSpec, _length),
]
"""The rules by class; a subclass must satisfy the rules of all its base classes."""
