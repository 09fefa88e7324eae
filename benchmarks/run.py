"""Measure the table: ``python -m benchmarks.run [ROW ...] [--force]``; a row done is kept."""

import argparse
import datetime
import json
import logging
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from align.core.artifacts import write_manifest
from benchmarks.harness import Side, alternate, ratio, same_numbers, spread, summary
from benchmarks.roof import training_flops
from benchmarks.rows import ROWS, Row
from benchmarks.workloads import (
    SHAPES,
    lengths,
    pair_rows,
    prompt_rows,
    sft_rows,
    write_model,
    write_rows,
)

log = logging.getLogger("benchmarks")
RESULTS = Path(__file__).parent / "results"
TRL_112_PYTHON = "TRL_112_PYTHON"
"""Environment variable: the interpreter that has TRL 1.12."""


def main() -> None:
    """Parse the command line, measure what is missing, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}; default: all")
    parser.add_argument("--force", action="store_true", help="measure again what is there")
    parser.add_argument("--rounds", type=int, help="timed rounds of each side")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each side")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument(
        "--setting", type=int, help="number of the other side's setting (from 0); tries none"
    )
    parser.add_argument("--shape", default=None, choices=list(SHAPES))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    device, shape_name = device_name()
    shape_name = args.shape or shape_name
    for name in args.rows or ROWS:
        folder = RESULTS / device["folder"]
        target = folder / f"{name}.{shape_name}.{args.dtype}.{args.threads}t.json"
        if target.exists() and not args.force:
            log.info("%s: kept (--force measures again)", target.name)
            continue
        row = ROWS[name] if args.rounds is None else replace(ROWS[name], rounds=args.rounds)
        if args.setting is not None:
            row = replace(row, candidates=[row.candidates[args.setting]])
        with tempfile.TemporaryDirectory() as scratch:
            found = measure(
                row, Path(scratch), shape=shape_name, dtype=args.dtype, threads=args.threads
            )
        found = {"row": name, "device": device, "date": today(), **found}
        folder.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        log.info("%s: ratio %s", name, found["ratio"])


def today() -> str:
    """Return the date, for the results."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def device_name() -> tuple[dict[str, Any], str]:
    """Describe the device and give the shape of the model that fits it."""
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return {"folder": name.lower().replace(" ", "-"), "name": name}, "1.5B"
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {"folder": "cpu", "name": cpu, "cores": os.cpu_count()}, "10.5M"


def prepare(row: Row, folder: Path, *, shape: str, dtype: str) -> list[int]:
    """Write model, scorer and rows; give the lengths of the rows in tokens."""
    size = SHAPES[shape]
    write_model(folder / "base" / "model", size, dtype="float32", stop_frac=row.stop_frac)
    write_manifest(folder / "base", {"kind": "policy", "spec_hash": ""})
    if row.kind in ("reward", "ppo"):
        _write_scorer(folder)
    totals = lengths(row.lengths, row.rows, longest=row.longest, median=row.median)
    if row.kind == "sft":
        rows = sft_rows(totals, size.vocab_size, prompt_frac=row.prompt_frac)
    elif row.kind in ("reward", "dpo"):
        rows = pair_rows(totals, size.vocab_size, prompt_frac=row.prompt_frac)
    else:
        rows = prompt_rows(totals, size.vocab_size)
    write_rows(folder / "rows.jsonl", rows)
    return totals


def _write_scorer(folder: Path) -> None:
    import torch

    from align.models.heads import scorer_from
    from align.models.loading import load_tokenizer

    base = folder / "base" / "model"
    torch.manual_seed(1)
    scorer = scorer_from(base, dtype="float32")
    torch.save(scorer.head.weight.detach(), folder / "head.pt")
    scorer.save(folder / "scorer" / "model", tokenizer=load_tokenizer(base))


def measure(row: Row, scratch: Path, *, shape: str, dtype: str, threads: int) -> dict[str, Any]:
    """Choose the other side's settings, then compare."""
    totals = prepare(row, scratch, shape=shape, dtype=dtype)
    work = {
        "folder": str(scratch),
        "out": str(scratch / "out"),
        "dtype": dtype,
        "threads": threads,
        "rows": row.rows,
        "max_length": row.longest + row.work.get("new_tokens", 0),
        "learning_rate": 1e-4,
        "reward_pattern": r"<w[1-5]\d>",
        "cache_gib": 0.5,
        **row.work,
    }
    tried, best = [], row.candidates[0]
    if len(row.candidates) > 1:
        tried = [try_settings(row, work, settings) for settings in row.candidates]
        best = max(tried, key=lambda t: t["rate"])["settings"]
    log.info("%s: settings of the other side: %s", row.title, best)
    ours = Side("align", f"benchmarks.align_sides:{row.kind}", {**work, "settings": row.settings})
    theirs = _other(row, work, best)
    roof = Side("roof", "benchmarks.roof:matmul", work)
    sides = [ours, theirs, roof]
    try:
        for side in sides:
            side.wait_ready()
        alternate(sides, warmup=row.warmup, rounds=row.rounds)
    finally:
        for side in sides:
            side.close()
    found = compare(row, ours, theirs)
    gflops = spread([r["gflops"] for r in roof.rounds])
    if row.kind == "sft":
        rate = training_flops(SHAPES[shape], totals, _trained(scratch)) / 1e9
        for side in ("ours", "theirs"):
            share = rate / found[side]["seconds"]["median"] / gflops["median"]
            found[side]["roof_share"] = share
    return {
        "spec": asdict(row),
        "shape": shape,
        "dtype": dtype,
        "threads": threads,
        "tried": tried,
        "settings": dict(best),
        "roof_gflops": gflops,
        **found,
    }


def _trained(scratch: Path) -> int:
    from benchmarks.workloads import read_rows

    rows = read_rows(scratch / "rows.jsonl")
    return sum(row["completion"].count("<") + 1 for row in rows)


def _other(row: Row, work: Mapping[str, Any], settings: Mapping[str, Any]) -> Side:
    python = os.environ.get(TRL_112_PYTHON) if row.kind == "ppo" else None
    extra = {} if python is None else {"python": python}
    return Side("theirs", row.theirs, {**work, "settings": dict(settings)}, **extra)


def try_settings(row: Row, work: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Time one setting of the other side: one round to warm up, the best of two counts."""
    side = _other(row, work, settings)
    try:
        side.wait_ready()
        alternate([side], warmup=1, rounds=2)
    finally:
        side.close()
    found = summary(side, warmup=1, units=units(row))
    return {"settings": dict(settings), "rate": found["rate"]["max"], "peak_mib": found["peak_mib"]}


def units(row: Row) -> float | str:
    """Return how much work a round is: a number, or the name of the fact that holds it."""
    if row.kind == "sft":
        return float(sum(lengths(row.lengths, row.rows, longest=row.longest, median=row.median)))
    if row.kind in ("reward", "dpo"):
        return float(row.rows)
    return "tokens" if row.kind == "rollout" else 1.0


def compare(row: Row, ours: Side, theirs: Side) -> dict[str, Any]:
    """Sum both sides up and check that they computed the same."""
    mine = summary(ours, warmup=row.warmup, units=units(row))
    other = summary(theirs, warmup=row.warmup, units=units(row))
    found = {
        "unit": row.unit,
        "ours": mine,
        "theirs": other,
        "ratio": ratio(mine, other),
        "cpu_ratio": other["cpu_s"]["median"] / mine["cpu_s"]["median"],
        "memory_ratio": mine["peak_mib"] / other["peak_mib"],
    }
    if row.check:
        found["same"] = same_numbers(ours, theirs, row.check)
    return found


if __name__ == "__main__":
    main()
