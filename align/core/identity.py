"""The identity of a stage, recorded before it starts: its settings, inputs and files."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.core.artifacts import (
    FAILURE,
    LOCK,
    MANIFEST,
    SCRATCH,
    cut_links,
    is_unchanged,
    read_json_object,
    write_json_atomic,
)
from align.core.errors import ArtifactError

BEGUN = "begun.json"
RECIPE = "recipe.yaml"
GONE = (
    "removed while the stage was running. Nothing more was written; run the same command again to "
    "start over"
)
"""What is said of a stage's folder that is gone."""
_OWN_LEFTOVERS = {LOCK, FAILURE, "log.txt", f"{BEGUN}.tmp", f"{RECIPE}.tmp"}
"""Files of a stage that ended before it recorded its identity."""


def find_difference(
    old: Mapping[str, Any], new: Mapping[str, Any], *, any_layout: bool = False
) -> str | None:
    """Return the first difference between two identities of a stage; None if they are the same.

    An identity has ``spec_hash``, ``layout_free`` (the same hash without ranks and ZeRO),
    ``inputs`` (key -> hashes of the artifact), ``files`` (path -> record of each file that the
    stage reads) and ``hub`` (id -> commit of the data set).

    Args:
        old, new: the identities.
        any_layout: whether the number of ranks and ZeRO's settings may differ.
    """
    key = "layout_free" if any_layout and "layout_free" in old else "spec_hash"
    if old.get(key) != new[key]:
        return "different settings, seed or inputs"
    # The spec is the same; compare the inputs and then the files.
    old_inputs, old_files = (_mapping(old, key) for key in ("inputs", "files"))
    for key, entry in new["inputs"].items():
        if old_inputs.get(key) != entry:
            return f"its input {entry['path']} was created again"
    for path, record in new["files"].items():
        if path not in old_files:
            return f"{path} is new"
        if _mapping(old_files, path).get("sha256") != record["sha256"]:
            return f"{path} has changed"
    gone = next((path for path in old_files if path not in new["files"]), None)
    if gone is not None:
        return f"{gone} is gone"
    # Data sets of the hub; a machine without network may not know the revision.
    old_hub = _mapping(old, "hub")
    for name, revision in new.get("hub", {}).items():
        if name in old_hub and old_hub[name] != revision:
            before = str(old_hub[name])[:12]
            return f"{name} of the hub is at revision {revision[:12]}, it was {before}"
    return None


def layout(found: Mapping[str, int]) -> str:
    """Return the number of ranks and the ZeRO stages of a checkpoint's engines in words."""
    stages = sorted({stage for name, stage in found.items() if name != "ranks"})
    ranks = f"{found['ranks']} rank{'s' if found['ranks'] > 1 else ''}"
    return f"{ranks} under ZeRO-{'/'.join(map(str, stages))}" if stages else ranks


def changed_file(files: Mapping[str, Any], present: Mapping[str, Path]) -> str | None:
    """Return how the files that a stage has read differ from those it would read now.

    Args:
        files: path -> record, as stored.
        present: the paths that the recipe names now.
    """
    added = next((path for path in present if path not in files), None)
    for path, record in files.items():
        if path not in present and added is not None and Path(path).is_file():
            break  # it is there, but another one is read now, such as a newer snapshot of labels
        if path not in present:
            return f"{path}, which it read, is gone"
        if not isinstance(record, dict) or not is_unchanged(present[path], record):
            return f"{path} changed since"
    return None if added is None else f"{added} is new"


def record_begun(folder: Path, identity: Mapping[str, Any]) -> None:
    """Record a stage's identity in its folder, where it starts to write.

    Weights of an earlier attempt may be hard links, which must not be written into: they go. So do
    its temporary folders, which would become part of the artifact.
    """
    cut_links(folder)
    for left in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(left)
    write_json_atomic(folder / BEGUN, identity)


def read_begun(folder: Path) -> dict[str, Any] | None:
    """Return the identity in a stage's begun.json; None if it is missing or unreadable."""
    found = read_json_object(folder / BEGUN)
    return found if found is not None and isinstance(found.get("spec_hash"), str) else None


def _is_stage_folder(folder: Path) -> bool:
    """Return True if a folder is empty, missing, or was written by a stage of this suite."""
    if not folder.exists():
        return True
    if not folder.is_dir() or folder.is_symlink():
        return False
    if read_begun(folder) is not None or _has(folder / MANIFEST, "spec_hash"):
        return True
    # A stage that stopped before its record has only its recipe, or only files of its start.
    return _is_resolved_recipe(folder) or {p.name for p in folder.iterdir()} <= _OWN_LEFTOVERS


def check_is_stage_folder(folder: Path) -> None:
    """Raise if a folder to be written or removed was not created by this suite.

    Raises:
        ArtifactError: the folder contains something else.
    """
    if not _is_stage_folder(folder):
        raise ArtifactError(
            f"{folder}: exists, but no stage of align wrote it (no {BEGUN} or {MANIFEST} in it). "
            "Nothing was changed. Move it, or use another stage name or run folder."
        )


def _has(path: Path, key: str) -> bool:
    return key in (read_json_object(path) or {})


def _is_resolved_recipe(folder: Path) -> bool:
    """Return True if recipe.yaml is the resolved recipe of a stage with this folder's name."""
    import yaml

    try:
        found = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
        name = folder.name.removesuffix(".old")
        return isinstance(found["stages"][name], dict) and {"sinks", "description"} <= found.keys()
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False
    except (LookupError, TypeError, AttributeError):  # not the shape of a recipe
        return False


def _mapping(found: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = found.get(key)
    return part if isinstance(part, dict) else {}


def plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of an identity as JSON reads it back."""
    return json.loads(json.dumps(identity))
