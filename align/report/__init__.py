"""Turn a run folder into one offline HTML file; no torch, no network, no script."""

from pathlib import Path

from align.report import sections
from align.report.card import reward_cards
from align.report.chain import chain_picture
from align.report.markup import Markup, duration, join, tag
from align.report.merge import earlier, merges
from align.report.preflight import preflight
from align.report.read import RunRecord, read_run

REPORT_FILE = "report.html"
# The browser itself refuses requests and scripts, whatever a completion may hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def build_report(run_dir: Path) -> Path:
    """Write report.html of a run from its artefacts; a half-finished run says what is missing.

    Args:
        run_dir: ``runs/<recipe name>``.

    Returns:
        The path of the report.

    Raises:
        ArtefactError: the folder holds no stage.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    path = run_dir / REPORT_FILE
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text("<!doctype html>\n" + page(run), encoding="utf-8")
    temporary.replace(path)
    return path


def page(run: RunRecord) -> Markup:
    """Give the whole page."""
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    done = sum(stage.status == "done" for stage in run.stages)
    seconds = run.summary.get("seconds") or sum(stage.seconds or 0.0 for stage in run.stages)
    head = f"{done} of {len(run.stages)} stages done, {duration(seconds)}, seed {run.recipe.seed}"
    return tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("title", f"{run.recipe.name}: align report"),
            tag("style", Markup(style)),
        ),
        tag(
            "body",
            tag("header", tag("h1", run.recipe.name), tag("p", run.recipe.description),
                tag("p", head, class_="quiet")),
            sections.missing(run),
            tag("section", tag("h2", "The chain"), chain_picture(run.stages)),
            join(sections.comparison(run), sections.expectations(run), reward_cards(run)),
            join(earlier(run), merges(run), preflight(run)),
            join(sections.side_by_side(run), sections.curves(run)),
            join(sections.training_samples(run), sections.cost(run), sections.reproduce(run)),
        ),
        lang="en",
    )  # fmt: skip
