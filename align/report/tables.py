"""Terminal output of an evaluation: values, intervals, verdicts, win rates, reward models."""

from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from align.core.types import NO_DIFFERENCE
from align.recipe.schema.evaluate import OWN_TASK

MARKS = {"better": "[green]better[/]", "worse": "[red]worse[/]", NO_DIFFERENCE: "[dim]n.s.[/]"}
Block = Mapping[str, Any]


def task_tables(summary: Block) -> Iterator[Table]:
    """Yield one table per task, its pairwise win rates, and a table of the reward models.

    Each model is a column with the interval below the value, so that five models fit into 80
    columns.
    """
    for name, block in summary.get("tasks", {}).items():
        title = "held-out prompts" if name == OWN_TASK else name
        yield _values(title, block)
        # With two models the matrix repeats the win rate of the first table.
        if len(block.get("win_matrix", {})) > 2:
            yield _matrix(title, block["win_matrix"])
    if rows := summary.get("reward_models"):
        yield _reward_models(rows)


def ordered_models(block: Block, order: Sequence[str]) -> list[str]:
    """Return the models of a task: the baseline, then the others in the recipe's order."""

    def place(model: str) -> tuple[bool, int, str]:
        known = order.index(model) if model in order else len(order)
        return (model != block["baseline"], known, model)

    return sorted(block["models"], key=place)


def _reward_models(rows: Mapping[str, Block]) -> Table:
    table = _table(*rows, title="reward models (95 % intervals)")
    for metric in dict.fromkeys(name for row in rows.values() for name in row):
        table.add_row(metric, *(stacked(row.get(metric)) for row in rows.values()))
    return table


def _table(*names: str, title: str) -> Table:
    return Table("", *names, title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def _values(name: str, block: Block) -> Table:
    models = block["models"]
    answers = f" x {block['samples']} responses" if block["samples"] > 1 else ""
    title = f"{name}: {block['prompts']} prompts{answers}, baseline {block['baseline']}"
    table = _table(*models, title=title)
    for metric in block["metrics"]:
        cells = []
        for model, row in models.items():
            contrast = block["contrasts"].get(model, {}).get(metric, {})
            verdict = MARKS.get(contrast.get("verdict", ""), "")
            invalid = block.get("invalid", {}).get(model, {}).get(metric)
            left_out = f"[dim]{invalid} invalid[/]" if invalid else ""
            cells.append("\n".join(filter(None, [stacked(row.get(metric)), verdict, left_out])))
        table.add_row(_title(metric), *cells)
    for group, row in block.get("groups", {}).items():
        table.add_row(f"  [dim]{group}[/]", *(stacked(row.get(model)) for model in models))
    return table


def _title(metric: str) -> str:
    unit = {"kl": "nats/response", "length": "tokens"}.get(metric)
    return metric.replace("_", " ") + (f"\n[dim]{unit}[/]" if unit else "")


def stacked(value: object) -> str:
    """Return ``[value, low, high]`` as rich markup on two short lines, or a dash for no value."""
    if not isinstance(value, list) or value[0] is None:
        return "-"
    middle, low, high = (None if v is None else _short(v) for v in value)
    return f"[bold]{middle}[/]" + (f"\n[dim]{low}..{high}[/]" if low is not None else "")


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.3g}"


def _matrix(name: str, matrix: Mapping[str, Block]) -> Table:
    table = Table("win rate of \\ over", *matrix, title=f"{name}: win rates", box=SIMPLE_HEAD)
    for model, row in matrix.items():
        table.add_row(model, *(stacked(row[other]) if other in row else "" for other in matrix))
    return table


def verdict_lines(summary: Block) -> Iterator[str]:
    """Yield each checkpoint's verdict by each task's first metric.

    A line without a significant difference ends in the number of prompts that would show one.
    """
    for name, block in summary.get("tasks", {}).items():
        metric = block["metrics"][0]
        for model, contrasts in block["contrasts"].items():
            found = contrasts[metric]
            verdict = found.get("verdict", "no direction")
            line = f"{name}: {model} {verdict} than {block['baseline']} by {metric}"
            if verdict == NO_DIFFERENCE:
                line = f"{name}: {model}: {verdict} from {block['baseline']} by {metric}"
                if needed := found.get("needed"):
                    line += f"; about {needed:,} prompts would detect a difference of this size"
            yield line


def detect_lines(summary: Block, difference: float) -> Iterator[str]:
    """Yield the number of prompts that detect a difference of this size with 80 % power."""
    for name, block in summary.get("tasks", {}).items():
        metric = block["metrics"][0]
        # The minimum detectable effect falls with 1 / sqrt(prompts).
        needed = {
            model: max(2, ceil(found["prompts"] * (found["detectable"] / difference) ** 2))
            for model, contrasts in block["contrasts"].items()
            if (found := contrasts[metric]).get("detectable")
        }
        if needed:
            counts = ", ".join(f"{model} {count:,}" for model, count in needed.items())
            yield f"{name}: prompts to detect a difference of {difference:g} in {metric}: {counts}"


def judge_lines(summary: Block) -> Iterator[str]:
    """Yield a line on the verdicts and cost of each task's judge of pairs."""
    for name, block in summary.get("tasks", {}).items():
        if judge := block.get("judge"):
            yield f"{name}: {_judge_text(judge)}"


def _judge_text(judge: Block) -> str:
    """Return a judge's verdicts and what they cost, in one line."""
    reasons = [f"{n} {reason}" for reason, n in judge["invalid"].items()]
    invalid = sum(judge["invalid"].values())
    asked = cost = ""
    if "requests" in judge:  # a model behind an endpoint
        asked = f" {judge['requests']} requests ({judge['cached']} more from the cache),"
        tokens = judge["prompt_tokens"] + judge["answer_tokens"]
        cost = f" {tokens:,} tokens, ${judge['dollars']:.4f},"
    return (
        f"judge {judge['model']}: {judge['pairs_judged']} of {judge['pairs']} pairs judged in both "
        f"orders,{asked} {invalid} invalid{' (' + ', '.join(reasons) + ')' if invalid else ''},"
        f"{cost} {judge['seconds']:.1f} s"
    )


CALIBRATED = {
    "agreement": "agreement with people (ties half)",
    "decided_agreement": "agreement if both orders agree",
    "kappa": "Cohen's kappa",
    "first_share": "prefers the first response (0.5: no bias)",
    "consistent": "same verdict in both orders",
    "longer_share": "prefers the longer response",
    "human_longer_share": "people prefer the longer response",
}


def calibration_lines(found: Block) -> Iterator[str]:
    """Yield the lines of a judge's calibration, each value with its 95 % interval."""
    yield f"{found['pairs']} pairs ordered by people, {found['invalid']} without a valid verdict"
    for key, words in CALIBRATED.items():
        value, low, high = found[key]
        shown = "-" if value is None else f"{value:.2f}"
        yield f"{words:<40} {shown}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")
    if judge := found.get("judge"):
        yield _judge_text(judge)
