"""What an annotation lead does: roles, batches, disagreements, tables, training by a click."""

import csv
import fcntl
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from align.cli import cli
from align.core.errors import DataError, RecipeError
from align.data.labels import snapshots, write_snapshot
from align.recipe.load import load_recipe
from align.serve.labels.export import EXPORT_LOCK
from align.serve.labels.items import Candidate, add_items
from align.serve.labels.quality import cohen_kappa, quality_of
from align.serve.labels.tables import Project, create_project
from align.serve.labels.tasks import Answer, next_task, record_answer, undo
from align.serve.labels.training import derived, readers
from tests.serve.running import WAIT_S, Running, running

FAKE = str(Path(__file__).with_name("fake_training.py"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.chdir(tmp_path)
    with running(tmp_path / "runs", command=(FAKE,)) as found:
        yield found


def make(server: Running, *candidates: Candidate, batch: str = "", **settings: Any) -> Project:
    with server.services.store.write() as db:
        project = create_project(db, Project("p", **settings))
        add_items(db, project, candidates, batch=batch)
    return project


def pairs(count: int, **more: Any) -> list[Candidate]:
    models = ("secret-1", "secret-2")
    return [Candidate(f"q{i}", (f"good {i}", f"poor {i}"), models, **more) for i in range(count)]


def label(server: Running, project: Project, name: str, *, better: str = "good") -> None:
    """Label everything that is left for an annotator; ``tie`` is an answer too."""
    with server.services.store.write() as db:
        while (task := next_task(db, project, name)) is not None:
            left = str(task.responses[0]).startswith(better)
            choice = "tie" if better == "tie" else ("left" if left else "right")
            record_answer(db, project, name, task=task.id, answer=Answer(choice, seconds=2.0))


# ---- roles

ALLOWED = {
    "GET /labels",
    "GET /labels/{name}",
    "GET /labels/{name}/instructions",
    "GET /labels/{name}/work",
    "POST /labels/{name}/next",
    "POST /labels/{name}/tasks/{task}",
    "POST /labels/{name}/undo",
}
OPEN = {
    "GET /login",
    "POST /login",
    "POST /logout",
    "GET /static/report.css",
    "GET /live/charts.js",
}
FILLED = {
    "name": "p",
    "item": "1",
    "task": "1",
    "number": "1",
    "suffix": "csv",
    "group": "Overview",
}


def routes_of(server: Running) -> list[tuple[str, str]]:
    """Return the method and path of everything that the server answers."""
    return [
        (method, route.path)
        for route in server.app.routes
        for method in getattr(route, "methods", None) or ()
        if method != "HEAD"
    ]


def test_an_annotator_gets_nothing_but_labeling(server: Running):
    project = make(server, *pairs(2), wanted=2)
    label(server, project, "somebody else")
    token = server.services.auth.new_token("ann", "annotator")
    found = routes_of(server)
    assert len(found) > 50, "all areas are among them"
    tried = 0
    with server.client(token=token, follow_redirects=False) as client:
        for method, path in found:
            if f"{method} {path}" in ALLOWED | OPEN:
                continue
            place = path.replace(":path}", "}")
            for key, value in FILLED.items():
                place = place.replace(f"{{{key}}}", value)
            place = place.replace("{", "").replace("}", "")
            answer = client.request(method, place)
            if (method, place) == ("GET", "/"):
                assert answer.headers["location"] == "/labels"
                continue
            assert answer.status_code == 403, (method, place, answer.status_code)
            assert "secret" not in answer.text
            assert "may label at /labels" in answer.text
            tried += 1
    assert tried > 40


def test_an_annotator_sees_no_gold_no_models_and_no_labels_of_others(server: Running):
    gold = [
        Candidate(f"g{i}", (f"good g{i}", f"poor g{i}"), gold="a", source="gold.jsonl")
        for i in range(10)
    ]
    project = make(server, *pairs(20), *gold, gold_rate=0.4, repeat_rate=0.2, wanted=2)
    label(server, project, "somebody else")
    token = server.services.auth.new_token("ann", "annotator")
    seen, kinds = [], set()
    with server.client(token=token) as client:
        for path in ("/labels", "/labels/p/instructions", "/labels/p/work"):
            seen.append(client.get(path).text)
        while (task := client.post("/labels/p/next").json()).get("task") is not None:
            assert task.keys() == {"task", "mine"}, "what is left would tell gold items apart"
            assert task["task"].keys() == {"id", "prompt", "responses"}
            number = task["task"]["id"]
            done = client.post(f"/labels/p/tasks/{number}", json={"choice": "left"})
            assert done.json() == {"mine": task["mine"] + 1}
            kinds.add(task["task"]["prompt"][0]["content"][0])
            seen += [json.dumps(task), done.text]
        with server.services.store.read() as db:
            (other,) = db.execute(
                "SELECT min(t.id) FROM label_tasks t JOIN label_annotators a "
                "ON a.id = t.annotator_id WHERE a.name = 'somebody else'"
            ).fetchone()
        stolen = client.post(f"/labels/p/tasks/{other}", json={"choice": "left"})
        assert stolen.status_code == 409
    assert kinds == {"q", "g"}, "gold items were among them"
    assert not any(word in "".join(seen) for word in ("secret", "somebody", "gold.jsonl"))


def test_an_annotator_logs_in_with_a_token_and_labels(server: Running):
    make(server, *pairs(1))
    token = server.services.auth.new_token("ann", "annotator")
    with httpx.Client(base_url=server.url, timeout=WAIT_S) as browser:
        assert browser.post("/login", data={"token": token}).status_code == 200
        assert browser.get("/").headers["location"] == "/labels"
        assert ">Runs</a>" not in browser.get("/labels").text
        csrf = {"X-CSRF-Token": server.csrf(browser)}
        assert browser.post("/labels/p/next").status_code == 403
        assert browser.post("/labels/p/next", headers=csrf).json()["task"]["id"] == 1
        assert browser.post("/labels/p/export", headers=csrf).status_code == 403
        assert browser.post("/v1/fine_tuning/jobs", headers=csrf).status_code == 401
        assert browser.post("/logout", headers=csrf).headers["location"] == "/login"


def test_the_command_makes_tokens_of_both_roles(tmp_path: Path, server: Running):
    runner = CliRunner()
    argv = ["serve", "--runs", str(tmp_path / "runs"), "--new-token"]
    admin = runner.invoke(cli, [*argv, "lead"]).output.strip()
    annotator = runner.invoke(cli, [*argv, "ann", "--annotator"]).output.strip()
    with server.client(token=admin) as client:
        assert client.get("/labels").status_code == client.get("/").status_code == 200
    with server.client(token=annotator) as client:
        assert client.get("/labels").status_code == 200
        assert client.get("/v1/models").status_code == 403
    refused = runner.invoke(cli, ["serve", "--runs", str(tmp_path / "runs"), "--annotator"])
    assert isinstance(refused.exception, RecipeError)


# ---- agreement, disagreements, batches


def test_kappa_is_that_of_the_literature():
    # Two raters of 50 proposals: 20 both yes, 15 both no, 5 and 10 apart: (0.7 - 0.5) / (1 - 0.5).
    both = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    assert cohen_kappa(both) == pytest.approx(0.4)
    assert cohen_kappa([("y", "n"), ("n", "y")]) == pytest.approx(-1.0)
    assert cohen_kappa([("y", "y")] * 3) == 1.0
    assert cohen_kappa([]) is None


def disagreeing(server: Running) -> Project:
    """Return a project of 4 pairs with two labels each, which agree on none."""
    project = make(server, *pairs(4), wanted=2, reasons=("wrong",))
    label(server, project, "one")
    label(server, project, "two", better="tie")
    return project


def test_a_verdict_decides_an_item_whose_labels_differ(server: Running):
    project = disagreeing(server)
    with server.services.store.read() as db:
        (pair,) = quality_of(db, project).pairs
    assert (pair.first, pair.second) == ("annotator-1", "annotator-2")
    assert (pair.agreement.hits, pair.agreement.trials, pair.kappa) == (0, 4, 0.0)
    with server.client() as client:
        assert "4 items have labels that differ</a>; 4 of them without an answer" in (
            client.get("/labels/p").text
        )
        assert "no item has an answer" in client.post("/labels/p/export").text
        page = client.get("/labels/p/conflicts").text
        assert page.count("annotator-2: Tie") == page.count("annotator-1: A is better") == 4
        assert "secret" not in page, "verdicts are blind too"
        for item, answer in (("1", "b"), ("2", "tie"), ("3", "bad")):
            done = client.post(f"/labels/p/conflicts/{item}", data={"answer": answer})
            assert done.headers["location"] == "/labels/p/conflicts"
        client.post("/labels/p/conflicts/1", data={"answer": "a"})
        client.post("/labels/p/conflicts/3", data={"answer": ""})
        for item, answer in (("1", "good"), ("9", "a"), ("2", "x")):
            assert (
                client.post(f"/labels/p/conflicts/{item}", data={"answer": answer}).status_code
                == 400
            )
        client.post("/labels/p/export")
    (folder,) = snapshots("p")
    assert json.loads((folder / "snapshot.json").read_text())["items"] == {
        "answered": 2,
        "contested": 2,
        "decided": 2,
        "unfinished": 0,
    }
    (row,) = map(json.loads, (folder / "preference.jsonl").read_text().splitlines())
    assert (row["chosen"], row["decided"], len(row["votes"])) == ("good 0", True, 2)
    (tied,) = map(json.loads, (folder / "ties.jsonl").read_text().splitlines())
    assert (tied["prompt"], tied["decided"]) == ("q1", True)


def test_a_verdict_is_still_seen_and_taken_back_when_the_labels_agree(server: Running):
    project = make(server, *pairs(1), wanted=2)
    label(server, project, "one")
    label(server, project, "two", better="tie")
    with server.client() as client:
        client.post("/labels/p/conflicts/1", data={"answer": "b"})
        with server.services.store.write() as db:
            assert undo(db, project, "two") is not None
        label(server, project, "two")
        page = client.get("/labels/p/conflicts").text
        assert page.count("A is better</li>") == 2
        assert "Item 1: decided" in page, "the export still follows the verdict"
        client.post("/labels/p/conflicts/1", data={"answer": ""})
        assert "No item has labels that differ" in client.get("/labels/p/conflicts").text
        client.post("/labels/p/export")
    (row,) = map(json.loads, (snapshots("p")[0] / "preference.jsonl").read_text().splitlines())
    assert (row["chosen"], "decided" in row) == ("good 0", False)


def test_every_label_is_in_the_table_and_runs_no_formula(server: Running, tmp_path: Path):
    evil = '=HYPERLINK("http://x","y")'
    turns = [{"role": "user", "content": "a\nb"}]
    project = make(server, Candidate(turns, (evil, 'plain, "x"')), batch="one.jsonl")
    label(server, project, "=cmd", better="plain")
    with server.client() as client:
        found = client.get("/labels/p/labels.csv")
        assert found.headers["content-disposition"] == 'attachment; filename="p-labels.csv"'
        (row,) = csv.DictReader(io.StringIO(found.text))
        (whole,) = map(json.loads, client.get("/labels/p/labels.jsonl").text.splitlines())
        assert client.get("/labels/p/labels.exe").status_code == 400
    assert (row["prompt"], row["response_a"]) == ("a\nb", f"'{evil}")
    assert (row["response_b"], row["answer"], row["annotator"]) == (
        'plain, "x"',
        "b",
        "annotator-1",
    )
    assert (whole["prompt"], whole["response_a"], whole["answer"]) == (turns, evil, "b")
    assert (whole["batch"], whole["purpose"], whole["seconds"]) == ("one.jsonl", "label", 2.0)
    runner, target = CliRunner(), tmp_path / "out.csv"
    argv = ["labels", "votes", "p", str(target), "--runs", str(tmp_path / "runs")]
    assert runner.invoke(cli, argv).exit_code == 0
    assert target.read_bytes().decode() == found.text
    assert isinstance(runner.invoke(cli, argv).exception, DataError), "nothing is overwritten"


def test_the_page_shows_the_progress_of_each_batch(server: Running):
    project = make(server, *pairs(2), batch="first.jsonl")
    label(server, project, "one")
    rows = "".join(
        json.dumps({"prompt": f"q{i}", "response_a": f"good {i}", "response_b": f"poor {i}"}) + "\n"
        for i in range(5)
    )
    with server.client() as client:
        assert "<h2>Batches</h2>" not in client.get("/labels/p").text, "one needs no table"
        files = {"file": ("second.jsonl", rows.encode())}
        assert client.post("/labels/p/items", files=files).status_code == 303
        page = client.get("/labels/p").text
    table = page.partition("<h2>Batches</h2>")[2].partition("</table>")[0]
    assert "first.jsonl" in table.partition("second.jsonl")[0]
    assert "2 of 2" in table
    assert "0 of 3" in table, "two of the five were there before"


def test_instructions_are_changed_and_shown_to_annotators(server: Running):
    make(server, *pairs(1), instructions="old", reasons=("wrong",))
    token = server.services.auth.new_token("ann", "annotator")
    with server.client() as admin, server.client(token=token) as annotator:
        done = admin.post("/labels/p/instructions", data={"instructions": "Be <b>fair</b>.\nNew"})
        assert done.headers["location"] == "/labels/p/instructions"
        for path in ("/labels/p/instructions", "/labels/p/work"):
            page = annotator.get(path).text
            assert "Be &lt;b&gt;fair&lt;/b&gt;.\nNew" in page
            assert "old" not in page
            assert "Save the instructions" not in page
        assert annotator.post("/labels/p/instructions", data={}).status_code == 403
        tasks = annotator.post("/labels/p/next").json()
        assert tasks["task"] is not None, "the other settings are as before"


# ---- training

RECIPE = """
name: mine
seed: SEED
stages:
  base: {kind: base, path: models/x}
  dpo:
    kind: dpo
    init: base
    data: [{labels: p, weight: 2.0}, {path: "other$${x}.jsonl"}]
    heldout: [{labels: p@1}]
  grpo:
    kind: grpo
    init: base
    prompts: [{labels: p, rows: 5}]
    rewards: [{kind: regex, pattern: "yes"}]
    steps: 2
    watch: {every: 1, prompts: [{labels: p}], gold: [{kind: regex, pattern: "yes"}]}
"""


def test_the_recipe_of_a_snapshot_differs_in_nothing_else(server: Running, tmp_path: Path):
    project = make(server, *pairs(1))
    recipe = tmp_path / "recipes" / "mine.yaml"
    recipe.parent.mkdir()
    recipe.write_text(RECIPE.replace("SEED", "7"))
    old = RECIPE.replace("SEED", "7").replace("p@1", "p").replace("labels: p", "labels: p@1")
    (tmp_path / "old.yaml").write_text(old)
    (reader,) = readers(project)
    made = recipe.with_name("mine-3.yaml")
    made.write_text(derived(reader, project, 3))
    assert yaml.safe_load(made.read_text()).keys() == {"extends", "name", "stages"}
    found = load_recipe(made).model_dump()
    expected = load_recipe(recipe).model_dump()
    expected["name"] = "mine-3"
    assert expected["stages"]["dpo"]["data"][0]["labels"] == "p"
    expected["stages"]["dpo"]["data"][0]["labels"] = "p@3"
    expected["stages"]["grpo"]["prompts"][0]["labels"] = "p@3"
    expected["stages"]["grpo"]["watch"]["prompts"][0]["labels"] = "p@3"
    assert found == expected
    assert [r.path.name for r in readers(project)] == ["mine.yaml"], "not what was derived from it"
    plain = yaml.safe_load(recipe.read_text())
    (tmp_path / "json.yaml").write_text(json.dumps(plain))  # JSON is YAML
    assert [r.path.name for r in readers(project)] == ["json.yaml", "mine.yaml"]


def rows_of_jobs(server: Running) -> list[Any]:
    """Return the jobs of the queue as the database has them."""
    with server.services.store.read() as db:
        return db.execute("SELECT * FROM jobs").fetchall()


def wait_for(client: httpx.Client, text: str) -> str:
    """Return the part of the page about training once it contains a text."""
    deadline = time.monotonic() + WAIT_S
    while text not in (page := client.get("/labels/p/training").text):
        assert time.monotonic() < deadline, page
        time.sleep(0.05)
    return page


def test_a_click_exports_the_labels_and_trains_on_them(server: Running, tmp_path: Path):
    project = make(server, *pairs(2))
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("SEED", "0"))
    (tmp_path / "runs" / "mine").mkdir()
    train = {"recipe": "mine.yaml"}
    with server.client() as client:
        assert "nothing to export" in client.post("/labels/p/train", data=train).text
        label(server, project, "one")
        for other in ("../mine.yaml", "/etc/passwd", "mine-1.yaml", ""):
            assert client.post("/labels/p/train", data={"recipe": other}).status_code == 400
        assert "Export and train mine" in client.get("/labels/p").text
        assert client.post("/labels/p/train", data=train).headers["location"] == "/labels/p#train"
        page = wait_for(client, '"state done"')
        assert 'href="/compare?run=mine&amp;run=mine-1"' in page
        assert "hx-get" not in page, "nothing changes any more"
        client.post("/labels/p/train", data=train)  # the same labels again: the same run
        assert client.get("/labels/p/training").text == page
        assert client.get("/v1/fine_tuning/jobs").json()["data"] == []
        assert client.get("/v1/models").json()["data"] == []
        assert client.get("/v1/fine_tuning/jobs/mine-1").status_code == 404
    assert (tmp_path / "runs" / "mine-1" / "starts").read_text() == "p@1\n"
    (folder,) = snapshots("p")
    assert folder.name.startswith("0001-")


def test_labels_are_recorded_while_others_are_exported(
    server: Running, monkeypatch: pytest.MonkeyPatch
):
    project = make(server, *pairs(2), wanted=1)
    label(server, project, "one")
    (server.services.settings.runs.parent / "mine.yaml").write_text(RECIPE.replace("SEED", "0"))
    written: list[Path] = []

    def slow(*given: Any) -> Path:
        with server.client() as client:  # another export would wait, an answer does not
            assert client.post("/labels/p/undo").status_code == 200
        place = server.services.store.path.parent / EXPORT_LOCK
        with place.open("w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        written.append(write_snapshot(*given))
        return written[-1]

    monkeypatch.setattr("align.serve.labels.export.write_snapshot", slow)
    with server.client() as client:
        for path, form in (("export", {}), ("train", {"recipe": "mine.yaml"})):
            done = client.post(f"/labels/p/{path}", data=form)
            assert done.headers.get("location") == "/labels/p#train", done.text
    assert CliRunner().invoke(cli, ["labels", "export", "p", "--runs", "runs"]).exit_code == 0
    assert [folder.name[:4] for folder in written] == ["0001"] * 3


def test_a_run_on_labels_is_stopped_and_goes_on(server: Running, tmp_path: Path):
    project = make(server, *pairs(1))
    label(server, project, "one")
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("SEED", "1"))
    train, run = {"recipe": "mine.yaml"}, tmp_path / "runs" / "mine-1"
    with server.client() as client:
        client.post("/labels/p/train", data=train)
        deadline = time.monotonic() + WAIT_S
        while not (run / "waiting").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert 'hx-get="/labels/p/training"' in wait_for(client, '"state running"')
        assert client.post("/labels/p/stop", data={"run": "mine-2"}).status_code == 400
        assert client.post("/labels/p/stop", data={"run": "mine-1"}).status_code == 303
        assert "Stop</button>" not in wait_for(client, '"state stopped"')
        deadline = time.monotonic() + WAIT_S
        while any(job["pid"] for job in rows_of_jobs(server)):  # its process has to end too
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (tmp_path / "mine-1.yaml").write_text("name: mine\nstages: {}\n")
        refused = client.post("/labels/p/train", data=train)
        assert "this file exists and differs from the recipe for p@1" in refused.text


def test_a_run_on_labels_that_failed_says_why_and_is_tried_again(server: Running, tmp_path: Path):
    project = make(server, *pairs(1))
    label(server, project, "one")
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("SEED", "2"))
    with server.client() as client:
        client.post("/labels/p/train", data={"recipe": "mine.yaml"})
        assert "dpo: no row is left of 12" in wait_for(client, '"state failed"')
        (tmp_path / "mended").touch()
        client.post("/labels/p/train", data={"recipe": "mine.yaml"})
        assert "no row is left" not in wait_for(client, '"state done"')
    assert (tmp_path / "runs" / "mine-1" / "starts").read_text() == "p@1\np@1\n"
