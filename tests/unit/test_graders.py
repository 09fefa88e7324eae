"""Graders: scores by hand, templates that only look up, formulas that only calculate."""

import math
from pathlib import Path
from typing import Any

import pytest

from reward_models.formula import Formula, FormulaError
from reward_models.grader_specs import GraderError, RunError, fill, read_grader, sample_of
from reward_models.graders import GraderReward, Outcome, run_grader, run_graders
from reward_models.sandbox import missing_isolation
from reward_models.similarity import METRICS, similarity

needs_sandbox = pytest.mark.skipif(
    missing_isolation() is not None, reason=f"no sandbox here: {missing_isolation()}"
)


def nobody(model: str, messages: Any, sampling: Any) -> str:
    raise AssertionError("no model is asked")


def run(given: dict[str, Any], text: str, item: Any = None, *, ask: Any = nobody) -> Outcome:
    return run_grader(read_grader({"name": "g", **given}), text, item, ask=ask)


def check(operation: str, text: str, reference: str) -> float | None:
    given = {"type": "string_check", "operation": operation}
    slots = {"input": "{{ sample.output_text }}", "reference": "{{ item.x }}"}
    return run(given | slots, text, {"x": reference}).reward


# ---- texts


def test_string_checks_compare_as_they_are_called():
    assert check("eq", "Sun", "Sun") == 1.0
    assert check("eq", "Sun", "sun") == 0.0
    assert check("ne", "Sun", "sun") == 1.0
    assert check("like", "the Sun", "Sun") == 1.0
    assert check("like", "the sun", "Sun") == 0.0
    assert check("ilike", "the sun", "SUN") == 1.0


@pytest.mark.parametrize(
    ("metric", "text", "reference", "expected"),
    [
        # 3 of 4 characters on both sides.
        ("fuzzy_match", "abcd", "abed", 0.75),
        # "the" and "cat" of 3 and of 5 words.
        ("rouge_1", "the cat sat", "the cat ate the fish", 2 * 2 / 8),
        # "the cat" of 2 and of 4 pairs.
        ("rouge_2", "the cat sat", "the cat ate the fish", 2 * 1 / 6),
        ("rouge_3", "the cat sat", "the cat ate the fish", 0.0),
        ("rouge_5", "a b c d e", "a b c d e", 1.0),
        ("rouge_l", "the sat cat", "the cat ate the fish", 2 * 2 / 8),
        # 3 of the 5 + 4 + 3 + 2 n-grams of the longer text.
        ("gleu", "the cat sat", "the cat ate the fish", 3 / 14),
        # 3/4, (2 + 1)/(3 + 1), (1 + 1)/(2 + 1), (0 + 1)/(1 + 1); both have 4 words.
        ("bleu", "the cat sat on", "the cat sat down", (3 / 4 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25),
        # The same of the first 3 words, whose shortness costs exp(1 - 4/3).
        (
            *("bleu", "the cat sat", "the cat sat down"),
            math.exp(1 - 4 / 3),
        ),
        # One chunk of 2 words: P = 2/3, R = 2/5.
        (
            *("meteor", "the cat sat", "the cat ate the fish"),
            (4 / 15) / (0.9 * 2 / 3 + 0.1 * 2 / 5) * (1 - 0.5 / 8),
        ),
        # Both words, but in two chunks.
        ("meteor", "b a", "a b", 0.5),
    ],
)
def test_similarities_have_the_values_of_their_definitions(
    metric: str, text: str, reference: str, expected: float
):
    assert similarity(metric, text, reference) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_similarities_are_between_0_and_1_and_1_of_equal_texts(metric: str):
    words = "one two three four five six seven"
    # METEOR of equal texts lacks the penalty of their one chunk.
    assert similarity(metric, words, words.upper()) == pytest.approx(
        1 - 0.5 / 7**3 if metric == "meteor" else 1.0
    )
    for text in ("", "zzz", "seven one", "ONE two three four five six", "ein großes Wörterbuch"):
        assert 0.0 <= similarity(metric, text, words) <= 1.0
    assert similarity(metric, "", "") == 1.0
    assert similarity(metric, "", "one") == 0.0


# ---- templates


def spaces(text: str = "hi", item: Any = None) -> dict[str, Any]:
    return {"sample": sample_of(text), "item": item}


def test_templates_look_up_keys_and_indices_and_write_the_rest_as_json():
    item = {"a": {"b": [10, {"c": "x"}]}, "n": None, "two-part": 1}
    filled = fill(
        "{{item.a.b[1].c}} {{ item.a }} {{ item.n }} {{ item.two-part }}", spaces("", item)
    )
    assert filled == 'x {"b": [10, {"c": "x"}]} null 1'
    assert fill("{{ sample.output_json.k[0] }}", spaces('{"k": [true]}')) == "true"
    assert fill("{{ sample.choices[0].message.content }}", spaces("hi")) == "hi"
    assert fill("{% if 1 %} { { item } }", spaces()) == "{% if 1 %} { { item } }"


def test_what_is_filled_in_is_not_read_as_a_template():
    assert fill("{{ sample.output_text }}", spaces("{{ item.secret }}", {"secret": "s"})) == (
        "{{ item.secret }}"
    )


SSTI = (
    "{{ 7*7 }}",
    "{{ config }}",
    "{{ self.__init__.__globals__ }}",
    "{{ item.__class__.__mro__ }}",
    "{{ ''.__class__ }}",
    "{{ item|attr('__class__') }}",
    "{{ item['x'] }}",
    "{{ sample.output_text.upper() }}",
    "{{ item.x if 1 else 2 }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ request.application }}",
    "{{ item[0:1] }}",
    "{{ item.x }}{{ namespace() }}",
    "{{}}",
    "{{ item }} {{ item. }}",
)


@pytest.mark.parametrize("payload", SSTI)
def test_expressions_in_templates_are_errors_not_evaluated(payload: str):
    with pytest.raises(RunError) as error:
        fill(payload, spaces("hi", {"x": "y"}))
    assert error.value.kind == "invalid_variable_error"


def test_a_missing_key_and_a_response_without_json_are_different_errors():
    given = {"type": "string_check", "operation": "eq", "reference": "1"}
    assert set(run(given | {"input": "{{ item.y }}"}, "", {"x": 1}).errors) == {
        "invalid_variable_error"
    }
    lost = run(given | {"input": "{{ sample.output_json.y }}"}, "no json")
    assert set(lost.errors) == {"sample_parse_error"}
    assert lost.reward is None


# ---- formulas


def test_formulas_calculate():
    values = {"a": 2.0, "b": 3.0}
    for text, expected in {
        "a + 2*b - 1": 7.0,
        "a ^ b": 8.0,
        "-a / 4": -0.5,
        "max(a, b, 1) - min(a, b)": 1.0,
        "floor(2.7) + ceil(0.1) + abs(-1)": 4.0,
        "exp(log(a)) * sqrt(9)": 6.0,
        " b % a ": 1.0,
    }.items():
        assert Formula(text)(values) == pytest.approx(expected), text


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('id')",
        "a.__class__",
        "(lambda: 1)()",
        "[x for x in (1,)]",
        "a if b else 1",
        "'a' * 9",
        "open('/etc/passwd')",
        "max(key=a)",
        "True",
        "a < b",
        "f'{a}'",
        "a; b",
        "",
        "(" * 500 + "1" + ")" * 500,
        "1" + "+1" * 400,
        "max(*a)",
        "a := 1",
        "1j",
    ],
)
def test_formulas_are_nothing_but_arithmetic(text: str):
    with pytest.raises(FormulaError):
        Formula(text)


@pytest.mark.parametrize("text", ["1/0", "10^400", "(-1)^0.5", "9^9^9^9", "log(0)", "c", "min(1)"])
def test_formulas_without_a_finite_value_are_errors(text: str):
    with pytest.raises(FormulaError):
        Formula(text)({"a": 1.0})


# ---- models and members


def multi(formula: str, **graders: Any) -> dict[str, Any]:
    return {"type": "multi", "name": "m", "graders": graders, "calculate_output": formula}


LABEL: dict[str, Any] = {
    "type": "label_model",
    "name": "l",
    "model": "judge",
    "input": [{"role": "user", "content": "Is it good? {{ sample.output_text }}"}],
    "labels": ["good", "bad", "odd"],
    "passing_labels": ["good", "odd"],
}
SCORE: dict[str, Any] = {
    "type": "score_model",
    "name": "s",
    "model": "judge",
    "input": [{"role": "user", "content": "Rate: {{ sample.output_text }}"}],
    "range": [1, 10],
}


def test_model_graders_read_numbers_in_the_range_and_labels():
    asked: list[Any] = []

    def ask(model: str, messages: Any, sampling: Any) -> str:
        asked.append((model, messages[-1]["content"], sampling))
        return " 7.5 points" if messages[-1]["content"].startswith("Rate") else "Good."

    def replying(text: str) -> Any:
        return lambda model, messages, sampling: text

    given = multi("s / 10 + l", s={**SCORE, "sampling_params": {"seed": 1}}, l=LABEL)
    outcome = run(given, "x", ask=ask)
    assert outcome.sub_rewards == {"s": 7.5, "l": 1.0}
    assert outcome.reward == 1.75
    assert asked[0][0] == "judge"
    assert asked[0][1].startswith("Rate: x\n\n")
    assert asked[0][2] == {"seed": 1}
    assert run(multi("l", l=LABEL), "x", ask=replying("BAD")).reward == 0.0
    for text in ("eleven", "11", "0"):
        assert set(run(SCORE, "x", ask=replying(text)).errors) == {"model_grader_parse_error"}
    assert set(run(multi("l", l=LABEL), "x", ask=replying("fine")).errors) == {
        "model_grader_parse_error"
    }

    def down(model: str, messages: Any, sampling: Any) -> str:
        raise OSError("refused")

    assert run(SCORE, "x", ask=down).errors == {"model_grader_server_error": "refused"}


def test_a_multi_grader_takes_a_list_or_one_grader_by_name():
    one = {"type": "string_check", "name": "c", "operation": "eq"}
    one |= {"input": "{{ sample.output_text }}", "reference": "a"}
    for graders in ({"c": one}, [one], one):
        given = {"type": "multi", "graders": graders, "calculate_output": "2 * c"}
        assert run(given, "a").reward == 2.0


def test_an_invalid_grader_is_named_with_its_place():
    good = {"type": "string_check", "name": "c", "operation": "eq", "input": "a", "reference": "b"}
    for given, message in (
        ({**good, "operation": "is"}, "operation: Input should be"),
        ({**good, "input": "{{ x }}"}, r"c: \{\{ x \}\}: expected"),
        ({**good, "more": 1}, "more"),
        ({"type": "magic", "name": "c"}, "magic"),
        ("text", "grader"),
        (LABEL, "inside of a multi grader only"),
        (multi("l", l={**LABEL, "passing_labels": ["x"]}), "'x' is none of the labels"),
        (multi("c + d", c=good), "no grader named 'd'"),
        (multi("c.x", c=good), "calculate_output"),
        ({**SCORE, "range": [1, 1]}, "range"),
        ({"type": "python", "name": "p", "source": "x = 1"}, "def grade"),
        ({"type": "python", "name": "p", "source": "def grade(:"}, "source"),
    ):
        with pytest.raises(GraderError, match=message):
            read_grader(given)


# ---- programs


@needs_sandbox
def test_programs_score_and_their_errors_have_details():
    source = (
        "def grade(sample, item):\n"
        "    print('noise')\n"
        "    if sample['output_text'] == 'boom':\n"
        "        raise KeyError('lost')\n"
        "    return {'nan': float('nan')}.get(sample['output_text'], item['x'] / 4)\n"
    )
    grader = read_grader({"type": "python", "name": "p", "source": source})
    found = run_graders(grader, ["a", "boom", "nan", "b"], [{"x": 2}] * 3 + [{"x": 1}], ask=nobody)
    assert [outcome.reward for outcome in found] == [0.5, None, None, 0.25]
    assert found[1].errors == {"python_grader_runtime_error": "KeyError: 'lost'"}
    assert set(found[2].errors) == {"python_grader_runtime_error"}


@needs_sandbox
def test_programs_reach_no_file_no_network_and_no_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    monkeypatch.setenv("SECRET_KEY", "s3cret")
    source = (
        "import os, socket\n"
        "def grade(sample, item):\n"
        "    reached = 0\n"
        f"    for attempt in (lambda: open({str(secret)!r}).read(),\n"
        "                    lambda: os.environ['SECRET_KEY'],\n"
        "                    lambda: socket.create_connection(('127.0.0.1', 22), 1),\n"
        "                    lambda: open('/etc/shadow').read()):\n"
        "        try:\n"
        "            attempt()\n"
        "            reached += 1\n"
        "        except Exception:\n"
        "            pass\n"
        "    return reached\n"
    )
    outcome = run({"type": "python", "source": source}, "x", {})
    assert outcome.reward == 0.0, outcome.errors


# ---- as a reward


def test_a_grader_is_a_reward_with_none_where_it_has_no_score():
    grader = (
        '{"type": "string_check", "name": "c", "operation": "eq",'
        ' "input": "{{ sample.output_json.a }}", "reference": "{{ item.want }}"}'
    )
    reward = GraderReward(grader, "http://127.0.0.1:1/v1")
    completions = [[{"role": "assistant", "content": text}] for text in ('{"a": "y"}', "no json")]
    scores = reward(["p", "p"], completions, item=['{"want": "y"}'] * 2, other=[1, 2])
    assert scores == [1.0, None]


def test_a_cosine_of_embeddings_is_refused_and_not_replaced_by_another_score():
    grader = {"type": "text_similarity", "name": "x", "input": "a", "reference": "b"}
    with pytest.raises(GraderError, match=r"use one of fuzzy_match, bleu"):
        read_grader({**grader, "evaluation_metric": "cosine"})
    multi = {"type": "multi", "name": "m", "calculate_output": "x"}
    member = {**grader, "evaluation_metric": "cosine"}
    with pytest.raises(GraderError, match="cosine compares embeddings"):
        read_grader({**multi, "graders": {"x": member}})
