"""Load the model of an artifact, with its adapter if it needs one."""

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from align.core.errors import ArtifactError, TrainingError
from align.models.loading import load_policy, load_tokenizer, set_dropout
from align.recipe.schema.tuning import METHODS, QloraTuning, TuningSpec
from align.recipe.starts import start_problem
from align.tuning.files import unmerged_adapter, with_adapter
from align.tuning.rows import refuse_untrained, untrained_tokens
from align.tuning.wrap import add_tuner
from reward_models.scalar import RewardModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def load_tuned_policy(
    model_dir: Path | str,
    *,
    dtype: str,
    gradient_checkpointing: bool = False,
    shards: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Load a policy, with its adapter if that is not merged; ``shards``: see ``load_policy``."""
    model = load_policy(
        model_dir, dtype=dtype, gradient_checkpointing=gradient_checkpointing, shards=shards
    )
    return with_adapter(model, model_dir).eval()


def load_reward_model(model_dir: Path | str, dtype: torch.dtype = torch.float32) -> RewardModel:
    """Load a reward model, with its adapter if that is not merged."""
    return attach_adapter(RewardModel.load(model_dir, dtype), model_dir)


def attach_adapter(model: RewardModel, model_dir: Path | str) -> RewardModel:
    """Add the adapter that a loaded reward model may need, since reward_models has none."""
    model.backbone = with_adapter(model.backbone, model_dir)
    return model.eval()


def load_classifier(model_dir: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    """Load a classifier, with its adapter if that is not merged."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        str(model_dir), dtype=dtype, trust_remote_code=False
    )
    # The adapter is on the base; the head was saved in full.
    whole = with_adapter(model.base_model, model_dir)
    setattr(model, model.base_model_prefix, whole)
    return model.eval()


def load_for_training(
    model_dir: Path | str,
    tuning: TuningSpec,
    *,
    dtype: str,
    gradient_checkpointing: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
    shards: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Load a policy and add what ``tuning`` trains; an unmerged adapter is trained further.

    Args:
        model_dir: ``model/`` of an artifact, checked with ``check_start``.
        tuning: the stage's tuning block.
        dtype: dtype of the weights that are not in 4 bits.
        gradient_checkpointing: trade compute for memory.
        dropout: dropout of the model itself, not of its adapter.
        seed: random seed of new weights.
        shards: see ``load_policy``.

    Raises:
        RecipeError: the method freezes the row of a token that was never trained.
    """
    model = load_policy(
        model_dir,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        quantization=quantization(tuning, dtype),
        shards=shards,
    )
    # An adapter that is trained further has decided about them at its start.
    further = unmerged_adapter(model_dir) is not None
    tokens = [] if further else tokens_to_train(model, model_dir, tuning)
    if dropout:
        set_dropout(model, dropout)
    if gradient_checkpointing and tuning.method != "full":
        # Frozen embeddings return states without gradient, which checkpointed layers would drop.
        model.enable_input_require_grads()
    if further:
        return with_adapter(model, model_dir, trainable=True)
    return add_tuner(model, tuning, seed=seed, tokens=tokens)


def tokens_to_train(
    model: "PreTrainedModel", model_dir: Path | str, tuning: TuningSpec
) -> list[int]:
    """Return the tokens whose rows ``tuning`` has to train because nothing has trained them yet.

    Raises:
        RecipeError: there are such tokens, and the method freezes them.
    """
    if tuning.method == "full" or "lm_head" in getattr(tuning, "targets", ()):
        return []
    found = untrained_tokens(model, model_dir)
    if not tuning.trains_rows:
        refuse_untrained(found, model_dir, f"tuning.method {tuning.method}")
    if found:
        names = load_tokenizer(model_dir).convert_ids_to_tokens(sorted(found))
        log.info("rows of new tokens are trained beside the adapter: %s", ", ".join(names))
    return sorted(found)


def quantization(tuning: TuningSpec, dtype: str) -> Any:
    """Return transformers' 4-bit configuration for qlora, or None for other methods.

    Raises:
        TrainingError: bitsandbytes is not installed.
    """
    if not isinstance(tuning, QloraTuning):
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise TrainingError(
            "tuning.method qlora needs bitsandbytes, which is not installed. Run "
            "pip install 'align-suite[qlora]', or use method lora."
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        # As in the paper: NormalFloat, and quantized scales (arXiv:2305.14314 section 3).
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def check_start(model_dir: Path, made_by: object, tuning: TuningSpec) -> None:
    """Raise if a stage would train on top of an adapter that is neither merged nor continued.

    Args:
        model_dir: ``model/`` of the artifact from which the stage starts.
        made_by: the ``tuning`` block of the stage that wrote it, from its manifest.
        tuning: the tuning block of the new stage.

    Raises:
        ArtifactError: the message lists alternatives.
    """
    found = unmerged_adapter(model_dir)
    if found is None:
        return
    folder, method = found
    if METHODS[method].continues and made_by == tuning.model_dump(mode="json"):
        return
    raise ArtifactError(f"{folder}: {start_problem(method)}")
