"""Full disks, limits and read-only folders: one line, nothing lost, and the run goes on."""

import errno
import os
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.faults.campaign import clean, hooks, recipe
from tests.faults.campaign.kills import begin, finish, prepare
from tests.faults.campaign.ledger import Failed, Fault, Place, Unclear, no_traceback

STAGES = ("base", "sft", "reward", "kto", "ppo", "grpo", "trl", "curate", "self_instruct", "sft_z2")
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def faults(*, quick: bool) -> Iterator[Fault]:
    """Yield every fault of a disk."""
    for stage in ("sft",) if quick else STAGES:
        for i in range(2 if quick else 4):
            code = ERRORS[i % len(ERRORS)]
            name = f"{errno.errorcode[code]} from an operation on"
            yield Fault(name, f"{stage} {i}", partial(_errors, stage, code), 2.0)
        for i in range(1 if quick else 2):
            yield Fault("file size limit", f"{stage} {i}", partial(_limit, stage), 2.0)
    if quick or not may_mount():
        return
    for stage in STAGES:
        for i in range(2):
            yield Fault("a full file system", f"{stage} {i}", partial(_full, stage), 2.0)
        yield Fault("no inodes left", stage, partial(_inodes, stage), 2.0)
        yield Fault("a read-only file system", stage, partial(_read_only, stage), 2.0)


def may_mount() -> bool:
    """Return whether this user may mount a tmpfs."""
    if os.geteuid() != 0:
        return False
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", folder]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            return False
        subprocess.run(["umount", folder], check=True)
    return True


def _ended(place: Place, run, *, told: str) -> None:
    """Check that a run ended by itself with exit code 1 and one line that names the reason."""
    codes = run.wait()
    said = run.said()
    run.log.unlink()
    if all(code == 0 for code in codes):
        return  # what it needed was already written
    if any(code < 0 for code in codes[:1]):
        raise Failed(f"ended with {codes}: {said[-900:]}")
    no_traceback(said)
    if told and told not in said:
        raise Unclear(f"'{told}' is not in: {said[-900:]}")


TOLD = {
    errno.ENOSPC: "no space left on",
    errno.EDQUOT: "quota is used up",
    errno.EROFS: "read-only",
    errno.EIO: "input/output error",
}


def _errors(stage: str, code: int, place: Place) -> None:
    prepare(place, stage)
    number = place.rng.randint(1, clean.num_writes(place.clean, stage))
    once = place.rng.random() < 0.25
    run = begin(place, stage, hook=partial(hooks.fail_from, number, code, once=once))
    _ended(place, run, told=TOLD[code])
    finish(place, stage)


def _limit(stage: str, place: Place) -> None:
    prepare(place, stage)
    largest = max(p.stat().st_size for p in (place.clean / recipe.RUN / stage).rglob("*.*"))
    size = place.rng.randint(100, largest)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    run = begin(place, stage, hook=limited)
    _ended(place, run, told="")
    finish(place, stage)


class Mounted:
    """A small file system on a stage's folder."""

    def __init__(self, folder: Path, options: str) -> None:
        self.folder, self.options = folder, options

    def __enter__(self) -> "Mounted":
        self.folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", self.options, "tmpfs", str(self.folder)]
        subprocess.run(command, check=True)
        return self

    def change(self, options: str) -> None:
        """Mount it again with other options."""
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True)

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", str(self.folder)], check=True)


def _used(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _full(stage: str, place: Place) -> None:
    prepare(place, stage)
    kib = place.rng.randint(4, _used(place.clean / recipe.RUN / stage) // 1024)
    with Mounted(place.folder / recipe.RUN / stage, f"size={max(kib, 4)}k") as disk:
        _ended(place, begin(place, stage), told="no space left on")
        disk.change("size=64m")
        finish(place, stage)


def _inodes(stage: str, place: Place) -> None:
    prepare(place, stage)
    files = sum(1 for _ in (place.clean / recipe.RUN / stage).rglob("*"))
    number = place.rng.randint(2, files)
    with Mounted(place.folder / recipe.RUN / stage, f"nr_inodes={number}") as disk:
        _ended(place, begin(place, stage), told="no inodes left on")
        disk.change("nr_inodes=10000")
        finish(place, stage)


def _read_only(stage: str, place: Place) -> None:
    prepare(place, stage)
    with Mounted(place.folder / recipe.RUN / stage, "ro") as disk:
        _ended(place, begin(place, stage), told="read-only")
        disk.change("rw")
        finish(place, stage)
