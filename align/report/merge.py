"""Sections on what was kept: the curve of a merge stage, and the scores of earlier evaluations."""

from collections.abc import Mapping, Sequence
from typing import Any

from align.recipe.schema.evaluate import OWN_TASK
from align.report.charts import line_chart
from align.report.markup import Markup, number, table, tag, triple
from align.report.read import RunRecord, StageRecord

SETS = {"prompts": "familiar prompts", "shifted": "shifted prompts"}


def merges(run: RunRecord) -> Markup | None:
    """Show the curve of every merge stage: the score of each alpha on both sets of prompts."""
    stages = [s for s in run.stages if s.kind == "merge" and s.manifest.get("curve")]
    if not stages:
        return None
    said = (
        "Alpha 0 is the model before the fine-tuning, 1 the one after it. Chosen is the best score "
        "on shifted prompts among those that lose at most the tolerance on familiar ones; the "
        "choice was made on these very prompts, so judge it by an evaluation on others."
    )
    return tag("section", tag("h2", "Interpolated weights"), tag("p", said), *map(_merge, stages))


def _merge(stage: StageRecord) -> Markup:
    curve: Sequence[Mapping[str, Any]] = stage.manifest["curve"]
    chosen = stage.manifest["alpha"]
    series = [(label, [(p["alpha"], p[name][0]) for p in curve]) for name, label in SETS.items()]
    rows: list[list[object]] = [
        [
            tag("b", f"{number(point['alpha'])} chosen")
            if point["alpha"] == chosen
            else number(point["alpha"]),
            *(triple(point[f"{name}{end}"]) for name in SETS for end in ("", "_gain")),
        ]
        for point in curve
    ]
    heads: list[object] = ["alpha"]
    for label in SETS.values():
        heads += [label, f"{label}, against alpha 1"]
    return tag(
        "div",
        tag("h3", stage.name, tag("small", f"alpha {number(chosen)}")),
        tag("div", line_chart("score", series, x_label="alpha"), class_="charts"),
        table(heads, rows, class_="numbers"),
    )


def earlier(run: RunRecord) -> Markup | None:
    """Show the paired differences of the evaluations before the last: what an old task has lost."""
    found: Mapping[str, Any] = run.summary.get("earlier", {})
    parts = [
        tag(
            "div",
            tag("h3", name),
            table(
                ["difference", "value"],
                rows,
                class_="numbers",
            ),
        )
        for name, block in found.items()
        if (rows := _differences(block))
    ]
    return tag("section", tag("h2", "Earlier evaluations"), *parts) if parts else None


def _differences(evaluation: Mapping[str, Any]) -> list[list[object]]:
    own = evaluation.get("tasks", {}).get(OWN_TASK, {})
    return [
        [f"{model} - {own['baseline']}: {metric}", triple(told["difference"])]
        for model, row in own.get("contrasts", {}).items()
        for metric, told in row.items()
        if told["null"] == 0.0
    ]
