"""A stage parses a data file once, however many of its data sources name the file."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from stage_runs import BASE, LIMIT_S, environment

from benchmarks.structure import purpose, read_traces, write_tracer

RECIPE = f"""\
name: reads
stages:
{BASE}"""
RECIPE += """\
  sft:
    kind: sft
    init: base
    data: [{path: rows.jsonl, split: train, heldout_frac: 0.3}]
    heldout: [{path: rows.jsonl, split: heldout, heldout_frac: 0.3}]
    steps: 1
    batch_size: 4
    max_contaminated_frac: 1.0
  evaluate:
    kind: evaluate
    models: [base, sft]
    baseline: base
    prompts: [{path: rows.jsonl, split: heldout, heldout_frac: 0.3}]
    scores: [{kind: regex, pattern: a}]
    judge: [{kind: regex, pattern: a}]
"""
STAGES = ("--stages", "base", "sft")


def test_training_held_out_and_evaluated_rows_of_one_file_are_parsed_once(tmp_path: Path):
    (tmp_path / "reads.yaml").write_text(RECIPE, encoding="utf-8")
    rows = [{"prompt": f"Say {i} again.", "completion": f"{i}"} for i in range(20)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    worker = str(Path(__file__).parent / "workers" / "stages.py")
    path = write_tracer(tmp_path / "trace", watched=["rows.jsonl"])
    done = subprocess.run(
        [sys.executable, worker, "--recipe", "reads.yaml", "--run-dir", "run", *STAGES],
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (process,) = (p for p in read_traces(tmp_path / "trace") if worker in p["argv"])
    opened = Counter(purpose(within) for _, within in process["opened"])
    # The type is found by the first bytes, and then by the first lines.
    assert opened == {"hash": 1, "type": 2, "parse": 1}
    # Nothing was lost: by the definition of the split, the two sides are the whole file.
    manifest = json.loads((tmp_path / "run" / "sft" / "manifest.json").read_text())
    assert [entry["rows"] for entry in manifest["data"]] == [20, 20]
