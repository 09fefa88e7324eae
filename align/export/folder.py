"""The output folder of an export: written aside, renamed when verified, replaced only if ours."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.core.artifacts import hash_tree, is_unchanged, read_json_object, write_json_atomic
from align.core.errors import ArtifactError

RECORD = "export.json"
"""The record of an export, written last: its source, format, files and measured differences."""
_FORMAT = "align-export"


def is_export(folder: Path) -> bool:
    """Return whether ``align export`` wrote a folder."""
    return (read_json_object(folder / RECORD) or {}).get("written_by") == _FORMAT


@contextlib.contextmanager
def new_folder(out: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes ``out`` if the block ends without an error.

    Raises:
        ArtifactError: ``out`` exists, and ``force`` is off, or another program wrote it, or files
            in it were added or changed since; or it contains the current folder.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ArtifactError(f"{out}: exists and is not a folder. Choose another output folder")
    # An empty folder is replaced too: the shell would be left in one that no longer exists.
    if Path.cwd().is_relative_to(out.resolve()):
        raise ArtifactError(f"{out}: contains the current folder. Choose another output folder")
    occupied = out.is_dir() and any(out.iterdir())
    if occupied and not is_export(out):
        raise ArtifactError(
            f"{out}: exists, and align export did not write it (no {RECORD}). Nothing was changed. "
            "Choose another output folder"
        )
    if occupied and not force:
        raise ArtifactError(f"{out}: already contains an export. Use --force to replace it")
    if occupied:
        _refuse_loss(out, added_files(out), "files that align export did not write")
        _refuse_loss(out, edited_files(out), "files that were changed since the export")
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.partial")
    # Left by an export that was killed; nothing else uses this name.
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        if out.is_dir():
            shutil.rmtree(out)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _refuse_loss(out: Path, files: list[str], what: str) -> None:
    if files:
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        raise ArtifactError(
            f"{out}: contains {what}: {', '.join(files[:3])}{more}. Nothing was changed. Move them "
            "out of the folder, or choose another output folder"
        )


def write_record(folder: Path, about: dict[str, Any]) -> None:
    """Write the record of an export with the size and sha256 of every file."""
    files = hash_tree(folder, leave_out=(RECORD,))
    kept = {name: {k: entry[k] for k in ("bytes", "sha256")} for name, entry in files.items()}
    write_json_atomic(folder / RECORD, {"written_by": _FORMAT, **about, "files": kept})


def changed_files(folder: Path) -> list[str]:
    """Return the differences between an exported folder and its record, one line each."""
    record = read_json_object(folder / RECORD)
    if record is None or record.get("written_by") != _FORMAT:
        return [f"{RECORD}: missing or unreadable, so align export did not finish this folder"]
    files: dict[str, Any] = record.get("files", {})
    told = [f"{name}: missing" for name in sorted(files) if not (folder / name).is_file()]
    told += [f"{name}: not part of the export" for name in added_files(folder)]
    return told + [f"{name}: changed" for name in edited_files(folder)]


def edited_files(folder: Path) -> list[str]:
    """Return the names of the files whose content is no longer that of the folder's record."""
    files = (read_json_object(folder / RECORD) or {}).get("files") or {}
    there = [name for name in sorted(files) if (folder / name).is_file()]
    return [name for name in there if not is_unchanged(folder / name, files[name])]


def added_files(folder: Path) -> list[str]:
    """Return the names of what an exported folder contains beside the files of its record."""
    known = {RECORD, *((read_json_object(folder / RECORD) or {}).get("files") or {})}
    found = (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    return sorted({p.relative_to(folder).as_posix() for p in found} - known)
