"""The seeded faults: every one is found, nearly all at their line, and nothing else is said."""

import os
from pathlib import Path

import pytest

from align.core.errors import DataError
from align.data.chat import ChatFormat
from align.data.check import Request, check_data
from align.data.load import fit_rows, load_examples
from align.recipe.schema import DataSpec
from benchmarks.data_faults import clean_alarms, outcomes
from tests.fault_corpus import clean_rows, write_rows
from tests.unit.test_data_chat import NO_STOP, make_tokenizer

ROOT = Path(os.environ.get("ALIGN_REAL_DATA", "/nonexistent")) / "data"


def test_every_seeded_fault_is_found_at_its_place_and_nothing_else():
    found = list(outcomes())
    assert len({(o.case.code, o.case.fault) for o in found}) >= 60
    assert [o.case for o in found if not o.found] == []
    placed = [o for o in found if o.placed]
    assert len(placed) >= 0.95 * len(found)
    # A file of blank lines is one without rows and has blank lines.
    assert {o.case.fault for o in found if o.others} <= {"blank file"}


def test_clean_rows_of_every_kind_and_format_raise_no_alarm():
    assert {name: count for name, count in clean_alarms().items() if count} == {}


# What the check says of the real clean files, each finding looked at by hand (docs/data-check.md).
JUDGED_RIGHT = {
    "preference/oasst_en_ranked.jsonl": {"D078"},
    "preference/persona_yes_no.jsonl": {"D092"},
    "prompts/bbq_mc.jsonl": {"D092"},
    "sft/gpteacher_codegen.jsonl": {"D121"},
    "sft/ultrafeedback_1k.jsonl": {"D121"},
    "unpaired/llamafactory_kto_en.jsonl": {"D112"},
    "unpaired/xstest_overrefusal.jsonl": {"D121"},
}


@pytest.mark.real
@pytest.mark.slow
def test_clean_real_files_raise_only_what_was_judged_right():
    files = [p for p in sorted(ROOT.glob("*/*.jsonl")) if p.parent.name != "raw"]
    assert len(files) > 20
    said = {}
    for path in files:
        report = check_data(Request(path=str(path)))
        assert report.tally.total("error") == 0, path
        if report.tally.counts:
            said[path.relative_to(ROOT).as_posix()] = set(report.tally.counts)
    assert said == JUDGED_RIGHT


def _sft(**turn: object) -> list[dict]:
    rows = clean_rows("sft")
    rows[4]["messages"][1] |= turn
    return rows


def _at_four(kind: str, change) -> list[dict]:
    rows = clean_rows(kind)
    change(rows[4])
    return rows


# The data faults that a trainer was given (fault, rows, what the stage needs); each must stop the
# load of a stage with the fifth row named.
SIXTEEN = {
    "key contents": ("sft", _at_four("sft", lambda r: r["messages"][1].update(
        contents=r["messages"][1].pop("content")))),
    "role bot": ("sft", _sft(role="bot")),
    "no assistant turn": ("sft", _at_four("sft", lambda r: r["messages"].pop())),
    "empty assistant": ("sft", _sft(content="")),
    "content None": ("sft", _sft(content=None)),
    "content a number": ("sft", _sft(content=3)),
    "an image part": ("sft", _sft(content=[{"type": "image"}])),
    "messages a text": ("sft", _at_four("sft", lambda r: r.update(messages="hello"))),
    "messages missing": ("sft", _at_four("sft", lambda r: r.pop("messages"))),
    "answer before question": ("sft", _at_four("sft", lambda r: r["messages"].reverse())),
    "half a surrogate pair": ("sft", _sft(content="\ud83d")),
    "chosen equal to rejected": ("preference", _at_four(
        "preference", lambda r: r.update(rejected=r["chosen"]))),
    "chosen misspelt": ("preference", _at_four(
        "preference", lambda r: r.update(choosen=r.pop("chosen")))),
    "rejected null": ("preference", _at_four("preference", lambda r: r.update(rejected=None))),
}  # fmt: skip


@pytest.mark.parametrize("fault", SIXTEEN)
def test_a_faulty_row_stops_the_load_of_a_stage_with_its_line(tmp_path: Path, fault: str):
    kind, rows = SIXTEEN[fault]
    path = tmp_path / "rows.jsonl"
    write_rows(rows, path, "jsonl")
    with pytest.raises(DataError, match=rf"{path.name}:5: ") as caught:
        load_examples([DataSpec(path=str(path))], kind=kind, seed=0)
    first = next(line for line in str(caught.value).splitlines() if ":5: " in line)
    report = check_data(Request(path=str(path), kind=kind))
    (finding,) = [f for f in report.tally.findings() if f.source.endswith(":5")]
    assert first.partition(";")[0].replace("rows.jsonl:1 is", "rows.jsonl is") == (
        f"{finding.source}: {finding.found.partition(';')[0]}"
    )


def test_rows_lost_to_truncation_stop_a_stage_and_are_named(tmp_path: Path):
    rows = [{"prompt": f"q{i}", "completion": "a" * (200 if i else 2)} for i in range(8)]
    path = tmp_path / "rows.jsonl"
    write_rows(rows, path, "jsonl")
    chat = ChatFormat(make_tokenizer(None))
    examples = load_examples([DataSpec(path=str(path))], kind="sft", seed=0)
    tokens = [chat.sft_row(example) for example in examples]
    with pytest.raises(DataError, match=r"7 of 8 rows are longer .*rows.jsonl:"):
        fit_rows(tokens, max_length=50, max_lost_frac=0.01, what="sft")
    report = check_data(Request(path=str(path), chat=lambda: chat, max_length=50))
    assert (report.tally.counts["D110"], report.tally.counts["D114"]) == (7, 1)


def test_a_template_without_a_stop_gets_a_trained_one(tmp_path: Path):
    # The sixteenth fault is put right instead of refused: the answer ends in a trained stop token.
    path = tmp_path / "rows.jsonl"
    write_rows(clean_rows("sft"), path, "jsonl")
    chat = ChatFormat(make_tokenizer(NO_STOP))
    for example in load_examples([DataSpec(path=str(path))], kind="sft", seed=0):
        row = chat.sft_row(example)
        last = max(i for i, trained in enumerate(row.trained) if trained)
        assert row.input_ids[last] in chat.stop_token_ids
