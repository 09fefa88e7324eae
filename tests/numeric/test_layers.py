"""Frozen, thawed and slower layers against AdamW by hand; the slanted triangle by numbers."""

import logging
import math
import sys
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from engine_models import tiny_model

from align.core.errors import TrainingError
from align.core.types import TokenRow
from align.models.loading import load_policy
from align.models.logprobs import LogprobModel
from align.recipe.schema import LayersSpec, OptimSpec, TuningSpec, ZeroSpec
from align.stages.sft import collate, sft_loss
from align.training.layers import plan_layers
from align.training.learner import Learner, learning_rate
from align.tuning.export import full_weights
from align.tuning.merging import adapter_parameters
from align.tuning.wrap import add_tuner

ROWS = [
    TokenRow(tuple(3 + (7 * r * t + t) % 60 for t in range(n)), tuple(t > 2 for t in range(n)))
    for r, n in enumerate((9, 4, 17))
]
OPTIM = OptimSpec(
    learning_rate=5e-3,
    schedule="constant",
    warmup_frac=0.0,
    weight_decay=0.1,
    max_grad_norm=0.3,
    eps=1e-4,
)
STEPS = 6
LAYERS = LayersSpec(unfreeze={"every_steps": 2}, rate_decay=0.5)
# Two layers; the final norm counts with the top one. (first step, share of the rate)
BY_HAND = {
    "layers.1.": (0, 1.0),
    "model.norm.": (0, 1.0),
    "layers.0.": (2, 0.5),
    "embed": (4, 0.25),
}


def learner_of(model_dir: Path, layers: LayersSpec, stage: int = 0, offload: str = "none"):
    model = load_policy(model_dir, dtype="float32")
    learner = Learner(
        LogprobModel(model),
        optim=OPTIM,
        zero=ZeroSpec(stage=stage, offload=offload),
        dtype="float32",
        total_steps=STEPS,
        layers=layers,
    )
    return model, learner


def by_hand() -> tuple[dict[str, Tensor], list[float]]:
    """Do it in float64: a frozen tensor has no gradient, and Adam begins when it is thawed."""
    model = tiny_model(1, tied=True).double().train()
    parameters = dict(model.named_parameters())
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p), 0) for n, p in parameters.items()}
    norms = []
    for step in range(STEPS):
        total, count = 0.0, 0
        for row in ROWS:
            logprobs = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
            for t in range(3, len(row.input_ids)):
                total, count = total - logprobs[t - 1, row.input_ids[t]], count + 1
        plan = {n: next(v for k, v in BY_HAND.items() if k in n) for n in parameters}
        live = [n for n in parameters if step >= plan[n][0]]
        found = torch.autograd.grad(total / count, [parameters[n] for n in live])
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in found)))
        for name, g in zip(live, found, strict=True):
            p, rate = parameters[name], 5e-3 * plan[name][1]
            g = g * min(1.0, 0.3 / norms[-1])
            m, v, done = moments[name]
            m, v, done = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g, done + 1
            moments[name] = (m, v, done)
            m, v = m / (1 - 0.9**done), v / (1 - 0.999**done)
            with torch.no_grad():
                p.mul_(1 - rate * (0.1 if p.ndim == 2 else 0.0)).sub_(rate * m / (v.sqrt() + 1e-4))
    return {n: p.detach() for n, p in parameters.items()}, norms


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradual_unfreezing_equals_adamw_by_hand(model_dir: Path, stage: int) -> None:
    weights, norms = by_hand()
    assert min(norms) > 0.6  # clipping is at work, and by the live gradients alone
    model, learner = learner_of(model_dir, LAYERS, stage)
    start = {n: p.clone() for n, p in full_weights(model)}
    found_norms = []
    for step in range(STEPS):
        found_norms.append(learner.step([collate(ROWS, ROWS)], sft_loss)["grad_norm"])
        for name, p in full_weights(model):
            first = next(v[0] for k, v in BY_HAND.items() if k in name)
            assert torch.equal(p, start[name]) == (step < first), (step, name)
    assert found_norms == pytest.approx(norms, rel=1e-5)
    for name, p in full_weights(model):
        torch.testing.assert_close(p.double(), weights[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_first_layers_and_embeddings_stay_frozen(model_dir: Path, stage: int) -> None:
    model, learner = learner_of(
        model_dir, LayersSpec(freeze_first=1, freeze_embeddings=True), stage
    )
    start = {n: p.clone() for n, p in full_weights(model)}
    for _ in range(2):
        learner.step([collate(ROWS, ROWS)], sft_loss)
    for name, p in full_weights(model):
        frozen = "layers.0." in name or "embed" in name
        assert torch.equal(p, start[name]) == frozen, name


NAMES = [f"model.layers.{i}.mlp.weight" for i in range(4)]


@pytest.mark.parametrize(
    ("spec", "expected"),  # shares of embeddings, layers 0 to 3 at steps 0, 5, 10, 15, 20
    [
        (
            {"unfreeze": {"every_steps": 5}, "rate_decay": 0.5},
            [
                (0, 0, 0, 0, 1),
                (0, 0, 0, 0.5, 1),
                (0, 0, 0.25, 0.5, 1),
                (0, 0.125, 0.25, 0.5, 1),
                (0.0625, 0.125, 0.25, 0.5, 1),
            ],
        ),
        (
            {"unfreeze": {"every_steps": 5}, "freeze_first": 2},
            [(0, 0, 0, 0, 1), (0, 0, 0, 1, 1), (1, 0, 0, 1, 1), (1, 0, 0, 1, 1), (1, 0, 0, 1, 1)],
        ),
        ({"freeze_embeddings": True, "freeze_first": 1}, [(0, 0, 1, 1, 1)] * 5),
    ],
)
def test_plan_gives_the_share_of_each_layer(spec: dict, expected: list) -> None:
    plan = plan_layers(LayersSpec.model_validate(spec), NAMES, total_steps=30)
    found = [tuple(plan.share(d, step) for d in range(-1, 4)) for step in range(0, 25, 5)]
    assert found == expected


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("model.layers.2.self_attn.q_proj.weight", 2),
        ("base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight", 1),
        ("transformer.h.0.attn.c_attn.weight", 0),
        ("bert.encoder.layer.3.output.dense.bias", 3),
        ("model.embed_tokens.weight", -1),
        ("bert.embeddings.word_embeddings.weight", -1),
        ("lm_head.weight", 3),
        ("model.norm.weight", 3),
        ("prompt_encoder.default.embedding.weight", 3),
    ],
)
def test_depth_is_read_off_the_name(name: str, depth: int) -> None:
    assert plan_layers(LayersSpec(freeze_first=1), NAMES, total_steps=9).depth(name) == depth


def test_what_cannot_be_frozen_is_refused(model_dir: Path) -> None:
    with pytest.raises(TrainingError, match="freeze_first: 5, but the model has 4 layers"):
        plan_layers(LayersSpec(freeze_first=5), NAMES, total_steps=9)
    with pytest.raises(TrainingError, match="no parameter of the model belongs to a numbered"):
        plan_layers(LayersSpec(freeze_first=1), ["a.weight"], total_steps=9)
    with pytest.raises(ValueError, match="the block changes nothing"):
        LayersSpec()


def test_thaws_after_the_end_are_named(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    # setup_logging, called by another test of this process, cuts the way to the root logger.
    monkeypatch.setattr(logging.getLogger("align"), "propagate", True)
    plan_layers(LayersSpec(unfreeze={"every_steps": 5}), NAMES, total_steps=10)
    assert "leave the embeddings, layer 0, layer 1 frozen to the end" in caplog.text


def test_slanted_triangle_rises_to_the_peak_and_falls_to_the_floor() -> None:
    """T = 20, cut = floor(0.25 * 20) = 5, floor 1/32: share + (1 - share) / 32 by hand."""
    optim = OptimSpec(learning_rate=32.0, schedule="slanted", cut_frac=0.25)
    rates = [learning_rate(optim, step, 20) for step in range(21)]
    assert rates[:6] == pytest.approx([1 + 31 * k / 5 for k in range(6)])
    assert rates[5:] == pytest.approx([1 + 31 * (15 - k) / 15 for k in range(16)])


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_adapters_of_frozen_layers_are_still_saved_and_pushed(method: str) -> None:
    tuning = TypeAdapter(TuningSpec).validate_python({"method": method})
    model = add_tuner(tiny_model(1, tied=True), tuning)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    for name, p in model.named_parameters():
        if "layers.0." in name:
            p.requires_grad_(False)
    assert [name for name, _ in adapter_parameters(model)] == trained
