"""What clients, disks and clocks do to a server at the worst time."""

import shutil
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from align.core.errors import RecipeError
from align.recipe.load import load_recipe
from align.recipe.schema import GrpoStage
from align.serve.finetuning import generation, graders
from align.serve.finetuning.asked import ReinforcementHyperparameters
from align.serve.finetuning.files import Files
from align.serve.finetuning.generation import MAX_WAITING
from align.serve.finetuning.recipes import (
    check_changes,
    job_recipe,
    resolved,
    write_recipe,
)
from align.serve.finetuning.webhooks import Deliveries
from align.serve.store import Store
from tests.serve.running import WAIT_S, Running, running
from tests.serve.test_generation import FAKE
from tests.serve.tiny_model import SUPERVISED, jsonl, user

POLL_S = 0.02


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr(generation, "command", lambda _place, _engine: FAKE)
    with running(tmp_path, models={"tiny": "hub/tiny"}, devices=()) as found:
        yield found


def chat(server: Running, said: str, **more: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": [user(said)], **more}
    with server.client() as client:
        return client.post("/v1/chat/completions", json=body)


def all_places_are_free(server: Running) -> bool:
    """Wait until no request has a place of the models; whether that came to be."""
    generators, ends = server.services.parts["finetuning"].generators, time.monotonic() + WAIT_S
    while generators._waiting and time.monotonic() < ends:
        time.sleep(POLL_S)
    return not generators._waiting


def test_as_many_slow_answers_as_are_allowed_hold_up_nobody_else(server: Running):
    generators = server.services.parts["finetuning"].generators
    with ThreadPoolExecutor(MAX_WAITING) as pool:
        answers: list[Future[httpx.Response]] = []
        for i in range(MAX_WAITING - 1):
            answers.append(pool.submit(chat, server, "wait", stream=bool(i % 2)))
        while generators._waiting < MAX_WAITING - 1:
            time.sleep(POLL_S)
        # Every one of them has a thread of the server; there are others for this.
        assert [model.id for model in server.openai().models.list()] == ["tiny"]
        assert not any(answer.done() for answer in answers)
        # All of them wait for the model to be loaded, and may reach it after this one.
        assert chat(server, f"after {MAX_WAITING - 1}").status_code == 200
        found = [answer.result() for answer in answers]
    assert [(one.status_code, one.text) for one in found if one.status_code != 200] == []
    assert all_places_are_free(server)


def test_a_file_with_a_field_that_nothing_reads_is_refused(server: Running):
    fields = {"purpose": "fine-tune", "expires_after": "3600"}
    with server.client() as client:
        answer = client.post("/v1/files", data=fields, files={"file": ("t.jsonl", b"{}")})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "expires_after"
        assert "expires_after[seconds]" in answer.json()["error"]["message"]
        assert client.get("/v1/files").json()["data"] == []
        del fields["expires_after"]
        fields |= {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
        assert client.post("/v1/files", data=fields, files={"file": b"{}"}).status_code == 200


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            "supervised.max_lenght=3",
            "supervised.max_lenght: unknown key; did you mean 'max_length'?",
        ),
        ("dpo.max_length=no", "dpo.max_length: found 'no'; expected a whole number"),
        ("supervised.tuning.rank=0", "supervised.tuning.rank: found 0; expected a whole"),
        ("sft.steps=3", "sft.steps=3: expected METHOD.KEY=VALUE with one of the methods superv"),
        ("dpo.beta", "dpo.beta: expected METHOD.KEY=VALUE"),
        ("dpo", "dpo: expected METHOD.KEY=VALUE"),
    ],
)
def test_a_change_of_jobs_that_would_end_the_first_one_is_refused_at_the_start(change, told):
    good = ["supervised.eval_every=5", "dpo.beta=0.2", "reinforcement.sampling.max_new_tokens=8"]
    check_changes(good)
    with pytest.raises(RecipeError) as error:
        check_changes([*good, change])
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_clients_that_leave_a_stream_leave_nothing_behind(server: Running):
    body = {"model": "tiny", "messages": [user("wait")], "stream": True}
    with server.client() as client:
        for _ in range(5):
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                next(answer.iter_lines())
    assert chat(server, "go").status_code == 200
    assert all_places_are_free(server)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("n", 10**9), ("n", 0), ("n", True), ("max_tokens", -1), ("max_tokens", "9")),
        *(("seed", 10**30), ("seed", True), ("stop", ["x"] * 5), ("stop", ""), ("stop", [""])),
        *(("temperature", True), ("temperature", "1")),
    ],
)
def test_absurd_numbers_are_refused_or_do_no_harm(server: Running, field: str, value: Any):
    answer = chat(server, "hello", **{field: value})
    if value == 10**30:
        assert answer.status_code == 200
    else:
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith(field)


@pytest.mark.parametrize(
    "asked",
    [
        *({"store": True}, {"metadata": {"a": "b"}}, {"service_tier": "priority"}),
        *({"stream_options": {"include_usage": True}}, {"prompt_cache_key": "x"}),
        {"max_tokens": 1, "max_completion_tokens": 2},
        {"messages": [{"role": "user", "content": "hello", "name": "bob"}]},
    ],
)
def test_settings_of_a_chat_without_an_effect_are_refused(server: Running, asked: dict[str, Any]):
    answer = chat(server, "hello", **asked)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(next(iter(asked)))


def test_an_address_without_the_rest_of_a_path_is_the_apis_too(server: Running):
    with server.client() as client:
        assert client.get("/v1").json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize("suffix", ["a:b", "a b", "../x", "ü", "x\n", "x" * 65, "", "{{x}}"])
def test_suffixes_that_would_not_be_part_of_a_name_are_refused(server: Running, suffix: str):
    client = server.openai()
    file = client.files.create(file=("t.jsonl", jsonl(SUPERVISED)), purpose="fine-tune").id
    with pytest.raises(openai.BadRequestError) as error:
        client.fine_tuning.jobs.create(model="tiny", training_file=file, suffix=suffix)
    assert error.value.param == "suffix"
    assert not client.fine_tuning.jobs.list().data


def test_graders_that_run_at_the_same_time_are_bounded(
    server: Running, monkeypatch: pytest.MonkeyPatch
):
    def run_grader(*_: Any, **__: Any) -> Any:
        inside.append(None)
        while not leave:
            time.sleep(POLL_S)
        raise OSError(28, "No space left on device")  # it gives its place back all the same

    inside: list[None] = []
    leave: list[None] = []
    monkeypatch.setattr(graders, "run_grader", run_grader)
    body = {
        "grader": {
            **{"type": "string_check", "name": "g", "operation": "eq"},
            **{"input": "{{ sample.output_text }}", "reference": "x"},
        },
        "model_sample": "x",
    }
    path = "/v1/fine_tuning/alpha/graders/run"
    with server.client() as client, ThreadPoolExecutor(graders.MAX_RUNS) as pool:
        found = [pool.submit(client.post, path, json=body) for _ in range(graders.MAX_RUNS)]
        while len(inside) < graders.MAX_RUNS:
            time.sleep(POLL_S)
        assert client.post(path, json=body).status_code == 429
        leave.append(None)
        assert {answer.result().status_code for answer in found} == {507}
        assert client.post(path, json=body).status_code == 507


# ---- full disks


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), sqlite3.OperationalError("disk is full")]
)
def test_a_full_disk_is_told_and_changes_nothing(
    server: Running, error: Exception, monkeypatch: pytest.MonkeyPatch
):
    client = server.openai(max_retries=0)

    def full(*_: Any, **__: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Files, "write", full)
        with pytest.raises(openai.InternalServerError, match="disk of the server is full") as told:
            client.files.create(file=("t.jsonl", b"x"), purpose="fine-tune")
    assert (told.value.status_code, told.value.code) == (507, "disk_full")
    assert not client.files.list().data
    assert client.files.create(file=("t.jsonl", b"x"), purpose="fine-tune").bytes == 1


# ---- clocks


def test_an_event_that_was_planned_while_the_clock_was_ahead_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    url = "http://127.0.0.1:9/hook"  # nothing listens there
    with running(tmp_path, devices=(), private_webhooks=True) as own:
        with own.client() as client:
            assert client.post("/v1/webhooks", json={"url": url}).status_code == 200
        store: Store = own.services.store
        with store.write() as db:
            (hook,) = db.execute("SELECT id FROM webhooks").fetchone()
            insert = "INSERT INTO deliveries (webhook, event, body, next_at) VALUES (?, ?, '{}', ?)"
            for event, later in (("soon", 3600.0), ("year", 365 * 86400.0)):
                db.execute(insert, (hook, event, time.time() + later))
        deliveries = Deliveries(store, private=True)
        with deliveries.running():
            deliveries.step()
        with store.read() as db:
            rows = db.execute("SELECT event, attempts FROM deliveries").fetchall()
        tried = {row["event"]: row["attempts"] for row in rows}
        assert tried["soon"] == 0
        assert tried["year"] >= 1


# ---- what people see of a job


def test_the_run_of_a_job_says_whose_it_is_and_what(server: Running):
    client = server.openai()
    file = client.files.create(file=("t.jsonl", jsonl(SUPERVISED)), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file, suffix="mine").id
    while (status := client.fine_tuning.jobs.retrieve(job).status) == "validating_files":
        time.sleep(POLL_S)
    assert status == "queued"
    recipe = load_recipe(server.services.settings.data / "jobs" / job / "recipe.yaml")
    assert recipe.description == "Fine-tuning job of tester (mine): supervised, from tiny."


def test_a_short_context_leaves_room_for_a_prompt_and_a_response(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 96}')
    asked = ReinforcementHyperparameters().model_dump()
    chosen = resolved("reinforcement", asked, rows=12)
    settings = {"grader": {}, "hyperparameters": chosen}
    recipe = job_recipe(
        name="ftjob-1",
        description="",
        base=str(tmp_path),
        seed=0,
        method={"type": "reinforcement", "reinforcement": settings},
        files={"training": tmp_path / "rows.jsonl"},
        rows=12,
        integrations=[],
        url="http://127.0.0.1:1/v1",
    )
    write_recipe(recipe, tmp_path / "recipe.yaml")
    stage = load_recipe(tmp_path / "recipe.yaml").stages["train"]
    assert isinstance(stage, GrpoStage)
    # 96 tokens, of which half are for the response.
    assert (stage.max_length, stage.sampling.max_new_tokens) == (96, 48)


# ---- models that go away


def test_no_job_begins_from_a_base_that_is_gone(tmp_path: Path):
    gone = tmp_path / "gone"
    gone.mkdir()
    (gone / "config.json").write_text("{}")
    with running(tmp_path / "runs", models={"tiny": str(gone)}, devices=()) as own:
        client = own.openai()
        file = client.files.create(file=("t.jsonl", jsonl(SUPERVISED)), purpose="fine-tune").id
        shutil.rmtree(gone)
        with pytest.raises(openai.BadRequestError, match="no such model"):
            client.fine_tuning.jobs.create(model="tiny", training_file=file)
        assert not client.fine_tuning.jobs.list().data
