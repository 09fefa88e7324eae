"""Terminal tables of an evaluation: values, intervals, verdicts, win rates, reward models."""

from collections.abc import Iterator, Mapping
from math import ceil
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from align.recipe.schema.evaluate import OWN_TASK

MARKS = {"better": "[green]better[/]", "worse": "[red]worse[/]", "not shown": "[dim]not shown[/]"}
Block = Mapping[str, Any]


def task_tables(summary: Block) -> Iterator[Table]:
    """Yield a table for each task, its win rates of every pair, and one of the reward models.

    Models stand side by side with the interval under each value, so that five of them fit into a
    terminal of 80 columns.
    """
    for name, block in summary.get("tasks", {}).items():
        title = "held-out prompts" if name == OWN_TASK else name
        yield _values(title, block)
        if len(block.get("win_matrix", {})) > 2:
            yield _matrix(title, block["win_matrix"])
    if rows := summary.get("reward_models"):
        yield _reward_models(rows)


def _reward_models(rows: Mapping[str, Block]) -> Table:
    table = _table(*rows, title="reward models (95 % intervals)")
    for metric in dict.fromkeys(name for row in rows.values() for name in row):
        table.add_row(metric, *(stacked(row.get(metric)) for row in rows.values()))
    return table


def _table(*names: str, title: str) -> Table:
    return Table("", *names, title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def _values(name: str, block: Block) -> Table:
    models = block["models"]
    answers = f" x {block['samples']} answers" if block["samples"] > 1 else ""
    title = f"{name}: {block['prompts']} prompts{answers}, against {block['baseline']}"
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
    unit = {"kl": "nats/answer", "length": "tokens"}.get(metric)
    return metric.replace("_", " ") + (f"\n[dim]{unit}[/]" if unit else "")


def stacked(value: Any) -> str:
    """Write ``[value, low, high]`` in two short lines."""
    if not isinstance(value, list) or value[0] is None:
        return "-"
    middle, low, high = (None if v is None else _short(v) for v in value)
    return f"[bold]{middle}[/]" + (f"\n[dim]{low}..{high}[/]" if low is not None else "")


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.3g}"


def _matrix(name: str, matrix: Mapping[str, Block]) -> Table:
    table = Table("wins of \\ against", *matrix, title=f"{name}: win rates", box=SIMPLE_HEAD)
    for model, row in matrix.items():
        table.add_row(model, *(stacked(row[other]) if other in row else "" for other in matrix))
    return table


def verdict_lines(summary: Block) -> Iterator[str]:
    """Say the verdict on each checkpoint by each task's first metric, and what it would take."""
    for name, block in summary.get("tasks", {}).items():
        metric = block["metrics"][0]
        for model, contrasts in block["contrasts"].items():
            found = contrasts[metric]
            told = found.get("verdict", "no direction")
            line = f"{name}: {model} {told} than {block['baseline']} by {metric}"
            if told == "not shown":
                line = f"{name}: {model} not shown to differ from {block['baseline']} by {metric}"
                if needed := found.get("needed"):
                    line += f"; a difference like this one takes about {needed:,} prompts"
            yield line


def detect_lines(summary: Block, difference: float) -> Iterator[str]:
    """Say how many prompts show a difference of this size with probability 0.8."""
    for name, block in summary.get("tasks", {}).items():
        metric = block["metrics"][0]
        needed = {
            model: max(2, ceil(found["prompts"] * (found["detectable"] / difference) ** 2))
            for model, contrasts in block["contrasts"].items()
            if (found := contrasts[metric]).get("detectable")
        }
        if needed:
            counts = ", ".join(f"{model} {count:,}" for model, count in needed.items())
            yield f"{name}: prompts to see {difference:g} of {metric}: {counts}"


def judge_lines(summary: Block) -> Iterator[str]:
    """Say what the judge behind an endpoint was asked and what it cost."""
    for name, block in summary.get("tasks", {}).items():
        if judge := block.get("judge"):
            yield f"{name}: {judge_text(judge)}"


def judge_text(judge: Block) -> str:
    """Write a judge's cost in one line."""
    reasons = [f"{n} {reason}" for reason, n in judge["invalid"].items()]
    invalid = sum(judge["invalid"].values())
    return (
        f"judge {judge['model']}: {judge['pairs_judged']} of {judge['pairs']} pairs judged in both "
        f"orders, {judge['requests']} requests ({judge['cached']} more from the cache), "
        f"{invalid} invalid{' (' + ', '.join(reasons) + ')' if invalid else ''}, "
        f"{judge['prompt_tokens'] + judge['answer_tokens']:,} tokens, ${judge['dollars']:.4f}, "
        f"{judge['seconds']:.1f} s"
    )


CALIBRATED = {
    "agreement": "agrees with people (ties half)",
    "decided_agreement": "agrees where both orders do",
    "kappa": "Cohen's kappa",
    "first_share": "prefers the first answer (0.5 is none)",
    "consistent": "same verdict in both orders",
    "longer_share": "prefers the longer answer",
    "human_longer_share": "people prefer the longer answer",
}


def calibration_lines(found: Block) -> Iterator[str]:
    """Show a judge's calibration, a line each."""
    yield f"{found['pairs']} pairs ordered by people, {found['invalid']} without a valid verdict"
    for key, words in CALIBRATED.items():
        value, low, high = found[key]
        shown = "-" if value is None else f"{value:.2f}"
        yield f"{words:<40} {shown}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")
    if judge := found.get("judge"):
        yield judge_text(judge)
