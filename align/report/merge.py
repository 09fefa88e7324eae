"""Sections on forgetting: score curves of merge stages, and results of earlier evaluations."""

from collections.abc import Mapping, Sequence
from typing import Any

from align.recipe.schema.evaluate import OWN_TASK
from align.report.charts import line_chart
from align.report.markup import Markup, number, table, tag, triple
from align.report.read import RunRecord, StageRecord

SETS = {"prompts": "familiar prompts", "shifted": "shifted prompts"}


def merges(run: RunRecord) -> Markup | None:
    """Return the section with each merge stage's score by alpha on both sets of prompts."""
    stages = [s for s in run.stages if s.kind == "merge" and s.manifest.get("curve")]
    if not stages:
        return None
    intro = (
        "Alpha 0 is the model before fine-tuning, alpha 1 the model after it. The chosen alpha has "
        "the best score on shifted prompts among those that lose at most the tolerance on "
        "familiar prompts. It was selected on these prompts, so evaluate it on others."
    )
    return tag("section", tag("h2", "Interpolated weights"), tag("p", intro), *map(_merge, stages))


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
        heads += [label, f"{label}, difference to alpha 1"]
    return tag(
        "div",
        tag("h3", stage.name, tag("small", f"alpha {number(chosen)}")),
        tag("div", line_chart("score", series, x_label="alpha"), class_="charts"),
        table(heads, rows, class_="numbers"),
    )


def earlier(run: RunRecord) -> Markup | None:
    """Return the section with paired differences of all evaluate stages before the last one."""
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
        [f"{model} - {own['baseline']}: {metric}", triple(contrast["difference"])]
        for model, row in own.get("contrasts", {}).items()
        for metric, contrast in row.items()
        # Win rates are compared with 1/2, so they are not differences between two models.
        if contrast["null"] == 0.0
    ]
