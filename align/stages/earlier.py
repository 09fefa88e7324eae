"""What an earlier attempt of a stage has left in its folder: all of it, or checkpoints."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.core import checkpoints
from align.core.artifacts import MANIFEST, find_damage, read_json_object, read_manifest
from align.core.errors import ArtifactError
from align.core.identity import find_difference, read_begun
from align.recipe.schema import StageSpec, TrainingStage

log = logging.getLogger(__name__)
LAYOUT = ("ranks", "zero")
"""Settings that decide where a model's states are, and change its numbers by rounding only."""


def is_finished(out: Path, identity: Mapping[str, Any]) -> bool:
    """Return whether the stage is finished with this identity and its files are unchanged."""
    if not (out / MANIFEST).is_file():
        return False
    manifest = read_manifest(out)
    made_from = manifest.get("identity") or {
        "spec_hash": manifest.get("spec_hash"),
        "inputs": identity["inputs"],
        "files": identity["files"],
    }
    difference = find_difference(made_from, identity)
    if difference is not None:
        raise ArtifactError(
            f"{out}: finished, but made from something else than the recipe has now "
            f"({difference}); use --force to run it again, or another recipe name"
        )
    damage = find_damage(out, manifest, whole=False)
    if damage:
        raise ArtifactError(f"{damage[0]}. Use --force to run the stage again")
    log.info("%s: already done, nothing to do (--force does it again)", out)
    return True


def may_reshard(spec: StageSpec) -> bool:
    """Return whether a stage may continue from checkpoints of another layout."""
    return isinstance(spec, TrainingStage) and spec.reshard


def refuse_other_checkpoints(out: Path, identity: Mapping[str, Any], *, any_layout: bool) -> None:
    """Raise ArtifactError if the folder has checkpoints of a stage with another identity."""
    kept = sorted((out / "checkpoints").glob("*-*"), reverse=True)
    if not kept:
        return
    records = ((read_json_object(path / checkpoints.STATE) or {}).get("identity") for path in kept)
    before = read_begun(out) or next((r for r in records if isinstance(r, dict)), None)
    difference = None
    if before is not None:
        difference = find_difference(before, identity, any_layout=any_layout)
    if difference is not None:
        raise ArtifactError(
            f"{out}: its checkpoints were made from something else than the recipe has now "
            f"({difference}); use --force to start over"
        )
