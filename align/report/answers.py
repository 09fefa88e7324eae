"""What the checkpoints answered: the same prompts side by side, and samples of the training."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

from align.report.charts import Series, plot
from align.report.markup import Markup, join, number, tag
from align.report.read import Row, RunRecord

NUM_PROMPTS, NUM_OPEN, MAX_TEXT, MAX_DOTS = 40, 8, 1500, 150


def side_by_side(run: RunRecord) -> Markup | None:
    """Show the same held-out prompts answered by each checkpoint."""
    rows = [row for s in run.stages if s.kind == "evaluate" for row in s.samples if "model" in row]
    prompts: dict[Any, dict[str, Row]] = {}
    for row in rows:
        index = row.get("prompt_index", str(row.get("prompt")))
        prompts.setdefault(index, {}).setdefault(row["model"], row)
    if not prompts:
        return None
    # Evenly spread: neighbours in a data set are often alike.
    keys = list(prompts)
    step = max(1, len(keys) // NUM_PROMPTS)
    baseline = _baseline(run)
    shown = [_answers(prompts[key], baseline) for key in keys[::step][:NUM_PROMPTS]]
    rest = shown[NUM_OPEN:]
    return tag(
        "section",
        tag("h2", "The same prompts, each checkpoint's answer"),
        tag(
            "p",
            f"{len(shown)} of {len(keys)} held-out prompts, evenly spread; the first answer "
            "of each model with the judge's score.",
            f" What {baseline} does not say is marked." if baseline else "",
        ),
        *shown[:NUM_OPEN],
        tag("details", tag("summary", f"{len(rest)} more prompts"), *rest) if rest else None,
    )


def _baseline(run: RunRecord) -> str | None:
    specs = (run.recipe.stages[s.name] for s in run.stages if s.kind == "evaluate")
    return next((getattr(spec, "baseline", None) for spec in specs), None)


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


def _marked(text: Any, known: Any) -> Markup:
    """Give an answer with the words marked that the baseline's answer has not."""
    said = clip(text)
    if known is None or not text:
        return join(said)
    new, old = (re.findall(r"\s+|[^\s]+", part) for part in (said, clip(known)))
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    parts: list[object] = []
    for kind, _, _, start, end in blocks:
        words = "".join(new[start:end])
        marked = kind in ("insert", "replace") and words.strip()
        parts.append(tag("mark", words) if marked else words)
    return join(*parts)


def reward_and_length(run: RunRecord) -> Markup | None:
    """Draw the judge's score of each answer against its length, model by model."""
    charts = []
    for stage in run.stages:
        by_model: dict[str, list[tuple[float, float]]] = {}
        for row in stage.samples if stage.kind == "evaluate" else []:
            if "model" in row and row.get("score") is not None and row.get("length") is not None:
                by_model.setdefault(row["model"], []).append((row["length"], row["score"]))
        for model, dots in by_model.items():
            shown = dots[:: max(1, len(dots) // MAX_DOTS)]
            charts.append(
                plot(
                    model,
                    [Series("", shown, style="points")],
                    x_label="length (tokens)",
                    y_label="judge's score",
                    note=f"{len(shown)} answers",
                )
            )
    if not charts:
        return None
    said = "A cloud that climbs to the right: longer answers win. Look whether they are better."
    return tag(
        "section",
        tag("h2", "Score and length"),
        tag("p", said),
        tag("div", *charts, class_="charts"),
    )


def clip(text: Any) -> str:
    """Give a prompt or answer as plain text; a long one is cut and says so."""
    if isinstance(text, list):
        text = "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in text)
    text = "" if text is None else str(text)
    if len(text) <= MAX_TEXT:
        return text or "(empty)"
    return f"{text[:MAX_TEXT]} … ({len(text) - MAX_TEXT:,} more characters)"


def training_samples(run: RunRecord) -> Markup | None:
    """Show the first and the last answer that each online stage sampled while it trained."""
    stages = [s for s in run.stages if s.kind != "evaluate" and s.samples]
    if not stages:
        return None
    blocks = []
    for stage in stages:
        picked = (
            stage.samples[:1]
            if len(stage.samples) == 1
            else stage.samples[:: len(stage.samples) - 1]
        )
        rows = {f"step {row['step']}": row for row in picked[:2]}
        blocks.append(tag("h3", stage.name))
        blocks += [_answers({label: row}) for label, row in rows.items()]
    return tag("section", tag("h2", "Sampled while training"), *blocks)
