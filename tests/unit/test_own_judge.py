"""A judge of pairs that is the user's function: verdicts, failures, preflight, commands."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.api.stages import evaluate
from align.cli.eval_recipe import Question, question_recipe
from align.core.artifacts import spec_hash
from align.core.errors import AlignError, RecipeError
from align.core.types import PromptRow
from align.evaluation.judge import Bench, BothOrders, FunctionJudge, Pair
from align.evaluation.verdict import Responses
from align.preflight.rewards import judge_test
from align.recipe.load import load_recipe
from align.recipe.schema import DataSpec
from align.recipe.schema.evaluate import LONGER
from align.report.tables import judge_lines
from align.report.tasks import _judge as judge_table
from align.stages.evaluate.judge import calibrate, judge_all
from reward_models import build_reward
from reward_models.base import MissingColumnError, RewardFunction

CODE = '''
import math, os, sys, time
import numpy as np

def text(one): return one if isinstance(one, str) else one[-1]["content"]

def longer(prompts, completions, others):
    pairs = zip(map(text, completions), map(text, others))
    return [(len(a) > len(b)) + 0.5 * (len(a) == len(b)) for a, b in pairs]

def right(completions, others, answer, **columns):
    """1 if only the completion has the answer of the row."""
    rows = zip(completions, others, answer)
    return [0.5 + 0.5 * (r in text(a)) - 0.5 * (r in text(b)) for a, b, r in rows]

def chance(completions, others, **columns):
    return np.array([0.8 if c == "a" else 0.3 for c in completions])

def first(completions, others): return [True for _ in completions]

class Limit:
    def __init__(self, most): self.most = most
    def __call__(self, completions, others, **columns):
        return [0.5 + 0.5 * (len(a) <= self.most) - 0.5 * (len(b) <= self.most)
                for a, b in zip(completions, others)]

async def later(completions, others): return [0.0 for _ in completions]

def bad(prompts, completions, others):
    found = []
    for prompt, a, b in zip(prompts, completions, others):
        if prompt == "raise": raise ValueError(prompt)
        if prompt == "hang": time.sleep(60)
        if prompt == "exit": os._exit(1)
        if prompt == "quit": sys.exit(0)
        if prompt == "print": print("1.0")
        value = {"none": None, "nan": math.nan, "text": "first", "two": 2.0, "minus": -0.1}
        found.append(value.get(prompt, float(a > b)))
    return found

def reward(prompts, completions): return [1.0 for _ in completions]
'''
RECIPE = """
name: own
stages:
  base: {{kind: base, build: {{vocab_size: 64}}, data: [{{world: corpus}}], steps: 1}}
  evaluate:
    kind: evaluate
    models: [base]
    baseline: base
    tasks: [{{name: t, prompts: [{{path: p.jsonl}}], metrics: [win_rate]}}]
    pairwise: {pairwise}
"""


@pytest.fixture(autouse=True)
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("judge.py").write_text(CODE)
    return tmp_path / "judge.py"


def own(name: str, **keys: Any) -> RewardFunction:
    return build_reward({"kind": "python", "path": f"judge.py:{name}", **keys})


def verdicts(name: str, pairs: list[Pair], **keys: Any) -> tuple[list[BothOrders], dict[str, Any]]:
    bench = Bench(FunctionJudge(own(name, **keys)))
    return bench.judge(pairs), bench.report()


def test_both_orders_make_one_result():
    pairs = [Pair("q", "long", "s"), Pair("q", "s", "long"), Pair("q", "four", "size")]
    said, report = verdicts("longer", [*pairs, Pair("q", "same", "same")])
    assert said == [BothOrders(1, 0), BothOrders(0, 1), BothOrders(0.5, 0.5), BothOrders(0.5, 0.5)]
    assert [pair.result for pair in said] == [1.0, 0.0, 0.5, 0.5]
    assert (report["model"], report["pairs_judged"], report["invalid"]) == ("longer", 4, {})
    assert report["consistent"][0] == 1.0


def test_a_judge_that_takes_the_first_response_decides_nothing():
    said, report = verdicts("first", [Pair("q", "a", "b"), Pair("p", "c", "d")])
    assert [pair.result for pair in said] == [0.5, 0.5]
    assert (report["first_share"][0], report["consistent"][0]) == (1.0, 0.0)


def test_a_probability_counts_as_such():
    """In the order (a, b) a wins with 0.8, in (b, a) with 1 - 0.3: in the mean 0.75."""
    (said,), report = verdicts("chance", [Pair("q", "a", "b")])
    assert said.result == pytest.approx(0.75)
    assert said.winner == 1.0
    assert report["consistent"][0] == 1.0
    assert report["first_share"][0] == pytest.approx(0.55)


def test_it_gets_columns_conversations_and_arguments():
    prompt = [{"role": "user", "content": "2 + 2?"}]
    said, _ = verdicts("right", [Pair(prompt, "It is 4.", "It is 5.", {"answer": "4", "x": 1})])
    assert said == [BothOrders(1.0, 0.0)]
    said, _ = verdicts("Limit", [Pair("q", "short", "much too long")], args={"most": 6})
    assert said == [BothOrders(1.0, 0.0)]
    said, _ = verdicts("later", [Pair("q", "a", "b")])
    assert said == [BothOrders(0.0, 0.0)]
    with pytest.raises(MissingColumnError, match="'answer', which is not a column"):
        verdicts("right", [Pair("q", "a", "b")])


def test_what_is_no_verdict_is_counted_and_spoils_no_other():
    wrong = ["raise", "none", "nan", "text", "two", "minus", "exit", "quit"]
    pairs = [Pair(name, "b", "a") for name in [*wrong, "fine", "print"]]
    said, report = verdicts("bad", pairs)
    assert [pair.result for pair in said] == [None] * len(wrong) + [1.0, 1.0]
    assert report["invalid"] == {
        "raised ValueError": 2,
        "no score (None)": 2,
        "score is not finite": 2,
        "score is a str": 2,
        "verdict not between 0 and 1": 4,
        "function died": 2,
        "raised SystemExit": 2,
    }


def test_a_function_that_hangs_is_ended():
    said, report = verdicts("bad", [Pair("fine", "b", "a"), Pair("hang", "b", "a")], deadline_s=4.0)
    assert [pair.result for pair in said] == [1.0, None]
    assert report["invalid"] == {"function timed out": 2}


def test_each_task_reports_its_own_invalid_verdicts():
    function = own("bad")
    reports = []
    for prompts in (["none", "fine"], ["two"]):
        bench = Bench(FunctionJudge(function))
        bench.judge([Pair(prompt, "a", "b") for prompt in prompts])
        reports.append(bench.report()["invalid"])
    assert reports == [{"no score (None)": 2}, {"verdict not between 0 and 1": 2}]


def test_models_of_a_stage_are_judged_with_the_columns_of_their_prompts():
    rows = [PromptRow((1,), f"q{i}", {"answer": str(i)}) for i in range(3)]
    models = {
        "base": Responses([_record(i, "none") for i in range(3)]),
        "tuned": Responses([_record(i, f" {i} \n" if i else "wrong") for i in range(3)]),
    }
    spec: Any = SimpleNamespace(
        pairwise=SimpleNamespace(endpoint=None, criteria="", sequential=False, batch=2),
        baseline="base",
        label=lambda name: name,
    )
    judged, report = judge_all(spec, models, function=own("right"), rows=rows, seed=0)
    assert judged["tuned"].results == {(0, 0): 0.5, (1, 0): 1.0, (2, 0): 1.0}
    assert (report["pairs"], report["pairs_judged"]) == (3, 3)
    bare = [PromptRow((1,), "q", {}) for _ in rows]
    with pytest.raises(AlignError, match="'answer', which is not a column"):
        judge_all(spec, models, function=own("right"), rows=bare, seed=0)


def _record(i: int, text: str) -> Any:
    return {"prompt_index": i, "sample_index": 0, "prompt": f"q{i}", "completion": text}


def test_the_report_of_a_function_has_no_price():
    report = verdicts("longer", [Pair("q", "a", "bb")])[1]
    (line,) = judge_lines({"tasks": {"t": {"judge": {"pairs": 1, **report}}}})
    assert line.startswith("t: judge longer: 1 of 0 pairs judged in both orders, 0 invalid, ")
    assert "token" not in line
    page = str(judge_table({**report, "pairs": 1}))
    assert "longer" in page
    assert "requests" not in page


@pytest.mark.parametrize(
    ("name", "verdict", "text"),
    [
        ("longer", "ok", "valid verdicts on 3 of 3 pairs"),
        ("first", "warn", "it looks at the order"),
        ("right", "fail", "'answer', which is not a column"),
        ("later", "warn", "it looks at the order"),
    ],
)
def test_preflight_asks_it_before_anything_is_sampled(name: str, verdict: str, text: str):
    rows = [PromptRow((1,), f"What is {i}?", {}) for i in range(3)]
    found = judge_test(own(name), rows)
    assert found.verdict == verdict
    assert text in f"{found.value} {found.remedy}"


def test_preflight_fails_if_every_verdict_is_invalid_and_warns_of_some():
    prompts = [PromptRow((1,), name, {}) for name in ("none", "two")]
    found = judge_test(own("bad"), prompts)
    assert found.verdict == "fail"
    assert "2 x no score (None), 2 x verdict not between 0 and 1" in found.remedy
    found = judge_test(own("bad"), [*prompts, PromptRow((1,), "fine", {})])
    assert (found.verdict, found.value[:35]) == ("warn", "valid verdicts on 1 of 3 pairs in b")


def stage(pairwise: str) -> Any:
    Path("r.yaml").write_text(RECIPE.format(pairwise=pairwise))
    return load_recipe("r.yaml").stages["evaluate"]


def test_the_source_of_the_function_is_part_of_the_stage(code: Path):
    spec = stage("{function: {kind: python, path: 'judge.py:longer'}}")
    assert spec.pairwise.function.path == f"{code}:longer"
    before = spec_hash(spec.settings(), seed=0, inputs={})
    assert before == spec_hash(spec.settings(), seed=0, inputs={})
    code.write_text(CODE + "\n# changed\n")
    assert before != spec_hash(spec.settings(), seed=0, inputs={})


PYTHON = "kind: python, path: 'judge.py:"


@pytest.mark.parametrize(
    ("pairwise", "error"),
    [
        (f"{{function: {{{PYTHON}longr'}}}}", "has no 'longr'; did you mean 'longer'?"),
        (f"{{function: {{{PYTHON}reward'}}}}", "'reward' has no parameter 'others'"),
        (f"{{function: {{{PYTHON}longer', weight: 2.0}}}}", "no effect on a judge of pairs"),
        (f"{{function: {{{PYTHON}longer'}}, criteria: be kind}}", "no effect on a function"),
        ("{criteria: be kind}", "give one of 'endpoint' and 'function'; found neither"),
        (
            f"{{function: {{{PYTHON}longer'}}, endpoint: {{url: 'http://h/v1', model: m}}}}",
            "found both",
        ),
        ("{function: {kind: length, target: 2}}", "kind"),
    ],
)
def test_a_wrong_block_is_an_error_with_its_line(pairwise: str, error: str):
    with pytest.raises(RecipeError) as caught:
        stage(pairwise)
    assert error in str(caught.value)
    assert "r.yaml:10" in str(caught.value)


def test_calibration_of_the_same_rule_gives_the_same_numbers_as_the_suite_s():
    lengths = [(9, 3), (2, 5), (4, 4), (7, 6), (1, 8), (3, 2)]
    rows = [
        {"prompt": f"q{i}", "chosen": "x" * a, "rejected": "y" * b}
        for i, (a, b) in enumerate(lengths)
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: Any = {"model": None, "data": [DataSpec(path="pairs.jsonl")], "criteria": ""}
    found = calibrate("judge.py:longer", cache=None, **given)
    report = found.pop("judge")
    assert found == calibrate(LONGER, cache=None, **given)
    assert (report["model"], report["pairs_judged"]) == ("longer", 6)


def test_eval_names_it_on_the_command_line_and_in_python(code: Path):
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    asked = Question(["model"], ["world"], judge="judge.py:longer")
    recipe = question_recipe(asked, Path("runs"))
    own_block = {"function": {"kind": "python", "path": f"{code}:longer"}}
    assert recipe["stages"]["evaluate"]["pairwise"] == own_block
    for judge, error in (
        ("judge.py:reward", "has no parameter 'others'"),
        ("other.py:longer", "no such file"),
        ("judge", "expected 'rule', a reward model's RUN/STAGE, FILE.py:FUNCTION, or a URL"),
    ):
        with pytest.raises(RecipeError, match=error):
            question_recipe(Question(["model"], ["world"], judge=judge), Path("runs"))

    def alone(completions):
        return [1.0 for _ in completions]

    with pytest.raises(RecipeError, match="'alone' has no parameter 'others'"):
        evaluate(["model"], judge=alone)
