"""No key of a row or a turn is dropped: it is used, or a column, or the row is refused by name."""

import difflib
import json
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import DataError
from align.core.types import Example
from align.data.check.kinds import infer
from align.data.convert import WRITERS, convert
from align.data.formats.detect import detect, to_examples
from align.data.load import load_examples
from align.data.reading.readers import plain_row
from align.recipe.schema import DataSpec
from align.recipe.schema.formats import FORMATS, Kind

ROOT = Path(__file__).resolve().parents[2]
U, A, B = (
    {"role": r, "content": c} for r, c in (("user", "Q"), ("assistant", "A"), ("assistant", "B"))
)
TOOL = {"name": "qzxtool", "description": "Look.", "parameters": {"type": "object"}}
# A row of each format that users bring, with the kind it is asked for.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "messages": ("sft", {"messages": [U, A]}),
    "sharegpt": (
        "sft",
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    ),
    "alpaca": ("sft", {"instruction": "Q", "output": "A"}),
    "dolly": ("sft", {"instruction": "Q", "context": "C", "response": "A"}),
    "prompt_completion": ("sft", {"prompt": "Q", "completion": "A"}),
    "question_answer": ("sft", {"question": "Q", "answer": "A"}),
    "preference": ("preference", {"prompt": [U], "chosen": [A], "rejected": [B]}),
    "preference, text": ("preference", {"question": "Q", "chosen": "A", "rejected": "B"}),
    "unpaired": ("unpaired", {"prompt": "Q", "completion": "A", "label": True}),
    "prompt": ("prompts", {"prompt": "Q"}),
    "messages, prompts": ("prompts", {"messages": [U]}),
    "verl": ("prompts", {"prompt": [U], "reward_model": {"ground_truth": "7"}}),
}
KEYS: dict[str, Any] = {
    "system": "qzxsystem",
    "tools": [TOOL],
    "chat_template_kwargs": {"qzxkwarg": False},
    "weight": 0.25,
    "reasoning_content": "qzxreason",
    "rationale": "qzxrationale",
    "input": "qzxinput",
    "context": "qzxcontext",
    "history": [["qzxbefore", "qzxthen"]],
    "choices": ["qzxone", "qzxtwo"],
    "images": ["qzximage.png"],
    "loss": False,
    "masks": [0, 1],
    "sytem": "qzxmisspelt",
    "topic": "qzxtopic",
}


def trained_on(example: Example) -> str:
    """Return all that an example holds beside its columns."""
    parts = (example.prompt, example.completion, example.rejected, example.tools)
    return json.dumps([parts, example.template_kwargs, example.weight])


def outcome(name: str, key: str) -> str:
    kind, row = ROWS[name]
    form = name.split(",")[0]
    try:
        (example,) = to_examples({**row, key: KEYS[key]}, kind=kind, format=form, source="a:7")
    except DataError as error:
        refused = error
    else:
        refused = None
    if refused is not None:
        assert str(refused).startswith("a:7: ")
        assert key in str(refused)
        return str(refused.code)
    marks = [m for m in json.dumps(KEYS[key]).replace('"', " ").split() if m.startswith("qzx")]
    marks = [mark.rstrip(",:]}") for mark in marks] or [json.dumps(KEYS[key])]
    if all(mark in trained_on(example) for mark in marks):
        return "used"
    assert example.columns.get(key) == KEYS[key], f"{key} of {name} is dropped"
    return "column"


def table() -> str:
    lines = [f"| | {' | '.join(ROWS)} |", "|---" * (len(ROWS) + 1) + "|"]
    lines += [f"| {key} | {' | '.join(outcome(name, key) for name in ROWS)} |" for key in KEYS]
    return "\n".join(lines)


def test_every_key_in_every_format_is_used_or_a_column_or_refused_by_name() -> None:
    printed = table()
    assert printed in (ROOT / "docs/data-check.md").read_text(), printed


def test_system_column_is_a_turn_wherever_it_stands() -> None:
    for name, (kind, row) in ROWS.items():
        form = name.split(",")[0]
        given = {**row, "system": "Be brief."}
        (example,) = to_examples(given, kind=kind, format=form, source="a:1")
        first = (example.prompt or example.completion)[0]
        assert first == {"role": "system", "content": "Be brief."}, name
    twice = {"system": "One.", "messages": [{"role": "system", "content": "Two."}, U, A]}
    with pytest.raises(
        DataError, match="a:1: the row has one system prompt in a column and a different one"
    ):
        to_examples(twice, kind="sft", format="auto", source="a:1")


@pytest.mark.parametrize(
    "key", ["loss", "train", "trainable", "loss_mask", "weight", "training", "train_on_turn"]
)
@pytest.mark.parametrize("value", [False, 0, 0.0])
def test_turn_that_is_not_trained_has_weight_0(key: str, value: object) -> None:
    row = {"messages": [U, {**A, key: value}, U, {**B, key: 1}]}
    (example,) = to_examples(row, kind="sft", format="auto", source="a:1")
    assert [turn.get("weight", 1.0) for turn in example.completion] == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({**A, "weight": -1}, r"messages\[1\].weight: expected true, false or a number from 0"),
        ({**A, "weight": "1"}, r"messages\[1\].weight: expected true, false or a number from 0"),
        ({**A, "weight": 1, "train": False}, r"messages\[1\]: weight and train differ"),
        ({**A, "weight": 0}, "every assistant turn has weight 0"),
        ({**A, "weigth": 0}, r"unknown key 'weigth'.*did you mean 'weight'"),
        ({**A, "emotion": "glad"}, r"unknown key 'emotion' of a turn, 'glad', would be left out"),
        ({**A, "images": ["x.png"]}, "unknown key 'images'"),
        ({**A, "reasoning": "a", "thinking": "b"}, "reasoning and thinking differ"),
        ({**A, "tool_calls": [{"name": "f", "arguments": "[1"}]}, "expected a tool call with name"),
        ({**U, "reasoning_content": "hm"}, "reasoning in a turn of user"),
        ({"0": "Hi", "1": "Ho"}, r"the file lists its columns: to_json\(orient='records'"),
        ({**U, "loss": True}, "loss True on a turn of user; only assistant turns are trained"),
    ],
)
def test_key_of_a_turn_that_cannot_be_kept_is_refused(turn: dict, message: str) -> None:
    row = {"messages": [U, turn, *([A] if turn.get("role") == "user" else [])]}
    with pytest.raises(DataError, match=rf"a:3: .*{message}"):
        to_examples(row, kind="sft", format="auto", source="a:3")


def test_keys_that_hold_nothing_are_harmless() -> None:
    # As tables write turns: every key of any turn, most of them null.
    empty = {"tool_calls": None, "images": [], "emotion": None, "reasoning": "", "weight": None}
    (example,) = to_examples(
        {"messages": [{**U, **empty}, {**A, **empty, "id": "7"}], "images": [], "input": ""},
        kind="sft",
        format="auto",
        source="a:1",
    )
    assert example.completion == [U, A]


def test_tool_calls_of_every_layout_come_to_one_form() -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    wanted = [{"type": "function", "function": call}]
    as_text = {"name": "add", "arguments": '{"a": 1}'}
    turns = [
        {"role": "assistant", "content": None, "tool_calls": wanted},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": as_text}]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([call])},
        {"role": "assistant", "content": None, "function_call": as_text},
        {"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps(call)}]},
        {"from": "function_call", "value": json.dumps(call)},
    ]
    for turn in turns:
        row = {"messages": [U, turn, {"role": "tool", "content": "7"}, A], "tools": [TOOL]}
        (example,) = to_examples(row, kind="sft", format="auto", source="a:1")
        assert example.completion[1] == {
            "role": "assistant",
            "content": "",
            "tool_calls": wanted,
        }
        assert example.tools == ({"type": "function", "function": TOOL},)
    for given in (json.dumps([TOOL]), [json.dumps(TOOL)], TOOL):
        (example,) = to_examples(
            {"messages": [U, A], "tools": given}, kind="sft", format="auto", source="a:1"
        )
        assert example.tools == ({"type": "function", "function": TOOL},)


def test_history_must_hold_texts() -> None:
    row = {"instruction": "Q", "output": "A", "history": [["a", "b"], ["c", None]]}
    with pytest.raises(DataError, match=r"a:2: history\[1\]: assistant: expected text, found None"):
        to_examples(row, kind="sft", format="auto", source="a:2")
    row["history"] = [["a", 42]]
    with pytest.raises(DataError, match=r"a:2: history\[0\]: assistant: expected text, found 42"):
        to_examples(row, kind="sft", format="auto", source="a:2")


def test_answers_for_rewards_come_from_their_usual_places() -> None:
    truth = {"prompt": [U], "reward_model": {"style": "rule", "ground_truth": "7"}}
    (example,) = to_examples(truth, kind="prompts", format="auto", source="a:1")
    assert example.columns["answer"] == "7"
    worked = {"question": "Q", "answer": "1 + 1 = <<1+1=2>>2\n#### 1,200"}
    (example,) = to_examples(worked, kind="prompts", format="auto", source="a:1")
    assert example.columns["answer"] == "1,200"
    assert example.columns["solution"] == worked["answer"]
    (example,) = to_examples(worked, kind="sft", format="auto", source="a:1")
    assert example.completion[0]["content"] == worked["answer"]


def test_columns_of_tables_are_what_an_answer_is_compared_with() -> None:
    row = {"prompt": "Q", "answer": 4.0, "score": 0.5, "name": "cafe\u0301", "all": [2.0, None]}
    row |= {"price": Decimal("1200.00"), "rate": Decimal("0.10"), "none": Decimal("NaN")}
    row["deep"] = {"ground_truth": 7.0, "more": ["cafe\u0301"]}
    (example,) = to_examples(plain_row(row), kind="prompts", format="auto", source="a:1")
    assert repr(example.columns["answer"]) == "4"
    assert repr(example.columns["deep"]) == "{'ground_truth': 7, 'more': ['caf\u00e9']}"
    assert example.columns["score"] == 0.5
    assert example.columns["name"] == "caf\u00e9"
    assert repr(example.columns["all"]) == "[2, None]"
    assert [repr(example.columns[key]) for key in ("price", "rate", "none")] == [
        "1200",
        "0.1",
        "None",
    ]


def test_new_format_needs_only_its_entry_in_the_table() -> None:
    for name, form in FORMATS.items():
        for option in form.fields:
            row: dict[str, Any] = dict.fromkeys(option, "x")
            if form.when is not None:
                continue
            kind = form.gives[0]
            assert FORMATS[detect(row, kind=kind, source="a:1")].most_fields(row) == set(option), (
                name
            )


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rename_reaches_into_nested_fields(tmp_path: Path) -> None:
    row = {"q": "Q", "reward_model": {"ground_truth": "7", "style": "rule"}}
    path = write(tmp_path / "a.jsonl", [row])
    rename = {"q": "prompt", "reward_model.ground_truth": "answer"}
    (example,) = load_examples([DataSpec(path=path, rename=rename)], kind="prompts", seed=0)
    assert (example.prompt, example.columns["answer"]) == ("Q", "7")
    assert example.columns["reward_model"] == row["reward_model"]
    with pytest.raises(DataError, match=r"a.jsonl:1: rename: no field \['reward_model.truth'\]"):
        load_examples(
            [DataSpec(path=path, rename={"reward_model.truth": "answer"})], kind="prompts", seed=0
        )


def test_strings_are_rendered_as_turns_where_the_recipe_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "Q", "completion": "A"}])
    (text,) = load_examples([DataSpec(path=path)], kind="sft", seed=0)
    assert (text.prompt, text.completion) == ("Q", "A")
    (chat,) = load_examples([DataSpec(path=path, strings="chat")], kind="sft", seed=0)
    assert (chat.prompt, chat.completion) == ([U], [A])


@pytest.mark.parametrize("to", ["messages", "sharegpt", "prompt_completion"])
def test_convert_keeps_all_that_a_row_holds(tmp_path: Path, to: str) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        U,
        {**A, "reasoning_content": "hm", "tool_calls": [call], "weight": 0},
        {"role": "tool", "content": "7", "tool_call_id": "1"},
        {**B, "weight": 0.5},
    ]
    row = {"tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}, "weight": 2.0}
    if to == "prompt_completion":
        row |= {"prompt": turns[:3], "completion": turns[3:]}
    else:
        row |= {"messages": turns}
    spec = DataSpec(path=write(tmp_path / "a.jsonl", [row]))
    out = tmp_path / "b.jsonl"
    convert([spec], out, to=to, seed=0, columns=True)
    (before,) = load_examples([spec], kind=WRITERS[to][0], seed=0)
    (after,) = load_examples([DataSpec(path=str(out))], kind=WRITERS[to][0], seed=0)
    assert trained_on(after) == trained_on(before)
    assert before.weight == 2.0


def test_row_of_weight_0_is_no_example() -> None:
    row = {"messages": [U, A], "weight": 0}
    assert to_examples(row, kind="sft", format="auto", source="a:1") == []
    row = {"prompt": "Q", "chosen": "A", "rejected": "B", "weight": 0.5}
    with pytest.raises(DataError, match=r"a:1: weight: .*preference"):
        to_examples(row, kind="preference", format="auto", source="a:1")


def test_rows_of_a_file_are_rendered_alike_though_one_has_no_system() -> None:
    system = {"role": "system", "content": "S"}
    rows = [{"system": s, "prompt": "Q", "chosen": "A", "rejected": "B"} for s in ("S", "", None)]
    found = [to_examples(r, kind="preference", format="auto", source="a:1")[0] for r in rows]
    assert [example.prompt for example in found] == [[system, U], [U], [U]]


def test_kind_of_questions_without_answers_is_prompts() -> None:
    row = {"messages": [U], "answer": "7"}
    assert infer([(row, "a:1")], form="auto", rename={}, kind=None).kind == "prompts"
    row = {"messages": [U, A]}
    assert infer([(row, "a:1")], form="auto", rename={}, kind=None).kind == "sft"


@pytest.mark.parametrize(
    "key", ["masks", "loss_masks", "turn_weights", "train_on_turn", "trainOnInputs", "no_loss"]
)
@pytest.mark.parametrize("value", [[0, 1], [[False], [True]], False, 1.0])
def test_column_that_says_what_is_trained_is_refused_by_name(key: str, value: object) -> None:
    for name in ("messages", "preference", "unpaired"):
        kind, row = ROWS[name]
        with pytest.raises(DataError, match=f"a:7: .*{key}.* would be (dropped|left out)"):
            to_examples({**row, key: value}, kind=kind, format=name, source="a:7")
    (asked,) = to_examples({"prompt": "Q", key: value}, kind="prompts", format="auto", source="a:7")
    assert asked.columns[key] == value


@pytest.mark.parametrize(
    ("outer", "key", "value"),
    [
        ("metadata", "sample_weight", 0.25),
        ("meta", "lossMask", [0, 1]),
        ("extra", "trainable", False),
    ],
)
def test_loss_setting_inside_of_an_object_is_refused_by_its_path(
    outer: str, key: str, value: object
) -> None:
    inside = {outer: {"id": 3, key: value}}
    for name in ("messages", "preference", "unpaired"):
        kind, row = ROWS[name]
        with pytest.raises(DataError, match=rf"a:7: {outer}\.{key}: .* would be dropped"):
            to_examples({**row, **inside}, kind=kind, format=name, source="a:7")
        deep = {outer: {"deep": inside[outer]}}
        with pytest.raises(DataError, match=rf"{outer}\.deep\.{key}"):
            to_examples({**row, **deep}, kind=kind, format=name, source="a:7")
        aside = {f"{outer}_column": inside[outer]}
        (kept,) = to_examples({**row, **aside}, kind=kind, format=name, source="a:7")
        assert kept.columns[f"{outer}_column"] == inside[outer]
    (asked,) = to_examples({"prompt": "Q", **inside}, kind="prompts", format="auto", source="a:7")
    assert asked.columns == inside
    turn = {**A, "metadata": inside[outer]}
    with pytest.raises(DataError, match=rf"messages\[1\]: metadata\.{key}: .* would be left out"):
        to_examples({"messages": [U, turn]}, kind="sft", format="auto", source="a:7")


def test_loss_weight_inside_of_an_object_is_read_by_the_rename_of_the_message(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": [U, A], "info": {"loss_weight": 0.25}}])
    with pytest.raises(DataError, match=r"\(rename: \{info.loss_weight: weight\}\)"):
        load_examples([DataSpec(path=path)], kind="sft", seed=0)
    spec = DataSpec(path=path, rename={"info.loss_weight": "weight"})
    (example,) = load_examples([spec], kind="sft", seed=0)
    assert example.weight == 0.25


@pytest.mark.parametrize("kind", ["sft", "prompts"])
def test_system_prompt_inside_of_an_object_is_no_column(tmp_path: Path, kind: Kind) -> None:
    row = {"prompt": "Q", "extra": {"system_message": "Rhyme."}}
    row |= {"completion": "R"} if kind == "sft" else {}
    path = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError, match=r"rename: \{extra.system_message: system\}"):
        load_examples([DataSpec(path=path)], kind=kind, seed=0)
    spec = DataSpec(path=path, rename={"extra.system_message": "system"})
    (example,) = load_examples([spec], kind=kind, seed=0)
    assert example.prompt[0] == {"role": "system", "content": "Rhyme."}
    (example,) = load_examples(
        [DataSpec(path=path, rename={"extra": "extra_column"})], kind=kind, seed=0
    )
    assert example.prompt == "Q"


@pytest.mark.parametrize("key", ["mask", "is_masked", "compute_loss", "skipLoss"])
def test_turn_with_a_loss_key_of_unknown_sense_says_how_to_write_it(key: str) -> None:
    with pytest.raises(DataError, match=rf"messages\[1\]: unknown key '{key}'.*weight: 0"):
        to_examples({"messages": [U, {**A, key: True}]}, kind="sft", format="auto", source="a:7")


@pytest.mark.parametrize("key", ["System", "SYSTEM_PROMPT", "Input", "Tools"])
def test_a_key_in_other_letters_is_misspelt_and_no_column(key: str) -> None:
    with pytest.raises(DataError, match=f"unknown key '{key}'.*did you mean '{key.lower()}'"):
        to_examples({"messages": [U, A], key: "qzx"}, kind="sft", format="auto", source="a:7")


def test_an_empty_instruction_leaves_the_input_alone() -> None:
    row = {"instruction": "", "input": "Q", "output": "A"}
    (example,) = to_examples(row, kind="sft", format="auto", source="a:7")
    assert [turn["content"] for turn in example.prompt] == ["Q"]


def test_the_names_of_columns_are_compared_once_and_not_for_each_row(monkeypatch) -> None:
    asked = Counter()

    def counted(word, known, **options):
        asked[word] += 1
        return find(word, known, **options)

    find = difflib.get_close_matches
    monkeypatch.setattr(difflib, "get_close_matches", counted)
    row = {"messages": [U, A], "a_new_column": 1, "another_new_column": 2}
    for i in range(50):
        to_examples(row, kind="sft", format="auto", source=f"a:{i}")
    assert asked.keys() >= {"a_new_column", "another_new_column"}
    assert max(asked.values()) <= 2


@pytest.mark.parametrize("value", ["on", "off", "On", "high", "low", "none", "true", " enabled "])
@pytest.mark.parametrize("key", ["reasoning", "thinking", "reasoning_content"])
def test_a_switch_is_not_trained_as_reasoning(key: str, value: str) -> None:
    """Rows of Llama-Nemotron have reasoning: on, those of gpt-oss a level."""
    rows = [
        {"input": [U], "output": "A", "system_prompt": "detailed thinking on", key: value},
        {"messages": [U, {**A, key: value}]},
    ]
    for row in rows:
        with pytest.raises(DataError, match=rf"{key}: .* is a switch .*rename: .{key}: {key}_mode"):
            to_examples(row, kind="sft", format="auto", source="f:1")
    # A thought that begins with such a word is a text.
    row = {"messages": [U, {**A, key: f"{value}, so"}]}
    said = to_examples(row, kind="sft", format="auto", source="f:1")
    assert said[0].completion[1]["reasoning_content"] == f"{value}, so"


@pytest.mark.parametrize(
    ("name", "value", "offered"),
    [("messages", 0.5, True), ("messages", [0, 1], False), ("preference", 0.5, False)],
)
def test_only_an_sft_row_is_offered_a_weight_and_only_one_number(
    name: str, value: object, offered: bool
) -> None:
    kind, row = ROWS[name]
    with pytest.raises(
        DataError, match=r"meta\.loss_weight.*\(rename: {meta: meta_column}"
    ) as info:
        to_examples({**row, "meta": {"loss_weight": value}}, kind=kind, format=name, source="a:7")
    assert ("rename: {meta.loss_weight: weight}" in str(info.value)) == offered
