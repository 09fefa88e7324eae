"""Compare a recipe with its run folder: which stages are done, changed, half-done or to do."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from align.core.artifacts import (
    MANIFEST,
    file_sha256,
    find_damage,
    has_manifest,
    read_manifest,
    spec_hash,
)
from align.core.errors import ArtifactError
from align.core.identity import changed_file, read_begun
from align.data.reading.provenance import named_files
from align.recipe.load import RECIPE_FILE
from align.recipe.schema import Recipe

Status = Literal["done", "changed", "half-done", "to do"]


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """Status of one stage before a run."""

    name: str
    kind: str
    status: Status
    reason: str


def plan(recipe: Recipe, run_dir: Path | str) -> list[PlannedStage]:
    """Compare a recipe with the contents of its run folder.

    Args:
        recipe: a valid recipe.
        run_dir: ``runs/<recipe name>``; it need not exist.

    Returns:
        One entry per stage in the recipe's order. ``done``: finished with these settings and
        inputs. ``changed``: finished or started with different ones. ``half-done``: started with
        these."""
    hashes: dict[str, str] = {}
    planned = []
    for name, spec in recipe.stages.items():
        inputs = recipe.inputs(name)
        hashes[name] = spec_hash(
            spec.settings(),
            seed=recipe.seed_of(name),
            inputs={key: hashes.get(ref, ref) for key, ref in inputs.items()},
        )
        status, reason = _status(recipe, name, run_dir=Path(run_dir), hashes=hashes)
        planned.append(PlannedStage(name, spec.kind, status, reason))
    return planned


def _status(
    recipe: Recipe, name: str, *, run_dir: Path, hashes: Mapping[str, str]
) -> tuple[Status, str]:
    folder = run_dir / name
    if not has_manifest(folder):
        return _unfinished_status(recipe, name, folder=folder, expected_hash=hashes[name])
    try:
        manifest = read_manifest(folder)
    except ArtifactError as e:
        return "changed", str(e)
    if manifest.get("spec_hash") != hashes[name]:
        return "changed", _what_changed(recipe, name, manifest, hashes=hashes)
    # The same settings do not suffice: inputs, files and the artifact itself may have changed.
    for key, upstream in recipe.inputs(name).items():
        recorded = manifest.get("inputs", {}).get(key, {}).get("manifest_sha256")
        folder_read = recipe.folder_of(upstream, run_dir)
        problem = input_problem(folder_read, recorded) if recorded else None
        if problem is not None:
            return "changed", f"its input {upstream} {problem}"
    difference = _changed_file(recipe, name, manifest)
    if difference is not None:
        return "changed", difference
    damage = find_damage(folder, manifest, whole=False)
    if damage:
        return "changed", damage[0]
    return "done", f"in {manifest.get('seconds', 0):.0f} s"


def input_problem(folder: Path, recorded: str) -> str | None:
    """Return what happened to an artifact since a stage has read it; None if nothing.

    Args:
        folder: the artifact.
        recorded: sha256 of its manifest at that time.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return "is not finished any more" if folder.is_dir() else "was removed"
    if file_sha256(path) != recorded:
        return "was created again since"
    return None


def _changed_file(recipe: Recipe, name: str, manifest: Mapping[str, Any]) -> str | None:
    """Return how the files that the stage has read differ from their current state."""
    identity = manifest.get("identity")
    if isinstance(identity, dict) and isinstance(identity.get("files"), dict):
        present = named_files(recipe.stages[name], recipe.inputs(name))
        return changed_file(identity["files"], present)
    for entry in manifest.get("data", []):
        path = Path(str(entry.get("path", "")))
        if path.is_file() and entry.get("sha256") not in (None, file_sha256(path)):
            return f"the data in {path} changed since"
    return None


def _unfinished_status(
    recipe: Recipe, name: str, *, folder: Path, expected_hash: str
) -> tuple[Status, str]:
    begun, before = read_begun(folder), _recipe_before(folder)
    if begun is None and before is None:
        if (folder / RECIPE_FILE).is_file():
            return "changed", f"started, but {folder / RECIPE_FILE} cannot be read"
        return "to do", ""
    # Without checkpoints nothing would be lost, so changed settings simply start over.
    kept = sorted((folder / "checkpoints").glob("*"))
    different = _changes_since(recipe, name, before)
    if begun is not None:
        if begun["spec_hash"] == expected_hash:
            different = []
            if isinstance(begun.get("files"), dict):
                present = named_files(recipe.stages[name], recipe.inputs(name))
                file = changed_file(begun["files"], present)
                different += [] if file is None else [file]
        else:
            different = different or ["different settings or inputs"]
    if different and not kept:
        return "to do", "an earlier attempt with different settings saved no checkpoint"
    if different:
        return "changed", "started with " + "; ".join(different[:3])
    return "half-done", f"{len(kept)} checkpoints" if kept else "no checkpoint yet"


def _recipe_before(folder: Path) -> dict[str, Any] | None:
    """Return the recipe that an unfinished stage recorded; None if it cannot be read."""
    import yaml

    try:
        found = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None


def _changes_since(recipe: Recipe, name: str, before: Mapping[str, Any] | None) -> list[str]:
    """Return the settings that differ from those with which an unfinished stage was started."""
    try:
        old = (before or {})["stages"][name]
        old_seed = (before or {})["seed"] if old.get("seed") is None else old["seed"]
    except (LookupError, TypeError, AttributeError):
        return []
    different = _differences(old, recipe.stages[name].model_dump(mode="json"))
    if old_seed != recipe.seed_of(name):
        different.append(f"seed {old_seed} -> {recipe.seed_of(name)}")
    return different


def _what_changed(
    recipe: Recipe, name: str, manifest: Mapping[str, Any], *, hashes: Mapping[str, str]
) -> str:
    new = recipe.stages[name].model_dump(mode="json")
    different = _differences(manifest.get("spec", {}), new)
    seed = recipe.seed_of(name)
    if manifest.get("seed") != seed:
        different.append(f"seed {manifest.get('seed')} -> {seed}")
    recorded = manifest.get("inputs", {})
    for key, reference in recipe.inputs(name).items():
        old = recorded.get(key, {}).get("spec_hash")
        if reference in hashes and old != hashes[reference]:
            different.append(f"its input {reference} changed")
    rest = f" and {len(different) - 3} more" if len(different) > 3 else ""
    return "; ".join(dict.fromkeys(different[:3])) + rest or "its settings or inputs changed"


def _differences(old: object, new: object, key: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*new, *(n for n in old if n not in new)]
        return [
            line
            for n in names
            for line in _differences(old.get(n), new.get(n), f"{key}.{n}" if key else n)
        ]
    if old == new:
        return []
    if isinstance(old, dict | list) or isinstance(new, dict | list):
        return [key]
    return [f"{key} {old} -> {new}"]
