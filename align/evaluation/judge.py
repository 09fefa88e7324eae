"""Compare responses with a judge of pairs, in both orders and with early stopping."""

import time
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from align.core.types import NO_DIFFERENCE, Text
from align.evaluation.compare import Record, as_triple, by_place, clusters_of, mean_interval
from align.evaluation.sequential import ConfidenceSequence
from align.evaluation.verdict import Judged, Place
from reward_models.base import RewardFunction, completion_text, plain_text, response_to
from reward_models.judge import JudgeClient, Messages, Verdict

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"winner": {"type": "string", "enum": ["first", "second", "tie"]}},
    "required": ["winner"],
    "additionalProperties": False,
}
_FIRST = {"first": 1.0, "tie": 0.5, "second": 0.0}
"""The score of the response that was shown first, by verdict."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to one prompt; a result of 1 means that ``ours`` is better.

    ``columns`` are the other fields of the prompt's row.
    """

    prompt: Text
    ours: str
    theirs: str
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shown:
    """A pair in one of its two orders."""

    prompt: Text
    first: str
    second: str
    columns: Mapping[str, Any]


class PairJudge(Protocol):
    """Decide which of two responses is better."""

    def ask(self, asked: Sequence[Shown]) -> list[float | None]:
        """Return the score of each response shown first; None is an invalid verdict.

        1 is a win, 0.5 a tie and 0 a loss; a number between is the probability of a win.
        """
        ...

    def report(self) -> dict[str, Any]:
        """Return the judge's name (``model``), its invalid verdicts by reason and its cost."""
        ...


class EndpointJudge:
    """A language model behind an endpoint."""

    def __init__(self, client: JudgeClient, criteria: str) -> None:
        self.client = client
        self.criteria = criteria

    def ask(self, asked: Sequence[Shown]) -> list[float | None]:
        """Return the verdicts of the model."""
        requests = [_question(shown, self.criteria) for shown in asked]
        return [_share(verdict) for verdict in self.client.ask(requests, SCHEMA)]

    def report(self) -> dict[str, Any]:
        """Return the requests, tokens and price as well."""
        endpoint, cost = self.client.endpoint, self.client.cost
        return {
            "model": endpoint.model,
            **asdict(cost),
            "invalid": dict(cost.invalid),
            "dollars": cost.dollars(endpoint),
        }


class FunctionJudge:
    """A function of the user's: a reward that gets the responses shown second as ``others``."""

    def __init__(self, function: RewardFunction) -> None:
        self.function = function
        self.seconds = 0.0
        self._outside = 0
        # One function serves several tasks; each reports its own.
        self._before = Counter(function.invalid)

    def ask(self, asked: Sequence[Shown]) -> list[float | None]:
        """Return the verdicts of the function.

        Raises:
            MissingColumnError: the function needs a column that no row has.
        """
        began = time.monotonic()
        names = sorted({name for shown in asked for name in shown.columns})
        columns = {name: [shown.columns.get(name) for shown in asked] for name in names}
        scores = self.function(
            prompts=[shown.prompt for shown in asked],
            completions=[response_to(shown.prompt, shown.first) for shown in asked],
            **{**columns, "others": [response_to(shown.prompt, shown.second) for shown in asked]},
        )
        self.seconds += time.monotonic() - began
        self._outside += sum(x is not None and not 0.0 <= x <= 1.0 for x in scores)
        return [x if x is not None and 0.0 <= x <= 1.0 else None for x in scores]

    def report(self) -> dict[str, Any]:
        """Return the seconds that the function took as well."""
        invalid = dict(self.function.invalid - self._before)
        if self._outside:
            invalid["verdict not between 0 and 1"] = self._outside
        return {"model": self.function.name, "invalid": invalid, "seconds": self.seconds}


@dataclass(frozen=True, slots=True)
class BothOrders:
    """A judge's verdicts on a pair, with ours shown first and with theirs shown first.

    Each is the score of the response shown first, as of `PairJudge.ask`; None is invalid.
    """

    ours_first: float | None
    theirs_first: float | None

    @property
    def result(self) -> float | None:
        """Return the mean score of ours over both orders; None if a verdict is invalid."""
        if self.ours_first is None or self.theirs_first is None:
            return None
        return (self.ours_first + 1.0 - self.theirs_first) / 2.0

    @property
    def winner(self) -> float | None:
        """Return 1 if ours wins in both orders and 0 if theirs does; None if neither does."""
        if self.ours_first is None or self.theirs_first is None:
            return None
        ours, theirs = self.ours_first - 0.5, self.theirs_first - 0.5
        return float(ours > 0) if ours * theirs < 0 else None


@dataclass(slots=True)
class Bench:
    """A judge and all its verdicts.

    Attributes:
        by: who judges.
        said: verdicts of every judged pair in both orders. prompts: the prompt of each pair.
        offered: number of pairs available; early stopping may leave some unjudged.
    """

    by: PairJudge
    said: list[BothOrders] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    offered: int = 0

    def judge(self, pairs: Sequence[Pair]) -> list[BothOrders]:
        """Return the verdicts on pairs in both orders; equal responses tie without a request."""
        asked = [s for pair in pairs if pair.ours != pair.theirs for s in _both_orders(pair)]
        # Two verdicts per pair, in the order of the requests.
        verdicts = iter(self.by.ask(asked) if asked else ())
        found = [
            BothOrders(0.5, 0.5)
            if pair.ours == pair.theirs
            else BothOrders(next(verdicts), next(verdicts))
            for pair in pairs
        ]
        self.said += found
        self.prompts += [plain_text(pair.prompt) for pair in pairs]
        return found

    def report(self) -> dict[str, Any]:
        """Return the number of judged pairs, the position bias, and the judge's own report."""
        return {
            "pairs": self.offered,
            "pairs_judged": len(self.said),
            **position(self.said, self.prompts),
            **self.by.report(),
        }


def _both_orders(pair: Pair) -> tuple[Shown, Shown]:
    """Return a pair with ours first, and with theirs first."""
    return (
        Shown(pair.prompt, pair.ours, pair.theirs, pair.columns),
        Shown(pair.prompt, pair.theirs, pair.ours, pair.columns),
    )


def _question(asked: Shown, criteria: str) -> Messages:
    task = (
        f"{criteria} Ignore their order and length. Reply with JSON: "
        '{"winner": "first"}, {"winner": "second"} or {"winner": "tie"}.'
    )
    shown = (
        f"[Question]\n{plain_text(asked.prompt)}\n\n[First answer]\n{asked.first}\n\n"
        f"[Second answer]\n{asked.second}"
    )
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
        ``consistent``: fraction of pairs with the same winner, or a tie, in both orders. Each is
        [value, low, high].
    """
    whole = [(p.ours_first, p.theirs_first) for p in said]
    pairs = [None if a is None or b is None else (a, b) for a, b in whole]
    first = [None if pair is None else sum(pair) / 2.0 for pair in pairs]
    agree = [None if pair is None else float(side(pair[0]) == -side(pair[1])) for pair in pairs]
    return {
        "first_share": as_triple(mean_interval(first, clusters)),
        "consistent": as_triple(mean_interval(agree, clusters)),
    }


def side(share: float) -> int:
    """Return 1 if the first response wins, -1 if the second does, and 0 for a tie."""
    return int(share > 0.5) - int(share < 0.5)


def judge_model(
    bench: Bench,
    records: Sequence[Record],
    others: Sequence[Record],
    *,
    sequential: bool,
    batch: int,
    seed: int,
    columns: Sequence[Mapping[str, Any]] = (),
) -> Judged:
    """Return the verdicts on a model's responses against a baseline's, in random prompt order.

    Args:
        bench: the judge.
        records: responses of the model.
        others: responses of the baseline to the same prompts.
        sequential: stop as soon as the verdict is clear.
        batch: prompts judged between two looks at the interval.
        seed: random seed of the prompt order.
        columns: other fields of each prompt's row, by its index; empty if the judge reads none.

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
        found = bench.judge([_pair(mine[place], theirs[place], columns) for place in places])
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


def _pair(mine: Record, theirs: Record, columns: Sequence[Mapping[str, Any]]) -> Pair:
    texts = answer(mine["completion"]), answer(theirs["completion"])
    return Pair(mine["prompt"], *texts, columns[mine["prompt_index"]] if columns else {})


def answer(completion: Text) -> str:
    """Return a response's text without surrounding whitespace."""
    return completion_text(completion).strip()
