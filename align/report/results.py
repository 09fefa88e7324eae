"""The few lines at the end of a run: failed expectations, one table of the models, the report."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from align.core.expectations import band_text
from align.core.text import visible
from align.core.types import NO_DIFFERENCE
from align.recipe.schema.evaluate import OWN_TASK
from align.report.tables import judge_lines, ordered_models

Block = Mapping[str, Any]
UNITS = {"kl": "nats", "length": "tokens"}
STYLES = {"better": "bold green", "worse": "bold red"}
MAX_ALARMS = 3
MAX_FAILED = 5
"""Failed expectations that are shown at the end of a run."""
EDGES, GAP = 2, 3
"""Columns that the table's frame takes, and that lie between two of its columns."""
LAST = ("length_controlled_win_rate",)
"""Metrics that only repeat another one, and so are the first to be left out."""


def result_lines(summary: Block, *, order: Sequence[str], width: int) -> Iterator[Table | Text]:
    """Yield the results of a run, most important first.

    Args:
        summary: summary.json of the run.
        order: names of the models in the order of the recipe; the baseline always comes first.
        width: columns of the terminal; metrics that do not fit are named below the table.
    """
    yield from expectation_lines(summary, limit=MAX_FAILED)
    yield from _alarms(summary)
    tasks = summary.get("tasks", {})
    for name, block in tasks.items():
        # Of several tasks, the first metric of each; of one, as many as fit.
        found = sorted(block["metrics"], key=LAST.__contains__)
        metrics = found[:1] if len(tasks) > 1 else found
        yield from _task(name, block, metrics=metrics, order=order, width=width)
    for name, row in summary.get("reward_models", {}).items():
        if accuracy := row.get("pair_accuracy"):
            yield Text(f"{name}: ranks {_cell(accuracy)} of the held-out pairs correctly")
    yield from (Text(line) for line in judge_lines(summary))


def expectation_lines(summary: Block, *, limit: int | None = None) -> Iterator[Text]:
    """Yield one line for all expectations of a recipe, then one for each that failed.

    With a ``limit``, further ones are only counted.
    """
    found = summary.get("expectations", [])
    failed = [entry for entry in found if not entry["holds"]]
    if not failed:
        if found:
            yield Text(f"all {len(found)} expectations hold", style="green")
        return
    yield Text(f"FAILED: {len(failed)} of {len(found)} expectations do not hold", style="bold red")
    for entry in failed[:limit]:
        reason = f" ({entry['problem']})" if "problem" in entry else ""
        value = "-" if entry["value"] is None else f"{entry['value']:.4g}"
        yield Text(
            f"  {entry['key']} = {value}, expected {band_text(entry['band'])}{reason}", style="red"
        )
    if limit is not None and len(failed) > limit:
        yield Text(f"  and {len(failed) - limit} more: align show RUN", style="red")


def last_line(summary: Block, *, report: Path, clock: str) -> Text:
    """Return the line that ends a run: time, exit code, and where everything is."""
    code = 0 if all(entry["holds"] for entry in summary.get("expectations", [])) else 1
    where = f"{report}; all tables: align show {report.parent}"
    return Text(f"{clock} in all, exit code {code}; {where}")


def _alarms(summary: Block) -> Iterator[Text]:
    found = [
        (name, row)
        for name, stage in summary.get("stages", {}).items()
        for row in stage.get("alarms", [])
    ]
    for stage, row in found[:MAX_ALARMS]:
        step, name, reason = (row.get(k) for k in ("step", "name", "reason"))
        yield Text(visible(f"{stage}: alarm at step {step}: {name}: {reason}"), style="yellow")
    if len(found) > MAX_ALARMS:
        yield Text(f"{len(found) - MAX_ALARMS} more alarms: see the report", style="yellow")


def _task(
    name: str, block: Block, *, metrics: Sequence[str], order: Sequence[str], width: int
) -> Iterator[Table | Text]:
    # Rows: the baseline, then the models as the recipe orders them.
    baseline = block["baseline"]
    names = ordered_models(block, order)
    cells = {metric: [_marked(block, model, metric) for model in names] for metric in metrics}
    # Columns: as many metrics as fit, at least one. A title may wrap, a value may not.
    widths = {
        metric: max(map(len, [*_title(metric).split(), *(cell.plain for cell in cells[metric])]))
        for metric in metrics
    }
    left, shown = width - max(map(len, ["model", *names])) - EDGES, []
    for metric in metrics:
        left -= widths[metric] + GAP
        if left < 0 and shown:
            break
        shown.append(metric)
    title = "held-out prompts" if name == OWN_TASK else name
    answers = f" x {block['samples']} responses" if block["samples"] > 1 else ""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    table.add_column("model", no_wrap=True)
    for metric in shown:
        table.add_column(_title(metric), width=widths[metric])
    for i, model in enumerate(names):
        table.add_row(Text(visible(model)), *(cells[metric][i] for metric in shown))
    facts = f"{title}: {block['prompts']} prompts{answers}, 95 % intervals; "
    yield Text(facts + f"* differs significantly from {baseline}")
    yield table
    yield from _notes(block, names, metrics=metrics, hidden=metrics[len(shown) :])


def _notes(
    block: Block, names: Sequence[str], *, metrics: Sequence[str], hidden: Sequence[str]
) -> Iterator[Text]:
    """Yield what the table cannot show: power, excluded responses, metrics without a column."""
    first = metrics[0]
    for model in names:
        found = block["contrasts"].get(model, {}).get(first, {})
        if found.get("verdict") == NO_DIFFERENCE and (needed := found.get("needed")):
            yield Text(
                f"{model}: about {needed:,} prompts would detect its difference in {_title(first)}"
            )
        excluded = block.get("invalid", {}).get(model, {})
        if any(excluded.values()):
            counts = ", ".join(f"{n} by {metric}" for metric, n in excluded.items() if n)
            yield Text(f"{model}: responses without a valid score, left out: {counts}")
    if hidden:
        yield Text("not shown here: " + ", ".join(map(_title, hidden)), style="dim")


def _marked(block: Block, model: str, metric: str) -> Text:
    verdict = block["contrasts"].get(model, {}).get(metric, {}).get("verdict")
    cell = Text(_cell(block["models"][model].get(metric)))
    if verdict in STYLES:
        cell.append("*")
        cell.stylize(STYLES[verdict])
    return cell


def _cell(value: object) -> str:
    """Return ``[value, low, high]`` as text, or a dash for no value."""
    if not isinstance(value, list) or value[0] is None:
        return "-"
    middle, *bounds = (None if v is None else _short(v) for v in value)
    return str(middle) if bounds[0] is None else f"{middle} [{', '.join(map(str, bounds))}]"


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.3g}"


def _title(metric: str) -> str:
    unit = UNITS.get(metric)
    return metric.replace("_", " ") + (f" ({unit})" if unit else "")
