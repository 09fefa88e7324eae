"""Sections with responses: the same prompts side by side, and samples from training."""

import difflib
import re
from collections.abc import Mapping

from align.recipe.schema.evaluate import OWN_TASK, EvaluateStage
from align.report.charts import Series, plot
from align.report.markup import Markup, join, number, tag
from align.report.read import Row, RunRecord

NUM_PROMPTS, NUM_OPEN, MAX_TEXT, MAX_DOTS = 40, 8, 1500, 150


def side_by_side(run: RunRecord) -> Markup | None:
    """Return the section with each checkpoint's responses to the same held-out prompts."""
    rows = [row for s in run.stages if s.kind == "evaluate" for row in s.samples if "model" in row]
    # By its text: every task counts its prompts from 0.
    prompts: dict[str, dict[str, Row]] = {}
    for row in rows:
        prompts.setdefault(str(row.get("prompt")), {}).setdefault(row["model"], row)
    if not prompts:
        return None
    # Spread the selection evenly: neighboring rows of a dataset are often similar.
    found, count = list(prompts.values()), min(NUM_PROMPTS, len(prompts))
    baseline = _baseline(run)
    shown = [_answers(found[i * len(found) // count], baseline) for i in range(count)]
    rest = shown[NUM_OPEN:]
    return tag(
        "section",
        tag("h2", "Responses of each checkpoint to the same prompts"),
        tag(
            "p",
            f"{count} of {len(found)} held-out prompts, evenly spread. Each model's first "
            "response is shown with the judge's score.",
            f" Words that differ from {baseline} are highlighted." if baseline else "",
        ),
        *shown[:NUM_OPEN],
        tag("details", tag("summary", f"{len(rest)} more prompts"), *rest) if rest else None,
    )


def _baseline(run: RunRecord) -> str | None:
    # As the rows name it: a model given by its path has a label.
    specs = (run.recipe.stages[s.name] for s in run.stages)
    return next((s.label(s.baseline) for s in specs if isinstance(s, EvaluateStage)), None)


def _answers(by_model: Mapping[str, Row], baseline: str | None = None) -> Markup:
    first = next(iter(by_model.values()))
    known = by_model.get(baseline or "", {}).get("completion")
    cells = [
        tag(
            "div",
            tag("b", model),
            tag("span", f" {number(row.get('score'))}", class_="score"),
            tag("pre", _marked(row.get("completion"), None if model == baseline else known)),
        )
        for model, row in by_model.items()
    ]
    return tag("article", tag("pre", clip(first["prompt"]), class_="prompt"), tag("div", *cells))


def _marked(text: object, known: object) -> Markup:
    """Return a response in which the words that differ from the baseline's are highlighted."""
    plain = clip(text)
    if known is None or not text:
        return join(plain)
    # Whitespace runs are tokens of their own, so that joining them restores the text exactly.
    new, old = (re.findall(r"\s+|[^\s]+", part) for part in (plain, clip(known)))
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    parts: list[object] = []
    for kind, _, _, start, end in blocks:
        words = "".join(new[start:end])
        marked = kind in ("insert", "replace") and words.strip()
        parts.append(tag("mark", words) if marked else words)
    return join(*parts)


def reward_and_length(run: RunRecord) -> Markup | None:
    """Return scatter plots of the judge's score against response length, one per task and model."""
    charts = []
    for stage in run.stages:
        # Each task has a judge, and so a scale, of its own.
        by_task: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for row in stage.samples if stage.kind == "evaluate" else []:
            if "model" in row and row.get("score") is not None and row.get("length") is not None:
                place = (str(row.get("task", OWN_TASK)), row["model"])
                by_task.setdefault(place, []).append((row["length"], row["score"]))
        for (task, model), dots in by_task.items():
            # An SVG with thousands of circles makes the page slow: draw about MAX_DOTS of them.
            shown = dots[:: max(1, len(dots) // MAX_DOTS)]
            charts.append(
                plot(
                    model if task == OWN_TASK else f"{model}, {task}",
                    [Series("", shown, style="points")],
                    x_label="length (tokens)",
                    y_label="judge's score",
                    note=f"{len(shown)} responses",
                )
            )
    if not charts:
        return None
    intro = (
        "An upward trend means the judge favors longer responses. Check whether they are better."
    )
    return tag(
        "section",
        tag("h2", "Score and length"),
        tag("p", intro),
        tag("div", *charts, class_="charts"),
    )


def clip(text: object) -> str:
    """Return a prompt or response as plain text, truncated with a note if it is long."""
    if isinstance(text, list):
        text = "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in text)
    text = "" if text is None else str(text)
    if len(text) <= MAX_TEXT:
        return text or "(empty)"
    return f"{text[:MAX_TEXT]} … ({len(text) - MAX_TEXT:,} more characters)"


def training_samples(run: RunRecord) -> Markup | None:
    """Return the section with the first and last response that each stage sampled in training."""
    stages = [s for s in run.stages if s.kind != "evaluate" and s.samples]
    if not stages:
        return None
    blocks = []
    for stage in stages:
        # One sample must not be listed twice; otherwise the stride selects first and last.
        picked = (
            stage.samples[:1]
            if len(stage.samples) == 1
            else stage.samples[:: len(stage.samples) - 1]
        )
        rows = {f"step {row['step']}": row for row in picked[:2]}
        blocks.append(tag("h3", stage.name))
        blocks += [_answers({label: row}) for label, row in rows.items()]
    return tag("section", tag("h2", "Responses sampled during training"), *blocks)
