"""One hand row for each format, and the rows that must be refused."""

import pytest

from align.core.errors import DataError
from align.core.types import Example
from align.data.formats.detect import FormatDetector, detect, to_examples

U = {"role": "user", "content": "Q"}
A = {"role": "assistant", "content": "A"}
B = {"role": "assistant", "content": "B"}
S = {"role": "system", "content": "S"}


def one(row, kind: str, form: str = "auto") -> tuple:
    (example,) = to_examples(row, kind=kind, format=form, source="f:1")
    assert example.source == "f:1"
    return example.prompt, example.completion, example.rejected


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("messages", {"messages": [S, U, A]}, ([], [S, U, A])),
        ("prompt_completion", {"prompt": "p", "completion": "c"}, ("p", "c")),
        ("prompt_completion", {"prompt": [U], "completion": [A]}, ([U], [A])),
        ("prompt_completion", {"prompt": [U], "completion": "A"}, ([U], [A])),
        ("prompt_completion", {"prompt": "p", "completion": "c<|endoftext|>"}, ("p", "c")),
        (
            "alpaca",
            {"instruction": "I", "input": "", "output": "A"},
            ([{"role": "user", "content": "I"}], [A]),
        ),
        (
            "alpaca",
            {
                "instruction": "I",
                "input": "X",
                "output": "A",
                "system": "S",
                "history": [["Q", "B"]],
            },
            ([S, U, B, {"role": "user", "content": "I\n\nX"}], [A]),
        ),
        ("alpaca", {"instruction": "Q", "response": "A"}, ([U], [A])),
        (
            "sharegpt",
            {
                "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
                "system": "S",
            },
            ([], [S, U, A]),
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "Q"},
                    {"from": "function_call", "value": '{"f": 1}'},
                    {"from": "observation", "value": "7"},
                    {"from": "gpt", "value": "A"},
                ]
            },
            (
                [],
                [
                    U,
                    {"role": "assistant", "content": '{"f": 1}'},
                    {"role": "tool", "content": "7"},
                    A,
                ],
            ),
        ),
        (
            "messages",
            {"messages": [{**U, "content": [{"type": "text", "text": "Q"}]}, A]},
            ([], [U, A]),
        ),
        (
            "seed_tasks",
            {"instruction": "Q", "instances": [{"input": "", "output": "A"}]},
            ([U], [A]),
        ),
        ("text", {"text": "prose"}, ("", "prose")),
        ("text", "prose", ("", "prose")),
    ],
)
def test_sft_rows_of_each_format(name: str, row, expected: tuple) -> None:
    assert detect(row, kind="sft", source="f:1") == name
    assert one(row, "sft") == (*expected, None)
    assert one(row, "sft", name) == (*expected, None)


HH = "\n\nHuman: Q\n\nAssistant: B\n\nHuman: Q\n\nAssistant:"


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("preference", {"prompt": "p", "chosen": "a", "rejected": "b"}, ("p", "a", "b")),
        ("preference", {"prompt": [U], "chosen": [A], "rejected": [B]}, ([U], [A], [B])),
        ("preference", {"prompt": "Q", "chosen": [A], "rejected": [B]}, ([U], [A], [B])),
        ("preference", {"chosen": [S, U, A], "rejected": [S, U, B]}, ([S, U], [A], [B])),
        # One answer goes on where the other stops: the shared answer is no part of the prompt.
        ("preference", {"chosen": [U, A, U, B], "rejected": [U, A]}, ([U], [A, U, B], [A])),
        # The border is moved back to the space: "blue" and "black" share the letters "bl".
        (
            "preference",
            {"chosen": "the sky is blue", "rejected": "the sky is black"},
            ("the sky is", " blue", " black"),
        ),
        ("hh", {"chosen": f"{HH} A", "rejected": f"{HH} B"}, ([U, B, U], [A], [B])),
        (
            "openai_dpo",
            {"input": {"messages": [U]}, "preferred_output": [A], "non_preferred_output": [B]},
            ([U], [A], [B]),
        ),
        (
            "preference",
            {"prompt": "Q", "chosen": [U, A], "rejected": [U, B], "prompt_id": "1"},
            ([U], [A], [B]),
        ),
        (
            "sharegpt",
            {
                "conversations": [{"from": "human", "value": "Q"}],
                "chosen": {"from": "gpt", "value": "A"},
                "rejected": {"from": "gpt", "value": "B"},
            },
            ([U], [A], [B]),
        ),
        (
            "ultrafeedback",
            {
                "instruction": "Q",
                "completions": [
                    {"response": "B", "overall_score": 2.0},
                    {"response": "A", "overall_score": 9.0},
                    {"response": "C", "overall_score": 5.0},
                ],
            },
            ([U], [A], [B]),
        ),
        (
            "model_solutions",
            {
                "question": "Q",
                "ground_truth": "G",
                "m1": {"solution": "B", "is_correct": False},
                "m2": {"solution": "A", "is_correct": True},
            },
            ([U], [A], [B]),
        ),
    ],
)
def test_preference_rows_of_each_format(name: str, row: dict, expected: tuple) -> None:
    assert detect(row, kind="preference", source="f:1") == name
    assert one(row, "preference") == expected
    assert one(row, "prompts") == (expected[0], None, None)
    with pytest.raises(DataError, match="preference data, but the stage needs sft"):
        one(row, "sft", name)


def test_oasst_tree_gives_the_best_branch_and_best_against_worst() -> None:
    def node(role: str, text: str, *replies: dict, rank: int | None = None) -> dict:
        return {"role": role, "text": text, "rank": rank, "replies": list(replies)}

    tree = node(
        "prompter",
        "Q",
        node("assistant", "B", rank=1),
        node("assistant", "A", node("prompter", "Q2"), rank=0),
        node("assistant", "C", rank=2),
    )
    row = {"message_tree_id": "t", "prompt": tree}
    assert one(row, "sft") == ([], [U, A], None)
    worst = {"role": "assistant", "content": "C"}
    assert one(row, "preference") == ([U], [A], [worst])


@pytest.mark.parametrize(
    ("kind", "row", "found"),
    [
        ("preference", {"instruction": "q", "completions": None}, "completions: .* found None"),
        ("preference", {"instruction": "q", "completions": ["x"]}, "completions: .* \\['x'\\]"),
        (
            "preference",
            {"instruction": "q", "completions": [{"response": "a", "score": float("nan")}]},
            r"completions\[0\]: expected 'response' and one of",
        ),
        ("sft", {"instruction": "q", "instances": {"output": "a"}}, "instances: expected a list"),
        ("sft", {"instruction": "q", "output": "a", "history": 3}, "history: .* 3"),
        ("sft", {"message_tree_id": "t", "prompt": [U]}, "prompt: expected a message with replies"),
        (
            "preference",
            {"question": "q", "ground_truth": {}, "m": {"is_correct": True, "solution": None}},
            "m: solution: expected text, found None",
        ),
    ],
)
def test_rows_of_another_shape_are_errors_with_their_place(kind, row, found) -> None:
    with pytest.raises(DataError, match=f"f:1: {found}"):
        one(row, kind)


def test_messages_without_replies_are_null_in_typed_tables() -> None:
    answer = {"role": "assistant", "text": "A", "rank": None, "replies": None}
    row = {"message_tree_id": "t", "prompt": {"role": "prompter", "text": "Q", "replies": [answer]}}
    assert one(row, "sft") == ([], [U, A], None)


def test_unpaired_rows_are_imported_with_their_label() -> None:
    rows = [
        {"prompt": [U], "completion": [A], "label": False},
        {"messages": [U, A], "label": False},
        {"prompt": [U], "completion": [A], "label": "FALSE"},
    ]
    for row in rows:
        (example,) = to_examples(row, kind="unpaired", format="auto", source="f:1")
        assert (example.prompt, example.completion, example.label) == ([U], [A], False)
        with pytest.raises(DataError, match="unpaired data, but the stage needs sft"):
            one(row, "sft")


def test_prompts_keep_the_other_fields_as_columns() -> None:
    (example,) = to_examples(
        {"prompt": "p", "answer": "4", "label": 2}, kind="prompts", format="auto", source="f:1"
    )
    assert example == Example(prompt="p", columns={"answer": "4", "label": 2}, source="f:1")
    (example,) = to_examples({"turns": ["Q", "r"]}, kind="prompts", format="auto", source="f:1")
    assert (example.prompt, example.columns) == ([U], {"turns": ["Q", "r"]})
    # The prompt of a conversation is what stands before its last answer.
    assert one({"messages": [S, U, A, U, B]}, "prompts") == ([S, U, A, U], None, None)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [U], "chosen": [A], "rejected": [B]},
        {"prompt": [U], "completion": [A]},
        {"prompt": "Q", "completion": "A"},
        {"messages": [U, B, U, A]},
        {"prompt": [U], "completion": [A], "label": True},
    ],
)
def test_prompts_keep_the_good_answer_as_reference(row: dict) -> None:
    (example,) = to_examples(row, kind="prompts", format="auto", source="f:1")
    assert example.columns["reference"] == "A"


def test_reference_is_never_a_bad_answer_nor_instead_of_the_rows_own() -> None:
    def columns(row: dict) -> dict:
        (example,) = to_examples(row, kind="prompts", format="auto", source="f:1")
        return dict(example.columns)

    assert columns({"prompt": [U], "completion": [B], "label": False}) == {"label": False}
    assert columns({"prompt": "p"}) == {}
    assert columns({"messages": [U, A, U]}) == {}
    assert columns({"prompt": "p", "completion": "A", "reference": "own"}) == {"reference": "own"}


def test_margin_comes_from_its_field_or_from_the_scores() -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    for extra, margin in (
        ({}, None),
        ({"margin": 2}, 2.0),
        ({"score_chosen": 8.5, "score_rejected": 7}, 1.5),
    ):
        (example,) = to_examples(pair | extra, kind="preference", format="auto", source="f:1")
        assert example.margin == margin
    with pytest.raises(DataError, match="margin: expected a number"):
        one(pair | {"margin": "big"}, "preference")


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        (
            {"messages": [U, {"role": "bot", "content": "x"}]},
            "sft",
            r"f:1: messages\[1\]: role 'bot': expected one of .*did you mean 'assistant'",
        ),
        (
            {"messages": [U, {"role": "asistant", "content": "x"}]},
            "sft",
            "did you mean 'assistant'",
        ),
        (
            {"conversations": [{"from": ["human"], "value": "x"}]},
            "sft",
            r"f:1: conversations\[0\]: from \['human'\]: expected one of ",
        ),
        (
            {"messages": [U, {"role": "assistant", "contents": "x"}]},
            "sft",
            "no 'content' in a turn .*did you mean 'content' by 'contents'",
        ),
        (
            {"messages": [U, {"role": "assistant", "content": None}]},
            "sft",
            "expected text, found None",
        ),
        (
            {"messages": [U, {"role": "assistant", "content": " "}]},
            "sft",
            "the content of the assistant is empty",
        ),
        ({"messages": [U, U]}, "sft", "no assistant turn"),
        ({"messages": [S, A]}, "sft", "an assistant turn before any user turn"),
        ({"messages": []}, "sft", "expected a list of turns"),
        ({"messages": [U, {"role": "assistant", "content": "x", "weight": 0}]}, "sft", "weight 0"),
        (
            {"messages": [U, {"role": "assistant", "content": "", "tool_calls": [1]}]},
            "sft",
            r"messages\[1\].tool_calls\[0\]: expected a tool call with name and arguments",
        ),
        ({"conversations": [{"from": "humn", "value": "x"}]}, "sft", "did you mean 'human'"),
        ({"prompt": "p", "choosen": "a", "rejected": "b"}, "preference", "did you mean 'chosen'"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "preference", "are the same"),
        ({"prompt": "p", "chosen": "a", "rejected": ""}, "preference", "rejected is empty"),
        (
            {"prompt": "p", "chosen": "a", "rejected": [B]},
            "preference",
            "one is text, the other turns",
        ),
        ({"chosen": "abc", "rejected": "xyz"}, "preference", "have no common prefix"),
        ({"prompt": [U], "chosen": [U, A], "rejected": [B]}, "preference", "only one of chosen"),
        (
            {"prompt": [U, A], "chosen": [A], "rejected": [B]},
            "preference",
            "ends with a turn of role assis",
        ),
        ({"prompt": [U, A]}, "prompts", "ends with a turn of role assistant, expected user"),
        ({"prompt": ""}, "prompts", "prompt is empty"),
        (
            {"prompt": "p", "completion": "c", "label": 3},
            "unpaired",
            "label: expected true or false",
        ),
        (
            {"ask": "q", "reply": "a"},
            "sft",
            r"no known format has the fields \['ask', 'reply'",
        ),
        ({"text": "t"}, "prompts", "plain text has no prompts"),
        (
            {"messages": [U, A], "instruction": "i", "output": "o"},
            "sft",
            "can be read as messages or alpaca",
        ),
        ({"instruction": "Q", "output": 3}, "sft", "output: expected text, found 3"),
    ],
)
def test_faulty_rows_are_refused(row: dict, kind: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        to_examples(row, kind=kind, format="auto", source="f:1")
    assert str(caught.value).startswith("f:1: ")


def test_named_format_wants_its_fields() -> None:
    with pytest.raises(DataError, match="format alpaca needs instruction, output or instruction"):
        one({"prompt": "p"}, "sft", "alpaca")


def test_a_file_has_one_format() -> None:
    detector = FormatDetector("auto", kind="sft")
    assert detector.format_of({"messages": [U, A]}, "f:1") == "messages"
    with pytest.raises(DataError, match="f:2: format alpaca, but f:1 is messages"):
        detector.format_of({"instruction": "i", "output": "o"}, "f:2")
    assert detector.format_of({"instruction": "i", "output": "o"}, "g:1") == "alpaca"
