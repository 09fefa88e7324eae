"""Every page of the labels in a browser: accessible, narrow, quiet; and training in two clicks."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
import test_report as parts

from align.serve.auth import COOKIE
from align.serve.labels.items import Candidate, add_items
from align.serve.labels.tables import Project, create_project
from align.serve.labels.tasks import Answer, next_task, record_answer
from tests.browser import Watched, accessibility_findings, chromium
from tests.serve.running import WAIT_S, Running, running
from tests.serve.test_labels_lead import FAKE, RECIPE

SHOTS = os.environ.get("ALIGN_SCREENSHOTS")
"""Folder for pictures of the pages, for people to look at."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.chdir(tmp_path)
    parts.write_run(tmp_path / "runs" / "mine")
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("SEED", "0"))
    with running(tmp_path / "runs", command=(FAKE,)) as found:
        yield found


def open_page(browser: Any, server: Running, *, token: str = "", **options: Any) -> Any:
    """Return a page that is logged in: as the owner, or with a token."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(WAIT_S * 1000)
    if token:
        page.goto(f"{server.url}/login")
        page.get_by_label("Token").fill(token)
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url(f"{server.url}/labels")
        return page
    with server.browser() as client:
        cookie = {"name": COOKIE, "value": client.cookies[COOKIE], "url": server.url}
    context.add_cookies([cookie])
    return page


def fill(server: Running) -> None:
    """Make projects of all kinds; two annotators disagree on half of the pairs of the first."""
    text = "A response with several words that go on for a while, as they do. " * 4
    pairs = [
        Candidate(f"What is {i}?", (f"good {i}. {text}", f"poor {i}. {text}"), ("sft", "dpo"))
        for i in range(8)
    ]
    settings = {"wanted": 2, "reasons": ("wrong", "rude"), "instructions": "Be fair.\n" * 3}
    with server.services.store.write() as db:
        project = create_project(db, Project("p", **settings))  # type: ignore[arg-type]
        add_items(db, project, pairs[:6], batch="first.jsonl")
        add_items(db, project, pairs[6:], batch="mine/evaluate:sft against mine/evaluate:dpo")
        for name, odd in (("maria", "left"), ("ben", "tie")):
            for i in range(8):
                task = next_task(db, project, name)
                assert task is not None
                left = str(task.responses[0]).startswith("good")
                choice = odd if i % 2 else ("left" if left else "right")
                answer = Answer(choice, seconds=4.0, reasons=("wrong",))
                record_answer(db, project, name, task=task.id, answer=answer)
        add_items(db, project, [Candidate("One more?", ("yes", "no"))], batch="third.jsonl")
        thumbs = create_project(db, Project("thumbs", kind="thumbs"))
        add_items(db, thumbs, [Candidate(f"{i} + 1?", (f"2. {text}",)) for i in range(9)])
        steps = create_project(db, Project("steps", kind="steps", wanted=2))
        sums = [Candidate(f"{i} + 1 + 1?", (f"{i} + 1 = 3", "3 + 1 = 4", "4")) for i in range(3)]
        add_items(db, steps, sums[:1])
        for name, good in (("maria", True), ("ben", False)):
            task = next_task(db, steps, name)
            assert task is not None
            answer = Answer("steps", steps=(True, good, good), seconds=9.0)
            record_answer(db, steps, name, task=task.id, answer=answer)
        add_items(db, steps, sums[1:])


PAGES = {
    "lead": (
        *("", "/p", "/p/instructions", "/p/conflicts", "/p/work"),
        *("/steps", "/steps/conflicts", "/steps/work", "/thumbs", "/thumbs/work"),
    ),
    "annotator": ("", "/p/instructions", "/p/work", "/thumbs/work"),
}
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


def look(page: Any, place: str, name: str) -> list[str]:
    """Open a page, in both widths, and return what is wrong with it."""
    page.set_viewport_size(WIDE)
    page.goto(place)
    if place.endswith("/work"):
        page.locator("#task").wait_for()
        page.get_by_role("button", name="Keys").click()
        if place.endswith("/p/work"):
            page.keyboard.press("e")
            page.locator("#edit").wait_for()
    found = []
    for size in (WIDE, PHONE):
        page.set_viewport_size(size)
        found += accessibility_findings(page)
        if (wide := page.evaluate("document.documentElement.scrollWidth")) > size["width"]:
            found.append(f"{wide} pixels wide")
        if SHOTS:
            page.screenshot(path=f"{SHOTS}/{name}-{size['width']}.png", full_page=True)
    return [f"{name}: {problem}" for problem in found]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_accessible_narrow_and_quiet(browser: Any, server: Running, scheme: str):
    fill(server)
    with server.client() as client:
        client.post("/labels/p/conflicts/1", data={"answer": "a"})
        client.post("/labels/p/train", data={"recipe": "mine.yaml"})
    token = server.services.auth.new_token("ann", "annotator")
    found = []
    for who, given in (("lead", ""), ("annotator", token)):
        page = open_page(browser, server, token=given, color_scheme=scheme)
        watched = Watched(page)
        for place in PAGES[who]:
            name = f"{scheme}-{who}{place.replace('/', '-')}"
            found += look(page, f"{server.url}/labels{place}", name)
        watched.assert_quiet(server.url)
        page.context.close()
    assert found == []


def test_labels_are_trained_on_and_compared_in_two_clicks(browser: Any, server: Running):
    fill(server)
    page = open_page(browser, server)
    watched = Watched(page)
    page.goto(f"{server.url}/labels/p")
    page.get_by_role("button", name="Export and train mine").click()
    page.get_by_role("link", name="Compare mine and mine-1").click()  # comes without a reload
    page.wait_for_url("**/compare?run=mine&run=mine-1")
    assert "mine-1" in page.locator("main").inner_text()
    watched.assert_quiet(server.url)
    record = json.loads(next(Path("labels/p").glob("0001-*/snapshot.json")).read_text())
    assert record["items"]["answered"] >= 4


def test_a_disagreement_is_decided_by_the_keyboard(browser: Any, server: Running):
    fill(server)
    page = open_page(browser, server)
    page.goto(f"{server.url}/labels/p/conflicts")
    first = page.locator("section.conflict").first
    item = first.get_attribute("aria-label")
    first.get_by_role("button", name="Both bad").focus()
    page.keyboard.press("Enter")
    decided = page.get_by_label(item, exact=True)
    decided.get_by_text("decided by owner").wait_for()
    pressed = decided.locator('[aria-pressed="true"]')
    assert pressed.inner_text() == "Both bad"
