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

    def wake_up(self) -> None:
        self.said.append("awake")


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
    engine._asleep, engine._on_cpu, engine._owns_world = True, True, owns_world
    llm = weakref.ref(engine._llm)
    engine.close()
    rest = ["core, engine gone"]
    if not owns_world:
        rest = ["workers, engine gone", "scheduler, engine gone", "groups"]
    assert said == ["awake", *rest]


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
