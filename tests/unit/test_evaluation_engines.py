"""The engines of an evaluation: one at a time, and none outlives its stage."""

import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from align.core.artifacts import Artifact
from align.recipe.schema import EvaluateStage, Recipe
from align.stages.base import StageContext
from align.stages.evaluate import answers, stage

SPEC = EvaluateStage(
    kind="evaluate",
    models=["a", "b"],
    baseline="a",
    prompts=[{"path": "x"}],
    scores=[{"kind": "regex", "pattern": "x"}],
    judge=[{"kind": "regex", "pattern": "x"}],
)


def context_of(folder: Path) -> StageContext:
    return StageContext(Recipe(name="r", stages={"e": SPEC}), "e", folder, 0)


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
    context = context_of(tmp_path)
    artifacts = {name: Artifact(Path(name), {}) for name in "ab"}
    ends = pytest.raises(RuntimeError, match="out of memory") if fails else nullcontext()
    with ends, context.resources:
        answers.sample_all(
            SPEC, artifacts, {task.name: [] for task in SPEC.all_tasks}, context=context
        )
    assert log == ["start 0", "end 0", "start 1", "end 1"]


def test_one_model_is_in_memory_at_a_time(monkeypatch, tmp_path) -> None:
    """Two and the reference would not fit where the stages before this one did."""
    before: list[Any] = []

    def load(_: Path, *, dtype: str) -> nn.Module:
        assert not any(model() for model in before), "an earlier model is still in memory"
        model = nn.Linear(1, 1)
        before.append(weakref.ref(model))
        return model

    monkeypatch.setattr(stage, "load_tuned_policy", load)
    monkeypatch.setattr(stage, "chat_format", lambda _: None)
    monkeypatch.setattr(stage, "held_out_rows", lambda *_: [])
    monkeypatch.setattr(stage, "load_reference", lambda *_: nn.Linear(1, 1))
    monkeypatch.setattr(stage, "kl_per_answer", lambda *_, **__: [])
    monkeypatch.setattr(stage, "to_records", lambda *_, **__: [])
    monkeypatch.setattr(stage, "_log_model", lambda *_, **__: None)
    names = [task.name for task in SPEC.all_tasks]
    experience: Any = SimpleNamespace(completions=[])
    found = stage._measure_all(
        SPEC,
        {name: Artifact(Path(name), {}) for name in "ab"},
        answers={name: dict.fromkeys("ab", experience) for name in names},
        rewards={name: ([], []) for name in names},
        context=context_of(tmp_path),
    )
    assert [list(models) for models in found.values()] == [["a", "b"]]
    assert len(before) == 2
