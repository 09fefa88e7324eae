"""Checks on a scorer that is an encoder before its first step: its texts, its tokens, its loss."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from align.core.artefacts import Artefact
from align.core.types import TokenRow
from align.data.render.encoder_pairs import PairedFormat
from align.preflight.checks import Check, Finding, spread
from align.preflight.offline import loss_checks, sides_of, start_checks
from align.recipe.schema import RewardStage
from align.training.offline import OfflineTask
from reward_models.scalar import RewardModel, score_token_ids

NUM_SCORED = 8
"""Texts that are scored to see whether the model tells them apart."""


def paired_checks(
    spec: RewardStage,
    chat: PairedFormat,
    module: nn.Module,
    model: RewardModel,
    task: OfflineTask[Any],
    source: Artefact,
) -> list[Check]:
    """Give the checks of a reward stage on an encoder.

    Args:
        spec: the stage. chat: what rendered the rows. module: what the Learner will train.
        model: the scorer in it. task: rows, batches and loss. source: what ``init`` names.
    """
    rows = [side for row in (*task.rows, *task.heldout) for side in sides_of(row)]
    return [
        ("tokens", partial(tokens, chat, model, rows)),
        *start_checks(spec, model.backbone, source),
        ("whole texts", partial(whole_texts, model, rows)),
        *loss_checks(spec, module, task, vocab_size=_embeddings(model)),
    ]


def tokens(chat: PairedFormat, model: RewardModel, rows: Sequence[TokenRow]) -> Finding:
    """See that the model has an embedding for every token and positions for every text."""
    embeddings, positions = _embeddings(model), model.max_tokens
    largest, longest = max(max(r.input_ids) for r in rows), max(len(r.input_ids) for r in rows)
    value = f"largest token {largest:,} of {embeddings:,}, longest text {longest:,} of {positions}"
    if largest >= embeddings:
        remedy = "the tokenizer has more tokens than the model; take the one it was trained with"
        return Finding(value, "smaller", "fail", remedy)
    if positions is not None and longest > positions:
        return Finding(value, "smaller", "fail", f"max_length: {positions} leaves such rows out")
    unknown = chat.tokenizer.unk_token_id
    lost = sum(row.input_ids.count(unknown) for row in rows)
    if lost:
        remedy = "the tokenizer cannot write these texts; look at their characters, or change it"
        return Finding(f"{value}, {lost:,} unknown tokens", "none unknown", "warn", remedy)
    return Finding(value, "smaller")


def _embeddings(model: RewardModel) -> int:
    backbone: Any = model.backbone
    return backbone.get_input_embeddings().num_embeddings


def whole_texts(model: RewardModel, rows: Sequence[TokenRow]) -> Finding:
    """See that the first token knows what follows it: other texts have other scores."""
    texts = list(dict.fromkeys(row.input_ids for row in spread(rows, NUM_SCORED)))
    scores = set(score_token_ids(model, texts))
    return Finding(
        f"{len(texts)} texts have {len(scores)} different scores",
        "2 or more",
        "ok" if len(scores) > 1 or len(texts) == 1 else "fail",
        "the first token does not see what follows it, so this is no encoder; bring it in with "
        "kind: base and begin from that",
    )
