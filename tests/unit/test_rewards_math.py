"""The numeric reward against answers that models really give, honest and not."""

import os
import time
from fractions import Fraction

import pytest

from reward_models import build_reward
from reward_models.math import final_number

NUMBERS = {
    "So 6 * 7 = 42.\n#### 42": 42,
    "#### -1,234.50": Fraction(-2469, 2),
    "the answer is 1,234.50.": Fraction(2469, 2),
    "The answer is: **12**.": 12,
    "The answer is 7. Since 2 + 3 = 5, that fits.": 7,
    "The answer is 3 + 4 = 7": 7,
    "The answer is approx. 5": 5,
    "Answer:\n\n8": 8,
    "first 3, then 5 apples": 5,
    "it costs $1,000,000 in all": 1_000_000,
    "a loss of -$5": -5,
    "a loss of $-5": -5,
    "\u22127 degrees": -7,
    "10-5": 5,
    "x = -5": -5,
    ".5": Fraction(1, 2),
    "3/4": Fraction(3, 4),
    "1 1/2 cups": Fraction(3, 2),
    "-1 1/2": Fraction(-3, 2),
    r"\boxed{\frac{3}{4}}": Fraction(3, 4),
    r"thus $-\dfrac{3}{4}$": Fraction(-3, 4),
    r"\boxed{1{,}234}": 1234,
    r"\boxed{x = 42\text{ apples}} as 6 times 7": 42,
    "1.5e3": 1500,
    "1,2": 2,
    "7km": 7,
    # Several answers: the last marked one counts, and in it only the first number.
    r"\boxed{4} or \boxed{5}": 5,
    r"\boxed{4} so #### 5": 5,
    "#### 4\n#### 5": 5,
    "#### 1 2 3 4 5": 1,
    # A marked answer beats numbers in trailing text.
    "The answer is 42.\nI checked it 3 times.": 42,
    "#### 42\nHuman: what is 7?": 42,
}


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_final_number_of(text: str, value: Fraction | int):
    found = final_number(text)
    assert found is not None
    assert found.value == value


@pytest.mark.parametrize(
    "text",
    ["", "no idea", "x2 H2O", "on the 2nd", "2/0", "#### none\n5", r"5 so \boxed{}", "9" * 5000],
)
def test_final_number_is_none_of(text: str):
    assert final_number(text) is None


def test_long_digit_strings_are_read_in_linear_time():
    start = time.perf_counter()
    final_number("1," * 20000 + "1 " * 20000 + "9" * 100_000 + r"\frac{" * 5000)
    assert time.perf_counter() - start < 2.0


def test_math_scores_numbers_not_their_spelling():
    reward = build_reward({"kind": "math"})
    answers = ["0.50", "1/2", "50%", "50 %", ".51", "half", "5,0"]
    scores = reward(prompts=["?"] * 7, completions=answers, answer=["0.5"] * 7)
    assert scores == [1, 1, 1, 1, 0, 0, 0]
    assert not reward.invalid


def test_math_percent_as_unit_or_as_hundredth():
    reward = build_reward({"kind": "math"})
    answers = ["25%", "25", "0.25", "25%", "0.25%"]
    references = ["25", "25%", "25%", "0.25%", "25"]
    assert reward(prompts=["?"] * 5, completions=answers, answer=references) == [1, 1, 1, 0, 0]


def test_math_reads_references_of_any_type():
    reward = build_reward({"kind": "math"})
    references = ["2 + 2 = <<2+2=4>>4\n#### 4", 4, 4.0, "4.00"]
    assert reward(prompts=["?"] * 4, completions=["4"] * 4, answer=references) == [1, 1, 1, 1]


def test_math_reference_without_number_is_invalid_and_wrong_answer_is_zero():
    reward = build_reward({"kind": "math"})
    scores = reward(prompts=["?"] * 3, completions=["4", "?", "4"], answer=["four", "4", None])
    assert scores == [None, 0.0, None]
    assert reward.invalid == {"reference holds no number": 1, "column 'answer' is empty": 1}


def test_latex_compares_symbolically_and_survives_a_time_limit():
    reward = build_reward({"kind": "math", "latex": True, "timeout_s": 2.0})
    verifier = reward.function.__self__
    answers = [r"$\frac{1}{2}$", r"so \boxed{0.5}", r"\boxed{3}", r"\boxed{3} \boxed{0.5}", "no"]
    answers += ["x", r"$(1+x)^2$"]
    references = [r"\frac12"] * 5 + ["", "x^2 + 2x + 1"]
    scores = reward(prompts=["?"] * 7, completions=answers, answer=references)
    assert scores == [1.0, 1.0, 0.0, 0.0, 0.0, None, 1.0]
    assert reward.invalid == {"reference holds no expression": 1}
    first = verifier._worker.pid

    hang = r"\boxed{9^{9^{9^{9}}}}"
    scores = reward(prompts=["?"] * 2, completions=[hang, "$2$"], answer=["9^{9^{9}}", "2"])
    assert scores == [None, 1.0]
    assert reward.invalid["verifier timed out"] == 1
    assert verifier._worker.pid != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    verifier._worker.kill()
    verifier._worker.wait()
    assert reward(prompts=["?"], completions=["$2$"], answer=["2"]) == [1.0]
    verifier.close()
