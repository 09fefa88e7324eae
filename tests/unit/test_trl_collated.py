"""Rows that another trainer made: what its batches train, where they stop, what it dropped."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from small_tokenizers import byte_tokenizer

from align.core.types import TokenRow
from align.data.render.chat import ChatFormat
from align.data.render.templates import TEMPLATES
from align.stages.trl import preflight as collated

CHAT = ChatFormat(byte_tokenizer(TEMPLATES["plain"]))
STOP = CHAT.stop_token_ids[0]
KNOWN = frozenset({STOP})


def ids(text: str) -> list[int]:
    return CHAT.tokenizer(text, add_special_tokens=False)["input_ids"]


def row(text: str, trained: int, source: str = "a:1") -> TokenRow:
    """Make a row whose last ``trained`` tokens are trained."""
    tokens = ids(text)
    return TokenRow(
        tuple(tokens), tuple(i >= len(tokens) - trained for i in range(len(tokens))), source
    )


def test_rows_are_read_from_labels_without_their_padding() -> None:
    def collate(rows: list[list[int]]) -> dict[str, torch.Tensor]:
        width = max(map(len, rows))
        tokens = torch.tensor([r + [0] * (width - len(r)) for r in rows])
        labels = torch.tensor([[-100, *r[1:], *[-100] * (width - len(r))] for r in rows])
        real = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
        return {"input_ids": tokens, "labels": labels, "attention_mask": real}

    assert collated.rows_of([[5, 6, 7], [8, 9]], collate, ["a:1", "a:2"]) == [
        TokenRow((5, 6, 7), (False, True, True), "a:1"),
        TokenRow((8, 9), (False, True), "a:2"),
    ]
    # Rows that the trainer packed have no line any more.
    (packed,) = collated.rows_of([[5, 6, 7, 8, 9]], collate, ["a:1", "a:2"])
    assert packed.source == "row 0"


def test_both_answers_of_a_pair_are_read_whichever_way_they_are_collated() -> None:
    stacked = {
        "input_ids": torch.tensor([[1, 2], [1, 3]]),
        "completion_mask": torch.tensor([[0, 1], [0, 1]]),
        "KL_input_ids": torch.tensor([[7, 7]]),
        "KL_completion_mask": torch.tensor([[1, 1]]),
    }
    apart = {
        f"{side}_{key}": torch.tensor([value])
        for side, token in (("chosen", 2), ("rejected", 3))
        for key, value in (("input_ids", [1, token]), ("labels", [-100, token]))
    }
    expected = [TokenRow((1, t), (False, True), "a:1") for t in (2, 3)]
    for batch in (stacked, apart):
        assert collated.rows_of([None], lambda _, b=batch: b, ["a:1"]) == expected
    # An online trainer's batch holds prompts and no tokens.
    assert collated.rows_of([None], lambda rows: rows, ["a:1"]) == []


def test_the_first_token_is_trained_by_no_loss_whatever_its_label_says() -> None:
    batch = {"input_ids": torch.tensor([[4, 5]]), "labels": torch.tensor([[4, 5]])}
    (found,) = collated.rows_of([None], lambda _: batch, ["a:1"])
    assert found.trained == (False, True)


def test_a_trained_run_may_end_in_white_space_after_its_stop_and_in_nothing_else() -> None:
    good = [row("q: yes</s>", 4), row("q: yes</s>\n", 5), row("q: a</s>\nq: b</s>\n", 12)]
    assert collated.stops(CHAT, good, KNOWN).verdict == "ok"
    twice = collated.stops(CHAT, [*good, row("q: yes</s>\n</s>", 6)], KNOWN)
    assert (twice.verdict, twice.value[-8:]) == ("warn", "1 in two")
    cut = row("q: yes", 3, source="a:7")
    goes_on = row("q: yes</s> and", 8, source="a:8")
    found = collated.stops(CHAT, [*good, cut, goes_on], KNOWN)
    assert (found.verdict, found.value) == ("fail", "3 of 5 trained runs end in a stop token")
    assert "a:7, a:8" in found.remedy


def test_training_more_than_the_answers_is_a_warning_and_a_blind_row_fails() -> None:
    answers = [row("q: yes</s>", 4)] * 3
    found = collated.only_answers(CHAT, answers, num_answer_tokens=12, num_all=3)
    assert found.verdict == "ok"
    assert found.value.endswith("their responses have 12")
    everything = [row("q: yes</s>", 6)] * 3  # 18 of 12
    assert (
        collated.only_answers(CHAT, everything, num_answer_tokens=12, num_all=3).verdict == "warn"
    )
    # Some trainers add a second stop behind the line break of the template: no other text.
    assert (
        collated.only_answers(
            CHAT, [row("q: yes</s>\n</s>", 6)] * 3, num_answer_tokens=12, num_all=3
        ).verdict
        == "ok"
    )
    blind = [*answers, row("q: yes</s>", 0, source="a:9")]
    found = collated.only_answers(CHAT, blind, num_answer_tokens=12, num_all=4)
    assert found.verdict == "fail"
    assert "a:9" in found.remedy


def test_rows_that_the_trainer_drops_are_told() -> None:
    assert collated.as_many([1, 2], 2).verdict == "ok"
    found = collated.as_many([1, 2], 3)
    assert (found.verdict, found.value) == ("warn", "2 of 3 rows are in the trainer's data set")
