"""The two own peft tuners against their formulas; private tables of peft are used, so hold them."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

sys.path.insert(0, str(Path(__file__).parent))
from engine_models import save_tiny, tiny_model
from pydantic import TypeAdapter
from torch import Tensor

from align.core.errors import RecipeError
from align.models.attention import segments_from_positions
from align.models.loading import load_policy
from align.models.logprobs import LogprobModel
from align.recipe.schema import TuningSpec
from align.tuning.bottleneck import BottleneckConfig
from align.tuning.loreft import LoreftConfig, prompt_ends
from align.tuning.wrap import add_tuner

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
CONFIGS: dict[str, Any] = {
    "bottleneck": lambda: BottleneckConfig(target_modules=["o_proj", "down_proj"], size=6),
    "loreft": lambda: LoreftConfig(target_modules=["layers.0", "layers.1"], rank=3),
}


def disturb(model: torch.nn.Module, seed: int) -> None:
    """Move the trained parameters away from their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_tuner_starts_as_the_base_and_is_the_base_when_off(name):
    base = logits(tiny_model(0, tied=True))
    model = get_peft_model(tiny_model(0, tied=True), CONFIGS[name]()).eval()
    assert torch.equal(logits(model), base)
    disturb(model, 1)
    assert (logits(model) - base).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("name", CONFIGS)
def test_only_the_tuner_is_trained(name):
    model = get_peft_model(tiny_model(0, tied=True), CONFIGS[name]())
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".inserted_net.default." in n for n in trained)


@pytest.mark.parametrize("name", CONFIGS)
def test_two_adapters_live_side_by_side_and_reload(name, tmp_path):
    model = get_peft_model(tiny_model(0, tied=True), CONFIGS[name]()).eval()
    disturb(model, 1)
    first = logits(model)
    model.add_adapter("other", CONFIGS[name]())
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    disturb(model, 2)
    second = logits(model)
    assert (first - second).abs().max() > 0.1
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(0, tied=True), str(tmp_path)).eval()
    assert torch.equal(logits(again), first)
    again.load_adapter(str(tmp_path / "other"), "other")
    again.set_adapter("other")
    assert torch.equal(logits(again), second)


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "oft", "vera"])
@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (
            ["foo"],
            "'foo' names no layer of its own, expected linear layers of Qwen2ForCausalLM: "
            "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        ),
        (["q_proj", "proj"], "'proj' names no layer"),  # peft takes the first and says nothing
        (["embed_tokens"], "'embed_tokens' names Embedding"),
        (["mlp"], "'mlp' names Qwen2MLP"),
        (["lm_head"], "'lm_head' names no layer"),  # it is the embeddings, too
    ],
)
def test_target_that_is_no_linear_layer_is_refused(method, targets, said):
    spec = TypeAdapter(TuningSpec).validate_python({"method": method, "targets": targets})
    with pytest.raises(RecipeError, match=f"tuning.targets: {said}"):
        add_tuner(tiny_model(0, tied=True), spec)
    head = {"method": "lora", "targets": ["lm_head", "layers.1.mlp.up_proj"]}
    model = add_tuner(tiny_model(0, tied=False), TypeAdapter(TuningSpec).validate_python(head))
    assert sum(p.requires_grad for p in model.parameters()) == 4


def test_loreft_of_more_dimensions_than_the_states_is_refused():
    spec = TypeAdapter(TuningSpec).validate_python({"method": "loreft", "rank": 65})
    with pytest.raises(RecipeError, match=r"tuning.rank: 65 dimensions for hidden states of 64"):
        add_tuner(tiny_model(0, tied=True), spec)


def test_bottleneck_adds_a_small_network_after_a_projection():
    model = get_peft_model(tiny_model(0, tied=True), CONFIGS["bottleneck"]())
    disturb(model, 1)
    layer: Any = model.get_base_model().model.layers[0].mlp.down_proj
    x = torch.randn(1, 3, 96, generator=torch.Generator().manual_seed(4))
    h = x @ layer.base_layer.weight.T
    net = layer.inserted_net["default"]
    inner = h @ net.down.weight.T + net.down.bias
    gelu = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
    expected = h + gelu @ net.up.weight.T + net.up.bias
    torch.testing.assert_close(layer(x), expected)


def test_loreft_edits_states_in_the_span_of_orthonormal_rows():
    net: Any = get_peft_model(tiny_model(0, tied=True), CONFIGS["loreft"]())
    disturb(net, 1)
    edit = net.get_base_model().model.layers[1].inserted_net["default"]
    h = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(4))
    r = torch.linalg.qr(edit.basis).Q.T
    torch.testing.assert_close(r @ r.T, torch.eye(3), atol=1e-5, rtol=0)
    expected = (h @ edit.source.T + edit.bias - h @ r.T) @ r
    torch.testing.assert_close(edit(h, {}), expected, atol=1e-5, rtol=1e-4)
    # Orthogonal to the rows nothing changes.
    change = edit(h, {})
    torch.testing.assert_close(change, change @ r.T @ r, atol=1e-5, rtol=1e-4)


def test_loreft_finds_where_prompts_end_in_a_packed_row():
    # A prompt of 3 with answers of 2 and, branching off at 3, of 1; then a row of 2 + 2.
    positions = torch.tensor([0, 1, 2, 3, 4, 3, 0, 1, 2, 3])
    answers = torch.tensor([0, 0, 0, 1, 1, 1, 0, 0, 1, 1]).bool()
    segments = segments_from_positions(positions)
    found = prompt_ends(replace(segments, answers=answers))
    assert found.tolist() == [3] * 6 + [2] * 4
    # An answer that is not trained still branches off at its prompt's end.
    none = torch.zeros_like(answers)
    assert prompt_ends(replace(segments, answers=none)).tolist() == [3] * 6 + [4] * 4
    assert prompt_ends(segments).tolist() == [3] * 6 + [4] * 4


@pytest.mark.parametrize(("first", "last"), [(1, 1), (2, None), (None, 2)])
def test_loreft_on_a_packed_row_equals_each_prompt_alone(first, last, tmp_path):
    source = save_tiny(tiny_model(0, tied=True), tmp_path / "model")
    config = LoreftConfig(target_modules=["layers.0"], rank=3, first=first, last=last)
    model = get_peft_model(load_policy(source, dtype="float32"), config).eval()
    disturb(model, 1)
    prompt, answers = [5, 6, 7, 8], ([9, 10], [11, 12, 13])
    row = torch.tensor([[*prompt, *answers[0], *answers[1]]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 4, 5, 6]])
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]]).bool()
    with torch.no_grad():
        packed = LogprobModel(model)(row, positions, mask=mask).logprobs[0, 4:].tolist()
    expected = [x for answer in answers for x in decoded(model, prompt, answer)]
    assert packed == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def decoded(model: Any, prompt: list[int], answer: list[int]) -> list[float]:
    """Score an answer as it is generated: the prompt first, then token by token from the cache."""
    out = model(input_ids=torch.tensor([prompt]), use_cache=True)
    found = []
    for token in answer:
        found.append(out.logits[0, -1].log_softmax(-1)[token].item())
        out = model(
            input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True
        )
    return found
