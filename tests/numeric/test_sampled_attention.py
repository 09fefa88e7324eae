"""What samples and scores attends as the model's configuration says: soft caps, ALiBi."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from architectures import tiny_model
from engine_models import save_tiny

from align.recipe.schema import TrlStage
from align.sampling.build import build_engine
from align.sampling.engine import EngineOptions
from align.stages.tools.chat import Chat
from align.stages.trl.trainers import load_model
from reward_models.scalar import RewardModel

PROMPTS = [[5, 9, 33, 2, 61, 7, 7, 14], [40, 3]]
MODELS: dict[str, dict[str, Any]] = {
    "gemma2": {"attn_logit_softcapping": 0.3},
    "falcon": {"alibi": True, "new_decoder_architecture": True},
}


def exact(model: Any, ids: list[int]) -> torch.Tensor:
    """Return log p of tokens 1 .. T-1 by eager attention in one row, without a cache."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[1:, None])[:, 0]


@pytest.mark.parametrize("kind", MODELS)
def test_hf_engine_samples_from_the_eager_model(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind, torch.float32, own=True, **MODELS[kind])
    folder = save_tiny(model, tmp_path)
    engine = build_engine(
        "hf", EngineOptions(folder, max_model_len=64, cache_gib=0.02, stop_token_ids=(1,))
    )
    groups = engine.generate(PROMPTS, n=2, max_new_tokens=6, temperature=1.0, seeds=[3, 4])
    for prompt, answers in zip(PROMPTS, groups, strict=True):
        scored = torch.tensor(engine.token_logprobs(prompt))
        torch.testing.assert_close(scored, exact(model, prompt), atol=1e-4, rtol=0)
        for answer in answers:
            expected = exact(model, [*prompt, *answer.token_ids])[len(prompt) - 1 :]
            torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_chat_trl_and_reward_models_attend_as_the_eager_model(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind, torch.float32, own=True, **MODELS[kind])
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        states = model.base_model(ids, use_cache=False).last_hidden_state
        logits = model(ids, use_cache=False).logits
        scorer = RewardModel(model.base_model, states.shape[-1])
        scorer.save(tmp_path / "scorer")
        loaded = RewardModel.load(tmp_path / "scorer").backbone
        saved = save_tiny(model, tmp_path / "model")
        chat = Chat(saved, temperature=0.0, max_new_tokens=4)
        spec = TrlStage(
            kind="trl", trainer="SFT", init="x", data=[{"path": "x"}], rows="sft", steps=1
        )
        torch.testing.assert_close(
            loaded(ids, use_cache=False).last_hidden_state, states, atol=1e-4, rtol=0
        )
        for other in (chat.model, load_model(saved, spec)):
            torch.testing.assert_close(other(ids).logits, logits, atol=1e-4, rtol=0)
