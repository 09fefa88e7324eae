"""The numeric reward against answers that models really give, honest and not."""

import os
import time
from fractions import Fraction

import pytest

from reward_models import build_reward
from reward_models.base import InvalidScoreError
from reward_models.math import final_number, reference_number

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
    "7km": 7,
    # Several answers: the last marked one counts, and in it only the first number.
    r"\boxed{4} or \boxed{5}": 5,
    r"\boxed{4} so #### 5": 5,
    "#### 4\n#### 5": 5,
    # A marked answer beats numbers in trailing text.
    "The answer is 42.\nI checked it 3 times.": 42,
    "#### 42\nHuman: what is 7?": 42,
    # Where the number stands: behind a blank line, on the last line, behind a block of thought.
    "The answer is:\n\n$$18$$": 18,
    "The answer is:\n\n$$\n18\n$$": 18,
    "The answer is below.\n\n42": 42,
    "thus\n\n**42**": 42,
    "**Final Answer**\n\n42": 42,
    "<think>the answer is 3</think>\n42": 42,
    "<think>5</think><answer>\n7\n</answer><|im_end|>": 7,
    "The answer is 10 because 5 + 5 is 10.": 10,
    "#### 42 (in dollars)": 42,
    # How it is written.
    r"\boxed{\frac12}": Fraction(1, 2),
    r"\boxed{\dfrac12}": Fraction(1, 2),
    r"\boxed{\frac1{2}}": Fraction(1, 2),
    r"\boxed{\frac{-1}{-2}}": Fraction(1, 2),
    r"\boxed{\frac{-1}{2}}": Fraction(-1, 2),
    r"\boxed{2\frac12}": Fraction(5, 2),
    r"\boxed{2^{10}}": 1024,
    r"\boxed{10^{5}}": 100_000,
    r"\boxed{3 \times 10^{-2}}": Fraction(3, 100),
    "#### 3 × 10^5": 300_000,
    "10²": 100,
    "2½ cups": Fraction(5, 2),
    "#### 1 000 000": 1_000_000,
    "#### 1\u00a0000\u00a0000": 1_000_000,
    "#### 1\u2009000": 1000,
    "#### 1\u202f000": 1000,
    r"\boxed{1\,000\,000}": 1_000_000,
    "#### 1,00,000": 100_000,
    "#### \u20135": -5,
    "The answer is - 5": -5,
    "minus 5": -5,
    "50 percent": 50,
    r"\boxed{5\%}": 5,
    r"\boxed{90^\circ}": 90,
    r"\boxed{12\text{ cm}^2}": 12,
    r"\boxed{42\text{m}}": 42,
    "#### 120 cm^2": 120,
    "60 km/h": 60,
    # A rate: the unit after a slash is no divisor.
    "The answer is $18/hour": 18,
    r"The answer is \$18/hr.": 18,
    "#### 18 $/hour": 18,
    "60 km / h": 60,
    r"\boxed{60\text{ km/h}}": 60,
    r"\boxed{\$18/\text{hour}}": 18,
    "$3.50/lb": Fraction(7, 2),
    "it grows by 5%/year": 5,
    "3/4 cup": Fraction(3, 4),
    "18\u00a2": 18,
    # A command of LaTeX ends where its letters end.
    r"\boxed{1.5\times10^{3}}": 1500,
    r"\boxed{5\quad}": 5,
    r"x \approx14": 14,
    "He is a 5-year-old": 5,
    "the answer is 5 million": 5_000_000,
    "so x ≈ 3.14": Fraction(314, 100),
    "The answer is 5!": 5,
}
NO_NUMBERS = [
    *("", "no idea", "x2 H2O", "on the 2nd", "2/0", "#### none\n5", r"5 so \boxed{}", "9" * 5000),
    # More than a number: constants, variables, operators, pairs, lists, bounds.
    *(r"\boxed{2\pi}", r"$2\pi$", "2√3", r"\boxed{\sqrt{2}}", r"\boxed{\frac{\sqrt{3}}{2}}"),
    *(r"\boxed{3x+1}", "so it is 3x+1", r"\boxed{3x}", r"\boxed{3m}", r"\boxed{5i}", "3n"),
    *("#### 5 - 3", "#### 5-3", "10-5", "5 times 3", r"\boxed{5 \cdot 3}", r"\boxed{2(3)}"),
    *("(3, 4)", r"\boxed{(3,4)}", "[0, 5)", "1,2", "#### 3:4", "#### 1 2 3 4 5", "#### 5 or 6"),
    *("x > 5", "3/x", "#### 3/a", "6/xy", "3/pi", r"\boxed{3/h}", "#### 18 per 100"),
    *(r"\boxed{x > 5}", r"\boxed{\pm 5}", "±5", r"\boxed{5!}", "|5|", r"\boxed{2x = 6}"),
    *(r"\boxed{2^{1/2}}", r"\boxed{9^{9^{9}}}", "2^99999", "2^500", "The answer is not 5"),
    "#### 5 squared",
    # Cut off while thinking.
    *("<think>the answer is 5", "<think>5</think>"),
]


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_final_number_of(text: str, value: Fraction | int):
    found = final_number(text)
    assert found is not None
    assert found.value == value


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_final_number_is_none_of(text: str):
    assert final_number(text) is None


def test_long_digit_strings_are_read_in_linear_time():
    start = time.process_time()
    final_number("1," * 20000 + "1 " * 20000 + "9" * 100_000 + r"\frac{" * 5000)
    for part in ("answer", "<think>", "<a", "#### ", "minus ", " ", "- ", r"\text{", "1 000 "):
        final_number(part * 20_000 + "5")
    assert time.process_time() - start < 20.0


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
    assert reward.invalid == {"reference contains no number": 1, "column 'answer' is empty": 1}


@pytest.mark.parametrize(
    "reference",
    [
        r"\sqrt{2}",
        "√2",
        r"2\pi",
        "(3, 4)",
        "[0, 5)",
        r"\frac{\sqrt{3}}{2}",
        "3x",
        "5 or 6",
        "x > 2",
    ],
)
def test_math_reference_that_is_not_one_number_is_invalid(reference: str):
    reward = build_reward({"kind": "math"})
    answers = [reference, "2", "3", "4", "0"]
    assert reward(prompts=["?"] * 5, completions=answers, answer=[reference] * 5) == [None] * 5
    assert reward.invalid == {"reference is not one number; use latex: true": 5}


@pytest.mark.parametrize(
    "reference", ["120 cm^2", "120 cm²", "$120", "120.0", 120.0, "+120", "120 km/h"]
)
def test_math_reference_with_sign_currency_or_unit_is_one_number(reference: object):
    reward = build_reward({"kind": "math"})
    scores = reward(prompts=["?"] * 2, completions=["120", "2"], answer=[reference] * 2)
    assert scores == [1.0, 0.0]


def test_latex_compares_symbolically_and_survives_a_time_limit():
    reward = build_reward({"kind": "math", "latex": True, "timeout_s": 5.0})
    verifier = reward.function.__self__.verifier
    answers = [r"$\frac{1}{2}$", r"so \boxed{0.5}", r"\boxed{3}", r"\boxed{3} \boxed{0.5}", "no"]
    answers += ["x", r"$(1+x)^2$"]
    references = [r"\frac12"] * 5 + ["", "x^2 + 2x + 1"]
    scores = reward(prompts=["?"] * 7, completions=answers, answer=references)
    assert scores == [1.0, 1.0, 0.0, 0.0, 0.0, None, 1.0]
    assert reward.invalid == {"reference contains no expression": 1}
    first = verifier.worker.process.pid

    hang = r"\boxed{9^{9^{9^{9}}}}"
    scores = reward(prompts=["?"] * 2, completions=[hang, "$1+x$"], answer=["9^{9^{9}}", "x+1"])
    assert scores == [None, 1.0]
    assert reward.invalid["verifier timed out"] == 1
    assert verifier.worker.process.pid != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    verifier.worker.process.kill()
    verifier.worker.process.wait()
    assert reward(prompts=["?"], completions=["$1+x$"], answer=["x+1"]) == [1.0]
    verifier.worker.close()


@pytest.mark.parametrize("value", ["5!", "> 5", ">=5", {"a": 5}, {"answer": "5"}])
def test_a_bound_a_factorial_and_an_object_are_no_number(value: object) -> None:
    with pytest.raises(InvalidScoreError, match="use latex: true"):
        reference_number(value)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        # The notations that the numeric comparison reads count with latex too.
        ("<think>maybe 6</think>5", "5", 1.0),
        ("<think>it is 5", "5", 0.0),
        ("\\dfrac12", "0.5", 1.0),
        ("1\u202f000", "1000", 1.0),
        ("\u20135", "-5", 1.0),
        ("<answer>18</answer>", "18", 1.0),
        ("six", "$6", 0.0),
        # An expression without delimiters, alone.
        ("\\sqrt{3}", "\\sqrt{3}", 1.0),
        ("3", "\\sqrt{3}", 0.0),
        ("2\\pi", "2\\pi", 1.0),
        ("(3, 4)", "(3, 4)", 1.0),
        ("(4, 3)", "(3, 4)", 0.0),
        ("\\boxed{\\sqrt{3}}", "\\sqrt{3}", 1.0),
        ("120", "5!", 1.0),
        # Candidates are no answer.
        ("\\boxed{6} or \\boxed{5}", "5", 0.0),
    ],
)
def test_expressions_in_the_notations_of_responses(
    answer: str, reference: str, score: float
) -> None:
    reward = build_reward({"kind": "math", "latex": True})
    assert reward(prompts=["q"], completions=[answer], answer=[reference]) == [score]


def test_a_box_without_braces_marks_the_answer() -> None:
    reward = build_reward({"kind": "math"})
    asked = {"prompts": ["q"] * 2, "answer": ["5"] * 2}
    assert reward(completions=["so 7 and \\boxed 5", "\\boxed 7, not 5"], **asked) == [1.0, 0.0]
