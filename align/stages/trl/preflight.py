"""The preflight of stage trl: the rows as TRL's code prepares them, and its model."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from align.core.artifacts import Artifact
from align.core.types import Example, TokenRow
from align.data.render.chat import ChatFormat
from align.data.token_view import NUM_SHOWN, View, view_of
from align.preflight import collated, tokens
from align.preflight.checks import MAX_SEEN, Check, spread
from align.preflight.offline import same_weights
from align.preflight.rewards import reward_checks
from align.recipe.schema import TrlStage
from reward_models.base import RewardFunction

if TYPE_CHECKING:
    pass


def preflight_trl(
    spec: TrlStage,
    *,
    trainer: Any,
    examples: Sequence[Example],
    chat: ChatFormat,
    source: Artifact,
    rewards: Sequence[RewardFunction],
) -> tuple[list[Check], Callable[[], list[View]] | None]:
    """Return the checks of a TRL trainer's data and model, and rows for the token view.

    Args:
        spec: the stage. trainer: ready to train.
        examples: what its data set was made from. chat: this suite's renderer.
        source: what ``init`` names. rewards: handed to an online trainer.
    """
    start: Check = ("start", partial(same_weights, trainer.model, source, moved=False))
    # Online trainers: there are prompts and rewards, but no training rows.
    if spec.rows == "prompts":
        prompts = [chat.prompt_row(example) for example in examples]
        checks = tokens.prompt_checks(chat, prompts, model_dir=source.model_dir)
        checks += reward_checks("reward", spec.rewards, rewards, prompts=prompts, answers=None)
        return [*checks, start], None
    dataset = trainer.train_dataset
    made = collated.rows_of(dataset, trainer.data_collator, [e.source for e in examples])
    few = spread(examples, MAX_SEEN)
    if made:
        checks = _collated_checks(
            spec, dataset, made=made, examples=examples, chat=chat, source=source
        )
    else:  # its batches do not show which tokens are trained: use this suite's rendering
        own = _own_rows(spec, few, chat)
        checks = tokens.row_checks(chat, own, few, model_dir=source.model_dir)
    return [*checks, start], lambda: views(made or _own_rows(spec, few, chat), chat)


def _collated_checks(
    spec: TrlStage,
    dataset: Sequence[Any],
    *,
    made: Sequence[TokenRow],
    examples: Sequence[Example],
    chat: ChatFormat,
    source: Artifact,
) -> list[Check]:
    """Return the checks on rows that TRL prepared."""
    answers = _own_rows(spec, spread(examples, collated.MAX_ROWS), chat)
    num_answer_tokens = sum(sum(row.trained) for row in answers)
    ids = [row.input_ids for row in made]
    conversations = [
        tokens.chat_turns(e.prompt, e.completion) for e in examples if not tokens.is_text(e)
    ]
    stops = tokens.saved_stops(source.model_dir)
    # TRL trains both responses of a pair.
    num_all = len(examples) * (2 if spec.rows == "preference" else 1)
    counted = partial(
        collated.only_answers, chat, made, num_answer_tokens=num_answer_tokens, num_all=num_all
    )
    return [
        ("rows", partial(collated.as_many, dataset, len(examples))),
        ("trained tokens", counted),
        ("stop tokens", partial(collated.stops, chat, made, stops)),
        ("template", partial(tokens.template, chat, spread(conversations, tokens.NUM_RENDERED))),
        ("first token", partial(tokens.first_token, chat, ids)),
        ("vocabulary", partial(tokens.vocabulary, chat, ids, source.model_dir)),
    ]


def _own_rows(spec: TrlStage, examples: Sequence[Example], chat: ChatFormat) -> list[TokenRow]:
    """Return examples rendered by this suite, the two responses of a pair as two rows."""
    if spec.rows != "preference":
        return [chat.sft_row(example) for example in examples]
    pairs = [chat.pair_row(example) for example in examples]
    return [row for pair in pairs for row in (pair.chosen, pair.rejected)]


def views(rows: Sequence[TokenRow], chat: ChatFormat) -> list[View]:
    """Return token views of some rows as the trainer prepared them."""
    return [view_of(row, chat, side="row") for row in spread(rows, NUM_SHOWN)]
