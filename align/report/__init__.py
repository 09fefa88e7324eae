"""Turn a run folder into one offline HTML file; no torch, no network."""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from align.report import answers, sections
from align.report.card import cards_section, reward_cards
from align.report.chain import chain_picture
from align.report.classes import classifiers
from align.report.compare import comparison_page, named_runs, shared_charts
from align.report.curves import charts_of, curves, varying
from align.report.markup import Markup, duration, tag
from align.report.merge import earlier, merges
from align.report.microscope import microscope
from align.report.overview import overview
from align.report.read import RunRecord, read_run
from align.report.series import payload
from align.report.tasks import tasks
from align.report.watching import watching

REPORT_FILE = "report.html"
SCRIPTS = ("charts.js", "samples.js")
DAMAGED = (LookupError, TypeError, ValueError, AttributeError)
"""What reading a file with the wrong content raises."""
SERIES = "align-series"
"""Id of the element with the charts' data, which charts.js reads."""


def build_report(run_dir: Path) -> Path:
    """Write report.html of a run from its artifacts; an unfinished run lists what is missing.

    Args:
        run_dir: ``runs/<recipe name>``.

    Returns:
        The path of the report.

    Raises:
        ArtifactError: the folder contains no stage.
    """
    run_dir = Path(run_dir)
    return _write(run_dir / REPORT_FILE, page(read_run(run_dir)))


def build_comparison(first: Path, *others: Path) -> Path:
    """Write a page in the first run's folder that compares it with other runs.

    Raises:
        ArtifactError: one of the folders contains no stage.
    """
    runs = named_runs([read_run(Path(path)) for path in (first, *others)])
    records = list(runs.values())
    names = "-".join(run.directory.resolve().name for run in records[1:])
    title = " and ".join(run.recipe.name for run in records)
    header = tag("header", tag("h1", title))
    data = {SERIES: payload(shared_charts(runs))}
    html = document(title, header, *comparison_page(runs), data=data)
    return _write(records[0].directory / f"compare-{names}.html", html)


def build_cards(path: Path, cards: Mapping[str, Any]) -> Path:
    """Write a page with the reward-model cards, keyed by model name."""
    title = "Reward models"
    return _write(path, document(title, tag("header", tag("h1", title)), cards_section(cards)))


def _write(path: Path, html: Markup) -> Path:
    # Replace at the end: an open browser tab never loads a half-written page.
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text("<!doctype html>\n" + html, encoding="utf-8")
    temporary.replace(path)
    return path


@cache
def asset(name: str) -> Markup:
    """Return the text of a style sheet or script that is part of the page."""
    return Markup((Path(__file__).parent / name).read_text(encoding="utf-8"))


def document(title: str, *body: Markup | None, data: Mapping[str, object] | None = None) -> Markup:
    """Return a complete page with its style sheet and scripts inlined and no external resources.

    Args:
        title: of the browser's tab.
        body: the page's elements.
        data: JSON values that the scripts read, by the id of their element; without any, the page
            has no script.
    """
    style, script = asset("page.css"), Markup("".join(map(asset, SCRIPTS))) if data else None
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title}: align report"),
        tag("style", style),
    )
    values = [
        tag("script", _as_json(value), type="application/json", id=name)
        for name, value in (data or {}).items()
    ]
    code = tag("script", script) if script is not None else None
    return tag("html", head, tag("body", *body, *values, code), lang="en")


def _policy(style: str, script: str | None) -> str:
    """Return a policy that allows this style sheet and this script, and no request at all.

    The browser itself blocks everything else, whatever a response may contain.
    """
    allowed = f"'{_digest(script)}'" if script is not None else "'none'"
    return (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src {allowed}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _as_json(value: object) -> Markup:
    # Inside of a script element only "<" can end it or open a comment.
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def page(run: RunRecord) -> Markup:
    """Return the complete report page of a run."""
    done = sum(stage.status == "done" for stage in run.stages)
    known = run.summary.get("seconds")
    seconds = known if isinstance(known, int | float) else sum(s.seconds or 0.0 for s in run.stages)
    head = f"{done} of {len(run.stages)} stages done, {duration(seconds)}, seed {run.recipe.seed}"
    if (finished := run.finished) is not None:
        head += f", finished {finished:%Y-%m-%d %H:%M}"
    # Stages may have run on several machines.
    devices = dict.fromkeys(str(x) for s in run.stages if (x := s.manifest.get("devices")))
    head += f", on {' and '.join(devices)}" if devices else ""
    return document(
        run.recipe.name,
        tag(
            "header",
            tag("h1", run.recipe.name),
            tag("p", run.recipe.description),
            tag("p", head, class_="quiet"),
        ),
        # An unfinished run may already have failed expectations, which come first.
        shown(overview, run),
        sections.missing(run),
        *_groups(run),
        data=_data(run),
    )


def _data(run: RunRecord) -> dict[str, object]:
    """Return what the page's scripts read; nothing of a part that is damaged."""
    found: dict[str, object] = {}
    for name, part in {SERIES: series_of, answers.SAMPLES: answers.samples_data}.items():
        try:
            found[name] = part(run)
        except DAMAGED:
            continue  # Its section says so.
    return found


def series_of(run: RunRecord) -> dict[str, object]:
    """Return the data of the run's charts, which charts.js draws."""
    return payload(varying(charts_of(run)))


def _groups(run: RunRecord) -> list[Markup]:
    """Return links to the groups of sections, then the groups; empty ones are left out."""
    found = [(title, part) for title in GROUPS if (part := group_of(run, title)) is not None]
    links = [tag("a", title, href=f"#{title.lower()}") for title, _ in found]
    return [tag("nav", *links, class_="jump", aria_label="sections"), *(part for _, part in found)]


def group_of(run: RunRecord, title: str) -> Markup | None:
    """Return the sections of one of GROUPS; None if all are empty."""
    parts = [part for section in GROUPS[title] if (part := shown(section, run)) is not None]
    return tag("div", *parts, id=title.lower()) if parts else None


def _chain(run: RunRecord) -> Markup:
    return tag("section", tag("h2", "The chain"), chain_picture(run.stages))


# Results first, then the evidence, then what is needed to reproduce the run.
GROUPS: Mapping[str, tuple[Callable[[RunRecord], Markup | None], ...]] = {
    "Results": (
        sections.expectations,
        sections.alarms,
        sections.changes,
        tasks,
        sections.reward_models,
        reward_cards,
        classifiers,
        earlier,
        merges,
    ),
    "Samples": (
        answers.side_by_side,
        answers.reward_and_length,
        answers.over_steps,
        answers.training_samples,
    ),
    "Training": (_chain, watching, curves),
    "Data": (sections.ledger, microscope),
    "Checks": (sections.preflight,),
    "Reproduce": (sections.cost, sections.reproduce),
}


def shown(section: Callable[[RunRecord], Markup | None], run: RunRecord) -> Markup | None:
    """Return a section, or a line in its place if a file that it reads is damaged."""
    try:
        return section(run)
    except DAMAGED as error:
        name = section.__name__.strip("_").replace("_", " ")
        told = f"{name}: not shown, a file of the run is damaged ({type(error).__name__}: {error})"
        return tag("section", tag("p", f"{told}. 'align verify {run.directory}' names it."))
