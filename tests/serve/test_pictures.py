"""The pages look as they did when somebody looked at them, at three widths, light and dark."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL", reason="pillow is not installed")
from PIL import Image

from tests import pictures
from tests.browser import chromium
from tests.serve.running import Running, running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    if problem := pictures.fonts_differ():
        pytest.skip(problem)
    folder = tmp_path_factory.mktemp("runs")
    pictures.write_runs(folder)
    with running(folder) as found:
        pictures.write_labels(found)
        yield found


def unlike(page: Any, name: str, width: int, scheme: str, folder: Path) -> str:
    """Return in which way an open page differs from its baseline."""
    with Image.open(pictures.baseline(name, width, scheme)) as baseline:
        found = pictures.picture(page, folder / f"{name}-{width}-{scheme}.png")
        return pictures.difference(found, baseline.convert("RGB"))


def all_unlike(server: Running, views: list[tuple[int, str]], folder: Path, *flags: str) -> Any:
    found = {}
    with chromium(*flags) as browser:
        for width, scheme in views:
            with pictures.open_pages(browser, server, width, scheme) as pages:
                for name in pictures.NAMES:
                    if problem := unlike(pages[name], name, width, scheme, folder):
                        found[f"{name}, {width} px, {scheme}"] = problem
    return found


def test_the_pages_look_like_their_baselines(server: Running, tmp_path: Path) -> None:
    found = all_unlike(server, pictures.VIEWS, tmp_path)
    assert not found, f"{found}; look at {tmp_path}, then: python -m tests.pictures"


def test_hinted_fonts_look_the_same(server: Running, tmp_path: Path) -> None:
    # Letters get other shapes and other shades at their edges.
    flags = ("--font-render-hinting=full", "--disable-font-subpixel-positioning")
    assert all_unlike(server, [(1400, "light"), (390, "dark")], tmp_path, *flags) == {}


PLANTED = {
    "a section vanishes": "section('Reward models').remove()",
    "a section is hidden": "section('Reward models').style.visibility = 'hidden'",
    "two sections change places": "section('Cost').before(section('How to reproduce'))",
    "a section moves down by a line": """section('Reward models').style.transform =
        'translate(0, 24px)'""",
    "a section moves to the right": "section('Curves').style.transform = 'translate(24px, 0)'",
    "a chart is empty": """document.querySelectorAll('figure[data-chart] svg.live')[1]
        .style.visibility = 'hidden'""",
    "the panels have another color": """document.documentElement.style
        .setProperty('--panel', '#c0c0c0')""",
    "the page grows": "document.body.style.paddingBottom = '8rem'",
}
SECTION = """const section = title => [...document.querySelectorAll('h2')]
    .find(node => node.textContent.startsWith(title)).closest('section');"""


def test_a_planted_change_is_found(server: Running, tmp_path: Path) -> None:
    missed = []
    view = (1400, "light", ["report"])
    with chromium() as browser, pictures.open_pages(browser, server, *view) as pages:
        page = pages["report"]
        for name, change in PLANTED.items():
            page.reload()
            page.locator("svg.live .axes").first.wait_for()
            page.evaluate(f"() => {{ {SECTION} {change} }}")
            if not unlike(page, "report", 1400, "light", tmp_path):
                missed.append(name)
    assert missed == []
