"""Artifacts outside of a recipe that its stages name: by a folder, or as RUN/STAGE."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.core.text import suggest, unexpanded
from align.recipe.schema import references
from align.recipe.source import Key
from align.recipe.starts import read_mapping

RUNS, MANIFEST = Path("runs"), "manifest.json"


def place_of(stage: str, key: str) -> Key:
    """Return the key path of a dotted key below a stage."""
    return ("stages", stage, *(int(part) if part.isdigit() else part for part in key.split(".")))


def stages_of_runs(stages: Mapping[str, Any], runs: Path) -> dict[Key, str]:
    """Return the references RUN/STAGE to finished stages of other runs, and their folders.

    Args:
        stages: stage name to spec, None for an invalid stage.
        runs: folder of all runs.
    """
    found = {}
    for stage, spec in stages.items():
        for key, name in references(spec).items() if spec is not None else ():
            below = runs / name
            # As for a command, a path from the root, from here or from above is none below runs.
            is_path = name.startswith(("/", "./")) or ".." in Path(name).parts
            if (
                "/" in name
                and not is_path
                and not (Path(name) / MANIFEST).is_file()
                and (below / MANIFEST).is_file()
            ):
                found[place_of(stage, key)] = str(below)
    return found


def name_folder(data: dict[str, Any], key: Key, folder: str) -> None:
    """Replace the reference at a key path of a recipe's data by the folder that it means."""
    at: Any = data
    stage = data["stages"][key[1]]
    for part in key[:-1]:
        at = at[part]
    name, at[key[-1]] = at[key[-1]], folder
    # An evaluate stage names its models again.
    if key[2] == "models":
        if stage.get("baseline") == name:
            stage["baseline"] = folder
        if name in stage.get("labels", {}):
            stage["labels"][folder] = stage["labels"].pop(name)


def path_problem(
    name: str, wanted: Sequence[str], *, expected: str, fitting: Sequence[str]
) -> str | None:
    """Return why a folder is not an artifact of a wanted kind, or None if it is one."""
    folder = Path(name)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        if (folder / "config.json").is_file() or ("/" in name and not folder.exists()):
            advice = "; import a Hugging Face model with a stage 'kind: base, path: ...'"
        else:
            advice = suggest(name, fitting)
        advice = unexpanded(name) or advice
        state = (
            "a folder without manifest.json" if folder.is_dir() else "neither a stage nor a folder"
        )
        return f"'{name}' is {state}; {expected} or the folder of an artifact{advice}"
    found = read_mapping(manifest)
    if not found:
        return f"{manifest} is not a JSON mapping; run the stage that wrote it again"
    kind = found.get("kind")
    if kind not in wanted:
        return f"'{name}' is a {kind}; expected a {' or '.join(wanted)}"
    return None
