"""Compare responses with a language model as judge, in both orders and with early stopping."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from align.core.types import NO_DIFFERENCE, Text
from align.evaluation.compare import Record, as_triple, by_place, clusters_of, mean_interval
from align.evaluation.sequential import ConfidenceSequence
from align.evaluation.verdict import Judged, Place
from reward_models.base import completion_text, plain_text
from reward_models.judge import JudgeClient, Messages, Verdict

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"winner": {"type": "string", "enum": ["first", "second", "tie"]}},
    "required": ["winner"],
    "additionalProperties": False,
}
_FIRST = {"first": 1.0, "tie": 0.5, "second": 0.0}
"""The score of the response that was shown first, by verdict."""
Ask = Callable[[Sequence[Messages]], Sequence[Verdict]]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to one prompt; a result of 1 means that ``ours`` is better."""

    prompt: str
    ours: str
    theirs: str


@dataclass(frozen=True, slots=True)
class BothOrders:
    """A judge's verdicts on a pair, with ours shown first and with theirs shown first.

    Each is the score of the response shown first (1 win, 0.5 tie, 0 loss); None is invalid.
    """

    ours_first: float | None
    theirs_first: float | None

    @property
    def result(self) -> float | None:
        """Return the mean score of ours over both orders; None if a verdict is invalid."""
        if self.ours_first is None or self.theirs_first is None:
            return None
        return (self.ours_first + 1.0 - self.theirs_first) / 2.0


@dataclass(slots=True)
class Bench:
    """A judge and all its verdicts.

    Attributes:
        client: client of the judge's endpoint.
        criteria: instruction on what to compare.
        said: verdicts of every judged pair in both orders. prompts: the prompt of each pair.
        offered: number of pairs available; early stopping may leave some unjudged.
    """

    client: JudgeClient
    criteria: str
    said: list[BothOrders] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    offered: int = 0

    def judge(self, pairs: Sequence[Pair]) -> list[BothOrders]:
        """Return the verdicts on pairs in both orders; equal responses tie without a request."""
        asked = [pair for pair in pairs if pair.ours != pair.theirs]
        requests = [m for pair in asked for m in _both_orders(pair, self.criteria)]
        # Two verdicts per pair, in the order of the requests.
        verdicts = iter(self.client.ask(requests, SCHEMA) if requests else ())
        found = [
            BothOrders(0.5, 0.5)
            if pair.ours == pair.theirs
            else BothOrders(_share(next(verdicts)), _share(next(verdicts)))
            for pair in pairs
        ]
        self.said += found
        self.prompts += [pair.prompt for pair in pairs]
        return found

    def report(self) -> dict[str, Any]:
        """Return the number of judged pairs, the position bias and the cost."""
        endpoint, cost = self.client.endpoint, self.client.cost
        return {
            "model": endpoint.model,
            "pairs": self.offered,
            "pairs_judged": len(self.said),
            **position(self.said, self.prompts),
            **{k: v for k, v in asdict(cost).items() if k != "invalid"},
            "invalid": dict(cost.invalid),
            "dollars": cost.dollars(endpoint),
        }


def _both_orders(pair: Pair, criteria: str) -> tuple[Messages, Messages]:
    """Return the judge's request with ours first, and with theirs first."""
    return (
        _question(pair.prompt, pair.ours, pair.theirs, criteria=criteria),
        _question(pair.prompt, pair.theirs, pair.ours, criteria=criteria),
    )


def _question(prompt: str, first: str, second: str, *, criteria: str) -> Messages:
    task = (
        f"{criteria} Ignore their order and length. Reply with JSON: "
        '{"winner": "first"}, {"winner": "second"} or {"winner": "tie"}.'
    )
    shown = f"[Question]\n{prompt}\n\n[First answer]\n{first}\n\n[Second answer]\n{second}"
    return [{"role": "system", "content": task}, {"role": "user", "content": shown}]


def _share(verdict: Verdict) -> float | None:
    return None if verdict.value is None else _FIRST[verdict.value["winner"]]


def position(said: Sequence[BothOrders], clusters: Sequence[Hashable]) -> dict[str, Any]:
    """Return a judge's position bias.

    Args:
        said: its verdicts.
        clusters: the prompt of each pair; pairs of one prompt are not independent.

    Returns:
        ``first_share``: how often the response shown first wins, ties half; 0.5 without bias.
        ``consistent``: fraction of pairs with the same verdict in both orders. Each is
        [value, low, high].
    """
    whole = [(p.ours_first, p.theirs_first) for p in said]
    pairs = [None if a is None or b is None else (a, b) for a, b in whole]
    first = [None if pair is None else sum(pair) / 2.0 for pair in pairs]
    agree = [None if pair is None else float(pair[0] == 1.0 - pair[1]) for pair in pairs]
    return {
        "first_share": as_triple(mean_interval(first, clusters)),
        "consistent": as_triple(mean_interval(agree, clusters)),
    }


def judge_model(
    bench: Bench,
    records: Sequence[Record],
    others: Sequence[Record],
    *,
    sequential: bool,
    batch: int,
    seed: int,
) -> Judged:
    """Return the verdicts on a model's responses against a baseline's, in random prompt order.

    Args:
        bench: the judge.
        records: responses of the model.
        others: responses of the baseline to the same prompts.
        sequential: stop as soon as the verdict is clear.
        batch: prompts judged between two looks at the interval.
        seed: random seed of the prompt order.

    Returns:
        The results of the judged pairs. With ``sequential`` also an interval of the mean over
        prompts that is valid at any stopping time; invalid pairs are excluded.
    """
    mine, theirs = by_place(records), by_place(others)
    # Rows with the same prompt are one piece of evidence, so they are judged together.
    same = clusters_of(records)
    prompts: dict[Hashable, list[Place]] = {}
    for place in sorted(mine):
        prompts.setdefault(same[place[0]], []).append(place)
    groups = list(prompts.values())
    # Random order: the pairs judged before an early stop must represent all prompts.
    order = np.random.default_rng(seed).permutation(len(groups))
    bench.offered += len(mine)
    results: dict[Place, float | None] = {}
    sequence = ConfidenceSequence()
    for start in range(0, len(groups), batch):
        chosen = [groups[i] for i in order[start : start + batch]]
        places = sorted(place for group in chosen for place in group)
        found = bench.judge([_pair(mine[place], theirs[place]) for place in places])
        results |= {p: said.result for p, said in zip(places, found, strict=True)}
        # The sequence needs independent values, so each prompt contributes its mean once.
        for value in _by_prompt(results, chosen):
            sequence.update(value)
        if sequential and sequence.verdict != NO_DIFFERENCE:
            break
    return Judged(results, sequence.interval if sequential and sequence.count else None)


def _by_prompt(
    results: Mapping[Place, float | None], groups: Sequence[Sequence[Place]]
) -> list[float]:
    means = []
    for places in groups:
        known = [x for place in places if (x := results[place]) is not None]
        if known:
            means.append(sum(known) / len(known))
    return means


def _pair(mine: Record, theirs: Record) -> Pair:
    return Pair(
        plain_text(mine["prompt"]), answer(mine["completion"]), answer(theirs["completion"])
    )


def answer(completion: Text) -> str:
    """Return a response's text without surrounding whitespace."""
    return completion_text(completion).strip()
