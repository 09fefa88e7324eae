"""The over-optimization section: training score and gold score against the KL distance."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.core.log import EVALUATIONS_FILE
from align.report.charts import Series, line_chart, plot
from align.report.markup import Markup, number, table, tag
from align.report.read import Row, RunRecord, StageRecord, read_lines

NUM_CURVE = 60
NAMES = {"proxy": "training score", "gold": "gold score"}


def watching(run: RunRecord) -> Markup | None:
    """Return the section with the held-out evaluations during each online stage's training."""
    blocks = [block for stage in run.stages if (block := _stage(run.directory, stage))]
    if not blocks:
        return None
    intro = (
        "Scores on the same held-out prompts during training. The policy is optimized for the "
        "training score; the gold score is never trained on. d is the square root of the KL to "
        "the reference in nats per response; the fit is d (alpha - beta log d), arXiv:2210.10760. "
        "A gold score that falls while the training score rises indicates over-optimization."
    )
    return tag("section", tag("h2", "Over-optimization"), tag("p", intro), *blocks)


def _stage(folder: Path, stage: StageRecord) -> Markup | None:
    rows = read_lines(folder / stage.name / EVALUATIONS_FILE, [])
    rows = [row for row in rows if "intervals" in row]
    if len(rows) < 2:
        return None
    charts = [_chart(rows, name) for name in NAMES]
    lengths = [(float(r["step"]), r["intervals"]["length"][0]) for r in rows]
    charts.append(line_chart("length/mean", [("length", lengths)]))
    return tag(
        "div",
        tag("h3", stage.name, tag("small", _outcome(stage, rows))),
        tag("div", *charts, class_="charts"),
        _alarms(rows),
    )


def _chart(rows: list[Row], name: str) -> Markup:
    known = [row for row in rows if row["intervals"][name][0] is not None]
    # The KL is noisy and may fall between evaluations; a curve over d needs sorted points.
    known.sort(key=_distance)
    triples = [row["intervals"][name] for row in known]
    measured = Series(
        "measured",
        [(_distance(row), value) for row, (value, _, _) in zip(known, triples, strict=True)],
        bounds=[(low, high) for _, low, high in triples],
        style="points",
    )
    fit = rows[-1].get("fit", {}).get(name)
    start = rows[0]["intervals"][name][0]
    series = [measured]
    if fit and start is not None:
        curve = _curve(fit, start, _distance(known[-1]))
        series.append(Series("fit", curve, style="dashed", colour=2))
    return plot(NAMES[name], series, x_label="d = sqrt(KL)", y_label="score")


def _distance(row: Mapping[str, Any]) -> float:
    # An estimate of a KL near zero can be negative.
    return math.sqrt(max(0.0, row["kl"]))


def _curve(fit: Mapping[str, Any], start: float, far: float) -> list[tuple[float, float]]:
    alpha, beta = fit["alpha"][0], fit["beta"][0]
    places = [far * i / NUM_CURVE for i in range(1, NUM_CURVE + 1)]
    return [(0.0, start)] + [(d, start + d * (alpha - beta * math.log(d))) for d in places if d]


def _outcome(stage: StageRecord, rows: list[Row]) -> str:
    outcome = stage.manifest.get("watch", {})
    best = outcome.get("best_step", rows[-1].get("best_step"))
    parts = [f"best gold score at step {best}"]
    if outcome.get("stopped_by"):
        last, reason = outcome.get("last_step"), outcome.get("reason")
        parts.append(f"stopped by the guard at step {last}: {reason}")
    if "restored_step" in outcome:
        parts.append(f"weights of step {outcome['restored_step']} kept")
    return "; ".join(parts)


def _alarms(rows: list[Row]) -> Markup | None:
    found = [
        [f"step {row['step']}", alarm["name"], alarm["reason"], alarm["remedy"]]
        for row in rows
        for alarm in row.get("alarms", [])
    ]
    if not found:
        return tag("p", "No alarms.", class_="quiet")
    heads: list[object] = ["", "alarm", "observed", "what to do"]
    label = f"{number(len(found))} alarms"
    return tag("details", tag("summary", label), table(heads, found), open="open")
