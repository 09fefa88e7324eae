"""vLLM samples from every policy whose adapter merges, and from a LoRA that it serves beside."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from engine_models import save_tiny, tiny_model
from test_tuning_stages import alone, first_metrics
from tuned_stages import TUNINGS, make_base, run_stage, tuning_spec

from align.core.errors import TrainingError
from align.models.logprobs import LogprobModel
from align.recipe.schema.tuning import METHODS
from align.sampling.build import build_engine
from align.sampling.engine import EngineOptions, RolloutEngine
from align.sampling.push import (
    check_answers,
    measured_rounding,
    probe_logprobs,
    push,
    pushed_weights,
)
from align.tuning.loading import load_for_training

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
MERGED = [m for m in TUNINGS if METHODS[m].merges]
PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 10], [11]]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_model(0, tied=True), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> Iterator[RolloutEngine]:
    built = build_engine("vllm", EngineOptions(model_dir, max_model_len=64, cache_gib=0.02))
    yield built
    built.close()


def disturb(model, seed: int) -> None:
    """Move what is trained away from where it stands."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("method", MERGED)
def test_vllm_gives_the_greedy_tokens_of_the_adapted_model(engine, model_dir, method):
    model = load_for_training(model_dir, tuning_spec(method), dtype="float32").eval()
    disturb(model, 5)
    push(engine, pushed_weights(model), version=MERGED.index(method) + 1)
    assert_answers_of(model, engine)


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_vllm_serves_each_pushed_adapter_beside_the_weights(model_dir, method):
    tuning = tuning_spec(method)
    built = build_engine(
        "vllm",
        EngineOptions(model_dir, max_model_len=64, cache_gib=0.02, tuning=tuning, push="adapter"),
    )
    model = load_for_training(model_dir, tuning, dtype="float32").eval()
    assert_answers_of(model, built)  # before any push: the weights of model_dir
    for version in (1, 2, 3):
        disturb(model, version)  # the same prompts, whose prefixes the engine has cached
        pushed = dict(pushed_weights(model, adapter_alone=True))
        assert all(".lora_" in name for name in pushed)
        proof = push(built, iter(pushed.items()), version=version)
        assert (proof.same, proof.unplaced) == (len(pushed), ())
        assert_answers_of(model, built)
    astray = {name.replace("layers.1", "layers.7"): x for name, x in pushed.items()}
    with pytest.raises(TrainingError, match=r"7 missing \(model\.layers\.7\."):
        push(built, iter(astray.items()), version=4)
    built.close()


def test_grpo_samples_from_the_adapter_that_it_trains(tmp_path):
    with alone.world_of_one():
        folder = make_base(tmp_path)
        sampling = {"engine": "vllm", "push": "adapter", "max_new_tokens": 6, "cache_gib": 0.02}
        found = run_stage(
            folder, "grpo", {"method": "lora", "rank": 4}, name="g", sampling=sampling
        )
    assert found.manifest["metrics"]["engine/vllm"] == 1.0
    assert abs(found.manifest["metrics"]["kl/sampler"]) < 1e-4
    assert first_metrics(found)["policy/grad_norm"] > 0.0


def assert_answers_of(model, engine: RolloutEngine) -> None:
    probe = list(range(5, 25))
    trainer = LogprobModel(model)
    logprobs = probe_logprobs(trainer, probe)
    check_answers(
        engine, probe, logprobs=logprobs, rounding=measured_rounding(trainer, probe, logprobs)
    )
    groups = engine.generate(PROMPTS, n=1, max_new_tokens=10, temperature=0.0, stop_token_ids=())
    for prompt, (answer,) in zip(PROMPTS, groups, strict=True):
        assert list(answer.token_ids) == greedy(model, prompt, 10)


@torch.no_grad()
def greedy(model, prompt: list[int], num: int) -> list[int]:
    """Take the most likely token of a plain forward pass, again and again."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation("eager")
    ids = list(prompt)
    for _ in range(num):
        logits = base(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]
