"""The run that was never disturbed, and the comparison of another one with it."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.faults.campaign import forked, recipe
from tests.faults.campaign.hooks import count_writes
from tests.faults.campaign.ledger import Failed

SECONDS = "seconds.json"
WRITES = "writes.json"
NOT_COMPARED = ("manifest.json", "begun.json", "preflight.json", "metrics.jsonl", "recipe.yaml")
NOT_KEPT = ("log.txt", "failure.txt")
"""Files with times or defaults in them; the numbers of metrics.jsonl are compared apart."""


def make(folder: Path, stages: Sequence[str], *, jobs: int) -> None:
    """Run stages once without a fault; note their durations and numbers of file operations."""
    recipe.write_workplace(folder)
    (folder / recipe.RUN).mkdir()
    seconds, writes = {}, {}
    # What others read first; the rest side by side, as the faults will run.
    first = [[stage] for stage in ("base", "sft")]
    rest = [stage for stage in stages if [stage] not in first]
    for batch in [*first, *(rest[i : i + jobs] for i in range(0, len(rest), jobs))]:
        runs = {stage: _start(folder, stage) for stage in batch}
        for stage, run in runs.items():
            codes = run.wait()
            if any(codes):
                raise SystemExit(
                    f"{stage} without a fault ended with {codes}: {run.said()[-3000:]}"
                )
            seconds[stage] = run.seconds()
            writes[stage] = len((folder / f"{stage}.writes").read_text().splitlines())
            run.log.unlink()
    (folder / SECONDS).write_text(json.dumps(seconds))
    (folder / WRITES).write_text(json.dumps(writes))


def _start(folder: Path, stage: str) -> forked.Run:
    return forked.start_stage(
        folder,
        stage,
        recipe.kind_of(stage),
        ranks=recipe.RANKS.get(stage, 1),
        hook=lambda: count_writes(folder / f"{stage}.writes"),
        log=f"{stage}.txt",
    )


def num_writes(clean: Path, stage: str) -> int:
    """Return how many file operations the clean run of a stage did in its folder."""
    return json.loads((clean / WRITES).read_text())[stage]


def same(clean: Path, folder: Path, stage: str, *, metrics: bool = True) -> None:
    """Check that a stage left what the clean run left: the same files, bytes and numbers."""
    found, expected = (_hashes(place / recipe.RUN / stage) for place in (folder, clean))
    if found.keys() != expected.keys():
        raise Failed(f"other files: {sorted(found.keys() ^ expected.keys())}")
    other = [name for name in found if found[name] != expected[name]]
    if other:
        raise Failed(f"other bytes in {', '.join(other)}")
    if metrics and numbers(folder, stage) != numbers(clean, stage):
        raise Failed("other numbers in metrics.jsonl")
    left = [p.name for p in (folder / recipe.RUN / stage).rglob("*.tmp")]
    if left or (folder / recipe.RUN / stage / "stage.lock").exists():
        raise Failed(f"left behind: {left or 'stage.lock'}")


def _hashes(stage: Path) -> dict[str, str]:
    if not (stage / "manifest.json").is_file():
        raise Failed(f"{stage.name} is not finished")
    found = {}
    for path in sorted(stage.rglob("*")):
        name = path.relative_to(stage).as_posix()
        if path.is_file() and not name.startswith("checkpoints/") and name not in NOT_KEPT:
            apart = name in NOT_COMPARED
            found[name] = "" if apart else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def numbers(folder: Path, stage: str) -> list[dict[str, Any]]:
    """Return the metrics of a stage without its times."""
    path = folder / recipe.RUN / stage / "metrics.jsonl"
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def is_time(name: str) -> bool:
        return name.startswith("time") or name.endswith(("per_s", "_s"))

    return [{k: v for k, v in row.items() if not is_time(k)} for row in rows]
