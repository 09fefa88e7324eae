"""Rows in the layouts of public data sets are read as they mean, or refused with what to do."""

import pytest

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
