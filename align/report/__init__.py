"""Turn a run folder into one offline HTML file; no torch, no network, no script."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from align.report import answers, sections
from align.report.card import cards_section, reward_cards
from align.report.chain import chain_picture
from align.report.classes import classifiers
from align.report.compare import comparison_page, read_two
from align.report.ledger import ledger
from align.report.markup import Markup, duration, tag
from align.report.merge import earlier, merges
from align.report.microscope import microscope
from align.report.overview import overview
from align.report.preflight import preflight
from align.report.read import RunRecord, read_run
from align.report.tasks import tasks
from align.report.watching import watching

REPORT_FILE = "report.html"
# The browser itself blocks requests and scripts, whatever a response may contain.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


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


def build_comparison(first: Path, second: Path) -> Path:
    """Write a page in the first run's folder that compares two runs.

    Raises:
        ArtifactError: one of the folders contains no stage.
    """
    one, other = read_two(Path(first), Path(second))
    path = one.directory / f"compare-{other.directory.resolve().name}.html"
    title = f"{one.recipe.name} and {other.recipe.name}"
    header = tag("header", tag("h1", title))
    return _write(path, document(title, header, *comparison_page(one, other)))


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


def document(title: str, *body: Markup | None) -> Markup:
    """Return a complete page with its style sheet inlined and no external resources."""
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title}: align report"),
        tag("style", Markup(style)),
    )
    return tag("html", head, tag("body", *body), lang="en")


def page(run: RunRecord) -> Markup:
    """Return the complete report page of a run."""
    done = sum(stage.status == "done" for stage in run.stages)
    known = run.summary.get("seconds")
    seconds = known if isinstance(known, int | float) else sum(s.seconds or 0.0 for s in run.stages)
    head = f"{done} of {len(run.stages)} stages done, {duration(seconds)}, seed {run.recipe.seed}"
    if (finished := run.finished) is not None:
        head += f", finished {finished:%Y-%m-%d %H:%M}"
    return document(
        run.recipe.name,
        tag(
            "header",
            tag("h1", run.recipe.name),
            tag("p", run.recipe.description),
            tag("p", head, class_="quiet"),
        ),
        sections.missing(run),
        _shown(overview, run),
        *_groups(run),
    )


def _groups(run: RunRecord) -> list[Markup]:
    """Return links to the groups of sections, then the groups; empty ones are left out."""
    found = []
    for title, group in GROUPS.items():
        parts = [part for section in group if (part := _shown(section, run)) is not None]
        if parts:
            found.append((title, tag("div", *parts, id=title.lower())))
    links = [tag("a", title, href=f"#{title.lower()}") for title, _ in found]
    return [tag("nav", *links, class_="jump", aria_label="sections"), *(part for _, part in found)]


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
    "Samples": (answers.side_by_side, answers.reward_and_length, answers.training_samples),
    "Training": (_chain, watching, sections.curves),
    "Data": (ledger, microscope),
    "Checks": (preflight,),
    "Reproduce": (sections.cost, sections.reproduce),
}


def _shown(section: Callable[[RunRecord], Markup | None], run: RunRecord) -> Markup | None:
    """Return a section, or a line in its place if a file that it reads is damaged."""
    try:
        return section(run)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        name = section.__name__.strip("_").replace("_", " ")
        told = f"{name}: not shown, a file of the run is damaged ({type(error).__name__}: {error})"
        return tag("section", tag("p", f"{told}. 'align verify {run.directory}' names it."))
