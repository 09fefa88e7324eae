"""vLLM on the CPU with a limit on running responses, and with a key-value cache in 8-bit floats."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parent))
from engine_models import exact_logprobs, save_tiny, tiny_model

from align.core.errors import TrainingError
from align.models.logprobs import LogprobModel
from align.sampling.build import build_engine
from align.sampling.engine import EngineOptions, RolloutEngine
from align.sampling.push import check_answers, measured_rounding, probe_logprobs
from align.sampling.push import push as proven_push
from align.tuning.export import full_weights
from align.tuning.loading import load_tuned_policy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
PROBE = [(7 * i + 3) % 61 + 2 for i in range(40)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_model(0, tied=True), tmp_path_factory.mktemp("model"))


class RoundedCache(DynamicCache):
    """A cache of transformers that keeps 8 bits of a number: the definition, by another library.

    vLLM's kernels for CPUs cut the mantissa off after its three bits, where a GPU rounds.
    """

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(map(cut, super().update(*args, **kwargs)))  # type: ignore[return-value]


def cut(x: torch.Tensor) -> torch.Tensor:
    """Return float32 numbers with the sign, the exponent and three bits of the mantissa."""
    return (x.view(torch.int32) & ~((1 << 20) - 1)).view(torch.float32)


@torch.no_grad()
def rounded_logprobs(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Return log-probabilities of tokens 1 .. T-1 with keys and values rounded to 8 bits."""
    row = torch.tensor([ids])
    logits = model(input_ids=row, past_key_values=RoundedCache(), use_cache=True).logits[0, :-1]
    return logits.double().log_softmax(-1).gather(-1, row[0, 1:, None])[:, 0]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def engine(model_dir: Path, dtype: str) -> Iterator[RolloutEngine]:
    if not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()):
        pytest.skip("vLLM's CPU attention needs AVX-512 for 8-bit caches")
    built = build_engine(
        "vllm",
        EngineOptions(model_dir, dtype=dtype, max_model_len=128, cache_gib=0.02, cache_dtype="fp8"),
    )
    yield built
    built.close()


def test_keys_and_values_are_kept_in_8_bits(engine: RolloutEngine, dtype: str):
    found = torch.tensor(engine.token_logprobs(PROBE), dtype=torch.float64)
    model = tiny_model(0, tied=True)
    exact = torch.tensor(exact_logprobs(model, PROBE[:1], PROBE[1:]), dtype=torch.float64)
    wanted = rounded_logprobs(model, PROBE)
    effect = float((wanted - exact).abs().mean())
    gap = float((found - wanted).abs().mean())
    # In bfloat16 other values are rounded as well, before and after.
    assert gap < (0.05 if dtype == "float32" else 0.7) * effect, (gap, effect)


def test_the_proof_accepts_it_and_still_sees_other_weights(
    engine: RolloutEngine, model_dir: Path, dtype: str
):
    trainer = LogprobModel(load_tuned_policy(model_dir, dtype=dtype)).eval()
    logprobs = probe_logprobs(trainer, PROBE)
    assert engine.cache_dtype == torch.float8_e4m3fn
    rounding = measured_rounding(trainer, PROBE, logprobs, cache_dtype=engine.cache_dtype)
    check_answers(engine, PROBE, logprobs=logprobs, rounding=rounding)
    # Judged by the rounding of the weights' dtype alone, the cache in float32 would be an error.
    plain = measured_rounding(trainer, PROBE, logprobs)
    assert float(rounding.mean()) > 2.0 * float(plain.mean())
    if dtype == "float32":
        with pytest.raises(TrainingError, match="different log-probabilities"):
            check_answers(engine, PROBE, logprobs=logprobs, rounding=plain)
    proven_push(engine, full_weights(tiny_model(1, tied=True)), version=1)
    with pytest.raises(TrainingError, match="different log-probabilities"):
        check_answers(engine, PROBE, logprobs=logprobs, rounding=rounding)
    proven_push(engine, full_weights(tiny_model(0, tied=True)), version=2)
    check_answers(engine, PROBE, logprobs=logprobs, rounding=rounding)


def test_responses_beyond_the_limit_wait(model_dir: Path):
    prompts = [[3 + i, 4, 5] for i in range(7)]
    answers = []
    for limit in (None, 2):
        built = build_engine(
            "vllm", EngineOptions(model_dir, max_model_len=64, cache_gib=0.02, max_num_seqs=limit)
        )
        running: list[int] = []
        scheduler = built._llm.llm_engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
        schedule = scheduler.schedule

        def watched(*args: Any, _running=running, _scheduler=scheduler, _do=schedule) -> Any:
            found = _do(*args)
            _running.append(len(_scheduler.running))
            return found

        scheduler.schedule = watched
        groups = built.generate(prompts, n=1, max_new_tokens=8, temperature=0.0)
        answers.append([group[0].token_ids for group in groups])
        built.close()
        assert max(running) == (limit or 7)
    assert answers[0] == answers[1]
