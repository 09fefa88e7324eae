"""Live pages: right states, nothing written, nothing injected, new points on their own."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
import test_report as parts

from align.cli import cli
from align.core.lock import StageLock
from align.recipe.schema import Recipe
from align.report import GROUPS
from align.serve.live import state
from align.serve.live.process import holder
from align.serve.live.state import Records, state_of, versions
from tests.browser import Watched, accessibility_findings, chromium
from tests.serve.running import Running, running

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 120
HOLD = """
import fcntl, signal, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("held", flush=True)
signal.pause()
"""
"""A process that has locked a run, as `align run` does, and ends at SIGTERM, as it does."""


def write_unfinished(run: Path) -> None:
    """Write a run whose stage grpo is at step 60 of 600, with a line that is half-written."""
    recipe = Recipe.model_validate(parts.RECIPE)
    for name in ("base", "sft", "reward", "dpo", "ppo"):
        parts.write_stage(run, recipe, name)
    parts.write_stage(run, recipe, "grpo", done=False)
    lines = (run / "grpo" / "metrics.jsonl").read_text().splitlines(keepends=True)[:60]
    (run / "grpo" / "metrics.jsonl").write_text("".join(lines) + '{"step": 61, "rewa')
    (run / "grpo" / "log.txt").write_text("12:00:00 grpo 60/600\n\x1b[31mred\n")


def append(run: Path, **row: Any) -> None:
    """Add whole lines to the metrics of grpo; the half-written one is finished first."""
    with (run / "grpo" / "metrics.jsonl").open("a") as f:
        f.write('rd": 1}\n' + json.dumps({"time_s": 31.0, "total_steps": 600, **row}) + "\n")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    parts.write_run(folder / "finished")
    write_unfinished(folder / "unfinished")
    return folder


@pytest.fixture
def server(runs: Path) -> Iterator[Running]:
    with running(runs) as found:
        yield found


@pytest.fixture
def held(runs: Path) -> Iterator["subprocess.Popen[str]"]:
    argv = [sys.executable, "-c", HOLD, str(runs / "unfinished" / ".lock")]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return modification time and size of everything in the runs."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.lstat().st_size)
        for path in folder.rglob("*")
        if ".serve" not in path.parts
    }


# ---- states


def test_a_state_is_read_from_the_ends_of_the_files(runs: Path):
    done, left = state_of(runs / "finished"), state_of(runs / "unfinished")
    assert (done.state, done.done, done.total, done.fraction) == ("done", 7, 7, 1.0)
    assert done.problem == "1 of 2 expectations failed"
    assert (left.state, left.done, left.total) == ("stopped", 5, 7)
    assert (left.stage, left.step, left.total_steps) == ("grpo", 60, 600)
    # Five whole stages and a tenth of the sixth.
    assert left.fraction == pytest.approx(5.1 / 7)
    # At step 60 of 600: 0.2 + 0.6 / 10, and 0.08 / 10.
    assert left.headline == "reward/mean 0.26, kl/reference 0.008"
    assert left.left_s is None


def test_a_locked_run_runs_and_has_the_time_left(runs: Path, held: Any):
    assert holder(runs / "unfinished") == held.pid
    state = state_of(runs / "unfinished")
    assert state.state == "running"
    # 0.31 seconds a step, 540 steps left.
    assert state.left_s == pytest.approx(540 * 0.31)
    assert holder(runs / "finished") is None


def test_looking_does_not_take_the_lock(runs: Path, held: Any):
    held.kill()
    held.wait()
    assert holder(runs / "unfinished") is None
    with (runs / "unfinished" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert holder(runs / "unfinished") == os.getpid()


def test_a_stage_on_another_machine_runs_while_its_lock_is_touched(runs: Path):
    lock = runs / "unfinished" / "grpo" / "stage.lock"
    lock.write_text(json.dumps({"host": "node<7>", "place": "elsewhere", "pid": 1}))
    state = state_of(runs / "unfinished")
    assert (state.state, state.host) == ("running", "node<7>")
    os.utime(lock, (0, 0))
    assert state_of(runs / "unfinished").state == "killed"


def test_how_a_stage_has_ended_is_what_align_runs_says(runs: Path):
    """An error has a traceback or not, a resumed stage has the traceback of before."""
    stage = runs / "unfinished" / "grpo"
    failure, log = stage / "failure.txt", stage / "log.txt"

    def told() -> str:
        said = CliRunner().invoke(cli, ["runs", str(runs)]).output
        (line,) = [line for line in said.splitlines() if line.startswith("unfinished")]
        before = snapshot(runs)
        state = state_of(runs / "unfinished").state
        assert snapshot(runs) == before
        assert re.search(rf", {state}(: | in )grpo, ", line), line
        return state

    assert told() == "stopped"
    with log.open("a") as f:
        f.write("12:00:01 error: grpo: 3 rows are empty. Remove them\n  a.jsonl:1\n")
    assert told() == "failed"
    why = "grpo: 3 rows are empty. Remove them\n  a.jsonl:1"
    assert state_of(runs / "unfinished").problem == why
    failure.write_text("Traceback")
    assert told() == "failed"
    with log.open("a") as f:
        f.write("12:00:02 grpo: stopped by a signal. Run the same command again to resume\n")
    assert told() == "stopped"
    assert state_of(runs / "unfinished").problem == ""
    for folder, name in ((stage, "stage.lock"), (runs / "unfinished", "run.lock")):
        lock = StageLock(folder, name)
        assert told() == "running"
        left = json.loads(lock.path.read_text())
        lock.release()
        assert told() == "stopped"
        lock.path.write_text(json.dumps({**left, "started": "1"}))  # another process's number now
        assert told() == "killed"
        lock.path.unlink()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("grpo/recipe.yaml", b"\x00\xff{"),
        ("grpo/recipe.yaml", b"- 1"),
        ("grpo/metrics.jsonl", b'\xff\xfe\n[1]\n{"step": "x"}\n{"step": 1e999}\n'),
        (
            "grpo/metrics.jsonl",
            b'{"step": 1, "time_s": "x", "total_steps": [], "reward/mean": {}}\n',
        ),
        ("grpo/metrics.jsonl", b"[" * 100_000 + b"\n"),
        ("grpo/samples.jsonl", b'{"step": {}, "prompt": 3, "completion": [1], "score": "x"}\n'),
        ("grpo/samples.jsonl", b'{"prompt": null}\n\xff\n'),
        ("grpo/log.txt", b"\xff\x00\x1b]0;x\x07"),
        ("sft/manifest.json", b'{"metrics": 3, "spec": []}'),
        ("ppo/evaluations.jsonl", b'{"step": 1, "intervals": 3, "answers": [1]}\n' * 2),
        ("summary.json", b'{"tasks": 3, "expectations": [3], "stages": []}'),
        ("grpo/alarms.jsonl", b'{"step": []}\n'),
    ],
)
def test_damaged_files_are_told_and_stop_no_page(server: Running, runs: Path, file, content):
    place = runs / "unfinished" / file
    place.write_bytes(content)
    before = snapshot(runs)
    with server.client() as client:
        assert "unfinished" in client.get("/").text
        pages = ["", "/series", "/parts/status", "/parts/samples", "/parts/log", "/report"]
        pages += [f"/parts/{group}" for group in ("Overview", "Results", "Training", "Checks")]
        for page in pages:
            answer = client.get(f"/runs/unfinished{page}")
            # A recipe that cannot be read is one clear error; everything else is shown.
            if file == "grpo/recipe.yaml":
                assert answer.status_code in (200, 400), page
                assert answer.status_code == 200 or "resolved recipe" in answer.text
            else:
                assert answer.status_code == 200, page
    assert snapshot(runs) == before


def test_reading_writes_nothing_into_a_run(server: Running, runs: Path):
    before = snapshot(runs)
    with server.client() as client:
        for page in ("/", "/live/table", "/compare?run=finished&run=unfinished"):
            assert client.get(page).status_code == 200
        for name in ("finished", "unfinished"):
            for page in ("", "/series", "/report", "/parts/Samples", "/parts/log?stage=grpo"):
                assert client.get(f"/runs/{name}{page}").status_code == 200
    assert snapshot(runs) == before


def test_a_stage_that_is_set_aside_while_it_is_read_is_read_again(
    runs: Path, monkeypatch: pytest.MonkeyPatch
):
    calls, real = [], state.read_run

    def flaky(folder: Path) -> Any:
        calls.append(folder)
        if len(calls) == 1:
            raise FileNotFoundError(2, "No such file", "metrics.jsonl")
        return real(folder)

    monkeypatch.setattr(state, "read_run", flaky)
    assert len(Records().of(runs / "unfinished").stages) == 7
    assert len(calls) == 2


# ---- who may see and do what


def test_pages_need_a_login_and_names_cannot_leave_the_folder(server: Running, runs: Path):
    (runs.parent / "secret").mkdir()
    shutil.copytree(runs / "finished" / "base", runs.parent / "secret" / "base")
    with server.client(token="sk-align-wrong") as stranger:
        for page in ("/runs/finished/series", "/compare?run=a&run=b", "/runs/finished/events"):
            assert stranger.get(page).status_code in (303, 401), page
    with server.client() as client:
        for name in ("..%2Fsecret", "%2e%2e/secret", "../secret", ".serve", "none", "a%00b"):
            for page in ("", "/series", "/report", "/parts/log"):
                assert client.get(f"/runs/{name}{page}").status_code == 404, name
        assert client.get("/runs/finished/parts/log?stage=../../secret").status_code == 200
        assert client.get("/runs/finished/parts/../../secret").status_code == 404
        assert client.get("/compare?run=../secret&run=finished").status_code == 404
        assert client.get("/compare?run=finished").status_code == 400


def test_stop_sends_sigterm_but_only_with_the_token_of_the_form(
    server: Running, held: "subprocess.Popen[str]"
):
    with server.browser() as browser:
        token = server.csrf(browser)
        page = browser.get("/runs/unfinished").text
        assert 'action="/runs/unfinished/stop"' in page
        assert browser.post("/runs/unfinished/stop").status_code == 403
        wrong = browser.post("/runs/unfinished/stop", data={"csrf": "0" * 64})
        assert wrong.status_code == 403
        assert held.poll() is None
        answer = browser.post("/runs/unfinished/stop", data={"csrf": token})
        assert answer.status_code == 303
        assert held.wait(WAIT_S) == 75
        # There is nothing to stop now, and the page offers to resume.
        assert browser.post("/runs/unfinished/stop", data={"csrf": token}).status_code == 409
        assert 'action="/runs/unfinished/resume"' in browser.get("/runs/unfinished").text


def test_what_runs_is_not_resumed_and_a_job_is_left_to_its_queue(
    server: Running, runs: Path, held: Any
):
    with server.browser() as browser:
        form = {"csrf": server.csrf(browser)}
        answer = browser.post("/runs/unfinished/resume", data=form)
        assert answer.status_code == 409
        assert "running already" in answer.text
        (runs / ".serve" / "jobs" / "unfinished").mkdir(parents=True)
        answer = browser.post("/runs/unfinished/stop", data=form)
        assert answer.status_code == 409
        assert "fine-tuning API" in answer.text
        assert "/stop" not in browser.get("/runs/unfinished/parts/status").text
    assert held.poll() is None


def test_a_run_that_cannot_be_resumed_says_why(server: Running):
    # Its stages do not fit its recipe: `align run` refuses, and the page repeats what it said.
    with server.browser() as browser:
        form = {"csrf": server.csrf(browser)}
        assert browser.post("/runs/unfinished/resume", data=form).status_code == 303
        page = browser.get("/runs/unfinished/parts/status").text
        while "Starting" in page or "running" in page:
            page = browser.get("/runs/unfinished/parts/status").text
    assert "Resuming failed" in page
    assert "base: changed since it ran" in page
    assert "Traceback" not in page


# ---- what is shown


def test_samples_are_found_by_all_their_words(server: Running):
    with server.client() as client:

        def count(query: str) -> int:
            text = client.get(f"/runs/finished/parts/samples?{query}").text
            return int(re.findall(r'role="status">(\d+) samples', text)[0])

        # 5 models on 60 prompts, and 40 responses of each online stage.
        assert count("") == 5 * 60 + 2 * 40
        assert count("stage=grpo") == 40
        assert count("q=gladly") == 2 * 60
        # As text: 37 is also in no other response; dpo and ppo answer with "Gladly".
        assert count("q=GLADLY+%2337") == 2
        assert count("q=gladly+nowhere") == 0
        first = client.get("/runs/finished/parts/samples?q=gladly").text
        second = client.get("/runs/finished/parts/samples?q=gladly&page=1").text
        assert first.count("<article>") == second.count("<article>") == 25
        assert first != second


def test_a_page_of_many_runs_reads_the_recipes_of_its_own_runs_once(
    server: Running, runs: Path, monkeypatch: pytest.MonkeyPatch
):
    def counted(recipe: Path) -> Any:
        read.append(recipe.parent.parent.name)
        return real(recipe)

    read: list[str] = []
    real = state.read_resolved
    monkeypatch.setattr(state, "read_resolved", counted)
    monkeypatch.setattr(state, "PAGE", 2)
    for i, name in enumerate(("oldest", "unfinished", "finished")):
        if name == "oldest":
            shutil.copytree(runs / "finished", runs / name)
        for path in (runs / name).rglob("*"):
            os.utime(path, (1e9 + i, 1e9 + i))
    with server.client() as client:

        def shown(page: str) -> list[str]:
            return re.findall(r'<a href="/runs/(\w+)"', client.get(page).text)

        for _ in range(2):
            assert shown("/") == shown("/live/table?page=0") == ["finished", "unfinished"]
        assert sorted(read) == ["finished", "unfinished"]
        assert 'href="/?page=1">Older runs' in client.get("/").text
        assert shown("/?page=1") == shown("/live/table?page=1") == ["oldest"]
        assert 'href="/?page=0">Newer runs' in client.get("/?page=1").text
        assert "Older" not in client.get("/?page=1").text
        assert client.get("/?page=-1").status_code == 400
        for recipe in (runs / "oldest").glob("*/recipe.yaml"):
            recipe.write_text("damaged: [")
        # It has changed, so it is the newest one.
        assert '<span class="state damaged">' in client.get("/").text


def test_the_curves_of_a_run_come_before_its_samples(server: Running):
    with server.client() as client:
        page = client.get("/runs/finished").text
    parts = re.findall(r'id="(\w+)-part"', page)
    assert sorted(parts) == sorted(title.lower() for title in GROUPS)
    assert parts.index("training") < parts.index("samples")


def test_hostile_text_is_text_everywhere(server: Running, runs: Path):
    name = "<img src=x onerror=alert(1)>"
    shutil.copytree(runs / "finished", runs / name)
    (runs / name / "sft" / "log.txt").write_text(parts.EVIL)
    with server.client() as client:
        for page in ("/", f"/runs/{name}", f"/compare?run={name}&run=finished"):
            text = client.get(page).text
            assert "<img" not in text
            assert "<script>" not in text
            assert " style=" not in text
        assert "&lt;img src=x" in client.get("/").text
        assert "alert(" in client.get(f"/runs/{name}/parts/samples?q=alert").text


def test_events_name_what_has_changed_since_the_page(server: Running, runs: Path):
    seen = versions(runs / "unfinished")
    append(runs / "unfinished", step=62, **{"reward/mean": 0.5})
    with (
        server.client() as client,
        client.stream("GET", "/runs/unfinished/events", params=seen) as stream,
    ):
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.iter_lines()
        assert next(line for line in lines if line.startswith("event")) == "event: changed"
        assert json.loads(next(lines).removeprefix("data: ")) == ["series", "status"]
        (runs / "unfinished" / "grpo" / "log.txt").write_text("more\n")
        changed = next(line for line in lines if line.startswith("data"))
        assert json.loads(changed.removeprefix("data: ")) == ["log"]


def test_a_comparison_has_a_line_for_each_run(server: Running):
    with server.client() as client:
        found = client.get("/compare/series?run=finished&run=unfinished").json()
    (chart,) = [c for c in found["charts"] if c["id"] == "grpo/reward/mean"]
    assert [line["label"] for line in chart["lines"]] == ["finished", "unfinished"]
    assert [len(line["y"]) for line in chart["lines"]] == [600, 60]


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


def test_a_new_point_appears_without_reloading(
    browser: Any, server: Running, runs: Path, held: Any
):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(WAIT_S * 1000)
    watched = Watched(page)
    page.goto(f"{server.url}/login?code={server.services.auth.login_code()}")
    page.wait_for_url(f"{server.url}/")
    page.get_by_role("link", name="unfinished").click()
    chart = page.locator('figure[data-chart="grpo/reward/mean"]')
    chart.locator("svg.live .axes").wait_for()
    page.evaluate("window.notReloaded = true")
    assert page.locator('figure[data-chart="grpo/kl/coef"]').count() == 0
    append(runs / "unfinished", step=62, **{"reward/mean": 0.8125, "kl/coef": 0.25})
    with (runs / "unfinished" / "grpo" / "log.txt").open("a") as f:
        f.write("12:00:02 a new line of the log\n")
    chart.locator("button.line", has_text="0.8125").wait_for()
    page.locator("#status", has_text="step 62 of 600").wait_for()
    page.locator("#log-lines", has_text="a new line of the log").wait_for()
    # A metric that begins to change gets a chart of its own.
    append(runs / "unfinished", step=63, **{"reward/mean": 0.75, "kl/coef": 0.5})
    page.locator('figure[data-chart="grpo/kl/coef"]').wait_for(state="attached")
    page.get_by_label("search prompts and responses").fill("gladly")
    page.locator("#found", has_text="0 samples").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.wait_for_url(f"{server.url}/runs/unfinished")
    assert held.wait(WAIT_S) == 75
    page.get_by_role("button", name="Resume").wait_for()
    watched.assert_quiet(server.url)
    context.close()


HIDE = """hidden => {
    Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
}"""


def test_a_hidden_page_keeps_no_connection_and_gets_what_it_missed(
    browser: Any, server: Running, runs: Path
):
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(WAIT_S * 1000)
    page.goto(f"{server.url}/login?code={server.services.auth.login_code()}")
    page.wait_for_url(f"{server.url}/")
    with page.expect_request("**/events*") as opened:
        page.goto(f"{server.url}/runs/unfinished")
    with page.expect_event("requestfailed", lambda request: request == opened.value):
        page.evaluate(HIDE, True)
    with (runs / "unfinished" / "grpo" / "log.txt").open("a") as f:
        f.write("12:00:03 while nobody looked\n")
    page.evaluate(HIDE, False)
    page.locator("#log-lines", has_text="while nobody looked").wait_for()
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_a_phone_and_have_no_serious_finding_of_axe(
    browser: Any, server: Running, scheme: str
):
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(WAIT_S * 1000)
    watched = Watched(page)
    page.goto(f"{server.url}/login?code={server.services.auth.login_code()}")
    page.wait_for_url(f"{server.url}/")
    for path in ("/", "/runs/unfinished", "/compare?run=finished&run=unfinished"):
        page.goto(server.url + path)
        if path != "/":
            page.locator("svg.live .axes").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == 390, path
        assert accessibility_findings(page) == [], path
    watched.assert_quiet(server.url)
    context.close()


def test_selected_runs_stay_selected_and_are_compared(browser: Any, server: Running):
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(WAIT_S * 1000)
    watched = Watched(page)
    page.goto(f"{server.url}/login?code={server.services.auth.login_code()}")
    page.wait_for_url(f"{server.url}/")
    for name in ("finished", "unfinished"):
        page.get_by_label(f"compare {name}").check()
    with page.expect_response(lambda answer: answer.url.endswith("/live/table")):
        pass
    page.get_by_role("button", name="Compare").click()
    page.locator("svg.live .axes").first.wait_for()
    assert page.locator("h1").inner_text() == "unfinished and finished"
    watched.assert_quiet(server.url)
    context.close()
