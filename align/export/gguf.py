"""Write a policy as a GGUF file for llama.cpp and Ollama, and verify what was written."""

import math
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from align.core.errors import ArtifactError
from align.export import llama_cpp
from align.export.gguf_tokens import GgufTokenizer, gguf_tokenizer
from align.export.source import Source
from align.models.loading import saved_weights
from align.tuning.files import refuse_unmerged

FILE = "model.gguf"
TYPES = ("f16", "q8_0", "q4_k_m")
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""transformers' model type -> the architecture's name in GGUF."""
_ROPE_TYPES = {"llama": ("default", "llama3"), "qwen2": ("default",), "qwen3": ("default",)}
"""Rotary types that llama.cpp computes for an architecture."""
_FACTORS = "rope_freqs.weight"
"""Tensor by whose values llama.cpp divides the rotary frequencies."""
QUANTIZE = "llama-quantize"
_FILE_TYPES = {"f16": 1, "q8_0": 7}
_BLOCK = 32
"""Numbers that share one scale in Q8_0."""


def write_gguf(source: Source, folder: Path, *, kind: str) -> None:
    """Write model.gguf with the weights, tokenizer and chat template of a policy.

    Args:
        source: the policy. folder: the output folder. kind: one of ``TYPES``.

    Raises:
        ArtifactError: the architecture, its options or its tokenizer are not supported, or a
            needed package or program is not installed.
    """
    if kind == "q4_k_m":
        _quantize(source, folder)
        return
    config = _check_architecture(source)
    gguf: Any = _package()
    vocabulary = gguf_tokenizer(source.model_dir, num_rows=config.vocab_size)
    writer = gguf.GGUFWriter(str(folder / FILE), ARCHITECTURES[config.model_type])
    _write_config(writer, config, name=source.name, kind=kind)
    _write_tokenizer(writer, vocabulary)
    factors = rope_factors(config)
    if factors is not None:
        writer.add_tensor(_FACTORS, factors.numpy(), raw_dtype=gguf.GGMLQuantizationType.F32)
    names = gguf.get_tensor_name_map(_model_arch(gguf, config), config.num_hidden_layers)
    for name, tensor in saved_weights(source.model_dir):
        # llama.cpp takes the embeddings for a head that is not in the file.
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = name.rpartition(".")
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ArtifactError(
                f"{source.model_dir}: GGUF has no name for the weight {stem}.{suffix}"
            )
        data, data_type = _stored(gguf, _permuted(name, tensor.float(), config), kind)
        writer.add_tensor(found, data, raw_dtype=data_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _package() -> Any:
    if find_spec("gguf") is None:
        raise ArtifactError(
            "--format gguf needs the package gguf, which is not installed. Run: "
            "pip install 'align-suite[export]'"
        )
    import gguf

    return gguf


def _check_architecture(source: Source) -> Any:
    """Return the configuration of a policy that can become a GGUF file.

    Raises:
        ArtifactError: it cannot, for the reason in the message.
    """
    if source.kind != "policy":
        raise ArtifactError(
            f"{source.model_dir}: a {source.kind} cannot become GGUF; only policies"
        )
    refuse_unmerged(source.model_dir, "GGUF export")
    config: Any = AutoConfig.from_pretrained(str(source.model_dir), trust_remote_code=False)
    kind, told = config.model_type, None
    rope = getattr(config, "rope_parameters", None) or {}
    if kind not in ARCHITECTURES:
        told = f"model type {kind!r} (supported: {', '.join(ARCHITECTURES)})"
    elif (form := rope.get("rope_type", "default")) not in _ROPE_TYPES[ARCHITECTURES[kind]]:
        told = f"rotary type {form!r} (supported: {', '.join(_ROPE_TYPES[ARCHITECTURES[kind]])})"
    elif "full_attention" not in set(getattr(config, "layer_types", None) or ["full_attention"]):
        told = "layers without full attention"
    elif getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        told = "sliding-window attention"
    elif getattr(config, "mlp_bias", False):
        told = "biases in the MLP"
    if told:
        raise ArtifactError(
            f"{source.model_dir}: GGUF export does not support {told}. Use --format model, and "
            "llama.cpp's own converter"
        )
    return config


def _model_arch(gguf: ModuleType, config: PreTrainedConfig) -> Any:
    wanted = ARCHITECTURES[config.model_type]
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted)


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _write_config(writer: Any, config: PreTrainedConfig, *, name: str, kind: str) -> None:
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_vocab_size(config.vocab_size)


def rope_factors(config: PreTrainedConfig) -> Tensor | None:
    """Return the divisors of Llama 3.1's scaling of the rotary frequencies; None without scaling.

    With the wavelength w of a frequency in tokens and c = ``original_max_position_embeddings``:
    1 for w below c / ``high_freq_factor``, ``factor`` for w above c / ``low_freq_factor``, and in
    between the harmonic mixture of both that is linear in c / w. Float32, (head_dim / 2,).

    Reference:
        ``apply_scaling`` of Meta's llama-models; the tensor's name and meaning are llama.cpp's.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "llama3":
        return None
    size, (low, high) = _head_dim(config), (rope["low_freq_factor"], rope["high_freq_factor"])
    exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
    wavelengths = 2 * math.pi * rope["rope_theta"] ** exponents
    turns = rope["original_max_position_embeddings"] / wavelengths  # rotations in the old context
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 / ((1.0 - kept) / rope["factor"] + kept)).float()


@torch.no_grad()
def apply_rope_factors(model: nn.Module, folder: Path) -> None:
    """Divide a model's rotary frequencies by the file's factors, which transformers does not read.

    Args:
        model: the model that transformers read from the file. folder: the exported folder.
    """
    tensors = _package().GGUFReader(str(folder / FILE)).tensors
    found = next((tensor.data for tensor in tensors if tensor.name == _FACTORS), None)
    if found is None:
        return
    for part in model.modules():
        if isinstance(frequencies := getattr(part, "inv_freq", None), Tensor):
            frequencies /= torch.from_numpy(found.copy()).to(frequencies)


def _write_tokenizer(writer: Any, found: GgufTokenizer) -> None:
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(list(found.tokens))
    writer.add_token_types(list(found.types))
    if found.scores:
        writer.add_token_scores(list(found.scores))
    if found.merges:
        writer.add_token_merges(list(found.merges))
    if found.bos_token_id is not None:
        writer.add_bos_token_id(found.bos_token_id)
    if found.pad_token_id is not None:
        writer.add_pad_token_id(found.pad_token_id)
    writer.add_eos_token_id(found.stop_token_ids[0])
    # GGUF has a token for the end of the text and one for the end of a turn.
    if len(found.stop_token_ids) > 1:
        writer.add_eot_token_id(found.stop_token_ids[1])
    writer.add_add_bos_token(found.add_bos)
    if found.model == "llama":
        writer.add_add_space_prefix(found.add_space)
    if found.chat_template is not None:
        writer.add_chat_template(found.chat_template)


def _permuted(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    """Return a query or key projection in the order of llama.cpp's rotary embedding.

    transformers rotates dimension i with i + d/2; for llama, llama.cpp rotates 2i with 2i + 1.
    """
    if ARCHITECTURES[config.model_type] != "llama":
        return tensor
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((n for part, n in heads.items() if f".{part}." in name), None)
    if count is None:
        return tensor
    halves = tensor.reshape(count, 2, len(tensor) // count // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def _stored(gguf: ModuleType, tensor: Tensor, kind: str) -> tuple[np.ndarray, Any]:
    """Return a tensor's data in its GGUF type: matrices in ``kind``, vectors in float32."""
    data = tensor.contiguous().numpy()
    types = gguf.GGMLQuantizationType
    if data.ndim == 1:
        return data, types.F32
    # Rows that do not consist of whole blocks stay in float16, as in llama.cpp.
    if kind == "q8_0" and data.shape[-1] % _BLOCK == 0:
        return gguf.quants.quantize(data, types.Q8_0), types.Q8_0
    return data.astype(np.float16), types.F16


def _quantize(source: Source, folder: Path) -> None:
    """Write Q4_K_M with llama.cpp's quantizer, from a temporary float16 file."""
    program, missing = shutil.which(QUANTIZE), llama_cpp.obstacle()
    if program is None and missing:
        raise ArtifactError(
            f"--dtype q4_k_m needs llama.cpp: neither its program {QUANTIZE} is on PATH, nor is "
            f"{llama_cpp.PACKAGE} installed. Install one of them, or use --dtype q8_0"
        )
    write_gguf(source, folder, kind="f16")
    # Under another name: the quantized file takes its place.
    whole = (folder / FILE).rename(folder / "f16.gguf")
    if program is None:
        llama_cpp.quantize(whole, folder / FILE)
    else:
        _run_quantize(program, whole, folder / FILE)
    whole.unlink()


def _run_quantize(program: str, whole: Path, file: Path) -> None:
    argv = [program, str(whole), str(file), "Q4_K_M"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode or not file.is_file():
        tail = " ".join((done.stderr or done.stdout).split())[-300:]
        raise ArtifactError(f"{QUANTIZE} failed with exit code {done.returncode}: {tail}")


def gguf_problems(source: Source, folder: Path, model: Any, *, row: float) -> Iterator[str]:
    """Yield one line for each difference between a GGUF file and the source.

    Args:
        source: the policy. folder: the exported folder.
        model: the model that transformers read from the file.
        row: largest relative error of a row of a weight matrix.
    """
    state = model.state_dict()
    for name, expected in saved_weights(source.model_dir):
        found = state.get(name)
        if found is None:
            yield f"{name}: missing from {FILE}"
        elif found.shape != expected.shape:
            yield f"{name}: shape {list(found.shape)}, expected {list(expected.shape)}"
        elif not bool(found.isfinite().all()):
            yield f"{name}: contains NaN or infinity"
        else:
            worst = _row_error(expected.float(), found.float())
            if worst > row:
                yield f"{name}: a row differs from the source by {worst:.2g}, at most {row:g}"
    tied = bool(
        AutoConfig.from_pretrained(
            str(source.model_dir), trust_remote_code=False
        ).tie_word_embeddings
    )
    if bool(model.config.tie_word_embeddings) != tied:
        yield f"tie_word_embeddings: {not tied}, expected {tied}"
    yield from _tokenizer_problems(source, folder)


def _row_error(expected: Tensor, found: Tensor) -> float:
    """Return the largest relative error of a row, or of a whole vector."""
    ours, theirs = (x.reshape(len(x) if x.ndim > 1 else 1, -1) for x in (expected, found))
    error = torch.linalg.vector_norm(ours - theirs, dim=1)
    return float((error / torch.linalg.vector_norm(ours, dim=1).clamp(min=1e-12)).max())


def _tokenizer_problems(source: Source, folder: Path) -> Iterator[str]:
    """Yield one line for each key of the file's tokenizer that differs from the source's."""
    gguf: Any = _package()
    config: Any = AutoConfig.from_pretrained(str(source.model_dir), trust_remote_code=False)
    expected = gguf_tokenizer(source.model_dir, num_rows=config.vocab_size)
    fields = gguf.GGUFReader(str(folder / FILE)).fields

    def said(key: str) -> Any:
        field = fields.get(f"tokenizer.{key}")
        return None if field is None else field.contents()

    stops = list(expected.stop_token_ids)
    pairs = {
        "ggml.model": expected.model,
        "ggml.pre": expected.pre,
        "ggml.tokens": list(expected.tokens),
        "ggml.token_type": list(expected.types),
        "ggml.merges": list(expected.merges) or None,
        "ggml.bos_token_id": expected.bos_token_id,
        "ggml.eos_token_id": stops[0],
        "ggml.eot_token_id": stops[1] if len(stops) > 1 else None,
        "ggml.add_bos_token": expected.add_bos,
        "chat_template": expected.chat_template,
    }
    for key, value in pairs.items():
        if said(key) != value:
            yield f"tokenizer.{key}: differs from the source's tokenizer"
