"""A job as a recipe: the settings that the API leaves open, and where the files are."""

import json
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from align.core.artifacts import MANIFEST, find_model, read_json_object, write_json_atomic
from align.core.errors import ArtifactError, RecipeError
from align.recipe.load import resolve
from align.recipe.plain import read_plain

STAGE = "train"
"""Name of the job's training stage."""
RECIPE = "recipe.yaml"
"""Name of the recipe in the job's folder; JSON is YAML."""
BASE_RATES = {"supervised": 2e-4, "dpo": 1e-5, "reinforcement": 1e-5}
"""Learning rate of a ``learning_rate_multiplier`` of 1, for LoRA."""
KINDS = {"supervised": "sft", "dpo": "dpo", "reinforcement": "grpo"}
LORA = {"method": "lora", "rank": 16, "alpha": 32.0}
MAX_LENGTH = 2048
EPOCHS = 3
MAX_BATCH = 32
GROUP = 8
PROMPTS_PER_STEP = 16
MAX_NEW_TOKENS = 256
CHECKPOINTS = 3
"""Checkpoints that a job keeps, the last one included."""
LONGEST_GAP = 200
"""Most steps between two checkpoints: what a job does again at most whose process was killed."""
DEFAULTS = {
    "learning_rate_multiplier": 1.0,
    "beta": 0.1,
    "compute_multiplier": 1.0,
    "eval_interval": 5,
    "eval_samples": 1,
}
"""What ``auto`` stands for in hyperparameters that do not depend on the data."""
GRADER = "reward_models.graders:GraderReward"


def resolved(method: str, hyperparameters: Mapping[str, Any], *, rows: int) -> dict[str, Any]:
    """Return hyperparameters with a number for each ``auto``.

    Args:
        method: supervised, dpo or reinforcement.
        hyperparameters: as requested.
        rows: of the training file.
    """
    online = method == "reinforcement"
    # OpenAI takes about 0.2 % of the examples; small files need several steps per epoch.
    batch = min(PROMPTS_PER_STEP, rows) if online else min(MAX_BATCH, max(1, round(rows / 100)))
    chosen = {**DEFAULTS, "batch_size": batch, "n_epochs": 1 if online else EPOCHS}
    found = {k: chosen[k] if v == "auto" else v for k, v in hyperparameters.items()}
    return {**found, "batch_size": min(found["batch_size"], rows)}


def job_recipe(
    *,
    name: str,
    description: str,
    base: str,
    seed: int,
    method: Mapping[str, Any],
    files: Mapping[str, Path],
    rows: int,
    integrations: list[dict[str, Any]],
    url: str,
) -> dict[str, Any]:
    """Return the recipe of a job, whose hyperparameters are numbers.

    Args:
        name: id of the job; also the name of the run.
        description: what people read on the page of the run.
        base: folder or hub id of the model.
        seed: of the job.
        method: type and settings.
        files: ``training`` and perhaps ``validation``.
        rows: of the training file.
        integrations: trackers.
        url: of this server's API, where model graders send their requests.
    """
    kind, settings = method["type"], method[method["type"]]
    chosen = settings["hyperparameters"]
    stage: dict[str, Any] = {
        "kind": KINDS[kind],
        "init": "base",
        "tuning": LORA,
        "max_length": _max_length(base),
        "optim": {
            "learning_rate": BASE_RATES[kind] * chosen["learning_rate_multiplier"],
            "warn_rate": False,
        },
    }
    if kind == "reinforcement":
        stage |= _online(settings, files, rows=rows, url=url)
        # Half of a short context is left to the prompt.
        stage["sampling"] = {"max_new_tokens": min(MAX_NEW_TOKENS, stage["max_length"] // 2)}
    else:
        stage |= _offline(kind, chosen, files, rows=rows)
    return {
        "name": name,
        "description": description,
        "seed": seed,
        "stages": {"base": {"kind": "base", "path": base}, STAGE: stage},
        **_sinks(integrations),
    }


def check_changes(changes: Sequence[str]) -> None:
    """Check the changes to jobs' recipes; a wrong one would make the first job fail.

    Args:
        changes: ``METHOD.KEY=VALUE`` texts.

    Raises:
        RecipeError: an unknown method or key, or an invalid value.
    """
    for text in changes:
        method, _, change = text.partition(".")
        key, equals, _ = change.partition("=")
        if method not in KINDS or not (key and equals):
            raise RecipeError(
                f"--set {text}: expected METHOD.KEY=VALUE with one of the methods "
                f"{', '.join(KINDS)}, such as supervised.max_length=4096"
            )
    for method in KINDS:
        asked = [text.partition(".")[2] for text in changes if text.startswith(f"{method}.")]
        if not asked:
            continue
        source = read_plain(_example(method), "job")
        try:
            resolve(source, [f"{STAGE}.{change}" for change in asked], folder=Path())
        except RecipeError as error:
            raise RecipeError(str(error).replace(f"stages.{STAGE}.", f"{method}.")) from error


def _example(method: str) -> dict[str, Any]:
    """Return the recipe of a job that uses every option; its files do not exist."""
    hyperparameters = resolved(
        method, dict.fromkeys((*DEFAULTS, "batch_size", "n_epochs"), "auto"), rows=100
    )
    return job_recipe(
        name="job",
        description="",
        base="model",
        seed=0,
        method={"type": method, method: {"hyperparameters": hyperparameters, "grader": {}}},
        files={"training": Path("training.jsonl"), "validation": Path("validation.jsonl")},
        rows=100,
        integrations=[],
        url="",
    )


def _sinks(integrations: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the recipe's block of trackers, if any."""
    if not integrations:
        return {}
    wandb = integrations[0]["wandb"]
    return {"sinks": {"wandb": True, "project": wandb["project"], "tags": wandb["tags"]}}


def _saving(steps: int, *, per_epoch: int) -> dict[str, Any]:
    """Return how often checkpoints are saved: after each epoch, and at least three times."""
    every = max(1, min(per_epoch, steps // CHECKPOINTS, LONGEST_GAP))
    return {"checkpoint_every": every, "keep_checkpoints": CHECKPOINTS}


def _offline(
    kind: str, chosen: Mapping[str, Any], files: Mapping[str, Path], *, rows: int
) -> dict[str, Any]:
    stage: dict[str, Any] = {
        "data": [{"path": str(files["training"])}],
        "epochs": float(chosen["n_epochs"]),
        "batch_size": chosen["batch_size"],
    }
    epochs = int(chosen["n_epochs"])
    steps = max(1, rows * epochs // chosen["batch_size"])
    stage |= _saving(steps, per_epoch=ceil(steps / epochs))
    if "validation" in files:
        stage |= {"heldout": [{"path": str(files["validation"])}], "eval_every": 10}
    if kind == "dpo":
        stage["beta"] = chosen["beta"]
    return stage


def _online(
    settings: Mapping[str, Any], files: Mapping[str, Path], *, rows: int, url: str
) -> dict[str, Any]:
    chosen = settings["hyperparameters"]
    args = {"grader": json.dumps(settings["grader"]), "url": url}
    reward = {"kind": "python", "path": GRADER, "args": args, "name": "grader"}
    reward["deadline_s"] = 600.0
    steps = ceil(rows * chosen["n_epochs"] / chosen["batch_size"])
    stage: dict[str, Any] = {
        "prompts": [{"path": str(files["training"])}],
        "rewards": [reward],
        "steps": steps,
        "prompts_per_step": chosen["batch_size"],
        "group_size": max(2, round(GROUP * chosen["compute_multiplier"])),
        **_saving(steps, per_epoch=ceil(steps / chosen["n_epochs"])),
    }
    if "validation" in files:
        # The API measures validation by the training grader. A recipe wants another scorer there,
        # so that it can see the grader exploited; this argument makes it one by name only.
        gold = {**reward, "args": {**args, "heldout": True}}
        stage["watch"] = {
            "every": chosen["eval_interval"],
            "prompts": [{"path": str(files["validation"])}],
            "gold": [gold],
            "samples": chosen["eval_samples"],
        }
    return stage


def _max_length(base: str) -> int:
    """Return the longest row that a model takes, at most MAX_LENGTH."""
    config = read_json_object(Path(base) / "config.json") or {}
    positions = config.get("max_position_embeddings")
    return min(MAX_LENGTH, positions) if isinstance(positions, int) else MAX_LENGTH


def write_recipe(recipe: Mapping[str, Any], path: Path) -> None:
    """Write a recipe whole."""
    write_json_atomic(path, literal(dict(recipe)))


def literal(value: object) -> Any:
    """Return plain data whose texts a recipe takes as they are.

    ``${NAME}`` would read a variable of the server's environment, and clients write some texts.
    """
    if isinstance(value, str):
        return value.replace("${", "$${")
    if isinstance(value, dict):
        return {key: literal(inner) for key, inner in value.items()}
    return [literal(inner) for inner in value] if isinstance(value, list) else value


def unescaped(text: str) -> str:
    """Return a text of a recipe as it was before ``write_recipe``."""
    return text.replace("$${", "${")


def base_place(name: str, place: str, runs: Path) -> str:
    """Return the folder or hub id of a base model.

    Raises:
        ArtifactError: there is none.
    """
    try:
        found = find_model(place, runs)
    except ArtifactError as error:
        raise ArtifactError(f"--model {name}={place}: {error}") from None
    if not found.exists():
        return str(found)
    return str((found / "model" if (found / MANIFEST).is_file() else found).resolve())
