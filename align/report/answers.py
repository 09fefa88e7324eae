"""Sections with responses: the same prompts side by side, and samples from training."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from align.core.log import EVALUATIONS_FILE
from align.recipe.schema.evaluate import OWN_TASK, EvaluateStage
from align.report.charts import Series, plot
from align.report.markup import Markup, join, number, tag
from align.report.read import Row, RunRecord, read_lines

NUM_PROMPTS, NUM_OPEN, MAX_TEXT, MAX_DOTS = 40, 8, 1500, 150
T = TypeVar("T")
NUM_STEPS, NUM_WATCHED, NUM_WATCHED_OPEN = 5, 24, 3
SAMPLES = "align-samples"
"""Id of the element with the searchable responses, which samples.js reads."""
MAX_SAMPLE_CHARS = 800_000
"""Characters of searchable responses in a page, which stays below 3 MB with them."""


def side_by_side(run: RunRecord) -> Markup | None:
    """Return the section with each checkpoint's responses to the same held-out prompts."""
    prompts = _prompts(run)
    if not prompts:
        return None
    # Spread the selection evenly: neighboring rows of a dataset are often similar.
    found, baseline = list(prompts.values()), _baseline(run)
    shown = [_answers(rows, baseline) for rows in _spread(found, NUM_PROMPTS)]
    rest = shown[NUM_OPEN:]
    return tag(
        "section",
        tag("h2", "Responses of each checkpoint to the same prompts"),
        tag(
            "p",
            f"{len(shown)} of {len(found)} held-out prompts, evenly spread. Each model's first "
            "response is shown with the judge's score.",
            f" Words that differ from {baseline} are highlighted." if baseline else "",
        ),
        tag(
            "div",
            *shown[:NUM_OPEN],
            tag("details", tag("summary", f"{len(rest)} more prompts"), *rest) if rest else None,
            data_samples="",
        ),
    )


def _prompts(run: RunRecord) -> dict[str, dict[str, Row]]:
    """Return prompt -> model -> its first response, of all evaluate stages."""
    rows = [row for s in run.stages if s.kind == "evaluate" for row in s.samples if "model" in row]
    # By its text: every task counts its prompts from 0.
    prompts: dict[str, dict[str, Row]] = {}
    for row in rows:
        prompts.setdefault(str(row.get("prompt")), {}).setdefault(row["model"], row)
    return prompts


def _spread(found: list[T], count: int) -> list[T]:
    count = min(count, len(found))
    return [found[i * len(found) // count] for i in range(count)]


def samples_data(run: RunRecord) -> object:
    """Return the responses to all held-out prompts, which the page's script searches.

    If they are too many for one page, prompts are left out, evenly spread.
    """
    found = [_searchable(rows) for rows in _prompts(run).values()]
    size = sum(len(json.dumps(prompt)) for prompt in found)
    kept = _spread(found, int(len(found) * min(1.0, MAX_SAMPLE_CHARS / max(1, size))))
    rule = _rule(row for rows in _prompts(run).values() for row in rows.values())
    return {"baseline": _baseline(run), "rule": rule, "total": len(found), "prompts": kept}


def _searchable(by_model: Mapping[str, Row]) -> dict[str, object]:
    first = next(iter(by_model.values()))
    answers = [
        {
            "model": model,
            "text": clip(row.get("completion")),
            "score": row.get("score"),
            "judge": row.get("judge"),
            "scores": row.get("scores"),
            "length": row.get("length"),
        }
        for model, row in by_model.items()
    ]
    name = _link(first)
    task = first.get("task", OWN_TASK)
    return {"id": name, "task": task, "prompt": clip(first["prompt"]), "answers": answers}


def _link(row: Row) -> str:
    """Return the name of a prompt's place in the page: it is the same in every report."""
    return f"p-{hashlib.sha256(clip(row['prompt']).encode()).hexdigest()[:10]}"


def _rule(rows: Iterable[Row]) -> str | None:
    """Return the first score that is 0 or 1 for every response: whether it is right."""
    values: dict[str, set[object]] = {}
    for row in rows:
        for name, score in (row.get("scores") or {}).items():
            values.setdefault(name, set()).add(score)
    return next((name for name, found in values.items() if found <= {0, 1, None}), None)


def _baseline(run: RunRecord) -> str | None:
    # As the rows name it: a model given by its path has a label.
    specs = (run.recipe.stages[s.name] for s in run.stages)
    return next((s.label(s.baseline) for s in specs if isinstance(s, EvaluateStage)), None)


def _answers(
    by_model: Mapping[str, Row], baseline: str | None = None, *, link: bool = True
) -> Markup:
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
    name = _link(first) if link else None
    mark = tag("a", "#", href=f"#{name}", class_="permalink", title="link to this prompt")
    return tag(
        "article",
        mark if link else None,
        tag("pre", clip(first["prompt"]), class_="prompt"),
        tag("div", *cells),
        id=name,
    )


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
    if isinstance(text, list) and all(isinstance(turn, dict) for turn in text):
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
        blocks += [_answers({label: row}, link=False) for label, row in rows.items()]
    return tag("section", tag("h2", "Responses sampled during training"), *blocks)


def over_steps(run: RunRecord) -> Markup | None:
    """Return the section with the responses to the same held-out prompts during training."""
    blocks = [block for stage in run.stages if (block := _stage_steps(run.directory, stage.name))]
    if not blocks:
        return None
    intro = (
        "The same held-out prompts at several steps of the training, with the gold score. Words "
        "that differ from the first step are highlighted."
    )
    title = "The same prompts during training"
    return tag("section", tag("h2", title), tag("p", intro), *blocks)


def _stage_steps(folder: Path, stage: str) -> Markup | None:
    # prompt -> step -> its response
    found: dict[str, dict[str, Row]] = {}
    evaluations = [
        row
        for row in read_lines(folder / stage / EVALUATIONS_FILE, [])
        if isinstance(row.get("answers"), list)
    ]
    if len(evaluations) < 2:
        return None
    # The first and the last evaluation, and those evenly between them.
    last = len(evaluations) - 1
    count = min(NUM_STEPS - 1, last)
    for i in dict.fromkeys(round(k * last / count) for k in range(count + 1)):
        for row in evaluations[i]["answers"]:
            steps = found.setdefault(str(row.get("prompt")), {})
            steps.setdefault(f"step {evaluations[i]['step']}", {**row, "score": row.get("gold")})
    first = f"step {evaluations[0]['step']}"
    shown = [_answers(rows, first, link=False) for rows in [*found.values()][:NUM_WATCHED]]
    rest = shown[NUM_WATCHED_OPEN:]
    return tag(
        "div",
        tag("h3", stage, tag("small", f"{len(shown)} of {len(found)} prompts")),
        *shown[:NUM_WATCHED_OPEN],
        tag("details", tag("summary", f"{len(rest)} more prompts"), *rest) if rest else None,
    )
