"""Read and write adapters in peft's format, and load models that depend on an adapter.

An artifact's ``model/`` contains merged weights if the adapter can be merged; ``adapter/`` is then
optional. Otherwise ``model/`` contains the frozen weights, and only both together are the model:
``with_adapter`` adds the adapter.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from align.core.errors import ArtifactError
from align.recipe.schema.tuning import METHODS
from align.tuning.light_peft import peft_for

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT = (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError)
"""Errors of peft about an adapter that does not fit its base, or cannot be merged."""
_TABLES = {
    "embeddings": r"\.(embed_tokens|word_embeddings|wte|embed_in)\.",
    "head": r"\.(lm_head|embed_out)\.",
}
_TABLE = re.compile("|".join(_TABLES.values()))
"""Matches the names of an adapter's tensors that belong to the embeddings or to their head."""


def unmerged_adapter(model_dir: Path | str) -> tuple[Path, str] | None:
    """Return the adapter without which a model folder is incomplete.

    Args:
        model_dir: ``model/`` of an artifact; the adapter is in ``adapter/`` beside it.

    Returns:
        The adapter's folder and its method, or None if ``model/`` is complete.
    """
    folder = Path(model_dir).parent / "adapter"
    if not (folder / CONFIG).is_file():
        return None
    kind = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["peft_type"]
    # Only methods that cannot be merged have a peft_type; other adapters are optional.
    methods = [method for method, tuning in METHODS.items() if tuning.peft_type == kind]
    return (folder, methods[0]) if methods else None


def refuse_unmerged(model_dir: Path, reader: str) -> None:
    """Raise ArtifactError if ``model_dir`` needs an adapter that the reader does not support."""
    found = unmerged_adapter(model_dir)
    if found is not None:
        raise ArtifactError(
            f"{found[0]}: this {found[1]} adapter cannot be merged into {model_dir}, and "
            f"{reader} needs merged weights. Use a tuning method that can be merged (lora)."
        )


def with_adapter(
    model: "PreTrainedModel", model_dir: Path | str, *, trainable: bool = False
) -> Any:
    """Add the adapter that ``model_dir`` needs to its loaded model, frozen by default."""
    found = unmerged_adapter(model_dir)
    if found is None:
        return model
    from safetensors.torch import load_file

    from align.tuning import bottleneck, loreft  # noqa: F401  registers them with peft

    peft = peft_for(model)
    folder, _ = found
    config = peft.PeftConfig.from_pretrained(str(folder))
    # peft freezes adapters that it loads in inference mode.
    config.inference_mode = not trainable
    if not config.is_prompt_learning:
        loaded = peft.PeftModel.from_pretrained(
            model, str(folder), config=config, is_trainable=trainable
        )
        return loaded
    from align.tuning.virtual import VirtualTokens

    virtual = VirtualTokens(model, config)
    virtual.load_adapter_state(load_file(folder / WEIGHTS))
    return virtual.requires_grad_(False)


def with_saved_adapter(model: "PreTrainedModel", folder: Path | str) -> Any:
    """Return the model with the adapter in ``folder``, as peft alone loads both."""
    return peft_for(model).PeftModel.from_pretrained(model, str(folder))


def base_of_adapter(folder: Path | str) -> str:
    """Return the model on which a folder's adapter was trained: a folder or a hub id.

    Raises:
        ArtifactError: the adapter's configuration cannot be read, or does not name a model.
    """
    path = Path(folder) / CONFIG
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: no base_model_name_or_path to merge onto: {error}") from error
    if not isinstance(name, str) or not name:
        raise ArtifactError(
            f"{path}: base_model_name_or_path is {name!r}. Set it to the base folder."
        )
    is_local = name.startswith(("/", ".", "~")) or name.count("/") > 1
    if is_local and not Path(name).exists():
        raise ArtifactError(
            f"{path}: base_model_name_or_path is {name!r}, and there is no such folder. Set it to "
            "the folder or hub id of the model that the adapter was trained on."
        )
    return name


def rows_of_adapter(folder: Path | str) -> dict[str, int]:
    """Return the rows that an adapter has for the embeddings and for the head of its base.

    Its training may have added tokens. It then contains whole tables, or single rows by number; a
    table of which it has none is 0.
    """
    from safetensors import safe_open

    config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    given = config.get("trainable_token_indices") or []
    listed = list(given.values()) if isinstance(given, dict) else [given]
    single = max((i + 1 for ids in listed for i in ids if isinstance(i, int)), default=0)
    found = dict.fromkeys(_TABLES, 0)
    if not (file := Path(folder) / WEIGHTS).is_file():
        return found
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a dict)
            for table, pattern in _TABLES.items():
                if re.search(pattern, name) is None:
                    continue
                whole = name.endswith(".weight")
                num = tensors.get_slice(name).get_shape()[0] if whole else 0
                num = single if name.endswith(".trainable_tokens_delta") else num
                found[table] = max(found[table], num)
    return found


def merged_onto(model: "PreTrainedModel", folder: Path | str) -> Any:
    """Return the model with the folder's adapter merged into its weights.

    Raises:
        ArtifactError: the adapter does not fit the model, or cannot be merged.
    """
    try:
        tuned = peft_for(model).PeftModel.from_pretrained(model, str(folder))
        # Loaded again for the report: peft only warns of missing names, and drops unexpected ones.
        report = tuned.load_adapter(str(folder), "default")
    except _PEFT as error:
        told = " ".join(str(error).split())[:300]
        raise ArtifactError(f"{folder}: cannot be merged onto its base: {told}") from error
    surplus = _without_copies(report.unexpected_keys, Path(folder))
    faults = [
        ("in its files but not in the model", surplus),
        ("missing from its files", sorted(report.missing_keys)),
    ]
    told = [f"{len(names)} weights {what}, such as {names[0]}" for what, names in faults if names]
    if told:
        raise ArtifactError(
            f"{folder}: {'; '.join(told)}: the adapter belongs to another base. Set "
            f"base_model_name_or_path in {CONFIG} to the model that it was trained on."
        )
    try:
        _untie_for_merging(tuned)
        return tuned.merge_and_unload()
    except _PEFT as error:
        told = " ".join(str(error).split())[:300]
        raise ArtifactError(f"{folder}: cannot be merged onto its base: {told}") from error


def _without_copies(surplus: Sequence[str], folder: Path) -> list[str]:
    """Return the unexpected names in order, without tables that the file has a second time.

    peft writes an enlarged table both as a trained module and as a table, and a tied one both as
    the embeddings and as their head, and reads one of the two.
    """
    from safetensors.torch import load_file

    tables = [name for name in surplus if _TABLE.search(name)]
    if not tables or not (folder / WEIGHTS).is_file():
        return sorted(surplus)
    saved = load_file(folder / WEIGHTS)
    read = [value for name, value in saved.items() if _TABLE.search(name) and name not in surplus]
    copies = {n for n in tables if n in saved and any(torch.equal(saved[n], v) for v in read)}
    return sorted(set(surplus) - copies)


def _untie_for_merging(tuned: Any) -> None:
    """Untie head and embeddings if an adapter changes only one of them.

    An adapter changes the outputs of one module, so that merging it into weights that both share
    would change the other one too.
    """
    base = tuned.get_base_model()
    pair = [base.get_input_embeddings(), base.get_output_embeddings()]
    own = [m.get_base_layer() if hasattr(m, "get_base_layer") else m for m in pair if m is not None]
    adapted = [hasattr(module, "get_base_layer") for module in pair]
    if len(own) == 2 and adapted[0] != adapted[1] and own[0].weight is own[1].weight:
        own[1].weight = nn.Parameter(own[1].weight.detach().clone())


def adapter_state(model: Any) -> tuple[dict[str, Tensor], Any]:
    """Return the adapter's tensors on the CPU under peft's names, and its configuration.

    Both belong to the weights at the start of the stage. Parameters must be whole (gathered).
    """
    import peft

    from align.tuning import pissa
    from align.tuning.virtual import VirtualTokens

    config = model.peft_config["default"]
    if isinstance(model, VirtualTokens):
        return model.adapter_state(), config
    state = {
        k: v.detach().cpu().clone()
        for k, v in peft.get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    return pissa.as_lora(model, state) if pissa.is_pissa(model) else (state, config)


def save_adapter(state: dict[str, Tensor], config: "PeftConfig", folder: Path) -> None:
    """Write an adapter in peft's format."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.contiguous() for k, v in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    # Saved as an inference adapter, as peft does; the stage may still train.
    inference, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = inference
    # peft writes sets in the order of Python's hashes, which differs from process to process.
    saved = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    ordered = {
        k: sorted(v) if isinstance(vars(config).get(k), set) else v for k, v in saved.items()
    }
    text = json.dumps(ordered, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")


def num_trained(model: nn.Module) -> tuple[int, int]:
    """Return the number of trained parameters and of all, even if partitioned or in 4 bits."""
    sizes = [(_size(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def _size(parameter: Any) -> int:
    # Under ZeRO-3 a parameter is empty, in 4 bits it has half as many elements.
    if hasattr(parameter, "ds_numel"):
        return parameter.ds_numel
    if hasattr(parameter, "quant_state"):
        return parameter.quant_state.shape.numel()
    return parameter.numel()
