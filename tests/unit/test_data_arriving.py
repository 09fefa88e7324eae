"""Rows in the layouts of public data sets are read as they mean, or refused with what to do."""

import pytest

from align.core.errors import DataError
from align.data.formats.detect import to_examples

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
        {"instruction": "Q", "input": "", "output": "A", "text": "all"},
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
    ("glaive", "sft", {"system": "S", "chat": "USER: Q"}, "convert the rows .map: FILE.py:NAME"),
]


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
