"""Runs of the near tests on copies of the code, each in a fork of one process.

Most of the time of a numeric test is the import of torch and transformers. The libraries are
imported once, before the forks; the code under test is imported in each fork, from its copy.
"""

import importlib
import json
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.mutants.tables import ROOT, Mutant, mutated

FOLDERS = (
    "align",
    "reward_models",
    "launch",
    "recipes",
    "tests",
    "benchmarks",
    "docs",
    "scripts",
)
LIBRARIES = ("pytest", "hypothesis", "jaxtyping", "beartype", "deepspeed", "transformers", "peft")
TIMEOUT = 300.0
"""Seconds after which a run is ended; a guard against a mutant that does not end."""


@dataclass(frozen=True, slots=True)
class Result:
    """What the tests said of one mutant.

    Attributes:
        mutant: the mutant. test: name of the first test that failed, or empty.
        verdict: killed, survived, timeout, or broken (the tests could not be run).
        told: end of the tests' output. seconds: how long they took.
    """

    mutant: Mutant | None
    verdict: str
    test: str
    told: str
    seconds: float


def take_copy(folder: Path, *, of: Path = ROOT) -> None:
    """Copy the code, its tests and what they read; later edits of the checkout do not matter."""
    # The checkout's bytecode names the checkout's files; that of a clean run is copied with it.
    ignored = shutil.ignore_patterns("__pycache__") if of == ROOT else None
    for name in FOLDERS:
        shutil.copytree(of / name, folder / name, symlinks=True, ignore=ignored)
    for path in of.iterdir():
        if path.is_file() and path.suffix in (".toml", ".md"):
            shutil.copy2(path, folder)


def run_clean(mutants: Sequence[Mutant], folder: Path) -> Result:
    """Return the result of all tests on an unchanged copy."""
    _prepare()
    tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    pid, began = _start(folder, tests, keep_bytecode=True), time.monotonic()
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(0.05)
    return _result(None, folder, time.monotonic() - began)


def run_mutants(
    mutants: Sequence[Mutant], clean: Path, *, jobs: int, tell: Callable[[Result], None]
) -> list[Result]:
    """Return the result of each mutant, in order.

    Args:
        mutants: what to plant. clean: an unchanged copy; others are made beside it.
        jobs: mutants at the same time. tell: called when the result of one is known.
    """
    _prepare()
    free = [clean.with_name(f"job-{job}") for job in range(jobs)]
    for copy in free:
        take_copy(copy, of=clean)
    waiting, found = list(mutants), {}
    running: dict[int, tuple[Mutant, Path, float]] = {}
    while waiting or running:
        while waiting and free:
            mutant, copy = waiting.pop(0), free.pop()
            for file, text in mutated(mutant, clean).items():
                (copy / file).write_text(text, encoding="utf-8")
            running[_start(copy, mutant.tests)] = (mutant, copy, time.monotonic())
        pid, _ = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            mutant, copy, began = running.pop(pid)
            found[mutant.name] = _result(mutant, copy, time.monotonic() - began)
            tell(found[mutant.name])
            for change in mutant.changes:
                shutil.copy2(clean / change.file, copy / change.file)
            free.append(copy)
            continue
        for child, (_, _, began) in running.items():
            if time.monotonic() - began > TIMEOUT:
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.02)
    return [found[mutant.name] for mutant in mutants]


def _prepare() -> None:
    """Set what tests/conftest.py sets, then import the libraries."""
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Looking for pytest's plugins takes longer than many a test.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    logging.disable(logging.WARNING)  # what the libraries say of this machine
    for name in LIBRARIES:
        importlib.import_module(name)
    logging.disable(logging.NOTSET)
    # A mutant is killed by the first example that fails; looking for a smaller one takes minutes.
    from hypothesis import Phase, settings

    settings.register_profile("no shrinking", phases=(Phase.explicit, Phase.generate))
    settings.load_profile("no shrinking")
    assert "align" not in sys.modules, "the code under test must be imported in the forks"


def _start(folder: Path, tests: Sequence[str], *, keep_bytecode: bool = False) -> int:
    """Fork a process that runs tests in a copy, and return its id."""
    (folder / "result.json").unlink(missing_ok=True)
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        if not keep_bytecode:
            # It would be taken for that of another mutant of the same size and second.
            sys.dont_write_bytecode = True
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        _run_tests(folder, tests)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _run_tests(folder: Path, tests: Sequence[str]) -> None:
    """Run pytest in this process and write result.json."""
    import pytest

    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    # The copy stands in for the checkout, here and in processes that the tests start.
    sys.path[:] = [str(folder), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
    os.environ["PYTHONPATH"] = str(folder)
    for name in [n for n in sys.modules if n.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]
    failed: list[str] = []

    class Failures:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                failed.append(report.nodeid)

    options = ["-x", "-q", "-p", "no:cacheprovider", f"--rootdir={folder}"]
    code = pytest.main([*options, *tests], plugins=[Failures()])
    files = [
        str(module.__file__)
        for name, module in sys.modules.items()
        if name.partition(".")[0] in FOLDERS and getattr(module, "__file__", None)
    ]
    here = bool(files) and all(Path(file).is_relative_to(folder) for file in files)
    found = {"code": int(code), "failed": failed, "here": here}
    (folder / "result.json").write_text(json.dumps(found), encoding="utf-8")


def _result(mutant: Mutant | None, folder: Path, seconds: float) -> Result:
    output = folder / "output.txt"
    told = output.read_text(encoding="utf-8", errors="replace") if output.is_file() else ""
    path = folder / "result.json"
    if not path.is_file():
        verdict = "timeout" if seconds > TIMEOUT else "broken"
        return Result(mutant, verdict, "", told[-3000:], seconds)
    found = json.loads(path.read_text(encoding="utf-8"))
    failed = found["failed"][0].partition("::")[2] if found["failed"] else ""
    # 0: all passed, 1: some failed; anything else, such as an error of collection, is no verdict.
    verdict = {0: "survived", 1: "killed"}.get(found["code"], "broken")
    if not found["here"]:
        verdict = "broken"
    return Result(mutant, verdict, failed, told[-3000:], seconds)
