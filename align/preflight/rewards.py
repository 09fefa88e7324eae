"""Self-tests of rewards: correct answers score above wrong ones; and of functions that judge."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from align.core.errors import DataError
from align.core.types import Completion, PromptRow
from align.evaluation.judge import Bench, FunctionJudge, Pair
from align.online.scoring import score_answers
from align.preflight.checks import Check, Finding, Verdict, spread
from align.recipe.schema import EnsembleSpec, RewardSpec, ScalarSpec
from reward_models.base import MissingColumnError, RewardFunction, plain_text
from reward_models.specs import CodeSpec, LengthSpec, RefusalSpec, RemoteSpec, RepetitionSpec

NUM_ROWS = 8
FORMS = (("", ""), ("#### ", ""), ("The answer is ", "."), ("\\boxed{", "}"))
"""Text before and after a final answer; the form that a reward reads best is used."""
SOLUTIONS = ("canonical_solution", "code", "solution", "reference_solution")
"""Columns that may contain a program that solves the row."""
_PLAIN = re.compile(r"(?:\\\W|[^\\\[\].*+?{}|^$()])*")
"""Matches patterns that match exactly one text: ordinary and escaped special characters."""
DEAD = (
    "all responses get the same score, so there is nothing to learn. Check some responses, the "
    "reward, and what the template writes before the response"
)
Answers = Callable[[], tuple[Sequence[PromptRow], Sequence[Completion]]]
"""Prompts and the policy's own responses to them."""


@dataclass(frozen=True, slots=True)
class Known:
    """Known correct and wrong responses to some rows, in the same order."""

    rows: list[PromptRow]
    right: list[str]
    wrong: list[str]


def reward_checks(
    label: str,
    specs: Sequence[RewardSpec],
    rewards: Sequence[RewardFunction],
    *,
    prompts: Sequence[PromptRow],
    answers: Answers | None,
) -> list[Check]:
    """Return one check per reward that can be tested.

    Args:
        label: what the rewards are for: reward, score or judge.
        specs: rewards of the recipe. rewards: built from them, in the same order.
        prompts: those of the stage. answers: sampled responses, for the rate of invalid scores.
    """
    return [
        (
            f"{label} {reward.name}",
            partial(self_test, spec, reward, prompts=prompts, answers=answers),
        )
        for spec, reward in zip(specs, rewards, strict=True)
        if answers is not None or _testable(spec, prompts)
    ]


def _testable(spec: RewardSpec, prompts: Sequence[PromptRow]) -> bool:
    """Return whether known answers can be constructed for the reward."""
    column = _column(spec)
    if isinstance(spec, CodeSpec):
        return _solution_column(prompts) is not None
    if _learned(spec):
        return column in prompts[0].columns
    return _fixed(spec) is not None or column is not None


def self_test(
    spec: RewardSpec,
    reward: RewardFunction,
    *,
    prompts: Sequence[PromptRow],
    answers: Answers | None,
) -> Finding:
    """Score known answers and sampled responses, and report the results and the speed."""
    began, scored = time.monotonic(), 0
    said, remedy = ["no known answers can be constructed for it"], ""
    verdict: Verdict = "ok"
    try:
        # Known responses: the best of several forms counts, since rewards parse different ones.
        forms = _known_answers(spec, prompts)
        results = [_above(reward, known) for known in forms]
        scored += sum(2 * len(known.rows) for known in forms)
        if results:
            above, rows = max(results), len(forms[0].rows)
            said = [f"right above wrong in {above} of {rows}"]
            verdict, remedy = _judged(spec, above, rows)
        if empty := _num_empty(spec, prompts):
            said.append(f"{empty:,} of {len(prompts):,} rows have no '{_column(spec)}'")
            told = "responses to rows without the column cannot be scored, and are left out"
            verdict, remedy = "warn" if verdict == "ok" else verdict, remedy or told
        if unseen := _unseen_prefill(spec, prompts):
            verdict, remedy = "warn" if verdict == "ok" else verdict, remedy or unseen
        if answers is not None:
            asked, own = answers()
            scores = score_answers(asked, own, [reward]).by_name[reward.name]
            scored += len(scores)
            lost = sum(score is None for score in scores)
            said.append(f"{lost} of {len(scores)} sampled responses invalid")
            known = {score for score in scores if score is not None}
            if len(known) == 1 and len(scores) - lost > 1:
                verdict = "warn" if verdict == "ok" else verdict
                said.append(f"all others score {known.pop():g}: all groups are dead")
                remedy = remedy or DEAD
            if lost == len(scores):
                verdict = "fail"
                remedy = (
                    f"no response can be scored ({_reasons(reward)}), so nothing can be trained"
                )
            elif lost and verdict == "ok":
                verdict, remedy = "warn", f"excluded from training: {_reasons(reward)}"
    except (MissingColumnError, DataError) as error:
        return Finding("its column is missing in the data", "", "fail", str(error))
    if scored:
        said.append(f"{scored / max(time.monotonic() - began, 1e-6):,.0f} responses/s")
    return Finding(", ".join(said), "right above wrong", verdict, remedy)


def _num_empty(spec: RewardSpec, prompts: Sequence[PromptRow]) -> int:
    """Return the number of rows without a value in the column that a rule reads."""
    column = _column(spec)
    if column is None or _learned(spec):
        return 0
    return sum(row.columns.get(column) is None for row in prompts)


def _unseen_prefill(spec: RewardSpec, prompts: Sequence[PromptRow]) -> str:
    """Return a remedy if the pattern expects what the template writes and the reward sees none."""
    pattern = str(getattr(spec, "pattern", None) or "")
    for prefill in {p.prefill for p in prompts if p.prefill}:
        if not spec.prefill and prefill[: prefill.index(">") + 1] in pattern:
            return (
                f"the chat template writes {prefill!r} at the beginning of each response, and the "
                "reward does not see it. Set prefill: true, or remove it from 'pattern'"
            )
    return ""


def _judged(spec: RewardSpec, above: int, rows: int) -> tuple[Verdict, str]:
    """Return verdict and remedy; a learned scorer may fail on some responses, a rule may not."""
    if above == rows or (_learned(spec) and 2 * above >= rows):
        return "ok", ""
    if _learned(spec):
        return (
            "warn",
            "the reward model prefers answers of other rows. Check that it fits these prompts",
        )
    if isinstance(spec, CodeSpec):
        verdict: Verdict = "warn" if above else "fail"
        return verdict, (
            f"the solutions of {rows - above} of {rows} rows do not pass their tests. Check "
            "'column', 'timeout_s', and that the packages that they import are installed"
        )
    if above == 0:
        return "fail", (
            f"the value of column '{_column(spec)}' never scores above a wrong value, in any "
            "form. Check 'column' and 'pattern'"
        )
    return "warn", f"some values of column '{_column(spec)}' are never scored as correct"


def _reasons(reward: RewardFunction) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in reward.invalid.most_common(3))


def _known_answers(spec: RewardSpec, prompts: Sequence[PromptRow]) -> list[Known]:
    """Return correct and wrong answers to a few rows, in every form that may suit the reward."""
    fixed = _fixed(spec)
    if fixed is not None:
        rows = spread(prompts, 1)
        return [Known(rows, [fixed[0]], [fixed[1]])]
    if isinstance(spec, RefusalSpec):
        return [_refusals(spec, _with_value(prompts, spec.column))]
    column = _column(spec)
    if isinstance(spec, CodeSpec):
        column = _solution_column(prompts)
    if column is None or _reads_ids(spec) or (_learned(spec) and column not in prompts[0].columns):
        return []
    rows = _with_value(prompts, column)
    values = [_first(row.columns[column]) for row in rows]
    # The wrong answer of a row is the correct one of another row, which has the right format.
    pairs = [
        (row, mine, other)
        for row, mine in zip(rows, values, strict=True)
        if (other := _other(values, mine)) is not None
    ]
    forms = [*FORMS, *_from_pattern(getattr(spec, "pattern", None))]
    if isinstance(spec, CodeSpec):
        forms = [("```python\n", "\n```")]
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
    """Return a correct and a wrong answer for a rule that reads only the text, else None."""
    if isinstance(spec, LengthSpec):
        return "word", " ".join(["word"] * spec.limit)
    if isinstance(spec, RepetitionSpec):
        distinct = " ".join(f"word{i}" for i in range(spec.ngram + 4))
        return distinct, " ".join(["word"] * (spec.ngram + 4))
    return None


def _refusals(spec: RefusalSpec, rows: Sequence[PromptRow]) -> Known:
    """Return responses that refuse where the column asks for it; the wrong ones do the reverse."""
    declined, replied = "I'm sorry, but I can't help with that.", "Gladly. First take a pencil."
    due = [_first(row.columns[spec.column]) in spec.declines for row in rows]
    return Known(
        list(rows),
        [declined if d else replied for d in due],
        [replied if d else declined for d in due],
    )


def _learned(spec: RewardSpec) -> bool:
    """Return whether a reward model takes part in the score."""
    if isinstance(spec, EnsembleSpec):
        return any(map(_learned, spec.members))
    return isinstance(spec, ScalarSpec)


def _reads_ids(spec: RewardSpec) -> bool:
    """Return whether a reward reads token ids, which constructed responses do not have."""
    if isinstance(spec, EnsembleSpec):
        return any(map(_reads_ids, spec.members))
    return isinstance(spec, RemoteSpec) and spec.token_ids


def _solution_column(prompts: Sequence[PromptRow]) -> str | None:
    return next((name for name in SOLUTIONS if any(p.columns.get(name) for p in prompts)), None)


def _column(spec: RewardSpec) -> str | None:
    """Return the column of the correct answer; for a reward model it is ``reference``."""
    if isinstance(spec, ScalarSpec):
        return "reference"
    if isinstance(spec, EnsembleSpec):
        return next((c for m in spec.members if (c := _column(m)) is not None), None)
    return spec.model_dump().get("column")


def _with_value(rows: Sequence[PromptRow], column: str) -> list[PromptRow]:
    """Return a few evenly spaced ones of the rows that have a value in a column.

    Raises:
        MissingColumnError: no row has one.
    """
    # Places, since millions of rows may be on disk.
    found = [i for i, row in enumerate(rows) if row.columns.get(column) is not None]
    if not found:
        names = sorted(name for name, value in rows[0].columns.items() if value is not None)
        raise MissingColumnError(
            f"{rows[0].source}: no column '{column}', as in all rows; the row has "
            f"{names or 'none'}. Rename a column of the data or set 'column' of the reward"
        )
    return [rows[i] for i in spread(found, NUM_ROWS)]


def _first(value: object) -> str:
    if isinstance(value, list | tuple):
        value = value[0] if value else ""
    if isinstance(value, Mapping):
        value = value.get("content", "")
    return str(value)


def _other(values: Sequence[str], mine: str) -> str | None:
    return next((v for v in values if v.strip().casefold() != mine.strip().casefold()), None)


def _from_pattern(pattern: str | None) -> list[tuple[str, str]]:
    """Return the form of a pattern that is plain text around one group, else an empty list."""
    # The first group that captures; everything around it must be literal text.
    start = re.search(r"(?<!\\)\((?!\?)", pattern or "")
    if pattern is None or start is None:
        return []
    depth, end = 0, len(pattern)
    # Find the closing bracket of that group; it may contain further groups.
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
    """Return the number of rows whose correct answer scores above the wrong one.

    The responses are texts that no policy sampled, so they have no token ids.
    """
    # They are whole: nothing of them is written by a template.
    rows = [replace(row, prefill="") for row in known.rows]
    right, wrong = (
        score_answers(rows, [_said(text) for text in side], [reward], with_ids=False).by_name[
            reward.name
        ]
        for side in (known.right, known.wrong)
    )
    return sum(r is not None and w is not None and r > w for r, w in zip(right, wrong, strict=True))


def _said(text: str) -> Completion:
    return Completion((0,), (0.0,), "stop", text, 0)


def judge_test(function: RewardFunction, prompts: Sequence[PromptRow]) -> Finding:
    """Check that a judge of pairs is a function of the responses, not of their order.

    A short response is compared with the text of the prompt, in both orders.
    """
    began = time.monotonic()
    expected = "valid verdicts that follow the responses"
    bench = Bench(FunctionJudge(function))
    pairs = [
        Pair(row.prompt, "Yes.", plain_text(row.prompt), row.columns)
        for row in spread(prompts, NUM_ROWS)
    ]
    try:
        said = bench.judge(pairs)
    except MissingColumnError as error:
        return Finding("its column is missing in the data", "", "fail", str(error))
    valid = [pair for pair in said if pair.result is not None]
    text = f"valid verdicts on {len(valid)} of {len(said)} pairs in both orders"
    speed = f", {2 * len(said) / max(time.monotonic() - began, 1e-6):,.0f} verdicts/s"
    reasons = ", ".join(f"{n} x {why}" for why, n in bench.report()["invalid"].items())
    if not valid:
        remedy = f"no pair can be judged ({reasons}), so nothing can be compared"
        return Finding(text, expected, "fail", remedy)
    # The same number in both orders can only be the response that is shown first, or second.
    if all(pair.ours_first == pair.theirs_first != 0.5 for pair in valid):
        remedy = (
            "it gives the same verdict in both orders, so it looks at the order and every pair "
            "ends in a tie. Compare 'completions' with 'others'"
        )
        return Finding(text + speed, expected, "warn", remedy)
    if len(valid) < len(said):
        return Finding(text + speed, expected, "warn", f"left out: {reasons}")
    return Finding(text + speed, expected, "ok", "")
