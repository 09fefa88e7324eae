"""Find the snapshot of exported labels that a recipe names: ``labels: NAME`` or ``labels: NAME@N``.

Worked example. ``align labels export helpful`` writes labels/helpful/0002-6f1e0c3b9a51/ with
snapshot.json and one file for each kind of rows, such as preference.jsonl. ``labels: helpful`` in a
recipe then reads that preference.jsonl in a dpo stage, and unpaired.jsonl in a kto stage.
``labels: helpful@1`` still reads the snapshot before. A snapshot never changes: its id is part of
the sha256 of snapshot.json, which has the sha256 of every other file.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.core.artifacts import file_sha256, fsync_directory, hash_tree, read_json_object
from align.core.errors import DataError
from align.data.reading.read_log import announced

FOLDER = "ALIGN_LABELS"
"""Environment variable with the folder of the snapshots; without it, ``labels``."""
RECORD = "snapshot.json"
FILES = {
    "preference": "preference.jsonl",
    "unpaired": "unpaired.jsonl",
    "sft": "sft.jsonl",
    "steps": "steps.jsonl",
}
"""File of each kind of rows that a stage may need."""
TIES_FILE = "ties.jsonl"
"""Pairs without a winner, which only a reward model with ``tie_margin`` can train on."""
ID_LENGTH = 12
_SNAPSHOT = re.compile(rf"(\d{{4,}})-([0-9a-f]{{{ID_LENGTH}}})")


def labels_folder() -> Path:
    """Return the folder that has one folder of snapshots for each labeling project."""
    return Path(os.environ.get(FOLDER) or "labels")


def snapshot_number(folder: Path) -> int:
    """Return the number of a snapshot by the name of its folder; 0 if it is none."""
    found = _SNAPSHOT.fullmatch(folder.name)
    return int(found[1]) if found else 0


def snapshots(project: str) -> list[Path]:
    """Return the folders of a project's snapshots, the oldest first."""
    found = [p for p in (labels_folder() / project).glob("*") if snapshot_number(p)]
    return sorted(found, key=snapshot_number)


def find_snapshot(labels: str) -> Path:
    """Return the folder of the snapshot that ``NAME`` (the newest) or ``NAME@N`` refers to.

    A running stage keeps the snapshot that its identity names, also if a newer one was exported
    since it started.

    Raises:
        DataError: there is no such project or snapshot, or a file in it was changed.
    """
    project, _, number = labels.partition("@")
    kept = snapshots(project)
    if not kept:
        raise DataError(
            f"labels: {project}: no snapshot in {labels_folder() / project} (from {Path.cwd()})"
            f"{_others()}. Export one with: align labels export {project}",
            code="D001",
        )
    found = [p for p in kept if snapshot_number(p) == int(number)] if number else kept
    if not found:
        listed = ", ".join(str(snapshot_number(p)) for p in kept)
        raise DataError(
            f"labels: {labels}: no snapshot {number}; {labels_folder() / project} has {listed}",
            code="D001",
        )
    read = announced()
    mine = [p for p in found if read and any(str(p / name) in read for name in _names(p))]
    folder = (mine or found)[-1]
    _verify(folder)
    return folder


def snapshot_files(labels: str) -> list[Path]:
    """Return the files with rows of the snapshot that ``labels`` refers to.

    Raises:
        DataError: as ``find_snapshot``.
    """
    folder = find_snapshot(labels)
    return [folder / name for name in _names(folder)]


def labels_file(labels: str, kind: str) -> Path:
    """Return the file of a snapshot with the rows that a stage needs.

    Args:
        labels: ``NAME`` or ``NAME@N``.
        kind: kind of rows, as for ``load_examples``; ``prompts`` takes rows of any kind.

    Raises:
        DataError: as ``find_snapshot``, or the labels give no such rows.
    """
    files = snapshot_files(labels)
    names = list(FILES.values()) if kind == "prompts" else [FILES.get(kind, "")]
    for name in names:
        for file in files:
            if file.name == name:
                return file
    has = ", ".join(file.name.partition(".")[0] for file in files) or "no rows at all"
    raise DataError(
        f"labels: {labels}: {files[0].parent if files else find_snapshot(labels)} has no {kind} "
        f"rows, only: {has}. docs/labels.md has a table of the rows that each label gives"
    )


def _names(folder: Path) -> Sequence[str]:
    """Return the names of a snapshot's files with rows, from its record."""
    return sorted(_listed(folder))


def _listed(folder: Path) -> dict[str, Any]:
    files = (read_json_object(folder / RECORD) or {}).get("files")
    return files if isinstance(files, dict) else {}


def _verify(folder: Path) -> None:
    """Raise DataError if a snapshot differs from what was exported."""
    expected = {RECORD: folder.name.partition("-")[2]}
    # The record comes first: the hashes in it count only if it is what was written.
    wrong = _first_changed(folder, expected) or _first_changed(
        folder, {name: str(entry["sha256"]) for name, entry in _listed(folder).items()}
    )
    if wrong is not None:
        state = "was changed" if wrong.is_file() else "is missing"
        raise DataError(
            f"{wrong}: {state} since the snapshot was exported. Remove {folder} and export the "
            f"labels again: align labels export {folder.parent.name}",
            code="D003",
        )


def _first_changed(folder: Path, expected: Mapping[str, str]) -> Path | None:
    for name, sha256 in expected.items():
        path = folder / name
        if not path.is_file() or not file_sha256(path).startswith(sha256):
            return path
    return None


def _others() -> str:
    """Return the projects that have snapshots, for the message about one that has none."""
    known = sorted(p.name for p in labels_folder().glob("*") if snapshots(p.name))
    return f"; there are {', '.join(known)}" if known else ""


def write_snapshot(
    project: str, rows: Mapping[str, Sequence[Mapping[str, Any]]], about: Mapping[str, Any]
) -> Path:
    """Write exported labels as a new snapshot, unless the newest one is the same.

    The same arguments give the same bytes.

    Args:
        project: name of the project.
        rows: rows by the name of their file; files without rows are not written.
        about: what else the record says about them.

    Returns:
        The folder of the snapshot.
    """
    texts = {
        name: "".join(_line(row) for row in found) for name, found in sorted(rows.items()) if found
    }
    record = json.dumps(
        {
            **about,
            "project": project,
            "files": {
                name: {"rows": text.count("\n"), "sha256": _sha256(text)}
                for name, text in texts.items()
            },
        },
        indent=2,
        sort_keys=True,
    )
    texts[RECORD] = record + "\n"
    found = snapshots(project)
    ending = f"-{_sha256(texts[RECORD])[:ID_LENGTH]}"
    if found and found[-1].name.endswith(ending):
        return found[-1]
    folder = labels_folder() / project
    folder.mkdir(parents=True, exist_ok=True)
    # Written beside its place and renamed: a snapshot is whole or does not exist.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as place:
        whole = Path(place) / "snapshot"
        whole.mkdir()
        for name, text in texts.items():
            (whole / name).write_text(text, encoding="utf-8")
            (whole / name).chmod(0o444)
        hash_tree(whole)  # flushes every file to the disk
        number = snapshot_number(found[-1]) + 1 if found else 1
        target = folder / f"{number:04}{ending}"
        whole.rename(target)
    fsync_directory(folder)
    return target


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
