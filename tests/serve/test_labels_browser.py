"""The labeling page in a real browser: keys, undo, edits, blindness, phones, hostile texts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.serve.auth import COOKIE
from align.serve.labels.items import Candidate, add_items
from align.serve.labels.tables import Project, create_project
from tests.browser import Watched, chromium
from tests.serve.running import WAIT_S, Running, running

EVIL = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.chdir(tmp_path)
    with running(tmp_path / "runs") as found:
        yield found


class Page:
    """A page that is logged in, and what went wrong on it."""

    def __init__(self, chromium: Any, server: Running, **options: Any) -> None:
        self.server = server
        context = chromium.new_context(**options)
        with server.browser() as client:
            cookie = {"name": COOKIE, "value": client.cookies[COOKIE], "url": server.url}
        context.add_cookies([cookie])
        self.page = context.new_page()
        self.page.set_default_timeout(WAIT_S * 1000)
        self.watched = Watched(self.page)

    def assert_quiet(self) -> None:
        self.watched.assert_quiet(self.server.url)

    def work(self, project: str) -> None:
        self.page.goto(f"{self.server.url}/labels/{project}/work")
        self.shown()

    def shown(self, prompt: str = "") -> list[str]:
        """Return the texts of the responses, once the page shows a prompt."""
        self.page.locator("#prompt", has_text=prompt).wait_for()
        return self.page.locator(".response .turn").all_inner_texts()

    def progress(self, mine: int) -> None:
        """Wait until the server has recorded so many answers."""
        found = f"{mine} answer{'' if mine == 1 else 's'} by you"
        self.page.locator("#progress", has_text=found).wait_for()

    def prompt(self) -> str:
        return self.page.locator("#prompt").inner_text().strip()

    def next_after(self, prompt: str) -> None:
        """Wait until another item, or the end, is shown."""
        self.page.wait_for_function(
            "p => document.getElementById('prompt').innerText.trim() !== p "
            "|| !document.getElementById('none').hidden",
            arg=prompt,
        )


def make(server: Running, *candidates: Candidate, **settings: Any) -> None:
    with server.services.store.write() as db:
        project = create_project(db, Project("p", **settings))
        add_items(db, project, candidates)


def recorded(server: Running) -> dict[str, dict[str, Any]]:
    """Return the labels by prompt, as they are in the database."""
    with server.services.store.read() as db:
        rows = db.execute(
            "SELECT t.*, i.prompt FROM label_tasks t JOIN label_items i ON i.id = t.item_id "
            "WHERE t.state != 'shown' ORDER BY t.sequence"
        ).fetchall()
    assert len({row["prompt"] for row in rows}) == len(rows)
    return {json.loads(row["prompt"]): dict(row) for row in rows}


def test_ten_pairs_labeled_by_keys_give_exactly_these_rows(browser: Any, server: Running):
    pairs = [
        Candidate(f"question {i}?", (f"good {i}", f"poor {i}"), ("secret-1", "secret-2"))
        for i in range(10)
    ]
    make(server, *pairs, reasons=("wrong", "rude"))
    page = Page(browser, server)
    page.work("p")
    expected: dict[str, tuple[str, str | None, str]] = {}
    keys = ["best", "0", "b", "best", "Shift+2", "s", "best", "undone", "edit", "best"]
    for i, key in enumerate(keys):
        prompt = page.prompt()
        left, right = page.shown(prompt)
        assert {left[:4], right[:4]} == {"good", "poor"}
        assert "secret" not in page.page.content()
        better = ("1", "left") if left.startswith("good") else ("2", "right")
        reasons = "[]"
        if key == "undone":  # a wrong answer, taken back, and the right one
            page.page.keyboard.press("0")
            page.next_after(prompt)
            page.page.keyboard.press("u")
            assert page.shown(prompt) == [left, right], "the same order again"
        if key == "Shift+2":
            page.page.keyboard.press(key)
            reasons = '["rude"]'
        if key == "edit":
            page.page.keyboard.press("e" if better[1] == "left" else "r")
            page.page.locator("#edit").fill("even better 1 2 0 b s u")
            page.page.keyboard.press("Control+Enter")
            expected[prompt] = (better[1], "even better 1 2 0 b s u", reasons)
        elif key in ("0", "b", "s"):
            page.page.keyboard.press(key)
            if key != "s":
                expected[prompt] = ({"0": "tie", "b": "bad"}[key], None, reasons)
        else:
            page.page.keyboard.press(better[0])
            expected[prompt] = (better[1], None, reasons)
        if i < len(keys) - 1:
            page.next_after(prompt)
    page.page.locator("#none").wait_for()
    page.progress(9)
    found = recorded(server)
    labels = {
        prompt: (row["choice"], row["edit"], row["reasons"])
        for prompt, row in found.items()
        if row["state"] == "done"
    }
    assert labels == expected
    assert [row["state"] for row in found.values()].count("skipped") == 1
    assert len(found) == 10
    assert all(row["seconds"] > 0 for row in found.values() if row["state"] == "done")
    page.assert_quiet()


def test_the_digits_of_a_french_keyboard_answer_too(browser: Any, server: Running):
    make(server, *(Candidate(f"question {i}?", ("a", "b")) for i in range(2)), reasons=("wrong",))
    page = Page(browser, server)
    page.work("p")
    press = (
        "([key, code, shiftKey]) => document.body.dispatchEvent("
        "new KeyboardEvent('keydown', {key, code, shiftKey, bubbles: true}))"
    )
    for key, code in (("&", "Digit1"), ("à", "Digit0")):  # what they type without Shift
        prompt = page.prompt()
        page.page.evaluate(press, ["1", "Digit1", True])
        page.page.evaluate(press, [key, code, False])
        page.next_after(prompt)
    page.progress(2)
    found = [(row["choice"], row["reasons"]) for row in recorded(server).values()]
    assert found == [("left", '["wrong"]'), ("tie", '["wrong"]')]
    page.assert_quiet()


def test_answers_faster_than_the_server_show_no_item_twice(browser: Any, server: Running):
    make(server, *(Candidate(f"question {i}?", ("a", "b")) for i in range(8)))
    page = Page(browser, server)
    held: list[Any] = []
    page.work("p")
    # Every request waits until the key was pressed: the page is always ahead of the server.
    seen: list[str] = []
    page.page.route(
        "**/labels/p/**", lambda route: held.append(route) if len(seen) < 8 else route.continue_()
    )
    while not page.page.locator("#none").is_visible():
        if page.page.locator("#task").is_visible():
            seen.append(page.prompt())
            page.page.keyboard.press("s" if len(seen) == 3 else "1")
        page.page.wait_for_timeout(1)  # lets the events of the browser in
        while held:
            held.pop(0).continue_()
    assert len(seen) == len(set(seen)) == 8
    page.progress(7)
    found = recorded(server)
    assert [row["state"] for row in found.values()].count("done") == 7
    page.assert_quiet()


def test_hostile_texts_are_shown_as_text(browser: Any, server: Running):
    reply = ({"role": "assistant", "content": EVIL},)
    item = Candidate(EVIL, (EVIL + "a", list(reply)), (EVIL, EVIL))  # type: ignore[arg-type]
    make(server, item, reasons=(EVIL[:70],), instructions=EVIL)
    page = Page(browser, server)
    page.work("p")
    assert sorted(page.shown()) == [EVIL, EVIL + "a"]
    assert page.prompt() == EVIL
    assert page.page.locator("#work img, #work script").count() == 0
    page.page.keyboard.press("1")
    page.page.locator("#none").wait_for()
    page.progress(1)
    for path in ("/labels", "/labels/p"):
        page.page.goto(server.url + path)
        assert page.page.locator("main img, main script").count() == 0
        assert "hacked" not in page.page.title()
    page.assert_quiet()


def test_the_page_fits_a_phone_and_works_by_touch(browser: Any, server: Running):
    long = "word " * 200 + "x" * 300
    make(server, Candidate("q " + "y" * 200, (long + "a", long + "b")), reasons=("wrong",))
    viewport = {"width": 390, "height": 844}
    page = Page(browser, server, viewport=viewport, has_touch=True)
    page.work("p")
    width = "document.documentElement.scrollWidth"
    assert page.page.evaluate(width) <= 390
    for box in page.page.locator("main button:visible").all():
        size = box.bounding_box()
        assert size["height"] >= 24, "WCAG 2.2, 2.5.8: targets of at least 24 pixels"
    page.page.get_by_role("button", name="Keys").tap()
    page.page.locator("#help").wait_for()
    assert page.page.evaluate(width) <= 390
    page.page.get_by_role("button", name="wrong").tap()
    page.page.get_by_role("button", name="Tie").tap()
    page.page.locator("#none").wait_for()
    page.progress(1)
    (row,) = recorded(server).values()
    assert (row["choice"], row["reasons"]) == ("tie", '["wrong"]')
    for path in ("/labels", "/labels/p"):
        page.page.goto(server.url + path)
        assert page.page.evaluate(width) <= 390
    page.assert_quiet()


def test_steps_are_labeled_one_after_the_other(browser: Any, server: Running):
    make(server, Candidate("1 + 1 + 1?", ("1 + 1 = 2", "2 + 1 = 4", "so 4")), kind="steps")
    page = Page(browser, server)
    page.work("p")
    assert page.shown() == ["1 + 1 = 2", "2 + 1 = 4", "so 4"]
    page.page.keyboard.press("Enter")  # not yet: two steps have no label
    for key in ("1", "1", "2", "ArrowUp", "2", "Enter"):
        page.page.keyboard.press(key)
    page.page.locator("#none").wait_for()
    page.progress(1)
    (row,) = recorded(server).values()
    assert json.loads(row["steps"]) == [True, False, False]
    page.assert_quiet()


def test_a_project_is_made_and_exported_in_the_browser(
    browser: Any, server: Running, tmp_path: Path
):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "q", "response_a": "a", "response_b": "b"}\n')
    found = Page(browser, server)
    page = found.page
    page.goto(f"{server.url}/labels")
    page.get_by_label("Name").fill("p")
    page.get_by_label("File of").set_input_files(str(file))
    page.get_by_label("Reasons").fill("wrong\nrude")
    page.get_by_role("button", name="Create the project").click()
    page.get_by_role("link", name="Label", exact=True).click()
    found.shown("q")
    page.keyboard.press("1")
    page.locator("#none").wait_for()
    found.progress(1)
    page.get_by_role("link", name="See the results").click()
    page.get_by_role("button", name="Export the labels").click()
    page.get_by_text("p@1").wait_for()
    (exported,) = (tmp_path / "labels" / "p").glob("0001-*/preference.jsonl")
    with page.expect_download() as download:
        page.get_by_role("link", name="preference.jsonl").click()
    assert Path(download.value.path()).read_bytes() == exported.read_bytes()
    found.assert_quiet()
