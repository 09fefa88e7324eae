"""The rules, the ensemble and what every reward owes: invalid scores, columns, TRL's convention."""

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

from reward_models import build_reward
from reward_models.base import Rule
from reward_models.specs import RewardSpec


def _scores(spec: dict[str, Any], completions: list[Any], **columns: Any) -> list[float | None]:
    reward = build_reward(spec)
    return reward(prompts=["?"] * len(completions), completions=completions, **columns)


def test_exact_match_ignores_case_and_outer_whitespace_only():
    spec = {"kind": "exact_match"}
    answers = [" Paris\n", "PARIS", "Paris.", ""]
    assert _scores(spec, answers, answer=["Paris"] * 4) == [1.0, 1.0, 0.0, 0.0]
    strict = {"kind": "exact_match", "ignore_case": False}
    assert _scores(strict, answers, answer=["Paris"] * 4) == [1.0, 0.0, 0.0, 0.0]


def test_exact_match_pattern_takes_last_match_and_no_match_is_wrong():
    spec = {"kind": "exact_match", "pattern": r"answer: (\w+)"}
    answers = ["answer: red, no, answer: blue", "answer: blue. answer: red", "blue"]
    assert _scores(spec, answers, answer=["blue"] * 3) == [1.0, 0.0, 0.0]


def test_exact_match_accepts_numbers_and_any_of_a_list():
    answers = ["4", "4", "four"]
    assert _scores({"kind": "exact_match"}, answers, answer=[4, 5, ["4", "Four"]]) == [1, 0, 1]


def test_exact_match_reads_another_column():
    assert _scores({"kind": "exact_match", "column": "gold"}, ["a"], gold=["a"]) == [1.0]


def test_missing_column_is_an_error_that_names_what_is_there():
    with pytest.raises(KeyError) as caught:
        _scores({"kind": "exact_match"}, ["a"], label=["a"])
    assert str(caught.value).startswith("reward 'exact_match': column 'answer' is missing")
    assert "['label']" in str(caught.value)


def test_column_of_wrong_length_is_an_error():
    with pytest.raises(ValueError, match="list of 2 values"):
        _scores({"kind": "exact_match"}, ["a", "b"], answer=["a"])


def test_empty_reference_is_invalid_and_counted():
    reward = build_reward({"kind": "exact_match"})
    assert reward(prompts=["?"] * 2, completions=["a", "a"], answer=["a", None]) == [1.0, None]
    assert reward.invalid == {"column 'answer' is empty": 1}


@pytest.mark.parametrize("kind", ["exact_match", "regex", "format"])
def test_malformed_pattern_is_refused_when_built(kind: str):
    with pytest.raises(ValueError, match="not a regular expression"):
        build_reward({"kind": kind, "pattern": "(a"})


@pytest.mark.parametrize("pattern", ["a", "(a)(b)"])
def test_exact_match_needs_one_group(pattern: str):
    with pytest.raises(ValueError, match="needs exactly 1"):
        build_reward({"kind": "exact_match", "pattern": pattern})


def test_regex_finds_anywhere_and_format_needs_all():
    answers = ["<a>x</a>", "<a>x</a> ", "b"]
    assert _scores({"kind": "regex", "pattern": "<a>.*</a>"}, answers) == [1.0, 1.0, 0.0]
    assert _scores({"kind": "format", "pattern": "<a>.*</a>"}, answers) == [1.0, 0.0, 0.0]
    # A dollar would accept a newline at the end; the whole answer is what must match.
    assert _scores({"kind": "format", "pattern": "b$"}, ["b\n", "b"]) == [0.0, 1.0]


def test_exponential_pattern_is_cut_off_and_counted_not_zero(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("reward_models.rules.PATTERN_TIMEOUT_S", 0.1)
    reward = build_reward({"kind": "regex", "pattern": r"^(a|a|aa)*\d$"})
    completions = ["a" * 60 + "b", "aa1"]
    assert reward(prompts=["?"] * 2, completions=completions) == [None, 1.0]
    assert reward.invalid == {"pattern timed out": 1}


def test_length_falls_linearly_between_target_and_limit():
    # target 2, limit 6: 4 words are half way.
    answers = ["", "a b", "a b c", "a  b\nc d", "a b c d e f", "a " * 50]
    assert _scores({"kind": "length", "target": 2, "limit": 6}, answers) == [1, 1, 0.75, 0.5, 0, 0]


def test_length_limit_must_exceed_target():
    with pytest.raises(ValueError, match="limit 3 must be above target 3"):
        build_reward({"kind": "length", "target": 3, "limit": 3})


def test_repetition_is_share_of_distinct_ngrams():
    # "a b a b a": bigrams ab ba ab ba, 2 of 4 distinct. "a a a": aa aa, 1 of 2.
    answers = ["a b a b a", "a a a", "a b c", "a", ""]
    assert _scores({"kind": "repetition", "ngram": 2}, answers) == [0.5, 0.5, 1.0, 1.0, 1.0]


def test_rule_that_raises_gives_none_with_the_reason_counted():
    def fragile(answer: str, value: Any) -> float:
        return 1 / len(answer)

    rule = Rule(fragile, name="fragile")
    assert rule(prompts=["?"] * 3, completions=["ab", "", ""]) == [0.5, None, None]
    assert rule.invalid == {"ZeroDivisionError": 2}


def test_conversations_are_judged_by_the_last_assistant_turn():
    said = {"role": "assistant", "content": "no"}
    final = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    tool = {"role": "tool", "content": "yes"}
    reward = build_reward({"kind": "exact_match"})
    completions = [[said, tool, final], [said], [tool], [{"role": "assistant", "content": None}]]
    scores = reward(prompts=[[]] * 4, completions=completions, answer=["yes"] * 4)
    assert scores == [1.0, 0.0, None, None]
    assert reward.invalid == {"no assistant turn": 1, "assistant turn without text": 1}


def test_prompts_and_completions_must_pair_up():
    with pytest.raises(ValueError, match="1 prompts but 2 completions"):
        build_reward({"kind": "regex", "pattern": "a"})(prompts=["?"], completions=["a", "b"])


def test_unknown_kind_lists_the_known():
    with pytest.raises(ValueError, match="exact_match"):
        build_reward({"kind": "exactmatch"})


def test_every_kind_of_reward_has_a_builder():
    for spec in RewardSpec.variants.values():
        module, _, name = spec.builder.partition(":")
        assert callable(getattr(import_module(module), name)), spec.builder


def test_recipes_are_checked_by_the_same_classes():
    from align.recipe import schema

    assert schema.RewardSpec is RewardSpec
    full = RewardSpec.variants["exact_match"](kind="exact_match", name="em", weight=2.0)
    for given in (full, full.model_dump(), {"kind": "exact_match", "name": "em", "weight": 2.0}):
        reward = build_reward(given)
        assert (reward.name, reward.__name__, reward.weight) == ("em", "em", 2.0)
        assert reward(prompts=["?"], completions=["A"], answer=["a"]) == [1.0]


@pytest.mark.parametrize("kind", RewardSpec.variants)
def test_unknown_key_of_any_kind_is_refused(kind: str):
    required = {
        k: None for k, f in RewardSpec.variants[kind].model_fields.items() if f.is_required()
    }
    with pytest.raises(ValueError, match=r"reward '.*': (.*; )?unknown key 'weigth'; did you mean"):
        build_reward({**required, "kind": kind, "weigth": 2.0})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "exact_match", "ignore_cas": False}, "unknown key 'ignore_cas'.*'ignore_case'"),
        ({"kind": "length", "target": 3}, "reward 'length': 'limit' is missing"),
        ({"kind": "regex", "name": "re"}, "reward 're': 'pattern' is missing"),
        ({"kind": "repetition", "ngram": 0}, "reward 'repetition': ngram: found 0; .*"),
        ({}, "reward kind None is unknown; use one of scalar, .*"),
        (
            {"kind": "ensemble", "members": [{"kind": "regex", "patern": "a"}] * 2},
            "unknown key 'members.0.patern'; did you mean 'pattern'",
        ),
        (
            {"kind": "judge", "endpoint": {"url": "http://x", "model": "m", "retry": 1}},
            "reward 'judge': unknown key 'endpoint.retry'; did you mean 'retries'",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(spec: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as told:
        build_reward(spec)
    assert "\n" not in str(told.value)


def _ensemble(combine: str, **keys: Any) -> Callable[..., list[float | None]]:
    members = [
        {"kind": "length", "target": 2, "limit": 6},
        {"kind": "repetition", "ngram": 1},
    ]
    return build_reward({"kind": "ensemble", "members": members, "combine": combine, **keys})


def test_ensemble_combines_by_hand_numbers():
    # "a a a a": length (6 - 4) / 4 = 0.5; one distinct word of four = 0.25; population std 0.125.
    completions = ["a a a a"]
    call = {"prompts": ["?"], "completions": completions}
    assert _ensemble("mean")(**call) == [0.375]
    assert _ensemble("min")(**call) == [0.25]
    reward = _ensemble("mean_minus_std", kappa=2.0)
    assert reward(**call) == [pytest.approx(0.375 - 2 * 0.125)]
    assert reward.disagreement == pytest.approx(0.125)


def test_ensemble_member_weight_scales_its_score():
    members = [
        {"kind": "regex", "pattern": "a", "weight": 3.0},
        {"kind": "regex", "pattern": "a", "weight": -2.0},
    ]
    reward = build_reward({"kind": "ensemble", "members": members})
    assert reward(prompts=["?"], completions=["a"]) == [0.5]  # (3 - 2) / 2; unweighted 1


def test_ensemble_is_invalid_where_a_member_is():
    members = [{"kind": "exact_match", "name": "em"}, {"kind": "regex", "pattern": "a"}]
    reward = build_reward({"kind": "ensemble", "members": members})
    scores = reward(prompts=["?"] * 2, completions=["a", "a"], answer=["a", None])
    assert scores == [1.0, None]
    assert reward.invalid == {"invalid member: em": 1}
    reward(prompts=["?"], completions=["a"], answer=[None])
    assert math.isnan(reward.disagreement)


def test_exact_match_takes_whole_floats_for_integers_and_one_spelling_of_letters():
    reward = build_reward({"kind": "exact_match"})
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    answers = ["4", "4.5", "007", composed, decomposed, "two"]
    values = [4.0, 4.5, "7", decomposed, composed, [2.0, "two"]]
    assert reward(prompts=["?"] * 6, completions=answers, answer=values) == [1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize("kind", ["regex", "format"])
def test_patterns_find_letters_however_unicode_composes_them(kind: str):
    reward = build_reward({"kind": kind, "pattern": "un caf\u00e9"})
    assert reward(prompts=["?"], completions=["un cafe\u0301"]) == [1.0]
