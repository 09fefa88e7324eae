"""What a tuning block says reaches the model: trained numbers counted by hand, scale, dropout."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn
from transformers import StableLmConfig, StableLmForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from engine_models import save_tiny, tiny_model

from align.core.errors import RecipeError
from align.models.loading import load_policy
from align.models.logprobs import LogprobModel
from align.recipe.schema import TuningSpec
from align.recipe.schema.tuning import LoreftTuning
from align.tuning.export import full_weights
from align.tuning.files import num_trained
from align.tuning.loading import load_for_training
from align.tuning.wrap import add_tuner

# Two layers of width 64, keys and values 32 wide, inner layer 96: inputs and outputs of each.
LINEAR = {
    "q": (64, 64),
    "k": (64, 32),
    "v": (64, 32),
    "o": (64, 64),
    "gate": (64, 96),
    "up": (64, 96),
    "down": (96, 64),
}
OUTPUTS = sum(out for _, out in LINEAR.values())
LORA = sum(4 * (a + b) for a, b in LINEAR.values())
BLOCK = 32 * 31 // 2  # free numbers of a rotation in 32 dimensions


def tuned(method: str, **keys: Any) -> Any:
    spec = TypeAdapter(TuningSpec).validate_python({"method": method, **keys})
    return add_tuner(tiny_model(1, tied=True), spec)


@pytest.mark.parametrize(
    ("method", "keys", "expected"),
    [
        ("head", {}, 0),
        ("lora", {"rank": 4}, 2 * LORA),
        ("lora", {"rank": 4, "targets": ["q_proj", "layers.1.mlp.up_proj"]}, 2 * 4 * 128 + 4 * 160),
        ("rslora", {"rank": 4}, 2 * LORA),
        ("pissa", {"rank": 4}, 2 * LORA),
        ("dora", {"rank": 4}, 2 * (LORA + OUTPUTS)),
        ("ia3", {}, 2 * (32 + 32 + 96)),
        ("oft", {"block_size": 32}, 2 * BLOCK * sum(a // 32 for a, _ in LINEAR.values())),
        ("vera", {"rank": 32}, 2 * (7 * 32 + OUTPUTS)),
        ("bottleneck", {"size": 8}, 2 * 2 * (64 * 8 + 8 + 8 * 64 + 64)),
        ("prefix", {"virtual_tokens": 3, "hidden": 16}, 3 * 32 + 33 * 16 + 17 * 2 * 2 * 32),
        ("prefix", {"virtual_tokens": 3}, 3 * 32 + 33 * 64 + 65 * 2 * 2 * 32),
        ("prompt", {"virtual_tokens": 3}, 3 * 64),
        ("ptuning", {"virtual_tokens": 3, "hidden": 16}, 3 * 64 + 65 * 16 + 17 * 16 + 17 * 64),
        ("loreft", {"rank": 4}, 2 * (2 * 64 * 4 + 4)),
        ("loreft", {"rank": 4, "layers": [1]}, 2 * 64 * 4 + 4),
    ],
)
def test_as_many_numbers_train_as_the_method_has(method: str, keys: dict, expected: int) -> None:
    assert num_trained(tuned(method, **keys))[0] == expected


@pytest.mark.parametrize(
    ("method", "scale"),
    [("lora", 8 / 4), ("rslora", 8 / 4**0.5)],
)
def test_update_of_a_weight_is_scaled_by_alpha_and_rank(method: str, scale: float) -> None:
    model = tuned(method, rank=4, alpha=8.0)
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_base_model().get_submodule(name)
    nn.init.normal_(layer.lora_B["default"].weight)
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    before = dict(tiny_model(1, tied=True).named_parameters())[f"{name}.weight"]
    found = dict(full_weights(model))[f"{name}.weight"]
    torch.testing.assert_close(found - before, scale * update, atol=1e-5, rtol=1e-4)


def test_dropout_of_an_adapter_acts_in_training_only() -> None:
    ids = torch.tensor([[5, 9, 17, 33, 2]])
    for method in ("lora", "rslora", "dora"):
        model = tuned(method, rank=4, dropout=0.5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        with torch.no_grad():
            first, second = (model.train()(ids).logits for _ in range(2))
            assert not torch.equal(first, second)
            assert torch.equal(model.eval()(ids).logits, model(ids).logits)


def test_prompt_begins_with_the_embeddings_of_real_tokens() -> None:
    model = tuned("prompt", virtual_tokens=3)
    table = model.get_input_embeddings().weight
    for row in model.embeddings():
        assert (table == row).all(1).any()


def test_dropout_of_a_llama_is_that_of_its_attention(tmp_path: Path) -> None:
    """keep.dropout on an architecture without a dropout layer is not without effect."""
    source = save_tiny(tiny_model(1, tied=True), tmp_path / "model")
    spec = TypeAdapter(TuningSpec).validate_python({"method": "bottleneck"})
    model: Any = load_for_training(source, spec, dtype="float32", dropout=0.3)
    found = [m.attention_dropout for m in model.modules() if hasattr(m, "attention_dropout")]
    assert found == [0.3, 0.3]
    plain = load_policy(source, dtype="float32")
    assert all(getattr(m, "attention_dropout", 0.0) == 0.0 for m in plain.modules())


def test_qlora_holds_doubly_quantized_normal_floats(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    source = save_tiny(tiny_model(1, tied=True), tmp_path / "model")
    spec = TypeAdapter(TuningSpec).validate_python({"method": "qlora", "rank": 4, "alpha": 8.0})
    model: Any = load_for_training(source, spec, dtype="float32")
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    assert len(states) == 2 * len(LINEAR)
    assert all(s.quant_type == "nf4" and s.nested for s in states)
    assert num_trained(model)[0] == 2 * LORA
    layer = model.get_base_model().get_submodule("model.layers.0.mlp.up_proj")
    assert layer.scaling == {"default": 2.0}


@pytest.mark.parametrize("method", ["full", "lora", "oft", "bottleneck", "loreft"])
def test_gradient_checkpointing_gives_the_same_gradients(method: str, tmp_path: Path) -> None:
    source = save_tiny(tiny_model(1, tied=True), tmp_path / "model")
    spec = TypeAdapter(TuningSpec).validate_python({"method": method})
    ids, found = torch.tensor([[5, 9, 17, 33, 2]]), []
    for on in (False, True):
        model: Any = load_for_training(source, spec, dtype="float32", gradient_checkpointing=on)
        states = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
        assert bool(states) == on
        LogprobModel(model.train())(ids).logprobs.sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


@pytest.mark.parametrize("ends", [{"first": 1}, {"last": 2}])
def test_ends_of_a_prompt_are_refused_where_rows_are_padded(ends: dict) -> None:
    """StableLM runs on padded rows, whose last columns are padding or the response."""
    config = StableLmConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with pytest.raises(RecipeError, match="'last' needs packed rows, which stablelm models do not"):
        add_tuner(StableLmForCausalLM(config), LoreftTuning(method="loreft", **ends))
    whole: Any = add_tuner(StableLmForCausalLM(config), LoreftTuning(method="loreft"))
    assert num_trained(whole)[0] == 2 * (2 * 16 * 4 + 4)
