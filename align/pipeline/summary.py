"""Combine a run's evaluation with the cost of each stage."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.core.artifacts import MANIFEST, read_json_object, read_manifest, write_json_atomic
from align.core.expectations import expectation
from align.core.log import ALARMS_FILE
from align.core.text import hidden
from align.recipe.schema import Recipe
from align.report.read import read_lines

TIMINGS = "timings.json"


def add_seconds(run_dir: Path, name: str, seconds: float) -> None:
    """Add the time of a stage's process; the manifest excludes imports and earlier attempts."""
    timings = _timings(run_dir)
    timings[name] = round(timings.get(name, 0.0) + seconds, 2)
    _write(run_dir, timings)


def forget_seconds(run_dir: Path, name: str) -> None:
    """Reset the time of a stage that starts over."""
    timings = _timings(run_dir)
    if timings.pop(name, None) is not None:
        _write(run_dir, timings)


def measured_seconds(run_dir: Path, recipe: Recipe) -> dict[str, float]:
    """Return how long each stage took that finished in this folder with the same settings."""
    timings, found = _timings(run_dir), {}
    for name, spec in recipe.stages.items():
        before = read_json_object(run_dir / name / MANIFEST) or {}
        if name in timings and before.get("spec") == hidden(spec.model_dump(mode="json")):
            found[name] = timings[name]
    return found


def _write(run_dir: Path, timings: dict[str, float]) -> None:
    try:
        write_json_atomic(run_dir / TIMINGS, timings)
    except OSError:  # losing a timing must not fail the run
        return


def _timings(run_dir: Path) -> dict[str, float]:
    """Return the seconds of each stage; a damaged file counts as empty."""
    found = read_json_object(run_dir / TIMINGS) or {}
    return {k: float(v) for k, v in found.items() if isinstance(v, int | float) and 0 <= v < 1e12}


def summarize(run_dir: Path, *, done: Sequence[str]) -> dict[str, Any]:
    """Combine the last evaluation's results with the cost of each finished stage, in order.

    Reward models come from all evaluations, expectations also from training stages. A reward model
    that several evaluations measured appears once for each, the earlier ones as
    ``<evaluation>/<reward model>``. ``earlier`` contains the tasks of the evaluations before the
    last, such as the scores on an old task before and after a new one was learned. A stage that
    raised alarms has them under ``alarms``.
    """
    summary: dict[str, Any] = {}
    latest = ""
    stages = {}
    timings = _timings(run_dir)
    for name in done:
        manifest = read_manifest(run_dir / name)
        metrics = manifest.get("metrics", {})
        stages[name] = {
            "seconds": timings.get(name, manifest.get("seconds")),
            "peak_rss_gib": manifest.get("peak_rss_gib"),
            "tokens_per_s": metrics.get("tokens/per_s"),
        }
        if alarms := read_lines(run_dir / name / ALARMS_FILE, []):
            stages[name]["alarms"] = alarms
        own = read_json_object(run_dir / name / "summary.json")
        if own is not None:
            summary = _joined(summary, latest, own)
            latest = name
        elif found := _expectations(name, manifest):
            summary["expectations"] = [*summary.get("expectations", []), *found]
    total = round(sum(entry["seconds"] or 0.0 for entry in stages.values()), 2)
    return summary | {"stages": stages, "seconds": total}


def _expectations(name: str, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return whether the last metrics of a stage are in the ranges that the recipe expects."""
    metrics = manifest.get("metrics", {})
    measured = f"the stage measured {', '.join(sorted(metrics)) or 'nothing'}"
    expect = manifest.get("spec", {}).get("expect") or {}
    return [
        expectation(f"{name}: {key}", band, metrics.get(key), "" if key in metrics else measured)
        for key, band in expect.items()
    ]


def _joined(earlier: dict[str, Any], name: str, later: dict[str, Any]) -> dict[str, Any]:
    """Merge an evaluation's results with those of earlier evaluations."""
    measured = later.get("reward_models", {})
    kept = {
        f"{name}/{model}" if model in measured else model: row
        for model, row in earlier.get("reward_models", {}).items()
    }
    expectations = [*earlier.get("expectations", []), *later.get("expectations", [])]
    joined = later | {"reward_models": kept | measured, "expectations": expectations}
    if "tasks" in earlier:
        joined["earlier"] = earlier.get("earlier", {}) | {name: {"tasks": earlier["tasks"]}}
    return joined
