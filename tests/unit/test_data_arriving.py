"""Rows in the layouts of public data sets are read as they mean, or refused with what to do."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.core.errors import DataError
from align.data.formats.detect import to_examples
from align.data.load import load_examples
from align.recipe.schema import DataSpec
from align.recipe.schema.formats import Kind

U, A, B = (
    {"role": r, "content": c} for r, c in (("user", "Q"), ("assistant", "A"), ("assistant", "B"))
)
S = {"role": "system", "content": "S"}
ARRIVING = [
    # name, kind, row, prompt, completion, rejected
    (
        "Orca pairs",
        "preference",
        {"system": "S", "question": "Q", "chosen": "A", "rejected": "B"},
        [S, U],
        [A],
        [B],
    ),
    (
        "Alpaca preference",
        "preference",
        {"instruction": "Q", "input": "I", "chosen": "A", "rejected": "B"},
        [{"role": "user", "content": "Q\n\nI"}],
        [A],
        [B],
    ),
    (
        "LLaMA-Factory KTO",
        "unpaired",
        {"instruction": "Q", "input": "", "output": "A", "kto_tag": False},
        [U],
        [A],
        None,
    ),
    ("GSM8K", "sft", {"question": "Q", "answer": "A"}, [U], [A], None),
    ("query/response", "sft", {"query": "Q", "response": "A"}, [U], [A], None),
    (
        "dolly",
        "sft",
        {"instruction": "Q", "context": "C", "response": "A", "category": "x"},
        [{"role": "user", "content": "Q\n\nC"}],
        [A],
        None,
    ),
    (
        "OpenOrca",
        "sft",
        {"id": "1", "system_prompt": "S", "question": "Q", "response": "A"},
        [S, U],
        [A],
        None,
    ),
    (
        "OpenAI RFT",
        "prompts",
        {"messages": [S, U], "reference_answer": {"x": 1}},
        [S, U],
        None,
        None,
    ),
    (
        "LLaMA-Factory v1 pairs",
        "preference",
        {"chosen_messages": [U, {**A, "loss_weight": 1.0}], "rejected_messages": [U, B]},
        [U],
        [A],
        [B],
    ),
    (
        "axolotl segments",
        "sft",
        {"segments": [{"label": False, "text": "Q"}, {"label": True, "text": "A"}]},
        "Q",
        "A",
        None,
    ),
    (
        "Stanford Alpaca",
        "sft",
        {"instruction": "Q", "input": "", "output": "A", "text": "### Q\n\n### A"},
        [U],
        [A],
        None,
    ),
    (
        "verl",
        "prompts",
        {
            "data_source": "x",
            "prompt": [U],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "7"},
            "extra_info": {},
        },
        [U],
        None,
        None,
    ),
    (
        "UltraFeedback",
        "preference",
        {
            "instruction": "Q",
            "completions": [
                {"response": "A", "overall_score": 9, "custom_system_prompt": "S"},
                {"response": "B", "overall_score": 1, "custom_system_prompt": "S"},
            ],
        },
        [S, U],
        [A],
        [B],
    ),
    (
        "UltraFeedback, a sequence of structs as datasets stores it",
        "preference",
        {"instruction": "Q", "completions": {"response": ["A", "B"], "score": [9, 1]}},
        [U],
        [A],
        [B],
    ),
    (
        "Bedrock",
        "sft",
        {
            "schemaVersion": "bedrock-conversation-2024",
            "system": [{"text": "S"}],
            "messages": [{**U, "content": [{"text": "Q"}]}, {**A, "content": [{"text": "A"}]}],
        },
        [],
        [S, U, A],
        None,
    ),
    (
        "system prompt in parts",
        "sft",
        {"system": ["S", {"type": "text", "text": "T"}], "messages": [U, {**A, "content": ["A"]}]},
        [],
        [{**S, "content": "S\nT"}, U, A],
        None,
    ),
    (
        "steps as columns",
        "steps",
        {"prompt": "Q", "steps": {"text": ["A", "B"], "label": [True, False]}},
        [U],
        [{**A, "content": "A\nB"}],
        None,
    ),
]


@pytest.mark.parametrize("case", ARRIVING, ids=[case[0] for case in ARRIVING])
def test_layout_that_users_bring_is_read_as_it_is(case: tuple) -> None:
    _, kind, row, prompt, completion, rejected = case
    (example,) = to_examples(row, kind=kind, format="auto", source="a:1")
    assert (example.prompt, example.completion, example.rejected) == (prompt, completion, rejected)


REFUSED = [
    # name, kind, row, what the message says to do
    (
        "FLAN",
        "sft",
        {"inputs": "Q", "targets": "A"},
        "rename: {inputs: prompt, targets: completion}",
    ),
    (
        "Aya, prompts",
        "prompts",
        {"inputs": "Q", "targets": "A", "language": "en"},
        "rename: {inputs: prompt, targets: completion}",
    ),
    (
        "AIME",
        "prompts",
        {"Problem": "Q", "Answer": 4},
        "rename: {Problem: problem, Answer: answer}",
    ),
    (
        "LMSYS",
        "sft",
        {"conversation": [U, A], "model": "m", "turn": 1},
        "rename: {conversation: messages}",
    ),
    (
        "CNN",
        "sft",
        {"article": "Q", "highlights": "A", "id": "1"},
        "rename: {article: prompt, highlights: completion}",
    ),
    (
        "distilabel",
        "sft",
        {"instruction": "Q", "generation": "A"},
        "rename: {generation: response}",
    ),
    ("T0", "sft", {"input": "Q", "target": "A"}, "rename: {target: output}"),
    ("stories", "corpus", {"story": "Once."}, "rename: {story: text}"),
    (
        "PKU-SafeRLHF",
        "preference",
        {"prompt": "Q", "response_0": "A", "response_1": "B", "better_response_id": 1},
        "response_0 and response_1 are several answers",
    ),
    (
        "WebGPT",
        "preference",
        {"question": "Q", "answer_0": "A", "answer_1": "B", "score_0": 1, "score_1": 0},
        "answer_0 and answer_1 are several answers",
    ),
    ("LIMA", "sft", {"conversations": ["Q", "A"]}, "a text alone does not say who says it"),
    ("tokens", "sft", {"input_ids": [1, 2], "labels": [-100, 2]}, "use the rows from which"),
    ("masked tokens", "sft", {"text": "Q", "labels": [-100, 2]}, "labels: .* would be dropped"),
    (
        "Capybara",
        "sft",
        {"conversation": [{"input": "Q", "output": "A"}], "source": "s"},
        "convert the rows .map: FILE.py:NAME",
    ),
    (
        "glaive",
        "sft",
        {"system": "S", "chat": "USER: Q\n\n\nASSISTANT: A <|endoftext|>"},
        "split it at its marks .USER:, ASSISTANT:, FUNCTION RESPONSE: .* .map: FILE.py:NAME",
    ),
    (
        "MOSS",
        "sft",
        {"meta_instruction": "S", "num_turns": 1, "chat": {"turn_1": {"Human": "Q", "MOSS": "A"}}},
        "write the texts under Human and MOSS as turns",
    ),
    (
        "SHP",
        "preference",
        {"history": "Q", "human_ref_A": "A", "human_ref_B": "B", "labels": 1, "score_A": 3},
        "write history as prompt, .*1 is human_ref_A",
    ),
    (
        "Nectar",
        "preference",
        {"prompt": "Q", "answers": [{"answer": "A", "rank": 1.0}, {"answer": "B", "rank": 2.0}]},
        "write the best one as chosen and the worst as rejected .*rank 1 is the best",
    ),
    (
        "Gemini",
        "sft",
        {"contents": [{"role": "user", "parts": [{"text": "Q"}]}]},
        "texts of parts are the content",
    ),
    (
        "arena",
        "preference",
        {"winner": "model_a", "conversation_a": [U, A], "conversation_b": [U, B]},
        "write the one that winner names as chosen",
    ),
    (
        "Anthropic tools",
        "sft",
        {"messages": [U, {**A, "content": [{"type": "tool_use", "name": "f", "input": {}}]}]},
        "Write calls as tool_calls of the turn and results as turns of role tool",
    ),
    (
        "OpenMathInstruct",
        "sft",
        {"question": "Q", "generated_solution": "A", "is_correct": True},
        "rename: {generated_solution: response}",
    ),
    (
        "several responses",
        "sft",
        {"prompt": "Q", "response": ["A", "B"]},
        "Of several responses, write one, or a row for each",
    ),
    ("a whole file", "sft", {"version": 1, "data": [{"prompt": "Q"}]}, "jq -c '.data..'"),
    (
        "speakers",
        "sft",
        {"messages": [{"speaker": "user", "text": "Q"}]},
        "write {role, content} .map: FILE.py:NAME",
    ),
    (
        "dialogues as one text",
        "preference",
        {"chosen": "Human: Q\nAssistant: A", "rejected": "Human: Other\nAssistant: B"},
        "differ before the response: .* both have 'Assistant:'",
    ),
    (
        "dialogues in a template",
        "preference",
        {
            "chosen": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA",
            "rejected": "<|im_start|>user\nOther<|im_end|>\n<|im_start|>assistant\nB",
        },
        "differ before the response: .*assistant'",
    ),
    ("text beside turns", "sft", {"messages": [U, A], "text": "Other."}, "text: 'Other.' would be"),
]

NESTED = [
    ("sft", {"conversation": {"messages": [U, A]}, "id": 1}, {"conversation.messages": "messages"}),
    (
        "prompts",
        {"custom_id": 1, "body": {"model": "m", "messages": [U]}},
        {"body.messages": "messages"},
    ),
    (
        "preference",
        {"example": {"prompt": "Q", "chosen": "A", "rejected": "B"}},
        {f"example.{key}": key for key in ("chosen", "prompt", "rejected")},
    ),
]


@pytest.mark.parametrize(("kind", "row", "names"), NESTED)
def test_fields_inside_of_an_object_are_refused_with_the_rename_that_reads_them(
    tmp_path: Path, kind: Kind, row: dict[str, Any], names: dict[str, str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    told = ", ".join(f"{old}: {new}" for old, new in names.items())
    with pytest.raises(DataError, match=re.escape(f"it can be read with rename: {{{told}}};")):
        load_examples([DataSpec(path=str(path))], kind=kind, seed=0)
    (example,) = load_examples([DataSpec(path=str(path), rename=names)], kind=kind, seed=0)
    assert "Q" in str((example.prompt, example.completion))


def test_different_system_prompts_of_two_responses_are_columns() -> None:
    entries = [
        {"response": text, "score": score, "custom_system_prompt": said}
        for text, score, said in (("A", 9, "Be kind."), ("B", 1, "Be curt."), ("C", 5, "Be odd."))
    ]
    row = {"instruction": "Q", "completions": entries}
    (pair,) = to_examples(row, kind="preference", format="auto", source="a:1")
    assert pair.prompt == [U]
    assert dict(pair.columns) == {
        "chosen_system_prompt": "Be kind.",
        "rejected_system_prompt": "Be curt.",
    }


@pytest.mark.parametrize("calls", [["f"], ["f", "g"]])
def test_tool_calls_as_columns_are_read(calls: list[str]) -> None:
    arguments = [json.dumps({"x": name}) for name in calls]
    whole = [{"name": n, "arguments": a} for n, a in zip(calls, arguments, strict=True)]
    for given in (
        {"name": calls, "arguments": arguments},
        {"id": None, "type": ["function"] * len(calls), "function": whole},
        whole,
    ):
        turns = [U, {"role": "assistant", "content": None, "tool_calls": given}]
        (example,) = to_examples({"messages": turns}, kind="sft", format="auto", source="a:1")
        assert example.completion is not None
        said = example.completion[-1]
        assert not isinstance(said, str)
        assert [call["function"] for call in said.get("tool_calls", [])] == [
            {"name": name, "arguments": {"x": name}} for name in calls
        ]
    turns[-1]["tool_calls"] = {"name": [*calls, "h"], "arguments": arguments}
    with pytest.raises(DataError, match=r"objects as columns .* differ in length"):
        to_examples({"messages": turns}, kind="sft", format="auto", source="a:1")


@pytest.mark.parametrize("key", ["image_url", "images_path", "audio_file", "video-bytes", "image"])
def test_places_of_images_and_sound_are_refused(key: str) -> None:
    with pytest.raises(DataError, match=f"{key}: images, video and audio cannot be trained on"):
        to_examples({"prompt": "Q", key: "x/y"}, kind="prompts", format="auto", source="a:1")
    for kept in ("num_images", "image_count", "imagery"):
        (example,) = to_examples(
            {"prompt": "Q", kept: 3}, kind="prompts", format="auto", source="a:1"
        )
        assert example.columns[kept] == 3


def test_bytes_are_refused_where_they_are_a_picture_or_sound() -> None:
    for first in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\x24\0\0\0WAVE"):
        row = {"prompt": "Q", "page": first + b"rest"}
        with pytest.raises(DataError, match="page: images, video and audio cannot"):
            to_examples(row, kind="prompts", format="auto", source="a:1")
    for kept in (b"", b"\xff", b"text"):
        row = {"prompt": "Q", "page": kept}
        (example,) = to_examples(row, kind="prompts", format="auto", source="a:1")
        assert example.columns["page"] == kept


def test_pairs_of_plain_text_may_share_their_beginning() -> None:
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    (pair,) = to_examples(row, kind="preference", format="auto", source="a:1")
    assert (pair.prompt, pair.completion) == ("The sky is", " blue.")
    row = {"chosen": "Human: Q\nAssistant: A", "rejected": "Human: Q\nAssistant: B"}
    (pair,) = to_examples(row, kind="preference", format="auto", source="a:1")
    assert pair.prompt == "Human: Q\nAssistant:"


def test_columns_of_maps_are_objects(tmp_path: Path) -> None:
    maps = pa.map_(pa.string(), pa.string())
    turns = [[tuple(turn.items()) for turn in (U, A)]]
    table = pa.table(
        {
            "messages": pa.array(turns, type=pa.list_(maps)),
            "more": pa.array(
                [[(1, {"x": 2.5})]], pa.map_(pa.int64(), pa.struct({"x": pa.float64()}))
            ),
            "none": pa.array([[]], type=maps),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    (example,) = load_examples([DataSpec(path=str(tmp_path / "rows.parquet"))], kind="sft", seed=0)
    assert example.completion == [U, A]
    assert example.columns["more"] == {"1": {"x": 2.5}}


@pytest.mark.parametrize("case", REFUSED, ids=[case[0] for case in REFUSED])
def test_layout_that_is_not_read_is_refused_with_what_to_do(case: tuple) -> None:
    _, kind, row, told = case
    with pytest.raises(DataError, match=f"a:1: .*{told}") as refused:
        to_examples(row, kind=kind, format="auto", source="a:1")
    # The rename of a message does what it says.
    if told.startswith("rename"):
        assert "did you mean" not in str(refused.value)
        names = dict(pair.split(": ") for pair in told[len("rename: {") : -1].split(", "))
        mended = {names.get(key, key): value for key, value in row.items()}
        (example,) = to_examples(mended, kind=kind, format="auto", source="a:1")
        assert "Q" in str(example.prompt or example.completion) or kind == "corpus"


def test_two_answers_are_never_taken_for_one() -> None:
    row = {"prompt": "Q", "response_0": "A", "response_1": "B"}
    with pytest.raises(DataError) as refused:
        to_examples(row, kind="preference", format="auto", source="a:1")
    assert "did you mean 'response'" not in str(refused.value)
