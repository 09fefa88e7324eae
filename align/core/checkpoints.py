"""Checkpoints of a running stage: written under a temporary name, hashed, renamed, and verified.

A checkpoint is a folder ``step-00000042`` with one DeepSpeed checkpoint per engine, one RNG file
per rank, and ``checkpoint.json``, which is written last. This record contains the identity of the
stage that saved it, the hash of every file, and a hash of itself.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from align.core import distributed
from align.core.artifacts import (
    file_record,
    file_sha256,
    fsync_directory,
    hash_tree,
    is_file_record,
    read_json_object,
    write_json_atomic,
)
from align.core.errors import ArtifactError, Preempted
from align.core.identity import GONE, find_difference, layout, plain
from align.core.lock import refuse_if_taken
from align.core.resharding import load_resharded, saved_stage
from align.core.rng import rng_state, set_rng_state
from align.core.storage import MIB, write_patiently

log = logging.getLogger(__name__)
STATE = "checkpoint.json"
AUTO_S = (600.0, 1800.0)
"""Shortest and longest time in seconds between two checkpoints of ``auto``."""
AUTO_COST = 30.0
"""``auto`` waits at least this many times as long as saving took: about 3 % of the time."""
CLOCK = time.monotonic
_identity: dict[str, Any] | None = None
_any_layout = False
_resharded: list[dict[str, Any]] = []


def belong_to(identity: Mapping[str, Any] | None, *, any_layout: bool = False) -> None:
    """Set the identity of the stage that this process runs.

    Checkpoints are saved with it, and those of other stages are skipped. Without an identity (a
    tool or a test that inspects a folder) nothing is compared.

    Args:
        identity: of the stage; None for no stage.
        any_layout: also load what other numbers of ranks and other ZeRO stages have saved.
    """
    global _identity, _any_layout
    _identity = None if identity is None else plain(identity)
    _any_layout = any_layout
    _resharded.clear()


def resharded() -> list[dict[str, Any]]:
    """Return the changes of ranks and ZeRO stages in this stage's history: step, old and new."""
    return list(_resharded)


def identity() -> dict[str, Any] | None:
    """Return the identity of the stage that this process runs; None outside a stage."""
    return _identity


class CheckpointTimer:
    """Decides after which steps a checkpoint is saved: by number, or by time for ``auto``.

    ``auto`` saves every 10 minutes, and less often, up to every 30, if saving takes longer than
    20 s. When a checkpoint is saved has no effect on the training.
    """

    def __init__(self, every: int | Literal["auto"]) -> None:
        self._every = every
        self._saved_at, self._took = CLOCK(), 0.0

    def due(self, step: int) -> bool:
        """Return whether to save after ``step`` steps; every rank must call this."""
        if isinstance(self._every, int):
            return self._every > 0 and step % self._every == 0
        shortest, longest = AUTO_S
        wait = min(max(shortest, AUTO_COST * self._took), longest)
        # The clocks of the ranks differ, so rank 0 decides.
        is_due = distributed.rank() == 0 and CLOCK() - self._saved_at >= wait
        return distributed.global_max(float(is_due)) > 0.0

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure the block that saves a checkpoint."""
        began = CLOCK()
        yield
        self._saved_at = CLOCK()
        self._took = self._saved_at - began

    def after(self, step: int, *, last: int, save: Callable[[int], object]) -> None:
        """Save a checkpoint if it is time, or if a signal stops the stage; every rank calls this.

        Args:
            step: number of steps done. last: number of all steps. save: saves the checkpoint of
                a number of steps.

        Raises:
            Preempted: a signal stops the stage, and steps are left.
        """
        stop = distributed.stop_requested()
        # The same on every rank, so that all of them or none ask due(), which may be a collective.
        if stop or self.due(step):
            with self.saving():
                save(step)
        if stop and step < last:
            raise Preempted(f"stopped by a signal after step {step}. Run again to resume")


def save_checkpoint(
    directory: Path, step: int, *, engines: Mapping[str, Any], state: Mapping[str, Any], keep: int
) -> Path:
    """Save engines (model, optimizer), every rank's RNG and ``state`` after ``step`` steps.

    Args:
        directory: the stage's checkpoints folder.
        step: number of completed optimizer (or rollout) steps.
        engines: name -> DeepSpeed engine.
        state: JSON values of the stage itself; data positions are functions of the step.
        keep: number of newest checkpoints to keep; older ones are removed afterwards.
    """
    final = directory / f"step-{step:08d}"
    temporary = directory / f"step-{step:08d}.tmp"
    # All ranks write into a temporary folder, which rank 0 renames when it is complete.
    distributed.on_first_rank(lambda: _begin_patiently(temporary, list(engines)))
    # Every rank has its own random stream, so each saves it.
    written = [temporary / f"rng-{distributed.rank()}.pt"]
    _save_patiently(rng_state(), written[0])
    for name, engine in engines.items():
        # A collective call: under ZeRO each rank writes its own shard.
        with patient(engine, temporary) as files:
            engine.save_checkpoint(str(temporary), tag=name, save_latest=False)
        written += files
    # Each rank reads back and flushes what it has written, all at the same time.
    own = {path.relative_to(temporary).as_posix(): file_record(path, sync=True) for path in written}
    hashed = {
        name: record for part in distributed.gather_objects(own) for name, record in part.items()
    }
    if distributed.rank() == 0:
        remove(final)
        record = {"step": step, "world_size": distributed.world_size(), "state": dict(state)}
        if _resharded:
            record["resharded"] = resharded()
        write_patiently(
            lambda: write_record(temporary, STATE, record, hashed=hashed),
            folder=temporary,
            needed=MIB,
            stop=distributed.was_asked,
        )
        temporary.rename(final)
        fsync_directory(directory)
        # Only this stage's own checkpoints are removed, never those of another stage.
        for old in _own(directory)[:-keep]:
            # After the new one is complete: at any moment there is one to resume from.
            shutil.rmtree(old)
    # No rank continues, or exits, before the checkpoint is complete.
    distributed.barrier()
    return final


def _begin_patiently(temporary: Path, engines: Sequence[str]) -> None:
    write_patiently(
        lambda: _begin(temporary, engines),
        folder=temporary,
        needed=MIB,
        stop=distributed.was_asked,
    )


def _begin(temporary: Path, engines: Sequence[str]) -> None:
    """Create an empty folder, but not that of a stage which someone removed.

    What killed savings have left is removed: with ``auto`` or after a signal, the step at which
    one was killed may never be saved again.

    The engines' folders are created too: DeepSpeed would ignore the error of a full disk here and
    fail later with another one.

    Raises:
        ArtifactError: the stage's folder is gone, or belongs to another process.
    """
    check_stage_is_ours(temporary.parents[1])
    for left in temporary.parent.glob("step-*.tmp"):
        remove(left)
    temporary.mkdir(parents=True)
    for name in engines:
        (temporary / name).mkdir()


def check_stage_is_ours(stage: Path) -> None:
    """Raise ArtifactError if the folder of this stage is gone or belongs to another process."""
    if not stage.is_dir():
        raise ArtifactError(f"{stage}: {GONE}")
    refuse_if_taken(stage)


def check_out_is_ours(out: Path) -> None:
    """Raise ArtifactError if the stage that saves weights below ``out`` may no longer do so.

    Args:
        out: folder of the stage, or of one step in its ``best/``.
    """
    check_stage_is_ours(out.parents[1] if out.parent.name == "best" else out)


@contextmanager
def patient(engine: Any, folder: Path) -> Iterator[list[Path]]:
    """Make DeepSpeed's engine wait while the disk is full; give the files that this rank writes.

    The wait is inside each file's writing: the other ranks are at DeepSpeed's own barriers.
    """
    writer, written = engine.checkpoint_engine, []
    save = writer.save

    def patient_save(state_dict: object, path: str) -> None:
        written.append(Path(path))
        write_patiently(
            lambda: _or_remove(Path(path), lambda: save(state_dict, path)),
            folder=folder,
            needed=tensor_bytes(state_dict),
            stop=distributed.was_asked,
        )

    # An attribute of the instance hides the method of its class, and deleting it shows that again.
    writer.save = patient_save
    try:
        yield written
    finally:
        del writer.save


def _save_patiently(state: object, path: Path) -> None:
    write_patiently(
        lambda: _or_remove(path, lambda: torch.save(state, path)),
        folder=path.parent,
        needed=tensor_bytes(state),
        stop=distributed.was_asked,
    )


def _or_remove(path: Path, write: Callable[[], None]) -> None:
    """Write a file; a part of it that did not fit does not stay on the full disk."""
    try:
        write()
    except Exception:
        path.unlink(missing_ok=True)
        raise


def save_weights(write: Callable[[], None], state: Mapping[str, torch.Tensor], out: Path) -> None:
    """Write the weights ``state`` below ``out`` on rank 0; wait for space on a full disk.

    Raises:
        ArtifactError: the stage's folder is gone, or belongs to another process.
    """
    if distributed.rank() == 0:
        check_out_is_ours(out)
        needed = tensor_bytes(state)
        write_patiently(write, folder=out, needed=needed, stop=distributed.was_asked)


def tensor_bytes(value: object) -> int:
    """Return the size of all tensors in nested mappings and lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def write_record(
    folder: Path,
    name: str,
    record: Mapping[str, Any],
    *,
    hashed: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Complete a checkpoint: flush and hash its files, then write its record.

    Args:
        folder: the checkpoint. name: of the file with the record. record: what it says besides.
        hashed: records of files that are flushed and hashed already.
    """
    full = plain({**record, "identity": _identity, "files": hash_tree(folder, hashed=hashed)})
    write_json_atomic(folder / name, {**full, "record_sha256": _record_hash(full)})


def _record_hash(record: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != "record_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def remove(path: Path) -> None:
    """Remove a folder, or a file or link with this name; do nothing if there is neither."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the newest undamaged checkpoint of this stage: all file sizes and hashes match.
    Damaged or foreign checkpoints are logged and skipped. Every rank gets the same result.
    """
    # Rank 0 says which there are: on a shared disk ranks could see different checkpoints.
    kept = sorted(directory.glob("step-????????"), reverse=True)
    for path in distributed.broadcast_object(kept):
        found, problem = distributed.broadcast_object(_read_record(path, STATE))
        if problem is None:
            # Each rank reads a part of the files, all at the same time.
            names = sorted(found["files"])[distributed.rank() :: distributed.world_size()]
            parts = distributed.gather_objects(_damaged_file(path, found, names))
            problem = next((p for p in parts if p is not None), None) or _foreign(found)
        if problem is None:
            return path
        log.warning("%s: %s; trying the previous one", path, problem)
    return None


def load_checkpoint(path: Path, engines: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Restore engines and this rank's RNG; return the step and the stage's own state.

    Raises:
        ArtifactError: the checkpoint cannot be loaded, or is of another number of ranks or another
            ZeRO stage without ``belong_to(any_layout=True)``.
    """
    record = json.loads((path / STATE).read_text(encoding="utf-8"))
    old = {"ranks": record["world_size"]} | {f"zero/{n}": saved_stage(path / n) for n in engines}
    new = {"ranks": distributed.world_size()}
    new |= {f"zero/{n}": engine.zero_optimization_stage() for n, engine in engines.items()}
    if old != new and not _any_layout:
        # ZeRO shards belong to their ranks, and each rank has its own random state.
        raise ArtifactError(
            f"{path}: saved by {layout(old)}, resumed with {layout(new)}. Start the same number "
            "of ranks, set reshard: true to continue with the same numbers up to rounding, or use "
            "--force."
        )
    _resharded[:] = record.get("resharded", [])
    for name, engine in engines.items():
        if old != new:
            load_resharded(path / name, engine)
            continue
        loaded, _ = engine.load_checkpoint(str(path), tag=name)
        if loaded is None:
            raise ArtifactError(f"{path}: DeepSpeed could not load engine '{name}'. Use --force.")
    if old != new:
        _resharded.append({"step": record["step"], "old": old, "new": new})
        log.warning(
            "%s: saved by %s, continued by %s. The training is the same up to rounding, not bit "
            "by bit, and dropout draws other masks",
            path,
            layout(old),
            layout(new),
        )
    own = path / f"rng-{distributed.rank()}.pt"
    if old == new or own.is_file():
        set_rng_state(torch.load(own, weights_only=True))
    return record["step"], record["state"]


def _own(directory: Path) -> list[Path]:
    """Return the checkpoints that this stage saved, oldest first."""
    return [p for p in sorted(directory.glob("step-????????")) if is_own(p)]


def is_own(path: Path, *, record: str = STATE) -> bool:
    """Return True if this stage saved a checkpoint, by the record in it."""
    found = read_json_object(path / record)
    return (path / record).is_file() and _foreign(found or {}) is None


def damage(path: Path, *, record: str = STATE) -> str | None:
    """Return why a checkpoint cannot be used; None if it can.

    Args:
        path: the checkpoint.
        record: its file with the hashes.
    """
    found, problem = _read_record(path, record)
    return problem or _damaged_file(path, found, sorted(found["files"])) or _foreign(found)


def _read_record(path: Path, record: str) -> tuple[dict[str, Any], str | None]:
    """Return a checkpoint's record, and why it cannot be used; None if it can."""
    found = read_json_object(path / record) or {}
    return found, _damaged_record(path, found, record)


def _damaged_record(path: Path, found: Mapping[str, Any], record: str) -> str | None:
    if not found:
        return f"damaged ({record} is missing or no record)"
    if found.get("record_sha256") != _record_hash(found):
        return f"damaged ({record} differs from its own hash)"
    files = found.get("files")
    if not isinstance(files, dict) or not files or not all(map(is_file_record, files.values())):
        return f"damaged ({record} lists no files)"
    if "step" in found and path.name != f"step-{found['step']:08d}":
        return f"damaged (its name does not say step {found['step']})"
    return None


def _damaged_file(path: Path, found: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return how one of these files differs from the record; None if none does."""
    for name in names:
        file, entry = path / name, found["files"][name]
        try:
            if not file.is_file():
                return f"damaged ({name} is missing)"
            is_same = file.stat().st_size == entry["bytes"] and file_sha256(file) == entry["sha256"]
        except OSError as error:  # an older checkpoint may be on a part of the disk that is whole
            return f"damaged ({name} cannot be read: {error.strerror})"
        if not is_same:
            return f"damaged ({name} differs from its recorded hash)"
    return None


def _foreign(record: Mapping[str, Any]) -> str | None:
    if _identity is None:
        return None
    identity = record.get("identity")
    if not isinstance(identity, dict):
        return "of another, unknown stage"
    difference = find_difference(identity, _identity, any_layout=_any_layout)
    return None if difference is None else f"of another stage or run ({difference})"
