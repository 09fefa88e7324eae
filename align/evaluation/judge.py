"""Let a language model compare answers in both orders, no longer than the verdict is open."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from align.core.types import Text
from align.evaluation.compare import Record, as_triple, by_place
from align.evaluation.sequential import ConfidenceSequence
from align.evaluation.stats import share_interval
from align.evaluation.verdict import Judged, Place
from reward_models.base import completion_text
from reward_models.judge import JudgeClient, Messages, Verdict

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"winner": {"type": "string", "enum": ["first", "second", "tie"]}},
    "required": ["winner"],
    "additionalProperties": False,
}
_FIRST = {"first": 1.0, "tie": 0.5, "second": 0.0}
"""What a verdict gives to the answer that was shown first."""
Ask = Callable[[Sequence[Messages]], Sequence[Verdict]]


@dataclass(frozen=True, slots=True)
class Pair:
    """Hold two answers to one prompt: ``ours`` is the side that a result of 1 speaks for."""

    prompt: str
    ours: str
    theirs: str


@dataclass(frozen=True, slots=True)
class BothOrders:
    """Hold what a judge said of a pair, ours first and ours second; None is invalid.

    Each is the share of the win given to the answer shown first.
    """

    ours_first: float | None
    theirs_first: float | None

    @property
    def result(self) -> float | None:
        """Give 1 where ours won in both orders, 0 where it lost in both; None if one is invalid."""
        if self.ours_first is None or self.theirs_first is None:
            return None
        return (self.ours_first + 1.0 - self.theirs_first) / 2.0


@dataclass(slots=True)
class Bench:
    """Hold a judge and everything it has said.

    Attributes:
        client: where it is asked. criteria: what it is to look at.
        said: every pair's verdicts in both orders.
        offered: pairs that it could have been asked about.
    """

    client: JudgeClient
    criteria: str
    said: list[BothOrders] = field(default_factory=list)
    offered: int = 0

    def judge(self, pairs: Sequence[Pair]) -> list[BothOrders]:
        """Judge pairs in both orders; equal answers are a tie that nobody is asked about."""
        asked = [pair for pair in pairs if pair.ours != pair.theirs]
        requests = [m for pair in asked for m in both_orders(pair, self.criteria)]
        verdicts = iter(self.client.ask(requests, SCHEMA) if requests else ())
        found = [
            BothOrders(0.5, 0.5)
            if pair.ours == pair.theirs
            else BothOrders(_share(next(verdicts)), _share(next(verdicts)))
            for pair in pairs
        ]
        self.said += found
        return found

    def report(self) -> dict[str, Any]:
        """Say what was judged, how the place of an answer swayed it, and what it cost."""
        endpoint, cost = self.client.endpoint, self.client.cost
        return {
            "model": endpoint.model,
            "pairs": self.offered,
            "pairs_judged": len(self.said),
            **position(self.said),
            **{k: v for k, v in asdict(cost).items() if k != "invalid"},
            "invalid": dict(cost.invalid),
            "dollars": cost.dollars(endpoint),
        }


def both_orders(pair: Pair, criteria: str) -> tuple[Messages, Messages]:
    """Write the question with ours first, then with ours second."""
    return (
        _question(pair.prompt, pair.ours, pair.theirs, criteria),
        _question(pair.prompt, pair.theirs, pair.ours, criteria),
    )


def _question(prompt: str, first: str, second: str, criteria: str) -> Messages:
    task = (
        f"{criteria} Ignore their order and length. Reply with JSON: "
        '{"winner": "first"}, {"winner": "second"} or {"winner": "tie"}.'
    )
    shown = f"[Question]\n{prompt}\n\n[First answer]\n{first}\n\n[Second answer]\n{second}"
    return [{"role": "system", "content": task}, {"role": "user", "content": shown}]


def _share(verdict: Verdict) -> float | None:
    return None if verdict.value is None else _FIRST[verdict.value["winner"]]


def position(said: Sequence[BothOrders]) -> dict[str, Any]:
    """Measure how the place of an answer sways a judge.

    Returns:
        ``first_share``: how often the answer shown first wins, ties half; 0.5 without bias.
        ``consistent``: share of pairs on which both orders agree. Each with its interval.
    """
    whole = [(p.ours_first, p.theirs_first) for p in said if p.result is not None]
    if not whole:
        return {"first_share": [None] * 3, "consistent": [None] * 3}
    first = [(a + b) / 2.0 for a, b in whole if a is not None and b is not None]
    agree = [float(a == 1.0 - b) for a, b in whole if a is not None and b is not None]
    return {
        "first_share": as_triple(share_interval(first)),
        "consistent": as_triple(share_interval(agree)),
    }


def plain(text: Text) -> str:
    """Write a prompt as the judge reads it: text as it is, a conversation with its roles."""
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return str(text[0]["content"])
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in text)


def judge_model(
    bench: Bench,
    records: Sequence[Record],
    others: Sequence[Record],
    *,
    sequential: bool,
    batch: int,
    seed: int,
) -> Judged:
    """Judge a model's answers against another's, prompt by prompt in a seeded order.

    Args:
        bench: the judge.
        records: answers of the model. others: those of the baseline to the same prompts.
        sequential: stop as soon as the verdict is clear.
        batch: prompts judged between two looks.
        seed: of the order in which prompts are judged.

    Returns:
        The results of the pairs that were judged, and with ``sequential`` the interval that holds
        whenever judging stopped: of the mean over prompts, an invalid pair left out.
    """
    mine, theirs = by_place(records), by_place(others)
    prompts = sorted({place[0] for place in mine})
    order = np.random.default_rng(seed).permutation(len(prompts))
    bench.offered += len(mine)
    results: dict[Place, float | None] = {}
    sequence = ConfidenceSequence()
    for start in range(0, len(prompts), batch):
        chosen = {prompts[i] for i in order[start : start + batch]}
        places = [place for place in sorted(mine) if place[0] in chosen]
        found = bench.judge([_pair(mine[place], theirs[place]) for place in places])
        results |= {p: said.result for p, said in zip(places, found, strict=True)}
        for value in _by_prompt(results, [prompts[i] for i in order[start : start + batch]]):
            sequence.update(value)
        if sequential and sequence.verdict != "not shown":
            break
    return Judged(results, sequence.interval if sequential and sequence.count else None)


def _by_prompt(results: Mapping[Place, float | None], prompts: Sequence[int]) -> list[float]:
    means = []
    for prompt in prompts:
        known = [x for place, x in results.items() if place[0] == prompt and x is not None]
        if known:
            means.append(sum(known) / len(known))
    return means


def _pair(mine: Record, theirs: Record) -> Pair:
    return Pair(plain(mine["prompt"]), answer(mine["completion"]), answer(theirs["completion"]))


def answer(completion: Text) -> str:
    """Give an answer's text."""
    return completion_text(completion).strip()
