"""The self-test of rewards: a known right answer above a known wrong one, speed, invalid scores."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from align.core.types import Completion, PromptRow
from align.online.scoring import score_answers
from align.preflight.checks import Check, Finding, Verdict, spread
from align.recipe.schema import EnsembleSpec, RewardSpec, ScalarSpec
from reward_models.base import MissingColumnError, RewardFunction
from reward_models.specs import LengthSpec, RefusalSpec, RemoteSpec, RepetitionSpec

NUM_ROWS = 8
FORMS = (("", ""), ("#### ", ""), ("The answer is ", "."), ("\\boxed{", "}"))
"""What may stand before and after a final answer; the form that a reward reads best is taken."""
_PLAIN = re.compile(r"(?:\\\W|[^\\\[\].*+?{}|^$()])*")
"""A pattern that stands for exactly one text: ordinary characters, and escaped special ones."""
DEAD = (
    "all groups are dead: answers that score alike teach nothing; look at some of them, at the "
    "reward, and at what the template writes before the answer"
)
Answers = Callable[[], tuple[Sequence[PromptRow], Sequence[Completion]]]
"""Prompts and the policy's own responses to them."""


@dataclass(frozen=True, slots=True)
class Known:
    """Hold responses of known worth to some rows, in the same order."""

    rows: list[PromptRow]
    right: list[str]
    wrong: list[str]


def reward_checks(
    label: str,
    specs: Sequence[RewardSpec],
    rewards: Sequence[RewardFunction],
    prompts: Sequence[PromptRow],
    answers: Answers | None,
) -> list[Check]:
    """Give one check for each reward that there is something to hold it to.

    Args:
        label: what the rewards are for: reward, score or judge.
        specs: as the recipe has them. rewards: built from them, in the same order.
        prompts: of the stage. answers: the policy's own, for the rate of invalid scores.
    """
    return [
        (f"{label} {reward.name}", partial(self_test, spec, reward, prompts, answers))
        for spec, reward in zip(specs, rewards, strict=True)
        if answers is not None or _testable(spec, prompts)
    ]


def _testable(spec: RewardSpec, prompts: Sequence[PromptRow]) -> bool:
    """Say whether known answers can be made; a line without any would say nothing."""
    column = _column(spec)
    if _learned(spec):
        return column in prompts[0].columns
    return _fixed(spec) is not None or column is not None


def self_test(
    spec: RewardSpec,
    reward: RewardFunction,
    prompts: Sequence[PromptRow],
    answers: Answers | None,
) -> Finding:
    """Score known answers and the policy's own; say what came out and how fast."""
    began, scored = time.monotonic(), 0
    said, remedy = ["no known answers can be made for it"], ""
    verdict: Verdict = "ok"
    try:
        forms = known_answers(spec, prompts)
        results = [_above(reward, known) for known in forms]
        scored += sum(2 * len(known.rows) for known in forms)
        if results:
            above, rows = max(results), len(forms[0].rows)
            said = [f"right above wrong in {above} of {rows}"]
            verdict, remedy = _judged(spec, above, rows)
        if answers is not None:
            asked, own = answers()
            scores = score_answers(asked, own, [reward]).by_name[reward.name]
            scored += len(scores)
            lost = sum(score is None for score in scores)
            said.append(f"{lost} of {len(scores)} own answers invalid")
            known = {score for score in scores if score is not None}
            if len(known) == 1 and len(scores) - lost > 1:
                verdict = "warn" if verdict == "ok" else verdict
                said.append(f"all others score {known.pop():g}")
                remedy = remedy or DEAD
            if lost == len(scores):
                verdict = "fail"
                remedy = f"no answer can be scored ({_reasons(reward)}); nothing could be trained"
            elif lost and verdict == "ok":
                verdict, remedy = "warn", f"left out of training: {_reasons(reward)}"
    except MissingColumnError as error:
        return Finding("the data lack its column", "", "fail", str(error))
    if scored:
        said.append(f"{scored / max(time.monotonic() - began, 1e-6):,.0f} answers/s")
    return Finding(", ".join(said), "right above wrong", verdict, remedy)


def _judged(spec: RewardSpec, above: int, rows: int) -> tuple[Verdict, str]:
    """Return verdict and remedy; a learned scorer may fail on some responses, a rule may not."""
    if above == rows or (_learned(spec) and 2 * above >= rows):
        return "ok", ""
    if _learned(spec):
        return "warn", "the reward model prefers other rows' answers; is it one for these prompts?"
    if above == 0:
        return "fail", (
            f"no way of stating the value of column '{_column(spec)}' gets a higher score than a "
            "wrong value; look at 'column' and 'pattern'"
        )
    return "warn", f"some values of column '{_column(spec)}' are never scored as right"


def _reasons(reward: RewardFunction) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in reward.invalid.most_common(3))


def known_answers(spec: RewardSpec, prompts: Sequence[PromptRow]) -> list[Known]:
    """Make right and wrong answers to a few rows, in every form that may suit the reward."""
    fixed = _fixed(spec)
    if fixed is not None:
        rows = spread(prompts, 1)
        return [Known(rows, [fixed[0]], [fixed[1]])]
    if isinstance(spec, RefusalSpec):
        return [_refusals(spec, spread(prompts, NUM_ROWS))]
    column = _column(spec)
    if column is None or _reads_ids(spec) or (_learned(spec) and column not in prompts[0].columns):
        return []
    rows = spread(prompts, NUM_ROWS)
    values = [_first(_value(row, column)) for row in rows]
    pairs = [
        (row, mine, other)
        for row, mine in zip(rows, values, strict=True)
        if (other := _other(values, mine)) is not None
    ]
    forms = [*FORMS, *_from_pattern(getattr(spec, "pattern", None))]
    return [
        Known(
            [row for row, _, _ in pairs],
            [f"{before}{v}{after}" for _, v, _ in pairs],
            [f"{before}{w}{after}" for _, _, w in pairs],
        )
        for before, after in forms
        if pairs
    ]


def _fixed(spec: RewardSpec) -> tuple[str, str] | None:
    """Give a right and a wrong answer where the rule looks at nothing but the text."""
    if isinstance(spec, LengthSpec):
        return "word", " ".join(["word"] * spec.limit)
    if isinstance(spec, RepetitionSpec):
        distinct = " ".join(f"word{i}" for i in range(spec.ngram + 4))
        return distinct, " ".join(["word"] * (spec.ngram + 4))
    return None


def _refusals(spec: RefusalSpec, rows: Sequence[PromptRow]) -> Known:
    """Decline where the column says so and reply elsewhere; the wrong answer does the reverse."""
    declined, replied = "I'm sorry, but I can't help with that.", "Gladly. First take a pencil."
    due = [_first(_value(row, spec.column)) in spec.declines for row in rows]
    return Known(
        list(rows),
        [declined if d else replied for d in due],
        [replied if d else declined for d in due],
    )


def _learned(spec: RewardSpec) -> bool:
    """Say whether a learned scorer has a part in the judgment."""
    if isinstance(spec, EnsembleSpec):
        return any(map(_learned, spec.members))
    return isinstance(spec, ScalarSpec)


def _reads_ids(spec: RewardSpec) -> bool:
    """Say whether a reward asks for the token ids of responses, which made-up ones lack."""
    if isinstance(spec, EnsembleSpec):
        return any(map(_reads_ids, spec.members))
    return isinstance(spec, RemoteSpec) and spec.token_ids


def _column(spec: RewardSpec) -> str | None:
    """Name the column with the right answer; a learned scorer is held to the row's reference."""
    if isinstance(spec, ScalarSpec):
        return "reference"
    if isinstance(spec, EnsembleSpec):
        return next((c for m in spec.members if (c := _column(m)) is not None), None)
    return spec.model_dump().get("column")


def _value(row: PromptRow, column: str) -> Any:
    if column not in row.columns:
        raise MissingColumnError(
            f"{row.source}: no column '{column}'; the row has {sorted(row.columns) or 'none'}; "
            "rename a column of the data or set 'column' of the reward"
        )
    return row.columns[column]


def _first(value: Any) -> str:
    if isinstance(value, list | tuple):
        value = value[0] if value else ""
    if isinstance(value, Mapping):
        value = value.get("content", "")
    return str(value)


def _other(values: Sequence[str], mine: str) -> str | None:
    return next((v for v in values if v.strip().casefold() != mine.strip().casefold()), None)


def _from_pattern(pattern: str | None) -> list[tuple[str, str]]:
    """Make a form of a pattern that is plain text around its one group; else none."""
    start = re.search(r"(?<!\\)\((?!\?)", pattern or "")
    if pattern is None or start is None:
        return []
    depth, end = 0, len(pattern)
    for bracket in re.finditer(r"(?<!\\)[()]", pattern[start.start() :]):
        depth += 1 if bracket.group() == "(" else -1
        if depth == 0:
            end = start.start() + bracket.end()
            break
    around = (pattern[: start.start()].removeprefix("^"), pattern[end:].removesuffix("$"))
    if not all(_PLAIN.fullmatch(part) for part in around):
        return []
    before, after = (re.sub(r"\\(\W)", r"\1", part) for part in around)
    return [(before, after)]


def _above(reward: RewardFunction, known: Known) -> int:
    """Count the rows whose right answer has a higher score than the wrong one.

    The responses are texts that no policy sampled: they have no token ids.
    """
    right, wrong = (
        score_answers(known.rows, [_said(text) for text in side], [reward], with_ids=False).by_name[
            reward.name
        ]
        for side in (known.right, known.wrong)
    )
    return sum(r is not None and w is not None and r > w for r, w in zip(right, wrong, strict=True))


def _said(text: str) -> Completion:
    return Completion((0,), (0.0,), "stop", text, 0)
