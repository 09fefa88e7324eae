"""LoRA on mixtures of experts, whose weights are parameters of one module and no linear layers."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, MixtralConfig, Qwen3MoeConfig

from align.core.errors import RecipeError
from align.models.loading import load_policy
from align.models.logprobs import token_logprobs
from align.models.saving import save_policy
from align.recipe.schema.tuning import METHODS
from align.stages.saving import whole_state
from align.tuning.export import full_weights, saved_buffers
from align.tuning.loading import load_for_training
from align.tuning.merging import adapted_layers, base_parameters
from align.tuning.wrap import add_tuner
from tests.numeric.architectures import tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from small_tokenizers import byte_tokenizer

SIZES = {
    **{"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    "num_experts_per_tok": 2,
}
DEEPSEEK = {
    **{"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    **{"moe_intermediate_size": 16, "first_k_dense_replace": 0, "q_lora_rank": 8},
    **{"kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, head_dim=8, moe_intermediate_size=16, num_experts=4
    ),
    "deepseek_v3": lambda: DeepseekV3Config(**SIZES | DEEPSEEK),
}
IDS = torch.arange(3, 40).unsqueeze(0)


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_of_experts_are_merged_and_saved(name: str, tmp_path: Path):
    torch.manual_seed(0)
    base, out = tmp_path / "base", tmp_path / "out"
    fresh = AutoModelForCausalLM.from_config(CONFIGS[name]())
    # The bias of DeepSeek's routers is a buffer; it must be the saved model's too.
    for bias in (b for n, b in fresh.named_buffers() if n.endswith("e_score_correction_bias")):
        bias.normal_(std=0.3)
    fresh.save_pretrained(base)
    byte_tokenizer(None).save_pretrained(base)
    model = add_tuner(load_policy(base, dtype="float32"), METHODS["lora"](method="lora"), seed=1)
    before = token_logprobs(model, IDS).logprobs.detach()
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.add_(torch.randn_like(p), alpha=0.1)
        tuned = token_logprobs(model, IDS).logprobs
    assert any("experts" in layer for layer in adapted_layers(model))
    assert float((tuned - before).abs().max()) > 0.01
    # An adapter's own weights are none of the model's, however they are nested.
    assert not {id(p) for p in trained} & {id(p) for p in base_parameters(model)}
    state, _ = whole_state(model, tmp_path / "model")
    save_policy(state.items(), source_dir=base, directory=out, dtype="float32")
    with torch.no_grad():
        found = token_logprobs(load_policy(out, dtype="float32"), IDS).logprobs
        # The model itself is as before: its adapters are still beside its weights.
        again = token_logprobs(model, IDS).logprobs
    torch.testing.assert_close(found, tuned, atol=1e-5, rtol=0.0)
    assert torch.equal(again, tuned)


# Of these, Apertus and Gemma 4 are no mixtures: their buffers are numbers of whole layers.
BUFFERS = ("apertus", "dots1", "gemma4_text", "glm4_moe", "minimax_m2", "solar_open")


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", [*BUFFERS, "ernie4_5_moe"])
def test_what_is_saved_are_the_weights_and_buffers_of_the_model(name: str, method: str):
    model = tiny_model(name, torch.float32)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    assert name not in BUFFERS or dict(saved_buffers(model))
    tuned = add_tuner(model, METHODS[method](method=method))
    state = dict(full_weights(tuned)) | dict(saved_buffers(tuned))
    tied = expected.keys() - state.keys()
    assert tied <= {"lm_head.weight"}
    # A new adapter changes nothing.
    assert all(torch.equal(state[key], expected[key]) for key in expected.keys() - tied)
    assert state.keys() <= expected.keys()


@pytest.mark.parametrize("method", ["dora", "pissa"])
def test_what_peft_cannot_adapt_is_an_error_of_the_recipe(method: str):
    model = AutoModelForCausalLM.from_config(CONFIGS["mixtral"]())
    with pytest.raises(RecipeError, match=rf"tuning.method {method}: peft cannot adapt Mixtral"):
        add_tuner(model, METHODS[method](method=method))


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_qlora_refuses_experts_whose_files_have_other_names_before_it_trains(tmp_path: Path):
    # transformers joins the experts of the files into one weight, whose precise form no file has.
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 64}
    model = AutoModelForCausalLM.from_config(MixtralConfig(**sizes, num_local_experts=2))
    model.save_pretrained(tmp_path)
    byte_tokenizer(None).save_pretrained(tmp_path)
    spec = METHODS["qlora"](method="qlora")
    with pytest.raises(RecipeError, match=r"qlora: the files of .* have no weight .*experts.*lora"):
        load_for_training(tmp_path, spec, dtype="float32")
