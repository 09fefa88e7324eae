"""Pictures of the report and of the server's pages, compared with those in ``tests/baselines``.

``python -m tests.pictures [NAME ...]`` draws them again, after a change that is meant
(see ``NAMES``).
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

sys.path.insert(0, str(Path(__file__).parent / "unit"))
import test_report as parts

from align.recipe.schema import Recipe
from align.report import build_report
from align.serve.labels.items import Candidate, add_items
from align.serve.labels.tables import Project, create_project
from tests.browser import chromium
from tests.serve.running import Running, running

BASELINES = Path(__file__).parent / "baselines"
FONTS = {"sans-serif": "DejaVu Sans", "monospace": "Noto Sans Mono"}
"""The fonts of the baselines: with others every line breaks elsewhere."""
NAMES = ("report", "runs", "run", "label", "labels", "project")
"""In this order: the pages of a project change once an item was shown."""
VIEWS = [(width, scheme) for width in (1400, 768, 390) for scheme in ("light", "dark")]
SCALE = 4
"""Pixels of the page, in each direction, that are one pixel of a picture."""
COLORS = 64
CELL = 8
"""Pixels of a picture, in each direction, whose mean color is compared."""
CONTRAST = 10
"""Levels of 255 by which two cells differ visibly; shapes of letters differ by less."""
PATCH = 6
"""Cells that may differ visibly."""


READY = {"report": "svg.live .axes", "run": "svg.live .axes", "label": ".response .turn"}
"""What a script adds to a page, which is complete when it is there."""
DRAWN = "() => new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))"


def baseline(name: str, width: int, scheme: str) -> Path:
    """Return the file of a page's picture."""
    return BASELINES / f"{name}-{width}-{scheme}.png"


def fonts_differ() -> str:
    """Return which font this machine has in place of the baselines', or an empty string."""
    if shutil.which("fc-match") is None:
        return "fc-match is not installed, so the fonts are not known"
    for family, expected in FONTS.items():
        argv = ["fc-match", "--format=%{family[0]}", family]
        found = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        if found != expected:
            return f"{family} is {found} here, and {expected} in the baselines"
    return ""


def write_runs(folder: Path) -> None:
    """Write a finished run and one that has stopped, both from constants, with a fixed date."""
    parts.write_run(folder / "finished")
    _shorten(folder / "finished" / "evaluate" / "samples.jsonl", 60)
    recipe = Recipe.model_validate(parts.RECIPE)
    for name in ("base", "sft"):
        parts.write_stage(folder / "stopped", recipe, name)
    parts.write_stage(folder / "stopped", recipe, "grpo", done=False)
    _shorten(folder / "stopped" / "grpo" / "metrics.jsonl", 60)
    log = [f"12:00:{step:02} grpo {step}/600" for step in range(1, 13)]
    (folder / "stopped" / "grpo" / "log.txt").write_text("\n".join(log) + "\n")
    for hour, run in enumerate(("stopped", "finished"), start=12):
        # Local time, which the pages show.
        written = datetime(2026, 11, 28, hour).timestamp()
        for path in (folder / run).rglob("*"):
            os.utime(path, (written, written))
    build_report(folder / "finished")


def write_labels(server: Running) -> None:
    """Write a labeling project of four pairs."""
    pairs = [
        Candidate(f"Name a planet that is number {i} from the sun.", ("Mars.", f"Planet {i}."))
        for i in range(1, 5)
    ]
    settings = {"reasons": ("wrong", "impolite"), "instructions": "Prefer the correct response."}
    with server.services.store.write() as db:
        add_items(db, create_project(db, Project("planets", **settings)), pairs)


def _shorten(path: Path, lines: int) -> None:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.name == "samples.jsonl":  # the first prompts of every model
        rows = [row for row in rows if row["prompt_index"] < lines // 15]
    parts.write_lines(path, rows[:lines])


@contextmanager
def open_pages(
    browser: Any, server: Running, width: int, scheme: str, names: Sequence[str] = NAMES
) -> Iterator[dict[str, Any]]:
    """Yield these pages by name, each open at its whole height with its charts drawn."""
    options = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    context = browser.new_context(**options)
    context.set_default_timeout(120_000)
    page = context.new_page()
    page.goto(f"{server.url}/login?code={server.services.auth.login_code()}")
    page.wait_for_url(f"{server.url}/")
    addresses = {
        "runs": f"{server.url}/",
        "report": (server.services.settings.runs / "finished" / "report.html").as_uri(),
        "run": f"{server.url}/runs/stopped",
        "labels": f"{server.url}/labels",
        "project": f"{server.url}/labels/planets",
        "label": f"{server.url}/labels/planets/work",
    }
    pages = {}
    for name in names:
        page = pages[name] = context.new_page()
        page.goto(addresses[name])
        if name in READY:
            page.locator(READY[name]).first.wait_for()
        height = page.evaluate("document.documentElement.scrollHeight")
        page.set_viewport_size({"width": width, "height": height})
        page.evaluate(DRAWN)
    yield pages
    context.close()


def picture(page: Any, file: Path) -> Image.Image:
    """Return an open page as a small picture of few colors, and save it."""
    page.screenshot(path=file, full_page=True, animations="disabled", caret="hide")
    with Image.open(file) as large:
        small = large.convert("RGB").reduce(SCALE)
    few = small.quantize(COLORS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(file, optimize=True)
    return few.convert("RGB")


def difference(found: Image.Image, baseline: Image.Image) -> str:
    """Return in which way two pictures differ visibly, or an empty string.

    Mean colors of cells are compared, so that shapes of letters do not count; what appears,
    vanishes or moves by a line changes many cells.
    """
    if abs(found.height - baseline.height) > 2 or found.width != baseline.width:
        return f"it is {found.size} pixels large, and {baseline.size} in the baseline"
    size = (found.width, min(found.height, baseline.height))
    both = [image.crop((0, 0, *size)).reduce(CELL) for image in (found, baseline)]
    apart = ImageChops.difference(*both)
    columns = apart.width
    colors = zip(*(band.get_flattened_data() for band in apart.split()), strict=True)
    strongest = [max(color) for color in colors]
    cells = [i for i, value in enumerate(strongest) if value > CONTRAST]
    if len(cells) <= PATCH:
        return ""
    rows = sorted({i // columns * CELL * SCALE for i in cells})
    return f"{len(cells)} cells differ, from {rows[0]} to {rows[-1]} pixels below the top"


def main(names: Sequence[str]) -> None:
    """Draw the baselines of these pages again."""
    BASELINES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        write_runs(Path(place))
        with chromium() as browser, running(Path(place)) as server:
            write_labels(server)
            for width, scheme in VIEWS:
                with open_pages(browser, server, width, scheme, names) as pages:
                    for name, page in pages.items():
                        file = baseline(name, width, scheme)
                        picture(page, file)
                        sys.stdout.write(f"{file.name}: {file.stat().st_size / 1000:.0f} kB\n")


if __name__ == "__main__":
    if problem := fonts_differ():
        sys.exit(problem)
    main(sys.argv[1:] or NAMES)
