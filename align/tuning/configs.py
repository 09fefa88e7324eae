"""Build peft's configuration of each tuning method: one function per method.

``builder`` of a class of ``recipe/schema/tuning.py`` names its function, which is called with the
model and the specification. It raises RecipeError if the model lacks the parts that it needs.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import peft
from torch import nn

from align.core.errors import RecipeError
from align.models.decoder import PACKS
from align.recipe.schema.tuning import (
    BottleneckTuning,
    DoraTuning,
    LoraTuning,
    LoreftTuning,
    OftTuning,
    PissaTuning,
    PrefixTuning,
    PromptTuning,
    PtuningTuning,
    QloraTuning,
    Targets,
    TuningSpec,
    VeraTuning,
)
from align.tuning.bottleneck import BottleneckConfig
from align.tuning.loreft import LoreftConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PISSA_ITERATIONS = 16
"""Subspace iterations of PiSSA's randomized SVD; the exact one takes minutes for large models."""


def lora(model: "PreTrainedModel", tuning: LoraTuning | QloraTuning) -> peft.PeftConfig:
    """Return the configuration of lora, rslora, dora and qlora."""
    targets = _targets(model, tuning.targets)
    if isinstance(tuning, DoraTuning):
        _check_norms(model, tuning)
    return peft.LoraConfig(
        r=tuning.rank,
        lora_alpha=cast("Any", tuning.alpha),
        lora_dropout=tuning.dropout,
        target_modules=targets,
        use_rslora=tuning.method == "rslora",
        use_dora=isinstance(tuning, DoraTuning),
        **_task(model),
    )


def pissa(model: "PreTrainedModel", tuning: PissaTuning) -> peft.PeftConfig:
    """Return the configuration of pissa."""
    return peft.LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.rank,
        target_modules=_targets(model, tuning.targets),
        init_lora_weights=f"pissa_niter_{PISSA_ITERATIONS}",  # pyright: ignore
        **_task(model),
    )


def ia3(model: "PreTrainedModel", tuning: TuningSpec) -> peft.PeftConfig:
    """Return the configuration of ia3."""
    targets, inner = _ia3_targets(model)
    return peft.IA3Config(target_modules=targets, feedforward_modules=inner, **_task(model))


def oft(model: "PreTrainedModel", tuning: OftTuning) -> peft.PeftConfig:
    """Return the configuration of oft."""
    targets = _targets(model, tuning.targets)
    _check_blocks(model, tuning)
    return peft.OFTConfig(
        oft_block_size=tuning.block_size, r=0, target_modules=targets, **_task(model)
    )


def vera(model: "PreTrainedModel", tuning: VeraTuning) -> peft.PeftConfig:
    """Return the configuration of vera."""
    targets = _targets(model, tuning.targets)
    return peft.VeraConfig(r=tuning.rank, target_modules=targets, **_task(model))


def bottleneck(model: "PreTrainedModel", tuning: BottleneckTuning) -> peft.PeftConfig:
    """Return the configuration of bottleneck."""
    return BottleneckConfig(target_modules=_projections(model), size=tuning.size, **_task(model))


def loreft(model: "PreTrainedModel", tuning: LoreftTuning) -> peft.PeftConfig:
    """Return the configuration of loreft."""
    if tuning.first is not None or tuning.last is not None:
        # In padded rows the last columns are padding or the response, not the end of the prompt.
        _check_packs(model, "loreft with 'first' or 'last'", "Leave both out to edit every token")
    return LoreftConfig(
        target_modules=_layers(model, tuning),
        rank=tuning.rank,
        first=tuning.first,
        last=tuning.last,
        **_task(model),
    )


def prompt(model: "PreTrainedModel", tuning: PromptTuning) -> peft.PeftConfig:
    """Return the configuration of prompt."""
    sizes = _virtual_sizes(model, tuning)
    return peft.PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **sizes)  # pyright: ignore


def ptuning(model: "PreTrainedModel", tuning: PtuningTuning) -> peft.PeftConfig:
    """Return the configuration of ptuning."""
    sizes = _virtual_sizes(model, tuning)
    return peft.PromptEncoderConfig(encoder_hidden_size=tuning.hidden, **sizes)


def prefix(model: "PreTrainedModel", tuning: PrefixTuning) -> peft.PeftConfig:
    """Return the configuration of prefix."""
    sizes, config = _virtual_sizes(model, tuning), model.config.get_text_config()
    heads = config.num_key_value_heads
    head_size = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    sizes |= {"num_attention_heads": heads, "token_dim": heads * head_size}
    hidden = tuning.hidden or config.hidden_size
    return peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=hidden, **sizes)


def _task(model: "PreTrainedModel") -> dict[str, Any]:
    return {"task_type": "CAUSAL_LM"} if model.can_generate() else {}


def _virtual_sizes(
    model: "PreTrainedModel", tuning: PrefixTuning | PromptTuning | PtuningTuning
) -> dict[str, Any]:
    """Return the model's sizes as peft's configuration of virtual tokens names them."""
    config = model.config.get_text_config()
    _check_packs(model, tuning.method, "Use lora or bottleneck")
    if not hasattr(config, "num_key_value_heads"):
        raise RecipeError(
            f"tuning.method {tuning.method}: virtual tokens need a causal decoder, found "
            f"{type(model).__name__}. Use lora or bottleneck."
        )
    return {
        "num_virtual_tokens": tuning.virtual_tokens,
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "token_dim": config.hidden_size,
        # peft's number for a decoder or an encoder alone.
        "num_transformer_submodules": 1,
        "task_type": "CAUSAL_LM" if model.can_generate() else "FEATURE_EXTRACTION",
        "base_model_name_or_path": config.name_or_path or None,
    }


def _check_packs(model: "PreTrainedModel", what: str, remedy: str) -> None:
    """Raise RecipeError if a policy runs on padded rows; scorers know no end of a prompt anyway."""
    kind = model.config.get_text_config().model_type
    if model.can_generate() and kind not in PACKS:
        raise RecipeError(
            f"tuning.method {what} needs packed rows, which {kind} models do not support. {remedy}."
        )


def _targets(model: "PreTrainedModel", targets: Targets) -> str | list[str]:
    """Return peft's ``target_modules`` after checking that each names a linear layer."""
    _check_targets(model, targets)
    return targets if isinstance(targets, str) else list(targets)


def _names(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, _ in model.named_modules()}


def _ia3_targets(model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the keys, values and inner MLP activations, for decoders and for BERT."""
    names = _names(model)
    if {"k_proj", "v_proj", "down_proj"} <= names:
        return ["k_proj", "v_proj", "down_proj"], ["down_proj"]
    if {"key", "value", "intermediate"} <= names:
        return [r"key", r"value", "output.dense"], ["output.dense"]
    raise RecipeError(_lacking(model, "ia3", "k_proj, v_proj, down_proj (or key, value, output)"))


def _projections(model: nn.Module) -> list[str]:
    """Return the output projections of attention and the MLP."""
    names = _names(model)
    if {"o_proj", "down_proj"} <= names:
        return ["o_proj", "down_proj"]
    if {"attention", "intermediate", "output"} <= names:
        return ["output.dense"]
    raise RecipeError(_lacking(model, "bottleneck", "o_proj, down_proj (or BERT's output.dense)"))


def _layers(model: "PreTrainedModel", tuning: LoreftTuning) -> list[str]:
    config = model.config.get_text_config()
    num = config.num_hidden_layers
    if tuning.rank > config.hidden_size:
        raise RecipeError(
            f"tuning.rank: {tuning.rank} dimensions for hidden states of {config.hidden_size}; "
            "expected fewer"
        )
    numbers = range(num) if tuning.layers == "all" else tuning.layers
    if any(i >= num for i in numbers):
        raise RecipeError(
            f"tuning.layers: found {max(numbers)}, expected numbers from 0 to {num - 1}: the model "
            f"has {num} layers"
        )
    # BERT and its relatives call the list of their layers `layer`.
    name = "layers" if "layers" in _names(model) else "layer"
    return [f"{name}.{i}" for i in numbers]


def _linears(model: nn.Module, targets: Targets) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers that ``targets`` names, except the output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        wanted = targets == "all-linear" or name.rpartition(".")[2] in targets
        if isinstance(module, nn.Linear) and module is not head and wanted:
            yield name, module


def _check_targets(model: "PreTrainedModel", targets: Targets) -> None:
    """Raise if a target is not a linear layer, since peft ignores it if another target is."""
    if targets == "all-linear":
        return
    from transformers.pytorch_utils import Conv1D

    linear = (nn.Linear, Conv1D)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    # A tied head is left out: an adapter on it alone would not fit the embeddings.
    named = {name: m for name, m in model.named_modules() if not (tied and m is head)}
    kinds = sorted({n.rpartition(".")[2] for n, m in named.items() if isinstance(m, linear)})
    for target in targets:
        hit = [m for name, m in named.items() if f".{name}".endswith(f".{target}")]
        if not hit or not all(isinstance(m, linear) for m in hit):
            found = type(hit[0]).__name__ if hit else "no layer of its own"
            raise RecipeError(
                f"tuning.targets: '{target}' names {found}, expected linear layers of "
                f"{type(model).__name__}: {', '.join(kinds)}"
            )


def _check_blocks(model: nn.Module, tuning: OftTuning) -> None:
    """Raise for a block size that peft would silently change."""
    for name, module in _linears(model, tuning.targets):
        if module.in_features % tuning.block_size:
            fits = [b for b in range(2, 129) if module.in_features % b == 0]
            raise RecipeError(
                f"tuning.block_size: {tuning.block_size} does not divide the {module.in_features} "
                f"inputs of {name}. Use one of {', '.join(map(str, fits))}, or other targets."
            )


def _check_norms(model: nn.Module, tuning: LoraTuning) -> None:
    """Raise if all weights of an output are 0: dora divides by their norm and would return NaN."""
    norms: dict[str, bool] = {}
    for name, module in _linears(model, tuning.targets):
        kind = name.rpartition(".")[2]
        norms[kind] = norms.get(kind, True) and bool(module.weight.any(1).all())
    dead, alive = ([kind for kind, ok in norms.items() if ok == held] for held in (False, True))
    if dead:
        raise RecipeError(
            "tuning.method dora divides by the norm of each output's weights, which is 0 for "
            f"outputs of {', '.join(dead)}. Exclude them: tuning.targets: [{', '.join(alive)}], "
            "or use lora."
        )


def _lacking(model: nn.Module, method: str, wanted: str) -> str:
    return (
        f"tuning.method {method}: {type(model).__name__} has no layers named {wanted}. "
        "Use lora, which works on every linear layer."
    )
