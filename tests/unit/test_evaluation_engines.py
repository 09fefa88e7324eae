"""The engines of an evaluation: one at a time, and none outlives its stage."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.core.artifacts import Artifact
from align.recipe.schema import EvaluateStage, Recipe
from align.stages.base import StageContext
from align.stages.evaluate import answers


class Engine:
    """Record in ``log`` when an engine starts and ends."""

    name = "fake"

    def __init__(self, log: list[str]) -> None:
        self.log, self.number = log, sum(x.startswith("start") for x in log)
        log.append(f"start {self.number}")

    def awake(self) -> Any:
        return nullcontext()

    def close(self) -> None:
        self.log.append(f"end {self.number}")


@pytest.mark.parametrize("fails", [False, True])
def test_engines_end_one_by_one_and_with_the_stage(fails: bool, monkeypatch, tmp_path) -> None:
    def ask(engine: Engine, *_: Any, **__: Any) -> Any:
        if fails and engine.number == 1:
            raise RuntimeError("out of memory")
        return SimpleNamespace(completions=[])

    log: list[str] = []
    monkeypatch.setattr(answers, "chat_format", lambda _: None)
    monkeypatch.setattr(answers, "same_tokens", lambda *_, **__: None)
    monkeypatch.setattr(answers, "start_engine", lambda *_, context: Engine(log))
    monkeypatch.setattr(answers, "_config", lambda artifact: artifact.path)
    monkeypatch.setattr(answers, "_ask", ask)
    spec = EvaluateStage(
        kind="evaluate",
        models=["a", "b"],
        baseline="a",
        prompts=[{"path": "x"}],
        scores=[{"kind": "regex", "pattern": "x"}],
        judge=[{"kind": "regex", "pattern": "x"}],
    )
    context = StageContext(Recipe(name="r", stages={"e": spec}), "e", tmp_path, 0)
    artifacts = {name: Artifact(Path(name), {}) for name in "ab"}
    ends = pytest.raises(RuntimeError, match="out of memory") if fails else nullcontext()
    with ends, context.resources:
        answers.sample_all(
            spec, artifacts, {task.name: [] for task in spec.all_tasks}, context=context
        )
    assert log == ["start 0", "end 0", "start 1", "end 1"]
