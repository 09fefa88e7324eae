"""Load causal language models and their tokenizers."""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)

from align.core import distributed
from align.core.artifacts import CONFIGS, WEIGHTS, artifact_kind, read_artifact
from align.core.errors import ArtifactError, TrainingError
from align.core.text import unexpanded
from align.models.decoder import SWITCHES, attention_for, form_of, rotary_limit
from align.models.sharding import load_in_shards
from reward_models.scalar import SCORER_FILE, STOPS

log = logging.getLogger(__name__)


@contextmanager
def bringing_in(path: str) -> Iterator[None]:
    """Report a remedy if a model is neither a local folder nor available from the hub.

    Raises:
        ArtifactError: replaces the hub client's error.
    """
    # A hub id has at most one slash and no leading dot; anything else must be a local folder.
    local = path.startswith(("/", ".", "~")) or path.count("/") > 1
    if local and not Path(path).exists():
        raise ArtifactError(f"{path}: no such folder. Correct the path{unexpanded(path)}.")
    if not Path(path).exists():
        _refuse_unreachable(path)
    try:
        yield
    except OSError as error:
        if Path(path).exists() or isinstance(error, ArtifactError):
            raise
        told = " ".join(str(error).split())
        raise ArtifactError(
            f"{path}: no such folder, and it cannot be loaded from the hub: {told} Correct the "
            "name, log in if it is private (hf auth login), or download the model on a "
            "machine with network access and use its folder"
        ) from error


def _refuse_unreachable(name: str) -> None:
    """Raise at once if a hub id is in no cache and the hub has no address or refuses connections.

    Its client would try each file again and again, for a minute.

    Raises:
        ArtifactError: the model cannot be loaded.
    """
    import httpx
    from huggingface_hub import (
        constants,
        get_session,
        is_offline_mode,
        try_to_load_from_cache,
    )

    cached = [try_to_load_from_cache(name, file) for file in CONFIGS]
    if is_offline_mode() or any(isinstance(place, str) for place in cached):
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except httpx.ConnectError as error:
        raise ArtifactError(
            f"{name}: no such folder, not in the cache ({constants.HF_HUB_CACHE}), and "
            f"{constants.ENDPOINT} cannot be reached: {error}. Download the model on a machine "
            "with network access, and use its folder"
        ) from error
    except httpx.HTTPError:
        return  # slow, or an answer that the client knows better how to read


def load_tokenizer(model_dir: Path | str) -> Any:
    """Load the tokenizer saved with a model, with the chat template of the folder."""
    found = AutoTokenizer.from_pretrained(str(model_dir), trust_remote_code=False)
    if not found.chat_template:
        found.chat_template = _template_beside(Path(model_dir))
    if isinstance(found.chat_template, str):
        # The mark that some editors begin a file with would begin every prompt.
        found.chat_template = found.chat_template.removeprefix("\ufeff")
    return found


def _template_beside(folder: Path) -> str | None:
    """Return the chat template of a folder that transformers keeps for processors, or None.

    Raises:
        ArtifactError: the file has no template, or there are several.
    """
    file = folder / "chat_template.json"
    if file.is_file():
        try:
            text = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ArtifactError(f"{file}: no chat_template in it: {error}. Remove it.") from error
        if isinstance(text, str) and text:
            log.warning("%s: its chat template is used", file)
            return text
        raise ArtifactError(f"{file}: chat_template: expected text. Remove the file, or correct it")
    files = sorted((folder / "chat_templates").glob("*.jinja"))
    chosen = [f for f in files if f.stem == "default"] or files
    if len(chosen) > 1:
        raise ArtifactError(
            f"{folder / 'chat_templates'}: {', '.join(f.name for f in chosen)}, and none is named "
            f"default.jinja. Choose one: stages.<base>.tokenizer.chat_template: {chosen[0]}"
        )
    for file in chosen:
        log.warning("%s: its chat template is used", file)
        return file.read_text(encoding="utf-8")
    return None


_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
"""Names under which architectures configure the number of their positions."""


def model_folder(place: Path, kind: str) -> Path:
    """Return the folder with a model's weights; those of a hub id are downloaded first.

    Args:
        place: folder of an artifact or a model, or a hub id.
        kind: expected kind of an artifact, such as ``policy``.

    Raises:
        ArtifactError: the artifact is damaged or of another kind, or the hub has no such model.
    """
    if artifact_kind(place) is not None:
        return read_artifact(place, kind).model_dir
    if place.exists():
        return place
    from huggingface_hub import snapshot_download

    with bringing_in(str(place)):
        return Path(snapshot_download(str(place), allow_patterns=list(WEIGHTS)))


def num_positions(model_dir: Path | str) -> int | None:
    """Return the number of positions of a saved model, or None if no configuration has one."""
    file = Path(model_dir) / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    config = config.get("text_config") or config
    return next((config[name] for name in _POSITIONS if isinstance(config.get(name), int)), None)


def load_policy(
    model_dir: Path | str,
    *,
    dtype: str,
    gradient_checkpointing: bool = False,
    quantization: BitsAndBytesConfig | None = None,
    shards: Mapping[str, Any] | None = None,
) -> Any:
    """Load a causal language model for training on packed rows, dropout off.

    If the sequences of its packed rows would attend to each other, it runs on padded rows instead
    (align.models.decoder). Only ``model/`` is loaded; align.tuning.loading adds an unmerged
    adapter.

    Dropout stays off because the log-probabilities of a policy must be deterministic. Otherwise the
    ratio of PPO and the reference of DPO would be wrong.

    Args:
        model_dir: folder of the model. dtype: of its weights.
        gradient_checkpointing: recompute activations in the backward pass.
        quantization: transformers' 4-bit configuration, None for whole weights.
        shards: configuration of DeepSpeed with ZeRO-3, to load straight into this rank's shards;
            None loads the whole model.
    """
    log.info("loading model %s", describe_folder(Path(model_dir)))
    config = AutoConfig.from_pretrained(str(model_dir), trust_remote_code=False)
    number, attention = getattr(torch, dtype), attention_for(config)
    model: Any = None
    if shards is not None:
        model = load_in_shards(
            Path(model_dir), config, dtype=number, attention=attention, deepspeed_config=shards
        )
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(
            str(model_dir),
            dtype=number,
            attn_implementation=attention,
            quantization_config=quantization,
            trust_remote_code=False,
        )
    disable_dropout(model)
    if quantization is not None:
        keep_layout(model)
    form_of(model)
    # The reentrant variant needs inputs with gradient, which frozen embeddings do not give.
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(distributed.device())


def describe_folder(model_dir: Path) -> str:
    """Return a model's folder and the size of its weights, such as ``runs/x/sft (0.5 GB)``."""
    size = sum(p.stat().st_size for p in model_dir.glob("*.safetensors")) / 1e9
    place = model_dir.parent if model_dir.name == "model" else model_dir
    return f"{place} ({size:.1f} GB)" if size >= 0.05 else str(place)


def check_length(model_dir: Path, max_length: int) -> None:
    """Refuse rows whose rotary factors would depend on the other rows of a batch.

    Raises:
        ArtifactError: ``max_length`` allows them.
    """
    config = AutoConfig.from_pretrained(str(model_dir), trust_remote_code=False)
    limit = rotary_limit(config)
    if limit is not None and max_length > limit:
        raise ArtifactError(
            f"{model_dir}: max_length is {max_length}. " + SWITCHES.format(limit=limit)
        )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of the model to 0, and all other randomness in training.

    Some architectures drop whole layers (layerdrop) or jitter the inputs of their routers.
    """
    _dropout_places(model, 0.0)
    for module in model.modules():
        if hasattr(module, _ROUTER_NOISE):
            # PhiMoE's router uses this number as a threshold without sampling, too: leave it, and
            # keep the router in eval mode, in which it does not sample.
            module.eval().train = lambda mode=True, module=module: module  # type: ignore[method-assign]
            continue
        for name in _numbers(module, _DRAWS):
            setattr(module, name, 0.0)


def set_dropout(model: nn.Module, rate: float) -> None:
    """Set every dropout probability of the model; it takes effect only in training.

    Raises:
        TrainingError: the architecture has no dropout.
    """
    if not _dropout_places(model, rate):
        raise TrainingError(
            f"keep.dropout: {type(model).__name__} has no dropout layer and no attention dropout. "
            "Remove the setting."
        )


_DROPOUT = re.compile(r"dropout|pdrop|drop_prob")
_DRAWS = re.compile(r"layerdrop|jitter|drop_path")
_ROUTER_NOISE = "router_jitter_noise"


def _numbers(module: nn.Module, names: re.Pattern[str]) -> list[str]:
    """Return the attributes of a module that are a probability with one of these names."""
    return [
        name
        for name, value in vars(module).items()
        if names.search(name) and type(value) in (int, float)
    ]


def _dropout_places(model: nn.Module, rate: float) -> int:
    places = 0
    for module in model.modules():
        # Dropout is either a module or a number that an attention layer reads.
        if isinstance(module, _DropoutNd):
            module.p, places = rate, places + 1
            continue
        for name in _numbers(module, _DROPOUT):
            setattr(module, name, rate)
            places += 1
    return places


def keep_layout(model: nn.Module) -> None:
    """Prevent bitsandbytes from repacking 4-bit weights at the first forward without gradient.

    In eval mode on CPUs with bfloat16 instructions, bitsandbytes rounds the scales, so that the
    policy differs before and after an evaluation. It also fails if the input size is not a multiple
    of 64.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore


@torch.no_grad()
def add_embeddings(model: PreTrainedModel, num_tokens: int, new_ids: Sequence[int]) -> None:
    """Initialize the rows of new tokens with the mean of all old ones, in embeddings and head.

    Ids beyond the table enlarge it. Ids within it use spare rows of a padded table that were never
    trained. Tied embeddings stay tied.

    Args:
        model: a causal language model of transformers.
        num_tokens: length of the tokenizer.
        new_ids: tokens that were just added to the tokenizer.
    """
    table = cast("nn.Embedding", model.get_input_embeddings())
    rows = table.num_embeddings
    new = torch.tensor(sorted({*new_ids, *range(rows, num_tokens)}), dtype=torch.long)
    if not len(new):
        return
    # Enlarge the table before the rows are initialized.
    if num_tokens > rows:
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
    # Enlarging may replace the modules.
    head: Any = model.get_output_embeddings()
    tables: list[Tensor] = [cast("nn.Embedding", model.get_input_embeddings()).weight]
    tables += [] if head.weight is tables[0] else [head.weight]
    tables += [] if getattr(head, "bias", None) is None else [head.bias]
    for table in tables:
        # A bfloat16 mean over many rows would stop changing after the first few, so use float32.
        table[new] = table[: int(new.min())].float().mean(0).to(table.dtype)


def saved_names(files: Sequence[Path]) -> Iterator[str]:
    """Yield the names of the tensors in safetensors files, without reading them."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as tensors:
            yield from tensors.keys()


def saved_weights(model_dir: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a saved model, file by file."""
    from safetensors import safe_open

    for file in sorted(model_dir.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_tensor(name)


def stop_token_ids(model_dir: Path | str) -> tuple[int, ...]:
    """Return the stop tokens that a model was saved with, the tokenizer's own first.

    A policy has them in its generation configuration, a scorer in scorer.json.
    """
    tokenizer, scorer = load_tokenizer(model_dir), Path(model_dir) / SCORER_FILE
    found = [tokenizer.eos_token_id]
    if (Path(model_dir) / "generation_config.json").is_file():
        # Chat models often stop at an end-of-turn token as well as at the end of text.
        extra = GenerationConfig.from_pretrained(str(model_dir)).eos_token_id
        found += extra if isinstance(extra, list) else [extra]
    elif scorer.is_file():
        found += json.loads(scorer.read_text(encoding="utf-8")).get(STOPS, [])
    return tuple(dict.fromkeys(t for t in found if t is not None))
