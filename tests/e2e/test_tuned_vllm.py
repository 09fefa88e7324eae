"""vLLM samples from every policy whose adapter merges: one engine takes each method in turn."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from engine_models import save_tiny, tiny_model
from tuned_stages import TUNINGS, tuning_spec

from align.models.logprobs import LogprobModel
from align.online.engine import RolloutEngine, build_engine
from align.online.weights import check_push, pushed_weights
from align.recipe.tuning_schema import UNMERGED
from align.tuning.loading import load_for_training

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
MERGED = [m for m in TUNINGS if m not in UNMERGED]
PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 10], [11]]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_model(0, tied=True), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> Iterator[RolloutEngine]:
    built = build_engine("vllm", model_dir, max_model_len=64, cache_gib=0.02)
    yield built
    built.close()


@pytest.mark.parametrize("method", MERGED)
def test_vllm_gives_the_greedy_tokens_of_the_adapted_model(engine, model_dir, method):
    model = load_for_training(model_dir, tuning_spec(method), dtype="float32").eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    engine.load_weights(pushed_weights(model), version=MERGED.index(method) + 1)
    probe = list(range(5, 25))
    with torch.no_grad():
        row = torch.tensor([probe])
        logprobs = LogprobModel(model)(row, torch.arange(20).unsqueeze(0)).logprobs[0, 1:]
    check_push(engine, probe, logprobs.tolist(), dtype="float32")
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
