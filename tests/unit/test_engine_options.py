"""What vLLM is started with: memory by arithmetic, running responses, and the cache's dtype."""

from pathlib import Path

import pytest
import torch

from align.core import distributed
from align.core.errors import TrainingError
from align.sampling import memory
from align.sampling.engine import EngineOptions
from align.sampling.memory import engine_share
from align.sampling.vllm_start import platform_options

GIB = 2**30


def options(**given) -> EngineOptions:
    plain = {
        "model_dir": Path("m"),
        "dtype": "bfloat16",
        "max_model_len": 512,
        "seed": 0,
        "memory_frac": None,
        "cache_gib": 0.5,
        "stop_token_ids": (),
    }
    return EngineOptions(**(plain | given))


@pytest.fixture
def gpu(monkeypatch):
    """Give a function that sets what a GPU says of its free and its whole memory, in GiB."""

    def set_memory(free: float, total: float) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * GIB), int(total * GIB)))

    return set_memory


def test_an_engine_takes_nine_tenths_of_what_the_stage_leaves(gpu):
    gpu(78.0, 80.0)
    # 78 free - 20 held - 1 for buffers = 57; 0.9 x 57 = 51.3 of 80.
    assert engine_share(20 * GIB) == pytest.approx(51.3 / 80)
    # A stage whose needs are unknown keeps half: 0.9 x (39 - 1) = 34.2 of 80.
    assert engine_share(None) == pytest.approx(34.2 / 80)
    # Other processes have 40 of them: 0.9 x (38 - 20 - 1) = 15.3.
    gpu(38.0, 80.0)
    assert engine_share(20 * GIB) == pytest.approx(15.3 / 80)


def test_a_tenth_of_a_gpu_always_stays_free(gpu):
    gpu(10_000.0, 10_000.0)
    assert engine_share(0.0) == pytest.approx(0.9 * 9_999 / 10_000)
    gpu(80.0, 80.0)
    assert engine_share(-100 * GIB) == memory.LARGEST


def test_the_fullest_gpu_decides(gpu, monkeypatch):
    gpu(78.0, 80.0)
    # Another rank would take 0.25.
    monkeypatch.setattr(distributed, "global_max", lambda value: max(value, -0.25))
    assert engine_share(20 * GIB) == 0.25
    gpu(30.0, 80.0)
    assert engine_share(20 * GIB) == pytest.approx(0.9 * 9 / 80)


def test_no_memory_left_is_one_line_with_the_numbers(gpu):
    gpu(20.0, 80.0)
    with pytest.raises(TrainingError) as caught:
        engine_share(19.5 * GIB)
    said = str(caught.value)
    assert "20.0 of 80.0 GiB are free" in said
    assert "19.5 GiB" in said
    assert "sampling.memory_frac" in said
    assert "\n" not in said


def test_a_share_in_the_recipe_is_not_computed(gpu):
    found = platform_options(options(memory_frac=0.4, held_bytes=9e99), on_cpu=False)
    assert found == {"gpu_memory_utilization": 0.4, "enable_sleep_mode": True}
    gpu(78.0, 80.0)
    found = platform_options(options(held_bytes=20 * GIB), on_cpu=False)
    assert found["gpu_memory_utilization"] == pytest.approx(51.3 / 80)


def test_on_the_cpu_the_size_of_the_cache_counts():
    found = platform_options(options(memory_frac=0.4, cache_gib=2.0), on_cpu=True)
    assert found["kv_cache_memory_bytes"] == 2**31
    assert "gpu_memory_utilization" not in found
    assert found["max_num_seqs"] == 256


@pytest.mark.parametrize("on_cpu", [True, False])
def test_limits_of_the_recipe_reach_the_engine(on_cpu):
    given = options(memory_frac=0.3, max_num_seqs=12, cache_dtype="fp8")
    found = platform_options(given, on_cpu=on_cpu)
    assert found["max_num_seqs"] == 12
    assert found["kv_cache_dtype"] == "fp8"
    assert "kv_cache_dtype" not in platform_options(options(memory_frac=0.3), on_cpu=on_cpu)


def test_more_responses_than_tokens_in_a_step_are_not_asked_for():
    """vLLM refuses fewer tokens than responses."""
    found = platform_options(options(max_num_seqs=9000), on_cpu=True)
    assert found["max_num_batched_tokens"] == 9000
