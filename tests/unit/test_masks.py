"""Token ids and masks of 120 rows beside those of TRL's SFTTrainer (benchmarks/masks.py)."""

import pytest

from benchmarks.masks import compare, conversations


@pytest.mark.slow
@pytest.mark.parametrize("template", ["llama3", "qwen3", "gemma3"])
def test_ids_and_masks_of_many_rows_are_those_of_trl(template: str):
    rows = conversations(120)
    answers = sum(turn["role"] == "assistant" for turns in rows for turn in turns)
    found = compare("trl", template, rows)
    assert found.same_ids == 120
    assert not found.only_ours
    # TRL also trains the line break after a stop, which nothing samples; llama3 writes none.
    assert found.only_theirs == ({} if template == "llama3" else {"\n": answers})
    assert found.same_masks == (120 if template == "llama3" else 0)
