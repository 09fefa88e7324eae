"""Measure reward models on held-out pairs, sets and sampled responses for their model card."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.core import distributed
from align.core.artifacts import Artifact
from align.core.types import Example, PairRow, Text, TokenRow
from align.data.fit import fit_rows
from align.data.formats.sets import AnswerSet, load_sets
from align.data.load import load_examples
from align.data.split import split_key
from align.evaluation.card import (
    ScoredPair,
    ScoredSet,
    agreement,
    best_of_n,
    pair_card,
    set_card,
)
from align.models.loading import load_tokenizer
from align.recipe.schema import DataSpec
from align.stages.reward.tasks import RowFormat, scorer_format
from align.training.batch import flatten_pairs, trim_after_last_trained
from align.tuning.loading import load_reward_model
from reward_models.learned import ScalarReward
from reward_models.refusals import refusing_side
from reward_models.scalar import RewardModel, score_token_ids

log = logging.getLogger(__name__)
HEADLINES = (
    "pair_accuracy",
    "length_balanced_accuracy",
    "best_of_set_accuracy",
    "log_loss",
    "ece",
    "length_correlation",
    "length_correlation_in_pair",
)
"""Metrics of a card that the summary table of reward models shows."""


@dataclass(frozen=True, slots=True)
class SampledAnswers:
    """Several sampled responses to each prompt, for the best-of-n curve.

    Attributes:
        rows: (prompt, response, prompt ids, response ids) of each response.
        groups: prompt number of each response. gold: its gold score, None if invalid.
        tokenizer: tokenizer of the ids.
    """

    rows: Sequence[tuple[Text, str, list[int], list[int]]]
    groups: Sequence[int]
    gold: Sequence[float | None]
    tokenizer: Any


@dataclass(frozen=True, slots=True)
class CardInput:
    """Data of the cards; at most ``max_lost_frac`` of the rows may be too long."""

    pairs: Sequence[DataSpec]
    sets: Sequence[DataSpec]
    max_length: int
    max_lost_frac: float
    seed: int
    answers: SampledAnswers | None = None
    ledger: Path | None = None
    """File that records the rows that are too long."""


def build_cards(models: Mapping[str, Artifact], given: CardInput) -> dict[str, dict[str, Any]]:
    """Return each reward model's card; with several, each is compared with the first other one."""
    scored = {name: _scored_pairs(artifact, given) for name, artifact in models.items()}
    cards: dict[str, dict[str, Any]] = {}
    for name, artifact in models.items():
        card, lost = pair_card(scored[name][0], seed=given.seed), scored[name][1]
        card["num_pairs_too_long"] = lost
        if given.sets:
            card |= set_card(_scored_sets(artifact, given), seed=given.seed)
        other = next((n for n in models if n != name), None)
        if other is not None:
            found = _agreement(scored[name][0], scored[other][0], given.seed)
            card["agreement"] = {"with": other, **found}
        if given.answers is not None:
            card["best_of_n"] = _best_of_n(artifact, given.answers, given.seed)
        cards[name] = card
        log.info("%s: pair accuracy %s on %d pairs", name, card["pair_accuracy"], card["num_pairs"])
    return cards


def headlines(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the [value, low, high] entries of a card that the summary table shows."""
    return {name: card[name] for name in HEADLINES if name in card}


def _load(artifact: Artifact) -> RewardModel:
    return load_reward_model(artifact.model_dir).to(distributed.device())


def _longest(model: RewardModel, given: CardInput) -> int:
    """Return the maximum number of tokens of a text; an encoder has a limit of its own."""
    limit = model.max_tokens if model.reads == "first" else None
    return given.max_length if limit is None else min(limit, given.max_length)


def _scored_pairs(artifact: Artifact, given: CardInput) -> tuple[list[ScoredPair], int]:
    """Return the scored held-out pairs, and how many were too long."""
    chat, model = scorer_format(artifact), _load(artifact)
    examples = load_examples(given.pairs, kind="preference", seed=given.seed)
    rows, lost = fit_rows(
        [chat.pair_row(e) for e in examples],
        max_length=_longest(model, given),
        max_lost_frac=given.max_lost_frac,
        ledger=given.ledger,
        what="held-out pairs of the reward model",
    )
    scores = score_token_ids(model, [row.input_ids for row in flatten_pairs(rows)])
    # Rows keep their source, through which the example's columns are found again.
    named = {e.source: e for e in examples}
    pairs = [
        _pair(row, named[row.source], chat, scores=scores[2 * i : 2 * i + 2])
        for i, row in enumerate(rows)
    ]
    return pairs, lost


def _pair(
    row: PairRow, example: Example, chat: RowFormat, *, scores: Sequence[float]
) -> ScoredPair:
    sides = [
        trim_after_last_trained(side).input_ids[row.num_prompt_tokens :]
        # Only the response: the prompt's tokens are the same on both sides.
        for side in (row.chosen, row.rejected)
    ]
    texts = [chat.decode(ids) for ids in sides]
    return ScoredPair(
        source=_group_of(example),
        prompt=split_key(example),
        chosen=scores[0],
        rejected=scores[1],
        chosen_tokens=len(sides[0]),
        rejected_tokens=len(sides[1]),
        refuses=refusing_side(texts[0], texts[1]),
    )


def _group_of(example: Example) -> str:
    """Return where an example comes from: column ``subset``, else its synthetic task or file."""
    if example.columns.get("subset"):
        return str(example.columns["subset"])
    if example.source.startswith("world:"):
        return "world"
    return Path(example.source.rpartition(":")[0]).stem


def _scored_sets(artifact: Artifact, given: CardInput) -> list[ScoredSet]:
    """Return the scored sets; a set with a response that is too long is left out."""
    chat, model = scorer_format(artifact), _load(artifact)
    found = load_sets(given.sets)
    rows = {i: _set_rows(chat, s) for i, s in enumerate(found)}
    # The longest response decides whether a set fits.
    longest = {i: max(mine, key=lambda row: len(row.input_ids)) for i, mine in rows.items()}
    kept, lost = fit_rows(
        list(longest.values()),
        max_length=_longest(model, given),
        max_lost_frac=given.max_lost_frac,
        ledger=given.ledger,
        what="sets of responses",
    )
    fitting = {id(row) for row in kept}
    chosen = [i for i, row in longest.items() if id(row) in fitting]
    flat = [row.input_ids for i in chosen for row in rows[i]]
    scores = iter(score_token_ids(model, flat))
    if lost:
        log.warning("%d sets of responses are too long and were left out", lost)
    return [
        ScoredSet(
            source=found[i].group,
            prompt=split_key(Example(found[i].prompt)),
            chosen=tuple(next(scores) for _ in found[i].chosen),
            rejected=tuple(next(scores) for _ in found[i].rejected),
        )
        for i in chosen
    ]


def _set_rows(chat: RowFormat, answers: AnswerSet) -> list[TokenRow]:
    return [
        trim_after_last_trained(
            chat.sft_row(Example(answers.prompt, answer, source=answers.source))
        )
        for answer in (*answers.chosen, *answers.rejected)
    ]


def _agreement(
    pairs: Sequence[ScoredPair], others: Sequence[ScoredPair], seed: int
) -> dict[str, Any]:
    """Return the agreement of two models, which must have scored the same pairs."""
    if [(p.source, p.prompt) for p in pairs] != [(p.source, p.prompt) for p in others]:
        return {
            "problem": "the two models scored different pairs, because their token lengths differ"
        }
    return dict(agreement(pairs, others, seed=seed))


def _best_of_n(artifact: Artifact, answers: SampledAnswers, seed: int) -> list[dict[str, Any]]:
    """Return the best-of-n curve over the prompts whose responses all have both scores."""
    proxies: dict[int, list[float | None]] = {}
    golds: dict[int, list[float | None]] = {}
    scores = _sampled_scores(artifact, answers)
    for group, score, value in zip(answers.groups, scores, answers.gold, strict=True):
        proxies.setdefault(group, []).append(score)
        golds.setdefault(group, []).append(value)
    # best-of-n needs both scores of every response, or its n would vary between prompts.
    judged = {str(k) for k in proxies if None not in (*proxies[k], *golds[k])}
    proxy, gold = (
        {str(k): [v for v in row if v is not None] for k, row in side.items() if str(k) in judged}
        for side in (proxies, golds)
    )
    return best_of_n(proxy, gold, seed=seed)


def _sampled_scores(artifact: Artifact, answers: SampledAnswers) -> list[float | None]:
    """Score sampled responses by token ids, or by text if the model's tokenizer differs."""
    tokenizer = load_tokenizer(artifact.model_dir)
    reward = ScalarReward(_load(artifact), tokenizer, normalize=False)
    reward.meet(answers.tokenizer)
    prompts, completions, prompt_ids, completion_ids = zip(*answers.rows, strict=True)
    return reward(
        prompts=prompts,
        completions=completions,
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
    )
