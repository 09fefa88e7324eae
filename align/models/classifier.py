"""Classifiers: a new head on a decoder or an encoder, saved in the format of transformers.

``AutoModelForSequenceClassification`` and transformers' pipelines can load the saved model.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from align.core import distributed
from align.core.storage import MIB, write_patiently
from align.models.loading import disable_dropout, load_tokenizer
from align.models.padded import right_padded
from align.models.saving import fitting_weights, write_weights


class ClassLogits(nn.Module):
    """Compute the class logits for each sequence of a packed row: (num, C) float32.

    Args:
        model: a transformers model with a sequence classification head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Run the model on the right-padded sequences of a packed row.

        Args:
            input_ids: (1, N).
            position_ids: (1, N), restarting at 0 with each sequence.
        """
        # (1, N) -> (num, T).
        laid = right_padded(input_ids, position_ids, fill=self.model.config.pad_token_id)
        return self.model(input_ids=laid.input_ids, attention_mask=laid.mask).logits.float()


def classifier_from(
    model_dir: Path,
    classes: Sequence[str],
    *,
    dtype: str,
    quantization: BitsAndBytesConfig | None = None,
) -> tuple[Any, list[str]]:
    """Load a saved model with a new head for these classes, dropout off.

    Returns:
        The model, and the weights below the head that ``model_dir`` lacks, which are random too.
    """
    config = _config(model_dir, classes)
    # The new head must not be quantized, since it is trained.
    if quantization is not None:
        # Every child beside the base model belongs to the head.
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
    named: Iterable[tuple[str, Tensor]],
    classes: Sequence[str],
    *,
    source_dir: Path,
    directory: Path,
    dtype: str,
) -> None:
    """Save weights under transformers' names, with the classes and the tokenizer of ``source_dir``.

    Args:
        named: names and tensors, which are written as they come.
        classes: names of the classes. source_dir: the model it was made from.
        directory: made if missing. dtype: of the weights.

    Raises:
        ArtifactError: ``named`` does not contain exactly the weights of the architecture.
    """
    config = _config(source_dir, classes)
    skeleton = _skeleton(config)
    what = type(skeleton).__name__
    config.architectures, config.dtype = [what], dtype
    directory.mkdir(parents=True, exist_ok=True)
    # A missing weight would be random after loading, without an error.
    write_weights(fitting_weights(named, skeleton.state_dict(), what=what), directory)

    def write() -> None:
        config.save_pretrained(str(directory))
        load_tokenizer(source_dir).save_pretrained(str(directory))

    write_patiently(write, folder=directory, needed=MIB, stop=distributed.was_asked)


def _config(model_dir: Path, classes: Sequence[str]) -> Any:
    config = AutoConfig.from_pretrained(
        str(model_dir),
        num_labels=len(classes),
        id2label=dict(enumerate(classes)),
        label2id={name: i for i, name in enumerate(classes)},
        problem_type="single_label_classification",
        trust_remote_code=False,
    )
    # The head of a decoder reads the last token that is not the padding token.
    config.pad_token_id = load_tokenizer(model_dir).pad_token_id
    return config


def _skeleton(config: PreTrainedConfig) -> Any:
    """Return the architecture without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)
