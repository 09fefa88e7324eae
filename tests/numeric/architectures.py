"""Tiny models of every causal architecture that transformers builds on a CPU, and their table.

    python tests/numeric/architectures.py

measures each of them (see test_architectures.py) and rewrites the table of docs/models.md.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from align.core.errors import ArtifactError
from align.models.attention import PACKED
from align.models.decoder import attention_for, form_of
from align.models.loading import disable_dropout
from align.models.logprobs import token_logprobs

DOCS = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- the table begins -->\n", "<!-- the table ends -->\n"

_SIZES = (
    (32, "hidden_size d_model n_embd dim embedding_size word_embed_proj_dim embed_dim dim_model"),
    (
        48,
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff shared_intermediate_size "
        "intermediate_size_mlp expert_hidden_size ffn_hidden_size dff dim_ff "
        "moe_shared_expert_intermediate_size dense_intermediate_size",
    ),
    (2, "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers"),
    (2, "num_dense_layers num_key_value_heads num_kv_heads linear_num_key_heads"),
    (2, "swa_num_key_value_heads num_global_key_value_heads"),
    (4, "num_attention_heads n_head num_heads n_heads decoder_attention_heads attention_heads"),
    (4, "encoder_attention_heads linear_num_value_heads swa_num_attention_heads"),
    (8, "head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim linear_key_head_dim rotary_dim"),
    (8, "linear_value_head_dim kv_channels swa_head_dim swa_v_head_dim dim_head global_head_dim"),
    (96, "vocab_size vocab_size_per_layer_input n_vocab"),
    (64, "max_position_embeddings n_positions max_seq_len n_ctx max_target_positions"),
    (64, "max_sequence_length"),
    (16, "q_lora_rank kv_lora_rank moe_intermediate_size shared_expert_intermediate_size"),
    (16, "hidden_size_per_layer_input o_lora_rank expert_intermediate_size"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok moe_k top_k_experts moe_top_k"),
    (1, "n_group topk_group num_expert_group"),
    (0, "pad_token_id"),
)
SIZES = {name: size for size, names in _SIZES for name in names.split()}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
_GRANITE = {"logits_scaling": 8.0}
# What sizes do not say: options that this test is about, and parts that must fit each other.
OPTIONS: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.0625},
    "cohere2_moe": {"logit_scale": 0.0625},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
    },
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.3},
    "gemma2": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0, "sliding_window": 4},
    "gemma3_text": _SLIDING | {"final_logit_softcapping": 2.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gpt_oss": _SLIDING,
    "granite": _GRANITE,
    "granite_swa": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoe_swa": _GRANITE,
    "granitemoehybrid": _MAMBA | _GRANITE | {"layer_types": ["mamba", "attention"]},
    "granitemoeshared": _GRANITE,
    "hyperclovax": {"logits_scaling": 0.125},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"attention_chunk_size": 4, "interleave_moe_layer_step": 2},
    "longcat_flash": {"expert_ffn_hidden_size": 16, "zero_expert_num": 1, "moe_topk": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8},
    "olmo_hybrid": _LINEAR,
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "zaya": {"num_experts_per_tok": 1},
}
_OTHER_MEDIA = "reads images or sound; its text model is in the table"
_ENCODER = "an encoder: it sees later tokens (refused when loaded)"
_MEDIA_TYPES = """
blt emu3 fuyu gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified git got_ocr2 llama4
gemma4_unified_assistant mllama moshi musicgen musicgen_melody phi4_multimodal qwen3_5 qwen3_5_moe
qwen4_exp trocr whisper
"""
_ENCODER_TYPES = """
bert-generation big_bird camembert cpmant data2vec-text ernie megatron-bert prophetnet rembert
roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod
"""
SKIPPED = {
    **dict.fromkeys(_MEDIA_TYPES.split(), _OTHER_MEDIA),
    **dict.fromkeys(_ENCODER_TYPES.split(), _ENCODER),
    "axk2": "sparse attention with an index, which needs specific sizes",
    "cohere_compass_text": "cannot be built from its own defaults in transformers 5.17",
    "dbrx": "cannot be built in transformers 5.17",
    "deepseek_v32": "sparse attention with an index, which needs specific sizes",
    "gemma3n_text": "cannot be built small: its configuration has one list for each layer",
    "glm_moe_dsa": "sparse attention with an index, which needs specific sizes",
    "hy_v4": "sparse attention with an index, which needs specific sizes",
    "kimi_linear": "cannot be built small: its configuration has one list for each layer",
    "qwen4_exp_text": "cannot be built from its own defaults in transformers 5.17",
    "reformer": "accepts only rows of whole chunks",
    "xglm": "its mask overflows in float64",
    "zamba": "cannot be built small: its shared layers are listed by number",
    "zamba2": "cannot be built small: its shared layers are listed by number",
}
NARROW = ("gpt_bigcode", "nemotron_h", "phimoe")
"""Compiled parts or fixed buffers keep these from float64 in every step."""
REFUSED = ("bert", "doge", "electra", "inkling_text", "modernbert-decoder", "roberta")
"""Measured too: what must be refused by name."""
TYPES = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in SKIPPED]

# One packed row: a sequence, then one whose first 5 tokens two answers share, then another.
ALONE = [
    [5, 9, 12, 33, 7, 21, 40],
    [11, 60, 17, 30, 8, 41, 50, 12],
    [11, 60, 17, 30, 8, 77, 6, 13, 90, 5],
    [88, 14, 15],
]
SHARED = 5
IDS = [*ALONE[0], *ALONE[1], *ALONE[2][SHARED:], *ALONE[3]]
POSITIONS = [*range(7), *range(8), *range(SHARED, 10), *range(3)]


def tiny_config(model_type: str, **extra: Any) -> Any:
    """Return the architecture's configuration, a few thousand weights large."""
    kind = CONFIG_MAPPING[model_type]
    default, found = kind(), {"bos_token_id": 1, "eos_token_id": 2}
    mapped = {n for n in dir(kind) if isinstance(getattr(kind, n, None), property)}
    mapped |= set(kind.attribute_map)
    for name in SIZES.keys() - mapped:
        old = getattr(default, name, "none") if name != "head_dim" else _head_dim(default)
        open_size = name in ("head_dim", "num_key_value_heads", "intermediate_size", "pad_token_id")
        if type(old) is int or (old is None and open_size):
            found[name] = SIZES[name]
    if hasattr(default, "qk_rope_head_dim") and "num_key_value_heads" in found:
        found["num_key_value_heads"] = 4
    for name in {"layer_types", "mlp_layer_types"} - mapped:
        if isinstance(kinds := getattr(default, name, None), list):
            found[name] = [kinds[0], kinds[-1]]
    if isinstance(getattr(default, "sliding_window", None), int):
        found["sliding_window"] = 4
    return kind(**(found | OPTIONS.get(model_type, {}) | extra))


def _head_dim(config: Any) -> Any:
    try:
        return getattr(config, "head_dim", "none")
    except Exception as error:  # a size for each layer
        if "per-layer" not in str(error):
            raise
        return 1


def tiny_model(model_type: str, dtype: torch.dtype, *, own: bool = False, **extra: Any) -> Any:
    """Return a model with weights large enough to tell tokens apart; equal for ``own`` and not.

    Args:
        model_type: of transformers. dtype: of the weights.
        own: with transformers' eager attention instead of what the suite chooses.
        extra: options of the configuration.
    """
    config = tiny_config(model_type, **extra)
    attention = "eager" if own else attention_for(config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, experts_implementation="eager"
    )
    model = model.to(dtype).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=draw, dtype=torch.float64).to(dtype)
            if weight.ndim >= 2:
                weight.copy_(0.25 * noise)
            elif "A_log" not in name:
                weight.add_(0.1 * noise)
    return model


@contextlib.contextmanager
def all_double() -> Iterator[None]:
    """Keep float64 where a model's code casts to float32, as norms and softmaxes do."""
    to, soft = Tensor.to, torch.nn.functional.softmax

    def wide_to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.dtype == torch.float64:
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return to(self, *args, **kwargs)

    def wide_softmax(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.dtype == torch.float64:
            kwargs["dtype"] = torch.float64
        return soft(x, *args, **kwargs)

    with (
        mock.patch.object(Tensor, "to", wide_to),
        mock.patch.object(Tensor, "float", Tensor.double),
        mock.patch.object(Tensor, "type", wide_to),
        mock.patch.object(torch.nn.functional, "softmax", wide_softmax),
    ):
        yield


def own_logprobs(model: Any) -> Tensor:
    """Return log p of each token of ``IDS`` by the model's own forward, a sequence at a time."""
    parts = []
    for i, sequence in enumerate(ALONE):
        logits = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0]
        logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        at = torch.arange(1, len(sequence))
        found = logprobs[at - 1, torch.tensor(sequence)[1:]]
        found = torch.cat([found.new_zeros(1), found])
        parts.append(found[SHARED:] if i == 2 else found)
    return torch.cat(parts)


def packed_logprobs(model: Any) -> Tensor:
    """Return log p of each token of ``IDS`` as the suite computes it, in one packed row."""
    ids, positions = torch.tensor([IDS]), torch.tensor([POSITIONS])
    return token_logprobs(model, ids, position_ids=positions).logprobs[0]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model_type: str
    way: str
    scale: float = 1.0
    error: float = 0.0
    note: str = ""


def measure(model_type: str, **extra: Any) -> Row:
    """Compare an architecture with itself in float64."""
    wide = contextlib.nullcontext() if model_type in NARROW else all_double()
    with wide, torch.no_grad():
        own = own_logprobs(tiny_model(model_type, torch.float64, own=True, **extra))
        model = tiny_model(model_type, torch.float64, **extra)
        try:
            form = form_of(model)
        except ArtifactError as error:
            return Row(model_type, "refused", note=str(error).partition(": ")[2].split(",")[0])
        disable_dropout(model.train())
        packed = packed_logprobs(model)
    packs = model.config.get_text_config()._attn_implementation == PACKED
    assert packs == form.packs
    gap = float((own - packed).abs().max())
    return Row(model_type, "packed" if packs else "padded", form.scale, gap)


def _table() -> str:
    lines = ["| model type | rows | largest difference (nats) | logits |", "|---|---|---|---|"]
    for name in sorted(TYPES):
        row = measure(name)
        gap = "" if row.way == "refused" else f"{row.error:.0e}"
        scaled = row.note or ("" if row.scale == 1.0 else f"scaled by {row.scale:g}")
        lines.append(f"| {name} | {row.way} | {gap} | {scaled} |")
        sys.stdout.write(lines[-1] + "\n")
    lines += ["", "Not measured:", ""]
    reasons = {
        reason: [n for n, r in SKIPPED.items() if r == reason] for reason in SKIPPED.values()
    }
    lines += [f"- {', '.join(sorted(names))}: {reason}." for reason, names in reasons.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = DOCS.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    DOCS.write_text(before + BEGIN + "\n" + _table() + "\n" + END + after, encoding="utf-8")
    sys.exit(0)
