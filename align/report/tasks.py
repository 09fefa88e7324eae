"""The comparison section: values, intervals, verdicts and pairwise win rates of each task."""

from collections.abc import Mapping, Sequence
from typing import Any

from align.core.types import NO_DIFFERENCE
from align.recipe.schema.evaluate import OWN_TASK
from align.report.markup import Markup, even, join, number, table, tag, triple
from align.report.read import RunRecord
from align.report.tables import ordered_models

Block = Mapping[str, Any]
UNITS = {"kl": "nats per response", "length": "tokens"}
CLASSES = {"better": "ok", "worse": "bad"}


def tasks(run: RunRecord) -> Markup | None:
    """Return the section with every evaluation task, the run's own prompts first."""
    blocks: Mapping[str, Block] = run.summary.get("tasks", {})
    if not blocks:
        return None
    return tag(
        "section",
        tag("h2", "Comparison on held-out prompts"),
        tag(
            "p",
            "Each value is shown with its 95 % confidence interval. The verdict is ",
            tag("span", "better", class_="ok"),
            " or ",
            tag("span", "worse", class_="bad"),
            " if the interval of the paired difference to the baseline excludes 0 (1/2 for a win "
            "rate), otherwise there is no significant difference. Of twenty comparisons without a "
            "real difference, one is expected to be significant by chance.",
        ),
        *(_task(name, block, list(run.recipe.stages)) for name, block in blocks.items()),
    )


def _task(name: str, block: Block, order: Sequence[str]) -> Markup:
    models = ordered_models(block, order)
    many = f", {block['samples']} responses each" if block["samples"] > 1 else ""
    facts = f"{block['prompts']} prompts{many}; baseline {block['baseline']}"
    title = "the run's own prompts" if name == OWN_TASK else name
    rows: list[list[object]] = [
        [_title(metric), *(_cell(block, model, metric) for model in models)]
        for metric in block["metrics"]
    ]
    rows += [
        [tag("small", group), *(triple(row.get(model)) for model in models)]
        for group, row in block.get("groups", {}).items()
    ]
    return join(
        tag("h3", title, tag("small", facts)),
        tag("p", block["description"], class_="quiet") if block.get("description") else None,
        table(["", *models], rows, class_="numbers"),
        _judge(block.get("judge")),
        _differences(block),
        _needed(block),
        _matrix(block.get("win_matrix", {})),
    )


def _title(metric: str) -> str:
    unit = UNITS.get(metric)
    return metric.replace("_", " ") + (f" ({unit})" if unit else "")


def _cell(block: Block, model: str, metric: str) -> Markup | str:
    verdict = block["contrasts"].get(model, {}).get(metric, {}).get("verdict")
    shown = tag("small", verdict, class_=CLASSES.get(verdict)) if verdict else None
    invalid = block.get("invalid", {}).get(model, {}).get(metric)
    left_out = tag("small", f"{invalid} responses excluded") if invalid else None
    return triple(block["models"][model].get(metric), shown, left_out)


def _differences(block: Block) -> Markup | None:
    """Return the paired difference of every metric and the judge's win, tie and loss counts."""
    rows: list[list[object]] = [
        [f"{model}: {_title(metric)}", triple(contrast["difference"])]
        for model, row in block["contrasts"].items()
        for metric, contrast in row.items()
        if contrast["difference"][0] is not None
    ]
    if not rows:
        return None
    counts = [
        tag(
            "li",
            f"{model}: {c['wins']} wins, {c['ties']} ties, {c['losses']} losses",
            f", {c['invalid']} pairs excluded as invalid" if c.get("invalid") else None,
        )
        for model, c in block.get("comparisons", {}).items()
    ]
    return tag(
        "details",
        tag("summary", f"Paired differences to {block['baseline']} and judged pairs"),
        table(["model: metric", "difference"], rows, class_="numbers"),
        tag("ul", *counts) if counts else None,
    )


def _needed(block: Block) -> Markup | None:
    """Return the statistical power of the comparison by the task's first metric."""
    metric = block["metrics"][0]
    found = {
        model: row[metric]
        for model, row in block["contrasts"].items()
        if "detectable" in row[metric]
    }
    rows: list[list[object]] = [
        [
            model,
            triple(contrast["difference"]),
            number(contrast["detectable"]),
            number(contrast.get("needed")) if contrast.get("verdict") == NO_DIFFERENCE else "-",
        ]
        for model, contrast in found.items()
    ]
    if not rows:
        return None
    heads = [
        f"{_title(metric)} against {block['baseline']}",
        "difference",
        "minimum detectable effect (80 % power)",
        "prompts to detect the measured difference (80 % power)",
    ]
    return tag("details", tag("summary", "Prompts needed"), table(heads, rows, class_="numbers"))


def _matrix(matrix: Mapping[str, Block]) -> Markup | None:
    if len(matrix) < 2:
        return None
    rows: list[list[object]] = [
        [model, *(_won(row.get(other)) for other in matrix)] for model, row in matrix.items()
    ]
    return join(
        tag("p", "Win rate of the row model over the column model; a tie counts half:"),
        table(["", *matrix], rows, class_="numbers matrix"),
    )


def _won(triple: Sequence[float | None] | None) -> Markup | str:
    if not triple or triple[0] is None:
        return ""
    spread = (
        tag("small", f"[{even(triple[1])}, {even(triple[2])}]") if triple[1] is not None else None
    )
    return tag("div", even(triple[0]), spread, class_=f"triple mix{round(7 * triple[0])}")


def _judge(judge: Block | None) -> Markup | None:
    if judge is None:
        return None
    invalid = ", ".join(f"{n} {reason}" for reason, n in judge["invalid"].items()) or "none"
    rows: list[list[object]] = [
        ["judge", judge["model"]],
        ["pairs judged", f"{judge['pairs_judged']} of {judge['pairs']}, in both orders"],
        ["invalid verdicts", invalid],
        ["prefers the first response", triple(judge["first_share"])],
        ["same verdict in both orders", triple(judge["consistent"])],
        ["time", f"{judge['seconds']:.1f} s"],
    ]
    if "requests" in judge:  # a model behind an endpoint
        tokens = judge["prompt_tokens"] + judge["answer_tokens"]
        rows.append(["requests", f"{judge['requests']}, {judge['cached']} more from the cache"])
        rows.append(["cost", f"{tokens:,} tokens, ${judge['dollars']:.4f}"])
    return tag("details", tag("summary", "The judge"), table(["", ""], rows, class_="facts"))
