"""Stage encoder: import an encoder as the backbone of a classify or reward stage."""

from functools import partial
from pathlib import Path
from typing import Any, cast

import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from align.core import distributed
from align.core.model_folder import refuse_unpadded
from align.models.bringing import check_folder, one_line, refuse_not_finite
from align.models.links import save_model
from align.models.loading import bringing_in, load_tokenizer
from align.preflight.checks import Finding
from align.recipe.schema import EncoderStage
from align.stages.base import Prepared, StageContext, StageResult


def prepare(spec: EncoderStage, context: StageContext) -> Prepared:
    """Import the encoder with its weights and tokenizer."""
    check_folder(spec.path, causal=False)
    exists = Path(spec.path).exists()
    with one_line(spec.path, "a tokenizer") if exists else bringing_in(spec.path):
        tokenizer = load_tokenizer(spec.path)
    refuse_unpadded(spec.path, padded=tokenizer.pad_token_id is not None)
    with one_line(spec.path, "an encoder"):
        # With its own class all weights are loaded, also a head that a later stage may not need.
        kind = _saved_class(spec.path)
        model, info = kind.from_pretrained(
            spec.path, output_loading_info=True, trust_remote_code=False
        )
    refuse_not_finite(spec.path, model)
    # transformers initializes missing weights at random; those are not part of the encoder.
    own = {k: v for k, v in model.state_dict().items() if k not in info["missing_keys"]}
    source, out = Path(spec.path), context.out / "model"

    def save() -> str:
        told = save_model(model, out, state=own, source=source)
        tokenizer.save_pretrained(str(out))
        return told

    told = distributed.on_first_rank(save)
    total = float(sum(x.numel() for x in own.values()))
    return Prepared(
        train=lambda: StageResult({"model/parameters": total}),
        checks=[
            ("weights", lambda: Finding(told)),
            ("vocabulary", partial(fits, model, tokenizer)),
        ],
    )


def fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Finding:
    """Check that the encoder has an embedding for every token."""
    embeddings = cast("nn.Embedding", model.get_input_embeddings()).num_embeddings
    largest = max(tokenizer.get_vocab().values())
    return Finding(
        f"largest token {largest:,} of {embeddings:,}",
        "smaller",
        "ok" if largest < embeddings else "fail",
        "the tokenizer belongs to another model",
    )


def _saved_class(path: str) -> Any:
    """Return the class that the model was saved as, so that no weight is lost."""
    names = AutoConfig.from_pretrained(path, trust_remote_code=False).architectures or []
    return getattr(transformers, names[0], AutoModel) if names else AutoModel
