"""Heads on a decoder: scorers begun from a policy or a scorer, and the critic's values."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from align.models.attention import PACKED, segments_from_positions
from align.models.loading import disable_dropout
from reward_models.scalar import SCORER_FILE, RewardModel


def scorer_from(
    model_dir: Path, *, dtype: str, num_heads: int = 1, quantization: Any = None
) -> RewardModel:
    """Load the decoder of a policy (with fresh random heads) or a whole scorer, dropout off.

    A scorer that has another number of heads keeps its decoder only.
    """
    kind = getattr(torch, dtype)
    if (model_dir / SCORER_FILE).is_file():
        model = RewardModel.load(model_dir, kind, attn_implementation=PACKED)
        if model.num_heads != num_heads:
            width = model.head.in_features
            model = RewardModel(model.backbone, width, num_heads=num_heads)
            model.head.to(kind)
    else:
        backbone = AutoModel.from_pretrained(
            str(model_dir),
            dtype=kind,
            attn_implementation=PACKED,
            quantization_config=quantization,
        )
        width = backbone.config.get_text_config().hidden_size
        model = RewardModel(backbone, width, num_heads=num_heads)
        model.head.to(kind)  # not the whole: rotary buffers must stay float32
    disable_dropout(model)
    return model.train()


class ValueModel(nn.Module):
    """Give V(state before token t) at index t of a packed row.

    The state before token t ends with the token before it, so values are shifted by one, as
    log-probabilities are; the first token of a sequence has no state before it and gets 0.
    """

    def __init__(self, scorer: RewardModel) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, input_ids: Tensor, position_ids: Tensor, *, behind: bool = False) -> Tensor:
        """Compute the values of a packed row.

        Args:
            input_ids: (1, N). position_ids: (1, N), those of align.models.attention.
            behind: give V(state that ends with token t) at index t instead, of which the last of a
                sequence is what follows it.

        Returns:
            float32 (1, N).
        """
        segments = segments_from_positions(position_ids[0])
        values = self.scorer(input_ids, position_ids=position_ids, segments=segments)
        if behind:
            return values
        return values[:, segments.previous].masked_fill(position_ids == 0, 0.0)
