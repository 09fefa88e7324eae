"""Model heads: scorers on a policy, an encoder or another scorer, and the critic's values."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, BitsAndBytesConfig, PreTrainedModel

from align.core import distributed
from align.core.errors import ArtifactError
from align.models.attention import Segments, segments_from_positions
from align.models.decoder import (
    attention_for,
    check_rotary,
    packs,
    padded_states,
    settle_decoder,
)
from align.models.loading import disable_dropout, keep_layout, load_tokenizer
from align.models.logprobs import causal_lm
from align.models.padded import right_padded
from align.models.sharding import load_backbone_in_shards
from reward_models.paired import separator_of
from reward_models.scalar import (
    SCORER_FILE,
    RewardModel,
    drop_pooler,
    exact_attention,
    reads_first,
)


def scorer_from(
    model_dir: Path,
    *,
    dtype: str,
    num_heads: int = 1,
    quantization: BitsAndBytesConfig | None = None,
    shards: Mapping[str, Any] | None = None,
) -> RewardModel:
    """Load the decoder of a policy (with new random heads) or a whole scorer, dropout off.

    Of a scorer with a different number of heads, only the decoder is used.

    Args:
        model_dir: folder of the policy or scorer. dtype: of the weights.
        num_heads: number of heads. quantization: of a policy's decoder, None for whole weights.
        shards: see ``load_policy``. The heads are whole on every rank until the Learner takes them.
    """
    kind = getattr(torch, dtype)
    config = AutoConfig.from_pretrained(str(model_dir), trust_remote_code=False)
    attention = None if reads_first(model_dir) else attention_for(config)
    backbone: Any = None
    if shards is not None:
        backbone = load_backbone_in_shards(
            model_dir, config, dtype=kind, attention=attention, deepspeed_config=shards
        )
    if (model_dir / SCORER_FILE).is_file():
        model = RewardModel.load(model_dir, kind, attn_implementation=attention, backbone=backbone)
        # Keep only the decoder and replace the heads.
        if model.num_heads != num_heads:
            reading = {"reads": model.reads, "separator": model.separator}
            model = _with_heads(model.backbone, kind, num_heads=num_heads, **reading)
    else:
        if backbone is None:
            backbone = AutoModel.from_pretrained(
                str(model_dir),
                dtype=kind,
                attn_implementation=attention,
                quantization_config=quantization,
                trust_remote_code=False,
            )
        model = _with_heads(backbone, kind, num_heads=num_heads)
    disable_dropout(model)
    # Decoders read packed rows, which are probed; encoders get padded rows and need no probe.
    if model.reads == "last":
        keep_layout(model)
        settle_decoder(model.backbone)
    return model.train()


def shared_scorer(model_dir: Path, dtype: torch.dtype, *, shards: Mapping[str, Any]) -> RewardModel:
    """Load the scorer of a reward, with its decoder or encoder in the shards of ZeRO-3.

    Every rank must score as often as the others, each its own rows. A model that cannot be loaded
    in shards is whole.

    Args:
        model_dir: folder of the scorer. dtype: of its weights. shards: see ``load_policy``.
    """
    config = AutoConfig.from_pretrained(str(model_dir), trust_remote_code=False)
    # The attention of a reward that is whole, so that both give the same scores.
    attention = None if reads_first(model_dir) else exact_attention(config)
    backbone = load_backbone_in_shards(
        model_dir, config, dtype=dtype, attention=attention, deepspeed_config=shards
    )
    model = RewardModel.load(model_dir, dtype, backbone=backbone)
    if backbone is not None:
        model.passes = lambda own: int(distributed.global_max(own))
    return model


def _separator(model_dir: Path, encoder: PreTrainedModel) -> int | None:
    """Return the token after which an encoder's second text begins; None if it has one type.

    Raises:
        ArtifactError: the tokenizer does not support pairs of texts.
    """
    try:
        found = separator_of(load_tokenizer(model_dir))
    except ValueError as error:
        raise ArtifactError(f"{model_dir}: {error}") from error
    # The model may have one type even if its tokenizer has two.
    return None if getattr(encoder.config, "type_vocab_size", 0) < 2 else found


def _with_heads(backbone: PreTrainedModel, kind: torch.dtype, **settings: Any) -> RewardModel:
    """Return a scorer with new heads of a dtype on a decoder or encoder."""
    width = backbone.config.get_text_config().hidden_size
    model = RewardModel(backbone, width, **settings)
    model.head.to(kind)  # only the heads: rotary buffers must stay float32
    return model


def scorer_on_encoder(
    model_dir: Path,
    *,
    dtype: str,
    num_heads: int = 1,
    quantization: BitsAndBytesConfig | None = None,
    shards: Mapping[str, Any] | None = None,
) -> tuple[RewardModel, list[str]]:
    """Create a scorer with new random heads on an encoder without its pooler, dropout off.

    Args:
        model_dir, dtype, num_heads, quantization, shards: see ``scorer_from``.

    Returns:
        The model, and the weights below the heads that ``model_dir`` lacks, which are random too.

    Raises:
        ArtifactError: the model is not an encoder whose tokenizer supports pairs of texts.
    """
    kind = getattr(torch, dtype)
    encoder: Any = None
    missing: list[str] = []
    if shards is not None:
        config = AutoConfig.from_pretrained(str(model_dir), trust_remote_code=False)
        encoder = load_backbone_in_shards(
            model_dir, config, dtype=kind, attention=None, deepspeed_config=shards
        )
    if encoder is None:
        encoder, info = AutoModel.from_pretrained(
            str(model_dir),
            dtype=kind,
            quantization_config=quantization,
            output_loading_info=True,
            trust_remote_code=False,
        )
        missing = info["missing_keys"]
    if encoder.config.is_encoder_decoder:
        raise ArtifactError(
            f"{model_dir}: {type(encoder).__name__} is an encoder-decoder. A reward stage must "
            "start from an encoder, such as BERT, or from a policy."
        )
    separator = _separator(model_dir, encoder)
    # The new head reads the first token's state; a pooler would be a second, pretrained head.
    drop_pooler(encoder)
    model = _with_heads(encoder, kind, num_heads=num_heads, reads="first", separator=separator)
    disable_dropout(model)
    lacking = [name for name in missing if not name.startswith("pooler.")]
    return model.train(), sorted(lacking)


class TextValues(nn.Module):
    """Compute an encoder's score of each text, repeated for its tokens: (1, N), or (1, N, K).
    Args:
        model: a scorer that reads whole texts.
    """

    def __init__(self, model: RewardModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Score the texts of a packed row, each in its own row."""
        laid = right_padded(input_ids, position_ids, fill=0)
        values = self.model(laid.input_ids, attention_mask=laid.mask)
        # (S, T) -> (N,) -> (1, N)
        return values[laid.number, laid.at].unsqueeze(0)


def packed_values(
    scorer: RewardModel, input_ids: Tensor, position_ids: Tensor, segments: Segments
) -> Tensor:
    """Return a decoder's values for the tokens of a packed row: (1, N), or (1, N, K heads)."""
    decoder = causal_lm(scorer.backbone)
    check_rotary(decoder, segments.positions)
    if packs(decoder):
        return scorer(input_ids, position_ids=position_ids, segments=segments)
    # (N, H) -> (1, N, H), the layout that the head expects.
    states = padded_states(decoder, input_ids[0], segments)
    return scorer.head(states.unsqueeze(0))


def values_of(model: RewardModel) -> nn.Module:
    """Return the module that training calls: packed rows in, a value per token out."""
    return TextValues(model) if model.reads == "first" else SequenceValues(model)


class SequenceValues(nn.Module):
    """Values of each token of a packed row, without padding: (1, N) or (1, N, heads)."""

    def __init__(self, model: RewardModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Return the value of every token, given the tokens before it in its sequence."""
        segments = segments_from_positions(position_ids[0])
        return packed_values(self.model, input_ids, position_ids, segments)


class ValueModel(nn.Module):
    """Compute V(state before token t) at index t of a packed row.

    The state before token t ends with the previous token, so values are shifted by one, like
    log-probabilities. The first token of a sequence has no state before it and gets 0.
    """

    def __init__(self, scorer: RewardModel) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, input_ids: Tensor, position_ids: Tensor, *, behind: bool = False) -> Tensor:
        """Return the values of a packed row.

        Args:
            input_ids: (1, N).
            position_ids: (1, N), as in align.models.attention.
            behind: return V(state that ends with token t) at index t instead; the last one of a
                sequence is the value of what follows it.

        Returns:
            float32 (1, N).
        """
        segments = segments_from_positions(position_ids[0])
        values = packed_values(self.scorer, input_ids, position_ids, segments)
        if behind:
            return values
        # Index t reads the value of the token before t; a first token has none.
        return values[:, segments.previous].masked_fill(position_ids == 0, 0.0)
