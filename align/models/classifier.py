"""Classifiers: a fresh head on a decoder or an encoder, kept in the format of transformers.

``AutoModelForSequenceClassification`` and transformers' pipelines read what is saved here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from align.core.errors import ArtefactError
from align.models.loading import disable_dropout, load_tokenizer
from align.models.padded import right_padded


class ClassLogits(nn.Module):
    """Give the logits of the classes for each sequence of a packed row: (num, C) float32.

    Args:
        model: a model of transformers with a head for sequences.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Lay the sequences out, right-padded, and run the model on them.

        Args:
            input_ids: (1, N). position_ids: (1, N), restarting at 0 with each sequence.
        """
        laid = right_padded(input_ids, position_ids, fill=self.model.config.pad_token_id)
        return self.model(input_ids=laid.input_ids, attention_mask=laid.mask).logits.float()


def classifier_from(
    model_dir: Path, classes: Sequence[str], *, dtype: str, quantization: Any = None
) -> tuple[Any, list[str]]:
    """Put a fresh head for these classes on a saved model, dropout off.

    Returns:
        The model, and the weights below the head that ``model_dir`` lacks: they are random too.
    """
    config = _config(model_dir, classes)
    if quantization is not None:
        bare = _skeleton(config)
        heads = [n for n, _ in bare.named_children() if n != bare.base_model_prefix]
        quantization.llm_int8_skip_modules = heads
    model, info = AutoModelForSequenceClassification.from_pretrained(
        str(model_dir),
        config=config,
        dtype=getattr(torch, dtype),
        quantization_config=quantization,
        output_loading_info=True,
        trust_remote_code=False,
    )
    disable_dropout(model)
    below = f"{model.base_model_prefix}."
    return model.train(), sorted(n for n in info["missing_keys"] if n.startswith(below))


def save_classifier(
    state: Mapping[str, Tensor],
    classes: Sequence[str],
    *,
    source_dir: Path,
    directory: Path,
    dtype: str,
) -> None:
    """Write weights by transformers' names, with the classes, and the tokenizer of ``source_dir``.

    Raises:
        ArtefactError: ``state`` does not hold exactly the weights the architecture has.
    """
    from huggingface_hub import save_torch_state_dict

    config = _config(source_dir, classes)
    skeleton = _skeleton(config)
    expected = set(skeleton.state_dict())
    if expected != set(state):
        raise ArtefactError(
            f"weights to save do not fit {type(skeleton).__name__}: missing "
            f"{sorted(expected - set(state))[:3]}, unexpected {sorted(set(state) - expected)[:3]}"
        )
    config.architectures, config.dtype = [type(skeleton).__name__], dtype
    directory.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(
        {k: v.contiguous() for k, v in state.items()}, str(directory), metadata={"format": "pt"}
    )
    config.save_pretrained(str(directory))
    load_tokenizer(source_dir).save_pretrained(str(directory))


def _config(model_dir: Path, classes: Sequence[str]) -> Any:
    config = AutoConfig.from_pretrained(
        str(model_dir),
        num_labels=len(classes),
        id2label=dict(enumerate(classes)),
        label2id={name: i for i, name in enumerate(classes)},
        problem_type="single_label_classification",
        trust_remote_code=False,
    )
    # The head of a decoder reads the last token that is not this one.
    config.pad_token_id = load_tokenizer(model_dir).pad_token_id
    return config


def _skeleton(config: Any) -> Any:
    """Give the architecture without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)
