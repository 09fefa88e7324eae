"""The preflight of stage trl: the rows as TRL's code prepares them, and its model.

The batches of TRL's trainer show which tokens it trains. A batch contains ``input_ids`` with
``labels`` or ``completion_mask``, without a prefix or with ``chosen_`` and ``rejected_``. Padding
is where ``attention_mask`` is 0.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from align.core.artifacts import Artifact
from align.core.types import Example, TokenRow
from align.data.render.chat import ChatFormat
from align.data.token_view import NUM_SHOWN, View, view_of
from align.preflight import tokens
from align.preflight.checks import MAX_SEEN, Check, Finding, spread
from align.preflight.offline import same_weights
from align.preflight.rewards import reward_checks
from align.preflight.tokens import trained_tokens
from align.recipe.schema import TrlStage
from reward_models.base import RewardFunction

MAX_ROWS = 4096
"""Maximum number of checked rows, evenly spaced."""
BATCH = 256
PREFIXES = ("", "chosen_", "rejected_")
IGNORED = -100
SURPLUS = 1.2
"""Ratio of trained tokens to response tokens above which the trainer trains more than those."""

Collate = Callable[[list[Any]], Any]


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
    made = rows_of(dataset, trainer.data_collator, [e.source for e in examples])
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
    answers = _own_rows(spec, spread(examples, MAX_ROWS), chat)
    num_answer_tokens = sum(sum(row.trained) for row in answers)
    ids = [row.input_ids for row in made]
    conversations = [
        tokens.chat_turns(e.prompt, e.completion) for e in examples if not tokens.is_text(e)
    ]
    known = tokens.saved_stops(source.model_dir)
    # TRL trains both responses of a pair.
    num_all = len(examples) * (2 if spec.rows == "preference" else 1)
    counted = partial(
        only_answers, chat, made, num_answer_tokens=num_answer_tokens, num_all=num_all
    )
    return [
        ("rows", partial(as_many, dataset, len(examples))),
        ("trained tokens", counted),
        ("stop tokens", partial(stops, chat, made, known)),
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


def rows_of(dataset: Sequence[Any], collate: Collate, sources: Sequence[str]) -> list[TokenRow]:
    """Return the rows of a trainer's data set as its collator passes them to the loss.

    Args:
        dataset: rows as the trainer prepared them. collate: its collator.
        sources: source of each row; if the number of rows differs, rows are numbered instead.

    Returns:
        Rows, a pair as two rows; empty if the batches contain no tokens.
    """
    # In batches, as a collator pads to the longest row of the batch that it gets.
    places = spread(range(len(dataset)), MAX_ROWS)
    named = sources if len(sources) == len(dataset) else [f"row {i}" for i in range(len(dataset))]
    found: list[TokenRow] = []
    for start in range(0, len(places), BATCH):
        chosen = places[start : start + BATCH]
        batch = collate([dataset[i] for i in chosen])
        if not isinstance(batch, Mapping):
            return []
        found += _rows(batch, [named[i] for i in chosen])
    return found


def _rows(batch: Mapping[str, Any], sources: Sequence[str]) -> Iterator[TokenRow]:
    for prefix in PREFIXES:
        ids = batch.get(f"{prefix}input_ids")
        trained = _trained(batch, prefix)
        if ids is None or trained is None:
            continue
        real = batch.get(f"{prefix}attention_mask", torch.ones_like(ids)).bool()
        for i, (found, mask, here) in enumerate(zip(ids, trained, real, strict=True)):
            # A batch may contain all chosen responses followed by all rejected ones.
            kept = mask[here].tolist()
            # Nothing predicts the first token, so no loss trains it, whatever its label says.
            yield TokenRow(
                tuple(found[here].tolist()),
                (False, *map(bool, kept[1:])),
                sources[i % len(sources)],
            )


def _trained(batch: Mapping[str, Any], prefix: str) -> torch.Tensor | None:
    labels, mask = batch.get(f"{prefix}labels"), batch.get(f"{prefix}completion_mask")
    return mask if labels is None else labels != IGNORED


def as_many(dataset: Sequence[Any], num_rows: int) -> Finding:
    """Check that the trainer dropped no rows."""
    value = f"{len(dataset):,} of {num_rows:,} rows are in the trainer's data set"
    verdict = "ok" if len(dataset) == num_rows else "warn"
    return Finding(
        value,
        "all",
        verdict,
        "the trainer packed rows, or dropped some by its own rules (such as prompts that fill its "
        "max_length). Its arguments are in 'args'",
    )


def only_answers(
    chat: ChatFormat, rows: Sequence[TokenRow], *, num_answer_tokens: int, num_all: int
) -> Finding:
    """Compare the number of trained tokens with the number of response tokens.

    Args:
        chat: has the stop tokens. rows: rows of the trainer.
        num_answer_tokens: trained tokens of the same rows as this suite renders them.
        num_all: total number of rows.
    """
    # Compare only up to the first stop token of a run: what follows is judged by `stops`.
    found = trained_tokens(rows)
    total = sum(_said(chat, row.input_ids[a:b]) for row in rows for a, b in _runs(row.trained))
    looked = "" if len(rows) >= num_all else f", {len(rows):,} of {num_all:,} checked"
    value = f"{found.value}{looked}; their responses have {num_answer_tokens:,}"
    if found.verdict == "ok" and total > SURPLUS * num_answer_tokens:
        return Finding(
            value,
            "the responses",
            "warn",
            "the trainer also trains tokens that are not the assistant's. Give it rows of prompt "
            "and completion, or see its arguments (args: {assistant_only_loss: true} in SFT)",
        )
    return Finding(value, found.bound, found.verdict, found.remedy)


def stops(chat: ChatFormat, rows: Sequence[TokenRow], known: frozenset[int]) -> Finding:
    """Check that every run of trained tokens ends in a stop token, apart from white space."""
    # A multi-turn row has one run of trained tokens per assistant turn.
    runs = [(row, start, end) for row in rows for start, end in _runs(row.trained)]
    bad = [
        row.source for row, start, end in runs if not _stops(chat, row, known, start=start, end=end)
    ]
    value = f"{len(runs) - len(bad):,} of {len(runs):,} trained runs end in a stop token"
    twice = sum(_stops_twice(chat, row.input_ids[a:b], known) for row, a, b in runs)
    # Only where every run ends in a stop token: otherwise a missing one is the finding.
    if twice and not bad:
        return Finding(
            f"{value}, {twice:,} in two",
            "one",
            "warn",
            "the trainer adds a stop token after the template's: the model learns to stop twice. "
            "Use a template that writes nothing after its stop token",
        )
    return Finding(
        value,
        f"all, by eos_token_id {sorted(known)} of the saved model",
        "fail" if bad else "ok",
        f"the trainer ends {', '.join(bad[:3])} differently: truncated at its max_length, or "
        "rendered by a template without a stop token. Compare 'align data show'",
    )


def _said(chat: ChatFormat, ids: Sequence[int]) -> int:
    """Return a run's length up to and including its first trailing stop or white-space token."""
    end = len(ids)
    while end and (
        ids[end - 1] in chat.stop_token_ids or not chat.decode(ids[end - 1 : end]).strip()
    ):
        end -= 1
    return min(end + 1, len(ids))


def _runs(trained: Sequence[bool]) -> Iterator[tuple[int, int]]:
    start = None
    for i, now in enumerate([*trained, False]):
        if now and start is None:
            start = i
        if not now and start is not None:
            yield start, i
            start = None


def _stops(chat: ChatFormat, row: TokenRow, known: frozenset[int], *, start: int, end: int) -> bool:
    # Only white space may follow the last stop token of a run.
    last = max((i for i in range(start, end) if row.input_ids[i] in known), default=None)
    return last is not None and not chat.decode(row.input_ids[last + 1 : end]).strip()


def _stops_twice(chat: ChatFormat, ids: Sequence[int], known: frozenset[int]) -> bool:
    # Tokens with text, or stop tokens: the last two of them both being stops means twice.
    said = [i for i in ids if i in known or chat.decode([i]).strip()]
    return len(said) > 1 and said[-1] in known and said[-2] in known
