"""The seeded faults: every one is found, nearly all at their line, and nothing else is said."""

import json
import os
from pathlib import Path

import pytest

from align.core.errors import DataError
from align.core.types import PairRow, TokenRow
from align.data.check import Request, check_data
from align.data.fit import fit_rows
from align.data.load import load_examples
from align.data.render.chat import ChatFormat
from align.recipe.schema import DataSpec
from benchmarks.data_faults import clean_alarms, outcomes
from tests.fault_corpus import clean_rows, write_rows
from tests.sixteen_faults import NO_STOP, SIXTEEN
from tests.unit.test_data_chat import make_tokenizer

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


ROW_FAULTS = [name for name, fault in SIXTEEN.items() if fault.in_rows]


@pytest.mark.parametrize("name", ROW_FAULTS)
def test_a_stage_and_the_data_check_say_the_same_of_a_faulty_row(tmp_path: Path, name: str):
    fault = SIXTEEN[name]
    path = tmp_path / "rows.jsonl"
    write_rows(fault.rows, path, "jsonl")
    with pytest.raises(DataError, match=rf"{path.name}:5: ") as caught:
        load_examples([DataSpec(path=str(path))], kind=fault.kind, seed=0)
    first = next(line for line in str(caught.value).splitlines() if ":5: " in line)
    report = check_data(Request(path=str(path), kind=fault.kind))
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


def test_the_check_names_rows_whose_template_writes_no_stop(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    write_rows(clean_rows("sft"), path, "jsonl")
    chat = ChatFormat(make_tokenizer(NO_STOP))
    report = check_data(Request(path=str(path), chat=lambda: chat))
    assert report.tally.counts["D115"] == report.rows
    assert next(iter(report.tally.findings())).source == f"{path}:1"


def test_long_rows_are_named_first_to_last_and_all_written_down(tmp_path: Path, caplog):
    rows = [TokenRow((1,) * n, (True,) * n, f"a.jsonl:{i}") for i, n in enumerate([9] * 7 + [2], 1)]
    ledger = tmp_path / "ledger.jsonl"
    with pytest.raises(DataError) as caught:
        fit_rows(rows, max_length=5, max_lost_frac=0.5, what="sft", ledger=ledger)
    assert caught.value.code == "D114"
    first = ", ".join(f"a.jsonl:{i} (9 tokens)" for i in range(1, 6))
    assert f"7 of 8 rows are longer than max_length 5: {first} and 2 more, all in {ledger};" in str(
        caught.value
    )
    lost = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert lost == [
        {"source": f"a.jsonl:{i}", "reason": "too long", "tokens": 9, "max_length": 5, "of": "sft"}
        for i in range(1, 8)
    ]
    # With the loss allowed they go, each written down; a pair that is cut stays and is noted.
    kept, count = fit_rows(rows, max_length=5, max_lost_frac=0.9, what="sft", ledger=ledger)
    assert ([row.source for row in kept], count) == (["a.jsonl:8"], 7)
    assert len(ledger.read_text().splitlines()) == 14
    sides = [TokenRow((1,) * 6, (False,) * 4 + (True,) * 2, "b.jsonl:1") for _ in "ab"]
    pair = PairRow(*sides, num_prompt_tokens=4, source="b.jsonl:1")
    assert fit_rows([pair], max_length=5, max_lost_frac=0.0, what="dpo", ledger=ledger)[1] == 0
    assert json.loads(ledger.read_text().splitlines()[-1])["reason"] == "prompt cut"
    assert "1 of 1 pairs were cut to 5 tokens: b.jsonl:1 (6 tokens)" in caplog.text
