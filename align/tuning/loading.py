"""Load the model of an artifact, with its adapter if it needs one."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from align.core.errors import ArtifactError, RecipeError, TrainingError
from align.models.loading import load_policy, load_tokenizer, set_dropout, stop_token_ids
from align.recipe.schema.tuning import METHODS, QloraTuning, TuningSpec
from align.recipe.starts import start_problem
from align.tuning.files import unmerged_adapter, with_adapter
from align.tuning.wrap import add_tuner
from reward_models.scalar import RewardModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEAR_MEAN = 0.01
"""A row is untrained if its distance to its initial value, the mean, is below this fraction."""


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
        RecipeError: the method freezes the row of a stop token that was never trained.
    """
    model = load_policy(
        model_dir,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        quantization=quantization(tuning, dtype),
        shards=shards,
    )
    if tuning.method != "full":
        _check_stops_trained(model, model_dir, tuning)
    if dropout:
        set_dropout(model, dropout)
    if gradient_checkpointing and tuning.method != "full":
        # Frozen embeddings return states without gradient, which checkpointed layers would drop.
        model.enable_input_require_grads()
    if unmerged_adapter(model_dir) is not None:
        return with_adapter(model, model_dir, trainable=True)
    return add_tuner(model, tuning, seed=seed)


@torch.no_grad()
def _check_stops_trained(
    model: "PreTrainedModel", model_dir: Path | str, tuning: TuningSpec
) -> None:
    """Raise if a stop token's row would be frozen at the mean with which it was added.

    The output head would score the stop token like an average token, so it is never sampled.
    """
    if "lm_head" in getattr(tuning, "targets", ()):
        return
    tokenizer, head = load_tokenizer(model_dir), model.get_output_embeddings()
    table: Tensor = cast("nn.Linear", head).weight
    firsts = sorted({*tokenizer.all_special_ids, *stop_token_ids(model_dir)})
    for stop in stop_token_ids(model_dir)[:1]:
        # Rows of new tokens were set to the mean of the rows before the first new one. Which one
        # that was is not recorded, so each special token up to the stop token is tried.
        for first in (i for i in firsts if 0 < i <= stop < len(table)):
            mean = table[:first].float().mean(0)
            if bool((table[stop].float() - mean).norm() <= NEAR_MEAN * mean.norm()):
                raise RecipeError(
                    f"tuning.method {tuning.method}: the stop token "
                    f"{tokenizer.convert_ids_to_tokens(stop)!r} has no trained row in {model_dir}: "
                    "it was added, or the model was never trained on it. This method freezes the "
                    "row, so the token could never be sampled. Train with method full first, or "
                    "use a stop token that the model knows (stages.<base>.tokenizer: "
                    "{chat_template: plain, stop_token: TOKEN})"
                )


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
