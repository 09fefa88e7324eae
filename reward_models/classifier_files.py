"""A scorer's files in the layout of transformers' ``...ForSequenceClassification`` classes.

transformers, TRL and vLLM then load a decoder with its heads as any other reward model.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

HEAD, SCORE = "head.weight", "score.weight"
BACKBONE = "backbone."
_SPARE = ("pad", "reserved")
"""Parts of the names of special tokens that no text contains."""


def classifier_class(
    config: "PreTrainedConfig", backbone_names: Collection[str]
) -> tuple[str, str] | None:
    """Return transformers' class for a backbone with bias-free heads, or None if it has none.

    Args:
        config: the backbone's configuration.
        backbone_names: names of the backbone's weights.

    Returns:
        The class name, and the prefix that the class adds to the names of the backbone's weights.
    """
    from transformers import AutoModelForSequenceClassification

    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    except ValueError:  # transformers has no such class for this architecture
        return None
    prefix = model.base_model_prefix
    # Other heads, such as BERT's pooler or a bias, would compute another score.
    expected = {f"{prefix}.{name}" for name in backbone_names} | {SCORE}
    return (type(model).__name__, prefix) if set(model.state_dict()) == expected else None


def saved_name(name: str, prefix: str) -> str:
    """Return the name of a scorer's weight in transformers' class."""
    return SCORE if name == HEAD else f"{prefix}.{name.removeprefix(BACKBONE)}"


def weights_files(directory: str | Path) -> list[Path]:
    """Return the files with a scorer's weights; a large one has several."""
    return sorted(Path(directory).glob("model*.safetensors"))


def own_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a scorer's file under the names of ``RewardModel``."""
    if SCORE not in weights:
        return dict(weights)
    rest = {name.split(".", 1)[1]: tensor for name, tensor in weights.items() if name != SCORE}
    return {f"{BACKBONE}{name}": tensor for name, tensor in rest.items()} | {HEAD: weights[SCORE]}


def read_weights(directory: Path, *, heads_only: bool) -> dict[str, Tensor]:
    """Return a scorer's weights under the names of `RewardModel`."""
    from safetensors import safe_open

    found = {}
    for file in weights_files(directory):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if not heads_only or name in (HEAD, SCORE):
                    found[name] = tensors.get_tensor(name)
    return own_names(found)


def classifier_config(
    config: "PreTrainedConfig",
    name: str,
    *,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    pad_token_id: int | None,
) -> "PreTrainedConfig":
    """Return a copy of the configuration for the class ``name`` with one label per head."""
    config = copy.deepcopy(config)
    found: Any = config
    found.architectures = [name]
    found.num_labels = len(mean) if isinstance(mean, Sequence) else 1
    # vLLM applies a sigmoid or softmax to the scores of any other type.
    found.problem_type = "regression"
    found.scorer_mean, found.scorer_std = mean, std
    # The saved weights have full precision even if training held them in 4 bits.
    if hasattr(found, "quantization_config"):
        del found.quantization_config
    for part in (found, config.get_text_config()):
        part.pad_token_id = pad_token_id
    return config


def padding_id(
    tokenizer: "PreTrainedTokenizerBase", stop_ids: Collection[int], *, num_rows: int
) -> int | None:
    """Return a token that can pad scored rows, or None if the tokenizer has none.

    transformers reads the score of a decoder at the last token that differs from the pad token.
    Rows end with a stop token, so no stop token can be the pad token.

    Args:
        tokenizer: the scorer's tokenizer.
        stop_ids: tokens that end a response.
        num_rows: rows of the embeddings; an id beyond them has none.
    """
    special = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    spare = [i for i, text in special.items() if any(part in text.lower() for part in _SPARE)]
    candidates = [tokenizer.pad_token_id, *spare, tokenizer.unk_token_id]
    fits = (i for i in candidates if i is not None and i < num_rows and i not in stop_ids)
    return next(fits, None)
