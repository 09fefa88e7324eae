"""Self-test of a judge of pairs that is a function: valid verdicts, which follow the responses."""

import time
from collections.abc import Sequence

from align.core.types import PromptRow
from align.evaluation.judge import Bench, FunctionJudge, Pair
from align.preflight.checks import Finding, spread
from reward_models.base import MissingColumnError, RewardFunction, plain_text

NUM_ROWS = 8


def judge_test(function: RewardFunction, prompts: Sequence[PromptRow]) -> Finding:
    """Compare a short response with the text of the prompt, in both orders."""
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
