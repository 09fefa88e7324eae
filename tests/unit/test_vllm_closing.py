"""How a vLLM engine is closed: awake, engine before workers, with or without a finalizer."""

import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from align.core import distributed
from align.sampling import vllm
from align.sampling.vllm import VllmEngine


class FakeLLM:
    """Stand in for vLLM's LLM, part of a reference cycle like the real one."""

    def __init__(self, said: list[str], client: SimpleNamespace) -> None:
        self.said = said
        self.llm_engine = SimpleNamespace(engine_core=client, owner=self)

    def wake_up(self, tags: list[str]) -> None:
        self.said.append("awake " + " ".join(tags))

    def sleep(self, level: int) -> None:
        self.said.append(f"asleep {level}")


@pytest.mark.parametrize("owns_world", [True, False])
def test_engine_wakes_and_goes_before_its_workers(monkeypatch, owns_world):
    parallel = pytest.importorskip("vllm.distributed.parallel_state")
    monkeypatch.setattr(parallel, "destroy_model_parallel", lambda: said.append("groups"))
    said: list[str] = []

    def shutdown(name: str) -> SimpleNamespace:
        return SimpleNamespace(
            shutdown=lambda: said.append(f"{name}, engine {'gone' if llm() is None else 'alive'}")
        )

    core = shutdown("core")
    core.model_executor, core.scheduler = shutdown("workers"), shutdown("scheduler")
    # vLLM 0.25.1 has no client._finalizer.
    engine = object.__new__(VllmEngine)
    engine._llm = FakeLLM(said, SimpleNamespace(engine_core=core))
    engine._asleep, engine._on_cpu, engine._owns_world = vllm.ASLEEP, True, owns_world
    llm = weakref.ref(engine._llm)
    engine.close()
    rest = ["core, engine gone"]
    if not owns_world:
        rest = ["workers, engine gone", "scheduler, engine gone", "groups"]
    assert said == ["awake weights kv_cache scheduling", *rest]


@pytest.mark.parametrize(
    ("pushed", "adapter", "levels"),
    [(True, False, [2, 2]), (False, False, [1, 2]), (True, True, [1, 1])],
)
def test_an_engine_wakes_part_by_part(monkeypatch, pushed, adapter, levels):
    """Weights, then the push, then the cache; an engine that is always pushed keeps no weights."""
    said: list[str] = []
    engine = object.__new__(VllmEngine)
    engine._llm = FakeLLM(said, SimpleNamespace(engine_core=None))
    engine._on_cpu, engine.takes_adapter, engine.version = False, adapter, 0
    engine.options = SimpleNamespace(always_pushed=pushed)  # type: ignore[assignment]
    loaded = SimpleNamespace(missing=(), stale=(), held={"w": 1})
    monkeypatch.setattr(engine, "_load", lambda _tensors: said.append("push") or loaded)
    monkeypatch.setattr(engine, "_forget_prefixes", lambda _where: engine._wake())
    engine._sleep()
    kept = [engine.version]
    with engine.awake():
        assert engine.load_weights([], version=3) == {"w": 1}
        engine._wake()
    kept.append(engine.version)
    first, second = (f"asleep {level}" for level in levels)
    assert said == [first, "awake weights", "push", "awake kv_cache scheduling", second]
    assert kept == [
        vllm.NO_WEIGHTS if level == 2 else v for level, v in zip(levels, (0, 3), strict=True)
    ]


def test_the_trainer_keeps_its_threads_when_an_engine_starts(monkeypatch):
    """vLLM sets one thread and then replaces the function, so that nobody sets another number."""
    used = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[0])
    setter = used.__setitem__
    monkeypatch.setattr(torch, "set_num_threads", lambda number: setter(0, number))
    ours = torch.set_num_threads
    with vllm._keep_threads():
        torch.set_num_threads(1)
        torch.set_num_threads = lambda _number: None
    assert torch.set_num_threads is ours
    assert used == [8]


def test_only_rank_0_keeps_the_weights_that_are_saved(monkeypatch):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from align.stages.saving import whole_state

    config = Qwen2Config(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    assert "model.norm.weight" in whole_state(model, Path("x"))[0]
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert whole_state(model, Path("x")) == ({}, None)
