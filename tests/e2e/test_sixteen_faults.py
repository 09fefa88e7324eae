"""The 16 data faults, given to stages as they are started: each stops with its row named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
import stage_runs
import tuned_stages

from align.core.artifacts import write_manifest
from tests.fault_corpus import write_rows
from tests.sixteen_faults import NO_STOP, SIXTEEN, Fault

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).parent / "workers" / "stage_ends.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two policies: one with the plain template, one whose template writes no stop."""
    folder = tuned_stages.make_base(tmp_path_factory.mktemp("sixteen"))
    model = folder / "no_stop" / "model"
    shutil.copytree(folder / "base" / "model", model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = NO_STOP
    tokenizer.save_pretrained(model)
    write_manifest(folder / "no_stop", {"kind": "policy", "spec_hash": "x", "spec": {}})
    return folder


def start_of(name: str, fault: Fault, folder: Path) -> tuple[str, str, str]:
    """Write the rows and the recipe of a fault; give what its stage is started with."""
    home = folder / name.replace(" ", "_")
    home.mkdir()
    write_rows(fault.rows, home / "rows.jsonl", "jsonl")
    init = folder / ("base" if fault.template is None else "no_stop")
    stage = {
        "kind": fault.stage,
        "init": str(init),
        "data": [{"path": str(home / "rows.jsonl")}],
        "steps": 1,
        "batch_size": 4,
        "max_length": fault.max_length,
    }
    recipe = home / "recipe.yaml"
    recipe.write_text(json.dumps({"name": "sixteen", "stages": {"train": stage}}))
    return fault.stage, str(recipe), str(home)


@pytest.mark.slow
def test_each_of_the_sixteen_faults_stops_its_stage_with_the_row_named(folder: Path) -> None:
    assert len(SIXTEEN) == 16
    started = [start_of(name, fault, folder) for name, fault in SIXTEEN.items()]
    done = subprocess.run(
        [sys.executable, str(WORKER)],
        input=json.dumps(started),
        capture_output=True,
        text=True,
        env=stage_runs.environment(),
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ends = dict(zip(SIXTEEN, json.loads(done.stdout.splitlines()[-1]), strict=True))
    assert {name: code for name, (code, _) in ends.items()} == dict.fromkeys(SIXTEEN, 2), ends
    for name, (_, said) in ends.items():
        home = folder / name.replace(" ", "_")
        assert f"{home / 'rows.jsonl'}:{SIXTEEN[name].line}" in said, (name, said)
        assert not (home / "train" / "manifest.json").exists()
        assert not (home / "train" / "metrics.jsonl").exists()
    # The remedy of the template, and every row that was too long.
    assert "tokenizer.append_stop: true" in ends["template without a stop"][1]
    ledger = folder / "7_of_8_rows_lost" / "train" / "ledger.jsonl"
    assert str(ledger) in ends["7 of 8 rows lost"][1]
    lost = [json.loads(line) for line in ledger.read_text().splitlines()]
    rows = folder / "7_of_8_rows_lost" / "rows.jsonl"
    assert [entry["source"] for entry in lost] == [f"{rows}:{i}" for i in range(2, 9)]
    assert {entry["reason"] for entry in lost} == {"too long"}
    assert all(entry["tokens"] > entry["max_length"] == 50 for entry in lost)


@pytest.mark.slow
def test_align_run_ends_with_2_and_the_row(folder: Path, tmp_path: Path) -> None:
    write_rows(SIXTEEN["role bot"].rows, tmp_path / "rows.jsonl", "jsonl")
    recipe = tmp_path / "stops.yaml"
    recipe.write_text(
        json.dumps(
            {
                "name": "stops",
                "stages": {
                    "base": {"kind": "base", "path": str(folder / "base" / "model")},
                    "sft": {
                        "kind": "sft",
                        "init": "base",
                        "steps": 1,
                        "data": [{"path": str(tmp_path / "rows.jsonl")}],
                    },
                },
            }
        )
    )
    done = subprocess.run(
        [sys.executable, "-m", "align.cli", "run", str(recipe), "--runs", str(tmp_path / "runs")],
        cwd=ROOT,
        env=stage_runs.environment() | {"PYTHONPATH": str(ROOT)},
        timeout=1200,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stdout
    said = "".join(done.stdout.split())
    assert f"{tmp_path / 'rows.jsonl'}:5:messages[1]:role'bot'" in said
