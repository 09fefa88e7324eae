"""PPO's critic recomputes its activations if the stage does, and its gradients stay the same."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from align.recipe.schema import PpoStage
from align.stages.online import build_critic

sys.path.insert(0, str(Path(__file__).parent))  # the fixture's own modules


def gradients(model_dir: Path, *, checkpointing: bool) -> tuple[dict[str, Tensor], int]:
    """Give the gradients of a sum of values, and the bytes kept for them outside checkpoints."""
    spec = PpoStage(
        kind="ppo",
        init="x",
        prompts=[{"path": "x"}],
        rewards=[{"kind": "regex", "pattern": "x"}],
        steps=1,
        gradient_checkpointing=checkpointing,
    )
    context: Any = SimpleNamespace(name="ppo")  # its artifacts are for another start of the critic
    critic = build_critic(spec, model_dir, context=context, updates=1)
    assert critic is not None
    model = critic.module.train()
    torch.nn.init.ones_(model.scorer.head.weight)
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.untyped_storage().nbytes())
        return x

    ids = torch.arange(3, 43).unsqueeze(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        total = model(ids, torch.arange(40).unsqueeze(0)).square().sum()
    total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, sum(kept)


def test_checkpointing_covers_the_critic(model_dir: Path) -> None:
    plain, all_bytes = gradients(model_dir, checkpointing=False)
    recomputed, few_bytes = gradients(model_dir, checkpointing=True)
    assert few_bytes < all_bytes / 2
    assert plain.keys() == recomputed.keys()
    assert any(gradient.abs().max() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)
