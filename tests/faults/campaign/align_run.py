"""`align run` in a fork: its stages are forks too, so that a whole run costs no imports."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.faults.campaign import forked


class ForkedStage:
    """Stand in for ``StageProcess``: the stage is a fork of `align run` and not a new Python."""

    def __init__(
        self, argv: Sequence[str], *, env: Mapping[str, str], log: Path, module: str
    ) -> None:
        self.folder = log.parent
        self.log_start = log.stat().st_size if log.exists() else 0
        words = list(argv)[argv.index(module) + 1 :]
        ranks = 2 if "deepspeed.launcher.runner" in argv else 1

        def body() -> None:
            from align.stages.base import main

            sys.argv = ["align.stages", *words]
            main()

        self._run = forked.start(
            body, Path.cwd(), ranks=ranks, environment=dict(env), log=str(log.resolve())
        )
        self._code: int | None = None

    def wait(self, timeout_s: float) -> int | None:
        """Return the worst exit code of the ranks, or None while one of them is at work."""
        del timeout_s
        if self._code is None:
            self._code = next((code for code in self._run.wait() if code), 0)
        return self._code

    def ask_to_stop(self) -> None:
        """Do nothing: no signal comes to such a run."""

    def kill(self) -> None:
        """Do nothing: it has ended."""

    def close(self) -> None:
        """Do nothing: it has ended."""


def align(folder: Path, *words: str) -> tuple[int, str]:
    """Run an ``align`` command in a workplace; return its exit code and what it said."""

    def body() -> None:
        from align.cli import app
        from align.pipeline import running

        replaced: Any = ForkedStage
        running.StageProcess = replaced
        os.environ["COLUMNS"] = "1000"  # paths in messages stay whole
        sys.argv = ["align", *words]
        app()

    run = forked.start(body, folder, log="said-align.txt")
    (code,) = run.wait()
    said = run.said()
    run.log.unlink()
    return code, said


def run_stage(folder: Path, stage: str, *words: str) -> tuple[int, str]:
    """Run ``align run`` for one stage of a workplace."""
    return align(folder, "run", "recipe.yaml", "--runs", ".", "--only", stage, *words)
