"""``align eval``: turn the options into a recipe with one evaluate stage, and run it."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from align.core.artifacts import MANIFEST, artifact_kind, find_model
from align.core.errors import EXIT_OK, RecipeError
from align.pipeline.processes import run_tool
from align.pipeline.running import run
from align.pipeline.terminal import Terminal
from align.recipe.load import load_task
from align.recipe.own_code import no_judge, placed, problem_of
from align.recipe.schema.common import FUNCTION
from align.recipe.schema.evaluate import LONGER
from align.report.tables import calibration_lines, detect_lines

STAGE = "evaluate"
HARNESS_PREFIX = "lm_eval:"


@dataclass(frozen=True, slots=True)
class Question:
    """The options of ``align eval``.

    Attributes:
        checkpoints: folders of artifacts, RUN/STAGE, or folders saved by transformers.
        tasks: names of shipped tasks, paths, or ``lm_eval:NAME``.
        baseline: checkpoint that the others are compared with; None for the first one.
        samples: responses per prompt; None for the task's own number.
        limit: prompts per task; None for all.
        judge: ``rule``, a reward model's RUN/STAGE or folder, ``FILE.py:FUNCTION``, or the URL of
            an endpoint.
        judge_model: name of the model at the endpoint.
        engine: sampling engine: auto, vllm or hf.
        dtype: of the weights; None for the usual one of this machine.
        tokenizer: settings that a transformers folder lacks (pad_token, chat_template).
        harness: Python interpreter with lm-eval.
        harness_backend: hf or vllm.
        harness_path: folder of custom lm-eval task files.
    """

    checkpoints: Sequence[str]
    tasks: Sequence[str]
    baseline: str | None = None
    samples: int | None = None
    limit: int | None = None
    judge: str = "rule"
    judge_model: str | None = None
    engine: str = "auto"
    dtype: str | None = None
    tokenizer: Mapping[str, str] | None = None
    harness: str | None = None
    harness_backend: str = "hf"
    harness_path: str | None = None


def evaluate(
    question: Question,
    *,
    runs: Path,
    out: Path | None = None,
    force: bool = False,
    detect: float | None = None,
) -> int:
    """Evaluate checkpoints; the same options again reuse the results on disk.

    Args:
        question: checkpoints, tasks and options.
        runs: folder in which RUN/STAGE is looked up and results are written.
        out: folder of the results; None derives its name from the options.
        force: evaluate again, even if nothing changed.
        detect: also print how many prompts would detect a difference of this size.

    Returns:
        The exit code of the stage.
    """
    recipe = question_recipe(question, runs)
    folder = out or results_folder(recipe, runs)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "eval.yaml"
    named = {"name": re.sub(r"[^A-Za-z0-9_.-]", "-", folder.name) or "eval", **recipe}
    path.write_text(yaml.safe_dump(named, sort_keys=False, allow_unicode=True), encoding="utf-8")
    code = run(path, run_dir=folder, force=force, redo=(STAGE,))
    if code == EXIT_OK and detect is not None:
        summary = json.loads((folder / STAGE / "summary.json").read_text(encoding="utf-8"))
        for line in detect_lines(summary, detect):
            Terminal().line(line)
    return code


def results_folder(recipe: Mapping[str, Any], runs: Path) -> Path:
    """Return the folder of an evaluation, named by its recipe: equal options find their results."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
    return runs / f"eval-{digest}"


def calibrate(
    judge: str,
    *,
    model: str | None,
    pairs: Path,
    rows: int | None,
    heldout_frac: float | None,
    out: Path,
    runs: Path,
) -> int:
    """Measure a judge against human preferences and print the result.

    Args:
        judge: URL of an endpoint, a reward model's RUN/STAGE or folder, ``FILE.py:FUNCTION``, or
            ``longer``.
        model: name of the model at the endpoint.
        pairs: file of preference pairs.
        rows: number of pairs; None for all.
        heldout_frac: use only pairs that a recipe with this held-out fraction does not train on;
            None for all.
        out: JSON file to write.
        runs: folder in which RUN/STAGE is looked up.

    Returns:
        The exit code of the process.
    """
    scorer = judge if judge == LONGER and model is None else None
    if scorer is None:
        endpoint, scorer = _judge(Question([], [], judge=judge, judge_model=model), runs)
        if endpoint is None and scorer is None:
            raise RecipeError(
                f"{judge}: expected a reward model's RUN/STAGE, FILE.py:FUNCTION, a URL with "
                f"--model, or '{LONGER}'"
            )
    options = ["--pairs", str(pairs), "--out", str(out)]
    options += ["--model", model] if model else []
    options += ["--rows", str(rows)] if rows else []
    options += ["--heldout-frac", str(heldout_frac)] if heldout_frac else []
    code = run_tool("calibrate", [scorer or judge, *options], quiet=True)
    if code == EXIT_OK:
        found = json.loads(out.read_text(encoding="utf-8"))
        for line in calibration_lines(found):
            Terminal().line(line)
    return code


def question_recipe(question: Question, runs: Path) -> dict[str, Any]:
    """Return the recipe of an evaluation, as plain data without a name.

    Raises:
        RecipeError: a checkpoint or task does not exist, or the options contradict each other.
    """
    # Find the checkpoints and label each of them.
    asked = list(dict.fromkeys(question.checkpoints))
    baseline = question.baseline or asked[0]
    places = {name: find_checkpoint(name, runs) for name in asked}
    labels = label_all(places.values())
    chosen = [p for name, p in places.items() if baseline in (name, labels[p])]
    if not chosen:
        place = find_checkpoint(baseline, runs)
        places = {baseline: place, **places}
        labels, chosen = label_all(places.values()), [place]
    # Artifacts are named by path; a transformers folder becomes a base stage of its own.
    given = {} if question.dtype is None else {"dtype": question.dtype}
    stages: dict[str, Any] = {}
    models: dict[str, str] = {}
    for place in places.values():
        if (place / MANIFEST).is_file():
            models[str(place)] = labels[place]
        else:
            stages[labels[place]] = {
                "kind": "base",
                "path": str(place),
                **given,
                "tokenizer": dict(question.tokenizer or {}),
            }
            models[labels[place]] = labels[place]
    reference = next(m for m, label in models.items() if label == labels[chosen[0]])
    stages[STAGE] = {
        "kind": "evaluate",
        "models": list(models),
        "labels": {model: label for model, label in models.items() if model != label},
        "baseline": reference,
        **given,
        "sampling": {"engine": question.engine},
        **_asked_tasks(question, runs),
    }
    return {"stages": stages}


def find_checkpoint(name: str, runs: Path) -> Path:
    """Return the place of a policy: RUN/STAGE, a folder or a hub id.

    Raises:
        ArtifactError: there is no such model.
        RecipeError: it is not a policy.
    """
    place = find_model(name, runs)
    kind = artifact_kind(place)
    if kind not in (None, "policy"):
        raise RecipeError(f"{place}: is a {kind}; expected a policy to evaluate")
    return place


def label_all(places: Iterable[Path]) -> dict[Path, str]:
    """Return a short unique label for each checkpoint: its last folder, or last two or three."""
    found = list(dict.fromkeys(places))
    for depth in (1, 2, 3):
        labels = {p: _label(p, depth) for p in found}
        if len(set(labels.values())) == len(found) and STAGE not in labels.values():
            return labels
    return {p: f"model{i}" for i, p in enumerate(found)}


def _label(place: Path, depth: int) -> str:
    parts = place.resolve().parts[-depth:]
    return re.sub(r"[^A-Za-z0-9_-]", "-", "-".join(parts)) or "model"


def _asked_tasks(question: Question, runs: Path) -> dict[str, Any]:
    """Return the evaluate stage's tasks and judge, with the options applied to the task files."""
    own = [name for name in question.tasks if not name.startswith(HARNESS_PREFIX)]
    theirs = [n.removeprefix(HARNESS_PREFIX) for n in question.tasks if n not in own]
    pairwise, scorer = _judge(question, runs)
    # The project's own tasks are written out, so that the recipe records what was evaluated.
    tasks = []
    for name in own:
        source = load_task(name)
        if source.errors:
            raise RecipeError("\n".join(source.errors))
        task = source.data
        if question.samples is not None:
            task["samples"] = question.samples
        if question.limit is not None:
            for entry in task.get("prompts") or []:
                entry["rows"] = min(question.limit, entry.get("rows") or question.limit)
        if scorer is not None:
            task["judge"] = [{"kind": "scalar", "model": scorer}]
        elif pairwise is not None:
            task.pop("judge", None)
        tasks.append(task)
    asked: dict[str, Any] = {"tasks": tasks} if tasks else {}
    if pairwise is not None:
        asked["pairwise"] = pairwise
    if theirs:
        asked["harness"] = _harness(question, theirs)
    elif question.harness:
        raise RecipeError(f"--lm-eval has no effect without a task {HARNESS_PREFIX}NAME; remove it")
    return asked


def _judge(question: Question, runs: Path) -> tuple[dict[str, Any] | None, str | None]:
    """Return the judge of pairs or the reward model that decides comparisons; both may be None."""
    name = question.judge
    if name.startswith(("http://", "https://")):
        if question.judge_model is None:
            raise RecipeError(
                f"judge {name}: no model given. Name it with --judge-model or --model"
            )
        return {"endpoint": {"url": name, "model": question.judge_model}}, None
    if question.judge_model is not None:
        raise RecipeError(
            f"model '{question.judge_model}' has no effect on judge {name}; remove it"
        )
    if name == "rule":
        return None, None
    if re.fullmatch(FUNCTION, name):
        path = placed(name, Path())
        if problem := problem_of(path) or no_judge(path):
            raise RecipeError(f"judge {name}: {problem}")
        return {"function": {"kind": "python", "path": path}}, None
    places = (Path(name), runs / name)
    place = next((p for p in places if (p / MANIFEST).is_file()), None)
    if place is not None and artifact_kind(place) == "reward_model":
        return None, str(place)
    raise RecipeError(
        f"judge {name}: expected 'rule', a reward model's RUN/STAGE, FILE.py:FUNCTION, or a URL"
    )


def _harness(question: Question, tasks: Sequence[str]) -> dict[str, Any]:
    if question.harness is None:
        raise RecipeError(
            f"task {HARNESS_PREFIX}{tasks[0]}: lm-evaluation-harness runs in a separate "
            "environment. Create it with 'python -m venv lm && lm/bin/pip install "
            "lm-eval[hf]==0.4.13' and add --lm-eval lm/bin/python"
        )
    return {
        "python": question.harness,
        "tasks": list(tasks),
        "backend": question.harness_backend,
        "include_path": question.harness_path,
        "limit": question.limit,
    }
