"""Loading: split, limits, mixture, overlap, rows that do not fit."""

import json
import logging
from pathlib import Path

import pytest

from align.core.errors import DataError
from align.core.types import Example, PairRow, TokenRow
from align.data.fit import fit_rows
from align.data.load import check_overlap, load_examples
from align.data.split import hash_fraction, side_of, split_key
from align.recipe.schema import DataSpec
from align.recipe.schema.formats import Kind


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prompts(tmp_path: Path, count: int, name: str = "a") -> str:
    return write(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i}"} for i in range(count)])


def test_hash_fraction_has_the_published_sha256_values() -> None:
    # sha256("abc") = ba7816bf 8f01cfea ... (FIPS 180-2, B.1), sha256("") = e3b0c442 98fc1c14 ...
    assert hash_fraction("abc") == 0xBA7816BF8F01CFEA / 2**64
    assert hash_fraction("") == 0xE3B0C44298FC1C14 / 2**64
    # 0xba78... / 2^64 = 0.728, so it is held out only by a share above that.
    assert side_of("abc", heldout_frac=0.72) == "train"
    assert side_of("abc", heldout_frac=0.73) == "heldout"


def test_split_key_is_the_first_user_message_of_every_kind() -> None:
    user = {"role": "user", "content": "Q"}
    system = {"role": "system", "content": "S"}
    answer = {"role": "assistant", "content": "A"}
    assert split_key(Example(prompt=[system, user])) == "Q"
    assert split_key(Example(prompt=[], completion=[system, user, answer, user])) == "Q"
    assert split_key(Example(prompt="Q", completion="A")) == "Q"
    assert split_key(Example(prompt="", completion="text")) == "text"


def test_load_splits_into_two_sides_that_make_the_whole(tmp_path: Path) -> None:
    path = prompts(tmp_path, 400)
    sides = {
        side: load_examples([DataSpec(path=path, split=side)], kind="prompts", seed=0)
        for side in ("all", "train", "heldout")
    }
    train, heldout = ({e.prompt for e in sides[side]} for side in ("train", "heldout"))
    assert not train & heldout
    assert train | heldout == {e.prompt for e in sides["all"]}
    assert heldout == {e.prompt for e in sides["all"] if hash_fraction(e.prompt) < 0.1}
    check_overlap(sides["train"], sides["heldout"])


def test_load_rows_keeps_a_seeded_choice_in_file_order(tmp_path: Path) -> None:
    spec = DataSpec(path=prompts(tmp_path, 100), rows=20)
    first = load_examples([spec], kind="prompts", seed=1)
    lines = [int(e.source.rpartition(":")[2]) for e in first]
    assert len(set(lines)) == 20
    assert lines == sorted(lines)
    assert first == load_examples([spec], kind="prompts", seed=1)
    assert first != load_examples([spec], kind="prompts", seed=2)


def test_load_weights_oversample_and_drop_nothing(tmp_path: Path) -> None:
    # 100 rows of weight 2 and 30 rows of weight 1: scale = max(100/2, 30/1) = 50, so 100 and 50:
    # 30 rows once and 20 of them a second time.
    specs = [
        DataSpec(path=prompts(tmp_path, 100, "a"), weight=2.0),
        DataSpec(path=prompts(tmp_path, 30, "b")),
    ]
    mixed = load_examples(specs, kind="prompts", seed=0)
    counts = {e.prompt: mixed.count(e) for e in mixed}
    assert len(mixed) == 150
    assert len(counts) == 130
    assert sorted(n for p, n in counts.items() if p.startswith("b")) == [1] * 10 + [2] * 20
    plain = [DataSpec(path=spec.path) for spec in specs]
    assert len(load_examples(plain, kind="prompts", seed=0)) == 130


def test_load_reports_every_bad_row_up_to_twenty(tmp_path: Path) -> None:
    good, bad = {"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": ""}
    few = write(tmp_path / "few.jsonl", [good, bad, good, bad])
    with pytest.raises(DataError) as caught:
        load_examples([DataSpec(path=few)], kind="sft", seed=0)
    lines = str(caught.value).splitlines()
    assert lines == [f"{few}:2: completion is empty", f"{few}:4: completion is empty"]
    many = write(tmp_path / "many.jsonl", [bad] * 50)
    with pytest.raises(DataError) as caught:
        load_examples([DataSpec(path=many)], kind="sft", seed=0)
    assert str(caught.value).count("completion is empty") == 20
    assert str(caught.value).endswith("... and more")


def test_load_renames_fields_and_names_a_missing_one(tmp_path: Path) -> None:
    path = write(tmp_path / "qa.jsonl", [{"question": "q", "answer": "a", "id": 3}])
    rename = {"question": "prompt", "answer": "completion"}
    (example,) = load_examples([DataSpec(path=path, rename=rename)], kind="sft", seed=0)
    assert (example.prompt, example.completion, example.columns) == ("q", "a", {"id": 3})
    with pytest.raises(DataError, match=r"qa.jsonl:1: rename: no field \['ask'\]"):
        load_examples([DataSpec(path=path, rename={"ask": "prompt"})], kind="sft", seed=0)
    with pytest.raises(DataError, match="would occur twice"):
        load_examples([DataSpec(path=path, rename={"id": "answer"})], kind="sft", seed=0)


def test_load_refuses_an_empty_result(tmp_path: Path) -> None:
    path = write(tmp_path / "abc.jsonl", [{"prompt": "abc"}])  # hash fraction 0.728: train
    with pytest.raises(DataError, match="no rows are left"):
        load_examples([DataSpec(path=path, split="heldout")], kind="prompts", seed=0)


def test_load_counts_rows_that_hold_no_pair(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def row(*scores: int) -> dict:
        answers = [{"response": f"r{i}", "overall_score": s} for i, s in enumerate(scores)]
        return {"instruction": "q", "completions": answers}

    path = write(tmp_path / "uf.jsonl", [row(1, 5, 3), row(4, 4)])
    with caplog.at_level(logging.WARNING):
        (pair,) = load_examples([DataSpec(path=path)], kind="preference", seed=0)
    assert (pair.completion[0]["content"], pair.rejected[0]["content"]) == ("r1", "r0")
    assert pair.margin == 4.0
    assert "1 of 2 rows contain no preference example" in caplog.text


QUESTION = "What is the capital of France?"


def told_of(folder: Path, kind: Kind, rows: list[dict], caplog) -> str:
    """Load the rows; give the warnings."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_examples([DataSpec(path=write(folder / "told.jsonl", rows))], kind=kind, seed=0)
    return caplog.text


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("sft", {"prompt": QUESTION, "completion": f"{QUESTION}\nParis"}),
        ("sft", {"question": QUESTION, "answer": f" {QUESTION} Paris"}),
        (
            "preference",
            {"prompt": QUESTION, "chosen": f"{QUESTION} A", "rejected": f"{QUESTION} B"},
        ),
        ("unpaired", {"prompt": QUESTION, "completion": f"{QUESTION} A", "label": True}),
    ],
)
def test_responses_that_repeat_their_prompt_are_told(
    tmp_path: Path, kind: Kind, row: dict, caplog
) -> None:
    told = "2 of 3 responses begin with their whole prompt"
    fields = ("completion", "answer", "chosen", "rejected")
    plain = {k: v.replace(QUESTION, "") if k in fields else v for k, v in row.items()}
    assert told in told_of(tmp_path, kind, [row, row, plain], caplog)
    # In a few rows it may be meant.
    assert "begin with" not in told_of(tmp_path, kind, [row, plain, plain], caplog)
    # A short prompt begins many a text by chance.
    short = {k: v.replace(QUESTION, "A") if isinstance(v, str) else v for k, v in row.items()}
    assert "begin with" not in told_of(tmp_path, kind, [short], caplog)


def test_turns_after_the_last_response_are_told(tmp_path: Path, caplog) -> None:
    asked, said = ({"role": r, "content": "a"} for r in ("user", "assistant"))
    whole, open_ended = {"messages": [asked, said]}, {"messages": [asked, said, asked]}
    tool = {"messages": [asked, said, {"role": "tool", "content": "r"}]}
    told = "2 of 3 conversations go on after their last response"
    assert told in told_of(tmp_path, "sft", [whole, open_ended, tool], caplog)
    assert "go on" not in told_of(tmp_path, "sft", [whole], caplog)
    assert "go on" not in told_of(tmp_path, "prompts", [{"messages": [asked]}], caplog)


def test_overlap_is_refused_by_prompt_and_by_world_instance() -> None:
    with pytest.raises(DataError, match="b:9 repeats a:1"):
        check_overlap([Example(prompt="q", source="a:1")], [Example(prompt="q", source="b:9")])
    one = Example(prompt="add 1 to 2.", columns={"instance": "i"}, source="world:sft:0")
    two = Example(prompt="what is 2 plus 1?", columns={"instance": "i"}, source="world:prompts:0")
    with pytest.raises(DataError, match="world:prompts:0 repeats world:sft:0"):
        check_overlap([one], [two])


def row_of(length: int, name: str = "") -> TokenRow:
    return TokenRow(tuple(range(length)), (True,) * length, source=name)


def test_fit_rows_loses_long_rows_whole_and_refuses_too_many() -> None:
    rows = [row_of(5), row_of(6), row_of(4)]
    kept, lost = fit_rows(rows, max_length=5, max_lost_frac=0.5, what="sft")
    assert (kept, lost) == ([rows[0], rows[2]], 1)
    with pytest.raises(
        DataError, match=r"sft: 1 of 3 rows .* 5: a.jsonl:7 \(6 tokens\);.*max_lost"
    ):
        fit_rows(
            [row_of(5), row_of(6, "a.jsonl:7"), row_of(4)],
            max_length=5,
            max_lost_frac=0.3,
            what="sft",
        )


def test_fit_rows_cuts_the_shared_prompt_of_a_pair_from_the_left() -> None:
    def side(*ids: int) -> TokenRow:
        return TokenRow(ids, (False,) * 4 + (True,) * (len(ids) - 4))

    pair = PairRow(side(1, 2, 3, 4, 50), side(1, 2, 3, 4, 60, 61), num_prompt_tokens=4, margin=2.0)
    (cut,), lost = fit_rows([pair], max_length=4, max_lost_frac=0.0, what="pairs")
    assert lost == 0
    assert cut.chosen.input_ids == (3, 4, 50)
    assert cut.rejected.input_ids == (3, 4, 60, 61)
    assert cut.rejected.trained == (False, False, True, True)
    assert (cut.num_prompt_tokens, cut.margin) == (2, 2.0)
    # At 2 tokens the longer answer would stand without a prompt: the pair is lost.
    with pytest.raises(DataError, match="1 of 1 rows"):
        fit_rows([pair], max_length=2, max_lost_frac=0.5, what="pairs")


def test_answers_make_sft_rows_of_pairs_on_the_side_of_their_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(40)]
    path = write(tmp_path / "pairs.jsonl", rows)
    train = [i for i in range(40) if side_of(f"q{i}", heldout_frac=0.5) == "train"]

    def answers(which: str) -> list[tuple]:
        spec = DataSpec(path=path, split="train", heldout_frac=0.5, answers=which)
        found = load_examples([spec], kind="sft", seed=0)
        assert all(e.rejected is None for e in found)
        return [(e.prompt, e.completion) for e in found]

    assert answers("chosen") == [(f"q{i}", f"c{i}") for i in train]
    assert answers("both") == [(f"q{i}", f"{side}{i}") for i in train for side in "cr"]


def test_answers_are_refused_where_they_have_no_effect(tmp_path: Path) -> None:
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "q", "chosen": "c", "rejected": "r"}])
    with pytest.raises(DataError, match="'answers' has no effect on prompts data"):
        load_examples([DataSpec(path=pairs, answers="both")], kind="prompts", seed=0)
    rows = write(tmp_path / "sft.jsonl", [{"prompt": "q", "completion": "c"}])
    with pytest.raises(DataError, match="is sft data, but the stage needs preference"):
        load_examples([DataSpec(path=rows, answers="both")], kind="sft", seed=0)
    with pytest.raises(DataError, match="set answers: chosen"):
        load_examples([DataSpec(path=pairs)], kind="sft", seed=0)
