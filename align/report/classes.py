"""The classifier section: scores with intervals, confusion matrix, most confident mistakes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from align.report.markup import Markup, even, join, table, tag, triple
from align.report.read import Row, RunRecord, StageRecord, read_lines

PREDICTIONS_FILE = "predictions.jsonl"
NUM_MISTAKES = 8


def classifiers(run: RunRecord) -> Markup | None:
    """Return the section on each classify stage's held-out results, or None without any."""
    stages = [s for s in run.stages if s.kind == "classify" and s.manifest.get("heldout")]
    if not stages:
        return None
    rows: list[list[object]] = [
        [
            stage.name,
            triple(stage.manifest["heldout"]["accuracy"]),
            triple(stage.manifest["heldout"]["macro_f1"]),
            f"{stage.manifest['metrics']['tuning/trained_params']:,.0f}",
        ]
        for stage in stages
    ]
    return tag(
        "section",
        tag("h2", "Classifiers"),
        tag("p", "On held-out rows, with 95 % confidence intervals."),
        table(["stage", "accuracy", "macro-F1", "trained parameters"], rows, class_="numbers"),
        *(_stage(run, stage) for stage in stages),
    )


def _stage(run: RunRecord, stage: StageRecord) -> Markup:
    scores: Mapping[str, Any] = stage.manifest["heldout"]
    predictions = read_lines(run.directory / stage.name / PREDICTIONS_FILE, [])
    return join(
        tag("h3", stage.name),
        _confusion(scores["confusion"], scores["classes"]),
        tag(
            "details",
            tag("summary", "Most confident mistakes"),
            _mistakes(predictions),
        ),
    )


def _confusion(counts: Sequence[Sequence[int]], classes: Mapping[str, Row]) -> Markup:
    """Return the confusion matrix with recall and precision, shaded by fraction of the row."""
    rows: list[list[object]] = []
    for (name, found), line in zip(classes.items(), counts, strict=True):
        cells = [_shaded(n, n / max(sum(line), 1)) for n in line]
        rows.append([name, even(found["f1"]), even(found["recall"]), *cells])
    rows.append(["precision", "", "", *(even(found["precision"]) for found in classes.values())])
    head = ["true class", "F1", "recall", *(f"predicted {name}" for name in classes)]
    return table(head, rows, class_="numbers confusion")


def _shaded(count: int, fraction: float) -> Markup:
    # Ten shades of at most 70 %, so that the number stays readable on the darkest cell.
    return tag("span", count, class_=f"shade mix{math.ceil(10 * fraction)}" if count else "shade")


def _mistakes(predictions: Sequence[Row]) -> Markup:
    wrong = [p for p in predictions if p["label"] != p["predicted"]]
    wrong.sort(key=lambda p: -p["probs"][p["predicted"]])
    if not wrong:
        return tag("p", "None: every held-out row is classified correctly.")
    rows: list[list[object]] = [
        [p["source"], p["label"], p["predicted"], even(p["probs"][p["predicted"]])]
        for p in wrong[:NUM_MISTAKES]
    ]
    head = ["row", "true class", "predicted class", "probability"]
    return join(
        tag("p", f"{len(wrong)} of {len(predictions)} rows are misclassified."),
        table(head, rows, class_="numbers"),
    )
