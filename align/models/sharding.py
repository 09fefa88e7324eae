"""Load a model straight into the shards of ZeRO-3, so that no rank ever has all of its weights."""

import ctypes
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from reward_models.classifier_files import BACKBONE
from reward_models.scalar import drop_pooler

log = logging.getLogger(__name__)
Places = Mapping[str, tuple[Path, str]]
"""Parameter -> the file that has it, and its name there."""
_MMAP_THRESHOLD = -3
"""glibc's M_MMAP_THRESHOLD."""
_handles: WeakKeyDictionary[nn.Module, list[RemovableHandle]] = WeakKeyDictionary()


def saved_names(model_dir: Path) -> dict[str, Path]:
    """Return the file of every tensor of a saved model."""
    names: dict[str, Path] = {}
    for file in sorted(model_dir.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names |= dict.fromkeys(tensors.keys(), file)
    return names


def saved_tensor(file: Path, name: str) -> Tensor:
    """Return one tensor of a file."""
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def load_in_shards(
    model_dir: Path,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    attention: str | None,
    deepspeed_config: Mapping[str, Any],
) -> PreTrainedModel | None:
    """Return a causal language model in eval mode whose parameters are sharded over the ranks.

    Every rank reads one tensor after the other and keeps its part. Until the Learner takes the
    model over, modules gather their weights for a forward pass without gradient.

    Args:
        model_dir: folder of the saved model. config: its configuration.
        dtype: of the weights. attention: name of the attention; None leaves it to transformers.
        deepspeed_config: the configuration with which the Learner will wrap the model.

    Returns:
        The model; None if transformers must load it, since its files are not the model's tensors
        one to one.
    """
    files = saved_names(model_dir)
    with _without_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    expected = set(model.state_dict()) | _tied(model)
    why = ""
    if surplus := sorted(files.keys() - expected):
        why = f"its files have {surplus[0]} under another name ({len(surplus)} more tensors)"
    places = {name: (file, name) for name, file in files.items()}
    if not _fill(model, places, model_dir, dtype, deepspeed_config, why=why):
        return None
    if (model_dir / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(model_dir))
    return model.eval()


def load_backbone_in_shards(
    model_dir: Path,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    attention: str | None,
    deepspeed_config: Mapping[str, Any],
) -> PreTrainedModel | None:
    """Return a model without heads and pooler in shards, as ``load_in_shards`` does.

    Args:
        model_dir: folder of a model with any head, of a model without one, or of a scorer.
        config: its configuration. dtype, attention, deepspeed_config: see ``load_in_shards``.
    """
    files = saved_names(model_dir)
    with _without_weights():
        model = AutoModel.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    drop_pooler(model)
    # Files of a model without a head have no prefix, and those of some scorers one of their own.
    prefixes = ("", f"{model.base_model_prefix}.", BACKBONE)
    places = {
        name: (files[prefix + name], prefix + name)
        for name in model.state_dict()
        for prefix in prefixes
        if prefix + name in files
    }
    filled = _fill(model, places, model_dir, dtype, deepspeed_config)
    return model.eval() if filled else None


def is_sharded(module: nn.Module) -> bool:
    """Return whether ZeRO-3 shards the parameters of a model."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def hand_over(module: nn.Module) -> None:
    """Stop gathering weights for forward passes: DeepSpeed does it from now on."""
    for part in module.modules():
        for handle in _handles.pop(part, []):
            handle.remove()


@contextmanager
def _without_weights() -> Iterator[None]:
    """Register parameters without memory inside the block; buffers are computed as usual."""
    # Before the model is built: each of its layers allocates weights and frees them again.
    _return_freed_memory()
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _tied(model: PreTrainedModel) -> set[str]:
    """Return the weights that are others under a second name."""
    return set(getattr(model, "all_tied_weights_keys", None) or {})


def _unfit(model: PreTrainedModel, places: Places, dtype: torch.dtype) -> str:
    """Return why a model cannot be filled tensor by tensor; "" if it can."""
    expected = set(model.state_dict()) - _tied(model)
    if missing := sorted(expected - places.keys()):
        return f"no tensor {missing[0]} in its files ({len(missing)} missing)"
    if expected - {name for name, _ in model.named_parameters()}:
        return "it has buffers in its files"
    if dtype != torch.float32 and getattr(model, "_keep_in_fp32_modules", None):
        return "parts of it stay in float32"
    return ""


def _return_freed_memory() -> None:
    """Make the C library return freed blocks of 1 MiB and more to the system at once.

    glibc keeps blocks of up to 32 MiB: those of gathered weights add up to the whole model.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, 2**20)


def _fill(
    model: PreTrainedModel,
    places: Places,
    model_dir: Path,
    dtype: torch.dtype,
    deepspeed_config: Mapping[str, Any],
    *,
    why: str = "",
) -> bool:
    """Read every parameter and keep this rank's part of it; return whether that is possible.

    Args:
        why: a reason against it that the caller has found.
    """
    import deepspeed

    if why := why or _unfit(model, places, dtype):
        log.warning(
            "%s: every rank loads the whole model before ZeRO-3 shards it: %s", model_dir, why
        )
        return False
    tied = _tied(model)
    first: Any = None
    for name, empty in list(model.named_parameters(remove_duplicate=False)):
        if name in tied:
            continue
        # Pages of the file, not a copy; they leave the memory with the tensor.
        data = saved_tensor(*places[name]).to(dtype)
        assert data.shape == empty.shape, f"{name}: {tuple(data.shape)} for {tuple(empty.shape)}"
        parameter: Any = nn.Parameter(data, requires_grad=empty.requires_grad)
        del data
        owner, _, own = name.rpartition(".")
        model.get_submodule(owner)._parameters[own] = parameter
        # The whole tensor is freed here.
        if first is None:
            deepspeed.zero.Init(
                module=nn.ParameterList([parameter]), config_dict_or_path=dict(deepspeed_config)
            )
            first = parameter
        else:
            first.convert_to_zero_parameters(param_list=[parameter])
    # The tie was cut when the parameters moved to the meta device.
    model.tie_weights()
    _handles[model] = _gather_on_use(model)
    return True


def _gather_on_use(model: nn.Module) -> list[RemovableHandle]:
    """Gather a module's own parameters while its forward runs."""
    import deepspeed

    handles = []
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if not own:
            continue
        # One stack for each module: nested modules gather and release on their own.
        stack = ExitStack()

        def before(_: nn.Module, __: object, own: list = own, stack: ExitStack = stack) -> None:
            assert not torch.is_grad_enabled(), "sharded weights have no gradient before training"
            stack.enter_context(deepspeed.zero.GatheredParameters(own))

        def after(_: nn.Module, __: object, ___: object, stack: ExitStack = stack) -> None:
            stack.close()

        handles.append(module.register_forward_pre_hook(before))
        # After an error too: weights that stay gathered would fill the memory.
        handles.append(module.register_forward_hook(after, always_call=True))
    return handles
