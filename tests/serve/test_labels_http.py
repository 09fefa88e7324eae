"""Labels over HTTP: forms, the labeling page's requests, what they refuse, and kill -9."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from align.data.labels import snapshots
from benchmarks.labels import run_with_kills
from tests.serve.running import Running, running

EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)>{{ 7 * 7 }}"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.chdir(tmp_path)
    with running(tmp_path / "runs") as found:
        yield found


def rows(count: int, **more: Any) -> bytes:
    made = [
        {"prompt": f"q{i}", "response_a": f"good {i}", "response_b": f"poor {i}"} | more
        for i in range(count)
    ]
    return "".join(json.dumps(row) + "\n" for row in made).encode()


def create(
    client: httpx.Client, name: str, file: bytes, *, filename: str = "pairs.jsonl", **fields: Any
) -> httpx.Response:
    return client.post("/labels", data={"name": name, **fields}, files={"file": (filename, file)})


def test_a_project_is_made_labeled_and_exported(server: Running):
    with server.client() as client:
        made = create(client, "p", rows(3, models=["secret-1", "secret-2"]), reasons="wrong\n rude")
        assert (made.status_code, made.headers["location"]) == (303, "/labels/p")
        seen = []
        for i in range(3):
            found = client.post("/labels/p/next").json()
            task = found["task"]
            assert (found["mine"], found["left"]) == (i, 3 - i)
            seen.append(task["prompt"][0]["content"])
            sides = [turns[0]["content"].split()[0] for turns in task["responses"]]
            choice = ("left", "right")[sides.index("good")]
            said = {"choice": choice, "reasons": ["rude"], "seconds": 1.5}
            assert client.post(f"/labels/p/tasks/{task['id']}", json=said).json()["mine"] == i + 1
        assert sorted(seen) == ["q0", "q1", "q2"]
        assert client.post("/labels/p/next").json()["task"] is None
        page = client.get("/labels/p").text
        assert "3 of 3 items" in page
        assert "secret-1 was preferred over secret-2: 100 %" in page
        assert client.post("/labels/p/export").headers["location"] == "/labels/p#train"
        (folder,) = snapshots("p")
        text = (folder / "preference.jsonl").read_text()
        found = client.get("/labels/p/snapshots/1/preference.jsonl")
        assert found.text == text
        assert found.headers["content-disposition"].startswith("attachment")
        exported = [json.loads(line) for line in text.splitlines()]
        assert {(r["chosen"], r["rejected"]) for r in exported} == {
            (f"good {i}", f"poor {i}") for i in range(3)
        }
        assert exported[0]["models"] == {"chosen": "secret-1", "rejected": "secret-2"}
        assert exported[0]["votes"][0]["reasons"] == ["rude"]


def test_what_an_annotator_gets_does_not_tell_which_model_wrote_a_response(server: Running):
    with server.client() as client:
        create(client, "p", rows(20, models=["secret-1", "secret-2"]))
        page = client.get("/labels/p/work").text
        tasks = [client.post("/labels/p/next").text]
        while (task := json.loads(tasks[-1])["task"]) is not None:
            assert task.keys() == {"id", "prompt", "responses"}
            answer = client.post(f"/labels/p/tasks/{task['id']}", json={"choice": "tie"})
            assert answer.json().keys() == {"mine", "left"}
            tasks.append(client.post("/labels/p/next").text)
        assert len(tasks) == 21
        assert "secret" not in page + "".join(tasks)
        assert "pairs.jsonl" not in page + "".join(tasks)
        left = [json.loads(t)["task"]["responses"][0][0]["content"][:4] for t in tasks[:-1]]
        assert {"good", "poor"} == set(left)


def test_texts_of_models_are_never_markup(server: Running):
    row = {"prompt": EVIL, "response_a": EVIL + "a", "response_b": EVIL, "models": [EVIL, "m"]}
    with server.client() as client:
        create(client, "p", json.dumps(row).encode(), reasons=EVIL[:80], instructions=EVIL)
        found = client.post("/labels/p/next")
        assert found.headers["content-type"] == "application/json"
        assert found.json()["task"]["prompt"][0]["content"] == EVIL
        said = {"choice": "left"}
        client.post(f"/labels/p/tasks/{found.json()['task']['id']}", json=said)
        client.post("/labels/p/export")
        for path in ("/labels", "/labels/p", "/labels/p/work"):
            page = client.get(path).text
            assert "<script>alert" not in page
            assert "<img src=x" not in page
            assert "49" not in page.partition("<main")[2]
        assert "&lt;img src=x onerror" in client.get("/labels/p/work").text


def test_a_project_is_made_of_the_samples_of_a_run(server: Running, tmp_path: Path):
    stage = tmp_path / "runs" / "r" / "evaluate"
    stage.mkdir(parents=True)
    lines = [
        {"model": m, "prompt": f"q{i}", "completion": f"{m} {i}", "scores": {"reward": i * s}}
        for i in range(3)
        for m, s in (("sft", 1.0), ("dpo", -1.0))
    ]
    (stage / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "samples.jsonl").write_text((stage / "samples.jsonl").read_text())
    with server.client() as client:
        assert "<option>r/evaluate:dpo</option>" in client.get("/labels").text
        sides = {"first": "r/evaluate:sft", "second": "r/evaluate:dpo", "by": "reward"}
        made = client.post("/labels", data={"name": "p", "queue": "margin", **sides})
        assert made.status_code == 303, made.text
        task = client.post("/labels/p/next").json()["task"]
        assert task["prompt"][0]["content"] == "q0"
        for place in (str(elsewhere), "../elsewhere:sft", "r/../../elsewhere", "r/evaluate"):
            refused = client.post("/labels", data={"name": "q", "first": place})
            assert refused.status_code == 400
            assert "Choose a file" in refused.text
        more = client.post("/labels/p/items", data={"first": "r/evaluate:sft"})
        assert more.status_code == 400
        assert "no two different responses" in more.text


def test_recipes_that_read_the_labels_have_a_button_and_a_comparison(
    server: Running, tmp_path: Path
):
    recipe = (
        "name: r\nstages:\n  base: {kind: base, path: models/x}\n"
        "  dpo: {kind: dpo, init: base, data: [{labels: NAME}]}\n"
    )
    (tmp_path / "mine.yaml").write_text(recipe.replace("NAME", "p"))
    (tmp_path / "other.yaml").write_text(recipe.replace("NAME", "q"))
    (tmp_path / "broken.yaml").write_text("labels: p: [")
    with server.client() as client:
        create(client, "p", rows(1))
        task = client.post("/labels/p/next").json()["task"]
        client.post(f"/labels/p/tasks/{task['id']}", json={"choice": "left"})
        client.post("/labels/p/export")
        page = client.get("/labels/p").text
        assert 'name="recipe" value="mine.yaml"' in page
        assert "other.yaml" not in page
        assert "/compare" not in page, "there is nothing to compare yet"
        for run in ("r", "r-1", "r-7", "mine", "other"):
            (tmp_path / "runs" / run).mkdir()
        page = client.get("/labels/p").text
    assert 'href="/compare?run=r&amp;run=r-1"' in page


REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("p/tasks/1", {"choice": "good"}, 400, "expected one of left, right, tie, bad"),
    ("p/tasks/1", {"choice": "left", "x": 1}, 400, "body.x"),
    ("p/tasks/1", {"choice": 1}, 400, "body.choice"),
    ("p/tasks/1", {"choice": "left", "reasons": ["x"]}, 400, "unknown reasons"),
    ("p/tasks/1", {"choice": "left", "edit": ""}, 400, "empty, unchanged"),
    ("p/tasks/99", {"choice": "left"}, 409, "not yours"),
    ("p/tasks/x", {"choice": "left"}, 400, "task"),
    ("q/tasks/1", {"choice": "left"}, 404, "No such labeling project"),
    ("p/next?beside=x", {}, 400, "beside"),
    ("p/next?beside=" + "1," * 150 + "1", {}, 400, "beside"),
    ("q/undo", {}, 404, "No such labeling project"),
]


def test_a_request_that_makes_no_sense_is_refused_as_json(server: Running):
    with server.client() as client:
        create(client, "p", rows(1))
        assert client.post("/labels/p/next").json()["task"]["id"] == 1
        for path, body, status, message in REFUSED:
            found = client.post(f"/labels/{path}", json=body)
            assert found.status_code == status, (path, body, found.text)
            assert message in found.json()["error"]
        assert client.post("/labels/p/next").json()["mine"] == 0


SENSELESS: list[tuple[dict[str, str], bytes, str]] = [
    ({"name": "../p"}, rows(1), "expected a name of 1 to 64"),
    ({"name": "p", "wanted": "0"}, rows(1), "wanted: found 0"),
    ({"name": "p", "kind": "stars"}, rows(1), "kind"),
    ({"name": "p", "queue": "margin"}, rows(1), "which needs the margins"),
    ({"name": "p"}, b'{"prompt": "q"}\n', "up.jsonl:1:"),
    ({"name": "p"}, b"not json\n", "up.jsonl:1"),
    ({"name": "p"}, b"", "up.jsonl"),
    ({"name": "p", "gold": "true"}, rows(1), "do not say which one is better"),
]


def test_a_form_that_makes_no_sense_changes_nothing(server: Running):
    with server.client() as client:
        for fields, file, message in SENSELESS:
            found = create(client, file=file, filename="../up.jsonl", **fields)
            assert found.status_code == 400, (fields, file)
            assert message in found.text
            assert "/tmp" not in found.text, "the server's own paths are nobody's business"
        assert "There is no project yet" in client.get("/labels").text


def test_strangers_and_forms_without_a_token_are_refused(server: Running):
    with server.client() as client:
        create(client, "p", rows(1))
    with httpx.Client(base_url=server.url) as stranger:
        assert stranger.get("/labels").headers["location"] == "/login"
        for path in ("/labels/p/next", "/labels/p/undo", "/labels/p/export", "/labels"):
            assert stranger.post(path, json={}).status_code == 401
    with server.browser() as browser:
        assert browser.get("/labels/p/work").status_code == 200
        for path in ("/labels/p/next", "/labels/p/undo", "/labels/p/export", "/labels/p/items"):
            assert browser.post(path, json={}).status_code == 403
        headers = {"X-CSRF-Token": server.csrf(browser)}
        assert browser.post("/labels/p/next", headers=headers).json()["task"]["id"] == 1
        form = {"csrf": server.csrf(browser)}
        assert browser.post("/labels/p/export", data=form).status_code == 400  # nothing to export


NO_FILES = [
    "p/snapshots/1/..%2f..%2fserve.sqlite",
    "p/snapshots/1/%2e%2e%2f%2e%2e%2frecipe.yaml",
    "p/snapshots/1/other.jsonl",
    "p/snapshots/2/preference.jsonl",
    "..%2fp/snapshots/1/preference.jsonl",
    "q/snapshots/1/preference.jsonl",
    "q",
    "q/work",
]


def test_only_the_files_of_a_snapshot_are_served(server: Running):
    with server.client() as client:
        create(client, "p", rows(1))
        client.post("/labels/p/next")
        client.post("/labels/p/tasks/1", json={"choice": "left"})
        client.post("/labels/p/export")
        assert client.get("/labels/p/snapshots/1/preference.jsonl").status_code == 200
        for path in NO_FILES:
            assert client.get(f"/labels/{path}").status_code == 404, path


# ---- kill -9


def test_a_killed_server_loses_and_doubles_no_label(tmp_path: Path):
    assert run_with_kills(tmp_path, items=16, annotators=2, kills=3) == 32


@pytest.mark.long
def test_a_server_killed_at_50_moments_loses_and_doubles_no_label(tmp_path: Path):
    assert run_with_kills(tmp_path, items=150, annotators=4, kills=50) == 300
