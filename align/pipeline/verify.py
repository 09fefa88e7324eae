"""Verify a run: the files of its finished stages, the artifacts that they read, what is missing."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.core.artifacts import MANIFEST, find_damage, read_json_object, read_manifest
from align.core.errors import ArtifactError
from align.pipeline.planning import input_problem


def verify_run(run_dir: Path) -> tuple[list[str], bool]:
    """Return a line for each finished stage or each of its problems, and whether all is whole.

    Raises:
        ArtifactError: no stage of the run is finished.
    """
    stages = sorted(path.parent for path in run_dir.glob(f"*/{MANIFEST}"))
    if not stages:
        raise ArtifactError(f"{run_dir}: no finished stage in it; expected runs/<recipe>")
    lines, whole = [], True
    for stage in stages:
        try:
            manifest = read_manifest(stage)
        except ArtifactError as e:
            manifest, problems = {}, [str(e)]
        else:
            problems = [*find_damage(stage, manifest, whole=True), *_inputs(stage, manifest)]
        ok = f"{len(manifest.get('files', {}))} files are as the stage left them"
        lines += problems or [f"{stage}: {ok}"]
        whole = whole and not problems
    # The summary is written once every stage is finished, and removed before one runs again.
    finished = (read_json_object(run_dir / "summary.json") or {}).get("stages")
    present = {stage.name for stage in stages}
    gone = [n for n in finished if n not in present] if isinstance(finished, dict) else []
    lines += [f"{run_dir / name}: was finished, but its manifest is gone" for name in gone]
    return lines, whole and not gone


def _inputs(stage: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problems of the artifacts that a finished stage has read."""
    if stage.name.endswith(".old"):  # kept while its successor, and theirs, are in the making
        return
    for entry in manifest.get("inputs", {}).values():
        reference, recorded = entry.get("path"), entry.get("manifest_sha256")
        if not isinstance(reference, str) or not isinstance(recorded, str):
            continue
        # A path is relative to the folder of `align run`, which may have been another one.
        is_stage = "/" not in reference
        folder = stage.parent / reference if is_stage else Path(reference)
        problem = input_problem(folder, recorded)
        if problem is not None and (is_stage or (folder / MANIFEST).is_file()):
            yield f"{stage}: its input {reference} {problem}"
