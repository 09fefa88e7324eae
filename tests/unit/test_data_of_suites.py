"""Rows in the layouts of other suites: what is read, and what is refused with what to write."""

import pytest

from align.core.errors import DataError
from align.data.formats.detect import to_examples
from align.recipe.schema.formats import Kind

U, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "R"}


def refused(row: dict, kind: Kind = "sft") -> str:
    with pytest.raises(DataError) as error:
        to_examples(row, kind=kind, format="auto", source="a:7")
    assert str(error.value).startswith("a:7: ")
    return str(error.value)


@pytest.mark.parametrize("tag", ["image", "video", "audio"])
@pytest.mark.parametrize("form", ["<{}>\nWhat is it?", "What is it?\n<{}>", "<{}>"])
def test_a_line_that_stands_for_an_image_is_refused(tag: str, form: str):
    text = form.format(tag)
    rows = (
        {"messages": [{"role": "user", "content": text}, A]},
        {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "R"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}, A]},
    )
    for row in rows:
        assert f"[0]: the line '<{tag}>' stands for an image" in refused(row)


@pytest.mark.parametrize(
    "text",
    ["<image>x</image>", "Explain <image>", "<images>\nQ", "a\n<image> b", "<", "<b>\nQ", "x\n<p>"],
)
def test_other_marks_are_text(text: str):
    row = {"messages": [{"role": "user", "content": text}, A]}
    (example,) = to_examples(row, kind="sft", format="messages", source="a:7")
    turns = [*example.prompt, *(example.completion or [])]
    assert text in [turn["content"] for turn in turns if isinstance(turn, dict)]


@pytest.mark.parametrize("history", [[U, A], ["a", "b"], [["a"]], [["a", "b", "c"]]])
def test_a_history_of_another_form_says_what_was_found(history: list):
    told = refused({"instruction": "Q", "output": "R", "history": history})
    assert "history: expected [question, answer], found " in told
    assert "write turns of {role, content} as messages" in told


@pytest.mark.parametrize(
    ("said", "meant"), [("User", "user"), ("HUMAN", "human"), ("Assistant", "assistant")]
)
def test_a_role_in_other_letters_is_named(said: str, meant: str):
    row = {"conversations": [{"from": said, "value": "Q"}, {"from": "gpt", "value": "R"}]}
    assert f"did you mean '{meant}'?" in refused(row)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (
            {"labeler": "l", "question": {"problem": "Q"}, "label": {"steps": []}},
            "rows of PRM800K: write question.problem as prompt",
        ),
        ({"input": "Q Step 1: a", "label": "Q Step 1: a +", "task": "GSM8K"}, "Math-Shepherd"),
        (
            {"id": "b", "custom_id": "c", "response": {"body": {"choices": [{"message": A}]}}},
            "append response.body.choices[0].message to the body.messages of the request",
        ),
    ],
)
def test_layouts_that_no_rename_reads_say_what_to_write(row: dict, what: str):
    assert what in refused(row)
    assert "did you mean" not in refused(row)


def test_exports_with_settings_of_the_request_are_read():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": "1"}'}}
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}
    row = {
        "messages": [U, {"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": [{"type": "function", "function": tool}],
        "parallel_tool_calls": False,
        "tool_choice": "auto",
        "temperature": 0.7,
    }
    (example,) = to_examples(row, kind="sft", format="messages", source="a:7")
    assert example.columns["parallel_tool_calls"] is False
    assert len(example.tools) == 1
