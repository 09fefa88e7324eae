"""One function per method of training: a base model, one stage, and the run that they make."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from align.api.given import Writer, base_stage, sources
from align.api.given import rewards as _rewards
from align.api.result import Run
from align.api.running import RUNS, execute, load_recipe
from align.core.errors import RecipeError
from align.recipe.schema import Recipe

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from align.cli.eval_recipe import Question
    from reward_models.specs import RewardSpec

    Row: TypeAlias = Mapping[str, Any]
    Data: TypeAlias = "datasets.Dataset | Row | str | Path | Sequence[Data]"
    Model: TypeAlias = (
        "str | Path | Run | PreTrainedModel | tuple[PreTrainedModel, Any] | Mapping[str, Any]"
    )
    OneReward: TypeAlias = (
        "Callable[..., Any] | type | str | Path | Run | RewardSpec | Mapping[str, Any]"
    )
    Rewards: TypeAlias = "OneReward | Sequence[OneReward]"


def sft(
    *,
    model: "Model",
    data: "Data",
    heldout: "Data | None" = None,
    out: Path | str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    runs: Path | str = RUNS,
    force: bool = False,
    quiet: bool = False,
    **keys: object,
) -> Run:
    """Fine-tune a model on the assistant turns of rows, and return the run.

    The same call with the same ``out`` resumes an interrupted run, and returns a finished one.

    Args:
        model: a hub id, a folder, RUN/STAGE, a loaded model (or the pair of it and its tokenizer),
            an earlier run, or the keys of a ``base`` stage, such as ``{"build": ...}``.
        data: a ``datasets.Dataset``, a list of rows, a path, a hub id, a data source as in recipes
            (``{"path": ..., "split": ...}``), or a list of these, which are mixed.
        heldout: rows that are evaluated and never trained on.
        out: folder of the run; None means ``sft`` below ``runs``.
        tokenizer: settings of the base stage, such as ``{"chat_template": "plain"}``, or the
            tokenizer of a loaded model.
        runs: folder of the runs, in which RUN/STAGE is looked up.
        force: replace the stages whose settings or data changed; a finished run in which nothing
            changed is returned as it is.
        quiet: show no progress.
        keys: further keys of the stage or of the recipe, as in docs/recipe-keys.md.

    Raises:
        AlignError: as ``align.run``.
    """
    options = {"out": out, "runs": Path(runs), "force": force, "quiet": quiet}
    return _offline("sft", model, tokenizer, data=data, heldout=heldout, keys=keys, **options)


def dpo(
    *,
    model: "Model",
    data: "Data",
    heldout: "Data | None" = None,
    out: Path | str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    runs: Path | str = RUNS,
    force: bool = False,
    quiet: bool = False,
    **keys: object,
) -> Run:
    """Train a policy on preference pairs (DPO and related losses); arguments as for ``sft``."""
    options = {"out": out, "runs": Path(runs), "force": force, "quiet": quiet}
    return _offline("dpo", model, tokenizer, data=data, heldout=heldout, keys=keys, **options)


def kto(
    *,
    model: "Model",
    data: "Data",
    heldout: "Data | None" = None,
    out: Path | str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    runs: Path | str = RUNS,
    force: bool = False,
    quiet: bool = False,
    **keys: object,
) -> Run:
    """Train a policy on responses labeled good or bad (KTO); arguments as for ``sft``."""
    options = {"out": out, "runs": Path(runs), "force": force, "quiet": quiet}
    return _offline("kto", model, tokenizer, data=data, heldout=heldout, keys=keys, **options)


def reward(
    *,
    model: "Model",
    data: "Data",
    heldout: "Data | None" = None,
    out: Path | str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    runs: Path | str = RUNS,
    force: bool = False,
    quiet: bool = False,
    **keys: object,
) -> Run:
    """Train a reward model on preference pairs; arguments as for ``sft``.

    The run can be passed to ``ppo`` and ``grpo`` as a reward.
    """
    options = {"out": out, "runs": Path(runs), "force": force, "quiet": quiet}
    return _offline("reward", model, tokenizer, data=data, heldout=heldout, keys=keys, **options)


def grpo(
    *,
    model: "Model",
    data: "Data",
    rewards: "Rewards",
    steps: int,
    heldout: "Data | None" = None,
    eval_every: int | None = None,
    out: Path | str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    runs: Path | str = RUNS,
    force: bool = False,
    quiet: bool = False,
    **keys: object,
) -> Run:
    """Train a policy on the rewards of its own responses, without a critic (GRPO and relatives).

    Args:
        model: as for ``sft``.
        data: prompts, in any form that ``sft`` accepts as data.
        rewards: a function ``f(prompts, completions, **columns)``, a class of such functions, the
            name of a reward kind, ``FILE.py:NAME``, a trained reward model (run, folder or
            RUN/STAGE), an ``align.rewards`` entry, a mapping as in recipes, or a list of these.
        steps: rollout steps.
        heldout: prompts on which the policy is scored by the same rewards during training.
        eval_every: steps between these evaluations; None for ten of them.
        out: folder of the run; None means ``grpo`` below ``runs``.
        tokenizer: as for ``sft``.
        runs: as for ``sft``.
        force: as for ``sft``.
        quiet: as for ``sft``.
        keys: further keys of the stage or of the recipe, as in docs/recipe-keys.md.

    Raises:
        AlignError: as ``align.run``.
    """
    options = {"out": out, "runs": Path(runs), "force": force, "quiet": quiet}
    watched = {"heldout": heldout, "eval_every": eval_every}
    scored = _rewards(rewards, Path(runs))
    keys = _online_keys("grpo", data, scored, steps=steps, keys=keys, **watched)
    return _train("grpo", model, tokenizer, keys=keys, **options)


def ppo(
    *,
    model: "Model",
    data: "Data",
    rewards: "Rewards",
    steps: int,
    heldout: "Data | None" = None,
    eval_every: int | None = None,
    out: Path | str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    runs: Path | str = RUNS,
    force: bool = False,
    quiet: bool = False,
    **keys: object,
) -> Run:
    """Train a policy with PPO and a learned critic; arguments as for ``grpo``."""
    options = {"out": out, "runs": Path(runs), "force": force, "quiet": quiet}
    watched = {"heldout": heldout, "eval_every": eval_every}
    scored = _rewards(rewards, Path(runs))
    keys = _online_keys("ppo", data, scored, steps=steps, keys=keys, **watched)
    return _train("ppo", model, tokenizer, keys=keys, **options)


def _offline(
    kind: str,
    model: object,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    data: object,
    heldout: object,
    keys: Mapping[str, Any],
    **options: Any,
) -> Run:
    watched = {} if heldout is None else {"heldout": sources(heldout)}
    found = {"data": sources(data), **watched, **keys}
    return _train(kind, model, tokenizer, keys=found, **options)


def _online_keys(
    kind: str,
    data: object,
    scored: list[Any],
    *,
    steps: int,
    heldout: object,
    eval_every: int | None,
    keys: Mapping[str, Any],
) -> dict[str, Any]:
    found = {"prompts": sources(data), "rewards": scored, "steps": steps, **keys}
    if heldout is None and eval_every is not None:
        raise RecipeError(f"align.{kind}: eval_every: has no effect without heldout; remove it")
    if heldout is not None and "watch" in keys:
        raise RecipeError(
            f"align.{kind}: heldout: 'watch' has prompts of its own; give one of both"
        )
    if heldout is not None:
        every = eval_every or max(1, steps // 10)
        found["watch"] = {"every": every, "prompts": sources(heldout), "gold": scored}
    return found


def _train(
    kind: str,
    model: object,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    keys: Mapping[str, Any],
    out: Path | str | None,
    runs: Path,
    force: bool,
    quiet: bool,
) -> Run:
    """Run a recipe of the base model and one stage of this kind."""
    folder = Path(out or runs / kind)
    base, init = base_stage(model, tokenizer, runs)
    above = {name: keys[name] for name in Recipe.model_fields if name in keys}
    own = {name: value for name, value in keys.items() if name not in above}
    stages = {"base": base} if base else {}
    stages[kind] = {"kind": kind, "init": init, **own}
    plain = Writer(folder).plain({"name": _name_of(folder), **above, "stages": stages})
    try:
        recipe = load_recipe(plain, runs=runs)
        return execute(recipe, folder, force=force, quiet=quiet)
    except RecipeError as error:
        raise RecipeError(_as_arguments(str(error), kind)) from None


def _name_of(folder: Path) -> str:
    """Return the name of the recipe of a run in this folder."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", folder.resolve().name)[:100].lstrip(".-")
    return name or "run"


def _as_arguments(errors: str, kind: str) -> str:
    """Return the errors of a recipe with the keys as the arguments of the function."""
    words = {
        "recipe: ": f"align.{kind}: ",
        "stages.base.path": "model",
        "stages.base.tokenizer": "tokenizer",
        "stages.base": "model",
        f"stages.{kind}.init": "model",
        f"stages.{kind}.prompts": "data",
        f"stages.{kind}.": "",
    }
    for key, argument in words.items():
        errors = re.sub(rf"(?<![\w.]){re.escape(key)}", argument, errors)
    return errors


def evaluate(
    models: "Sequence[str | Path | Run]",
    *,
    tasks: str | Path | Mapping[str, Any] | Sequence[str | Path | Mapping[str, Any]] = "world",
    baseline: "str | Path | Run | None" = None,
    out: Path | str | None = None,
    runs: Path | str = RUNS,
    force: bool = False,
    quiet: bool = False,
    **options: object,
) -> Run:
    """Compare checkpoints on held-out tasks; the same call again returns the results on disk.

    Args:
        models: runs, folders of stages or of transformers models, or RUN/STAGE.
        tasks: names of shipped tasks, files, or tasks as in docs/evaluation.md, whose prompts may
            be datasets or rows and whose grader may be functions.
        baseline: checkpoint that the others are compared with; None for the first one.
        out: folder of the results; None derives its name from the options.
        runs: folder in which RUN/STAGE is looked up and results are written.
        force: evaluate again, also if nothing changed.
        quiet: show no progress.
        options: samples, limit, judge, judge_model, engine, dtype and tokenizer, as in
            ``align eval``.

    Raises:
        AlignError: as ``align.run``.
    """
    from align.cli.eval_recipe import STAGE, Question, question_recipe, results_folder

    listed = [tasks] if isinstance(tasks, str | Path | Mapping) else list(tasks)
    place = Path(out or runs)
    question = _question(
        Question,
        checkpoints=[_checkpoint(model) for model in models],
        tasks=[_task(task, place, Path(runs)) for task in listed],
        baseline=None if baseline is None else _checkpoint(baseline),
        **options,
    )
    asked = question_recipe(question, Path(runs))
    folder = Path(out) if out is not None else results_folder(asked, Path(runs))
    recipe = load_recipe({"name": _name_of(folder), **asked}, runs=runs)
    return execute(recipe, folder, force=force, redo=(STAGE,), quiet=quiet)


def _question(kind: "type[Question]", **given: Any) -> "Question":
    from align.core.text import suggest

    known = list(kind.__dataclass_fields__)
    for name in given:
        if name not in known:
            hint = suggest(name, known) or f"; expected one of {', '.join(known)}"
            raise RecipeError(f"align.evaluate: {name}: unknown option{hint}")
    if not given["checkpoints"]:
        raise RecipeError("align.evaluate: models: found an empty list; expected runs or folders")
    return kind(**given)


def _checkpoint(model: object) -> str:
    return str(model.last_model() if isinstance(model, Run) else model)


def _task(task: str | Path | Mapping[str, Any], folder: Path, runs: Path) -> str:
    """Return the name of a task; one that is given in Python is written to a file."""
    if not isinstance(task, Mapping):
        return str(task)
    writer = Writer(folder)
    parts = {key: sources(task[key]) for key in ("prompts", "answers") if key in task}
    parts |= {key: _rewards(task[key], runs) for key in ("grader", "judge") if key in task}
    text = json.dumps(writer.plain({**task, **parts}), indent=1)
    return writer.text(text, "task", ".yaml")
