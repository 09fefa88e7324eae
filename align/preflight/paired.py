"""Checks on an encoder reward model before its first step: texts, tokens, loss."""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from torch import nn

from align.core.artifacts import Artifact
from align.core.types import TokenRow
from align.data.render.encoder_pairs import PairedFormat
from align.preflight.checks import Check, Finding, spread
from align.preflight.offline import loss_checks, sides_of, start_checks
from align.preflight.tokens import fitting
from align.recipe.schema import RewardStage
from align.training.task import OfflineTask
from reward_models.scalar import RewardModel, score_token_ids

NUM_SCORED = 8
"""Number of texts that are scored to check that their scores differ."""


def paired_checks(
    spec: RewardStage,
    chat: PairedFormat,
    *,
    module: nn.Module,
    model: RewardModel,
    task: OfflineTask[Any],
    source: Artifact,
) -> list[Check]:
    """Return the checks of a reward stage with an encoder.

    Args:
        spec: the stage. chat: row format. module: the module to train.
        model: the reward model in it. task: rows, batches and loss. source: the artifact of
            ``init``.
    """
    rows = [side for row in (*task.rows, *task.heldout) for side in sides_of(row)]
    return [
        ("tokens", partial(tokens, chat, model, rows)),
        *start_checks(spec, model.backbone, source),
        ("whole texts", partial(whole_texts, model, rows)),
        *loss_checks(spec, module, task, vocab_size=_embeddings(model)),
    ]


def tokens(chat: PairedFormat, model: RewardModel, rows: Sequence[TokenRow]) -> Finding:
    """Check that the model has an embedding for every token and positions for every text."""
    return fitting(
        [row.input_ids for row in rows],
        embeddings=_embeddings(model),
        positions=model.max_tokens,
        unknown=cast("int | None", chat.tokenizer.unk_token_id),
    )


def _embeddings(model: RewardModel) -> int:
    backbone: Any = model.backbone
    return backbone.get_input_embeddings().num_embeddings


def whole_texts(model: RewardModel, rows: Sequence[TokenRow]) -> Finding:
    """Check that the first token attends to the whole text: different texts score differently."""
    texts = list(dict.fromkeys(row.input_ids for row in spread(rows, NUM_SCORED)))
    scores = set(score_token_ids(model, texts))
    return Finding(
        f"{len(texts)} texts have {len(scores)} different scores",
        "2 or more",
        "ok" if len(scores) > 1 or len(texts) == 1 else "fail",
        "the first token does not attend to what follows it, so this is not an encoder. Import it "
        "with kind: base and start from that stage",
    )
