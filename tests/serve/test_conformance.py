"""Every call of the unmodified openai client against a real server."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.serve.running import Running, running
from tests.serve.tiny_model import (
    GRADER,
    REINFORCEMENT,
    SUPERVISED,
    jsonl,
    save_model,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server without devices: jobs wait in the queue."""
    place = str(save_model(tmp_path_factory.mktemp("model")))
    models = {"tiny": place, "org/tiny": place}
    with running(tmp_path_factory.mktemp("runs"), models=models, devices=()) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> OpenAI:
    return server.openai()


@pytest.fixture(scope="module")
def training_file(client: OpenAI) -> str:
    return client.files.create(file=("t.jsonl", jsonl(SUPERVISED)), purpose="fine-tune").id


# ---- files


def test_files_are_created_listed_read_and_deleted(client: OpenAI):
    made = [
        client.files.create(
            file=(f"f{i}.jsonl", jsonl([i])),
            purpose="user_data",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
        for i in range(5)
    ]
    assert made[0].expires_at == made[0].created_at + 3600
    assert (made[0].bytes, made[0].filename, made[0].status) == (2, "f0.jsonl", "processed")
    assert client.files.retrieve(made[1].id) == made[1]
    assert client.files.wait_for_processing(made[1].id) == made[1]
    assert client.files.content(made[3].id).read() == b"3\n"
    listed = [file.id for file in client.files.list(purpose="user_data", limit=2, order="asc")]
    assert listed == [file.id for file in made]
    newest = client.files.list(purpose="user_data", limit=2)
    assert [file.id for file in newest.data] == [made[4].id, made[3].id]
    assert newest.has_more
    assert client.files.delete(made[0].id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made[0].id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(made[0].id)


def test_a_large_file_comes_in_parts(client: OpenAI):
    content = bytes(range(256)) * 5000
    upload = client.uploads.create(
        bytes=len(content), filename="large.jsonl", mime_type="text/jsonl", purpose="fine-tune"
    )
    assert upload.status == "pending"
    half = len(content) // 2
    parts = [
        client.uploads.parts.create(upload.id, data=io.BytesIO(part)).id
        for part in (content[half:], content[:half])
    ]
    done = client.uploads.complete(upload.id, part_ids=parts[::-1])
    assert done.status == "completed"
    assert done.file is not None
    assert client.files.content(done.file.id).read() == content
    assert client.uploads.complete(upload.id, part_ids=parts[::-1]).file == done.file
    chunked = client.uploads.upload_file_chunked(
        file=content, filename="c.jsonl", bytes=len(content), mime_type="x", purpose="fine-tune"
    )
    assert chunked.file is not None
    assert client.files.content(chunked.file.id).read() == content


def test_an_upload_must_have_the_announced_size_and_hash(client: OpenAI):
    def upload(**more: Any) -> Any:
        made = client.uploads.create(
            bytes=4, filename="x", mime_type="text/jsonl", purpose="fine-tune"
        )
        part = client.uploads.parts.create(made.id, data=b"abcd").id
        return client.uploads.complete(made.id, part_ids=[part, *more.pop("also", [])], **more)

    assert upload(md5="e2fc714c4727ee9395f324cd2e7f331f").status == "completed"
    with pytest.raises(openai.BadRequestError, match="md5"):
        upload(md5="0" * 32)
    with pytest.raises(openai.NotFoundError, match="part"):
        upload(also=["part-000"])
    made = client.uploads.create(bytes=4, filename="x", mime_type="x", purpose="fine-tune")
    with pytest.raises(openai.APIStatusError, match="larger"):
        client.uploads.parts.create(made.id, data=b"abcde")
    with pytest.raises(openai.BadRequestError, match="0 bytes, 4 were announced"):
        client.uploads.complete(made.id, part_ids=[])
    for _ in range(2):
        assert client.uploads.cancel(made.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        client.uploads.parts.create(made.id, data=b"ab")


def test_an_upload_that_expires_and_whose_last_part_is_sent_again(client: OpenAI):
    made = client.uploads.create(
        bytes=4,
        filename="x",
        mime_type="text/jsonl",
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    first = client.uploads.parts.create(made.id, data=b"ab").id
    last = client.uploads.parts.create(made.id, data=b"cd").id
    # The answer was lost: the client counts its second attempt in a header.
    again = {"x-stainless-retry-count": "1"}
    assert client.uploads.parts.create(made.id, data=b"cd", extra_headers=again).id == last
    with pytest.raises(openai.APIStatusError, match="larger than the 4 bytes"):
        client.uploads.parts.create(made.id, data=b"e")
    # The order of the parts is the one that completes them.
    file = client.uploads.complete(made.id, part_ids=[last, first]).file
    assert file is not None
    assert file.expires_at == file.created_at + 3600
    assert client.files.content(file.id).read() == b"cdab"
    nonsense = {"nonsense": 1}
    with pytest.raises(openai.BadRequestError, match="nonsense"):
        client.uploads.complete(made.id, part_ids=[], extra_body=nonsense)
    with pytest.raises(openai.BadRequestError, match="nonsense"):
        client.uploads.create(
            bytes=4, filename="x", mime_type="x", purpose="fine-tune", extra_body=nonsense
        )


# ---- jobs


def wait_for(client: OpenAI, job: str, *statuses: str) -> Any:
    """Poll until a job has one of the statuses; the caller's test has a limit."""
    while (found := client.fine_tuning.jobs.retrieve(job)).status not in statuses:
        assert found.status not in ("succeeded", "failed", "cancelled"), found
    return found


def test_a_job_has_the_objects_fields_and_waits_in_the_queue(client: OpenAI, training_file: str):
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=training_file,
        suffix="mine",
        seed=7,
        metadata={"team": "a"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}},
        },
    )
    assert job.object == "fine_tuning.job"
    assert job.status == "validating_files"
    assert (job.model, job.seed, job.training_file) == ("tiny", 7, training_file)
    assert (job.fine_tuned_model, job.finished_at, job.result_files) == (None, None, [])
    queued = wait_for(client, job.id, "queued")
    assert queued.method.supervised.hyperparameters.batch_size == 1
    assert queued.hyperparameters.n_epochs == 2
    assert queued.hyperparameters.learning_rate_multiplier == 1.0
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=2)]
    assert messages == [
        "Files validated, moving job to queued state",
        f"Validating training file: {training_file}",
        f"Created fine-tuning job: {job.id}",
    ]
    assert list(client.fine_tuning.jobs.checkpoints.list(job.id)) == []


def test_an_integration_is_taken_as_the_client_shows_it(client: OpenAI, training_file: str):
    wandb: Any = {"project": "p", "tags": ["a"], "entity": None, "name": None}
    asked: Any = [{"type": "wandb", "wandb": wandb}]
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=training_file, integrations=asked
    )
    shown = [integration.to_dict() for integration in job.integrations or []]
    again = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=training_file,
        integrations=shown,  # type: ignore[arg-type]
    )
    assert again.integrations == job.integrations


def test_an_expired_file_trains_no_job(server: Running, client: OpenAI):
    file = client.files.create(
        file=("t.jsonl", jsonl(SUPERVISED)),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    with server.services.store.write() as db:
        db.execute("UPDATE files SET expires_at = expires_at - 3601 WHERE id = ?", (file.id,))
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    with pytest.raises(openai.BadRequestError, match="no such file"):
        client.fine_tuning.jobs.create(model="tiny", training_file=file.id)


def test_the_old_form_of_hyperparameters_is_understood(client: OpenAI, training_file: str):
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=training_file, hyperparameters={"n_epochs": 1}
    )
    assert job.method is not None
    assert job.method.type == "supervised"
    assert job.hyperparameters.n_epochs == 1


def test_jobs_are_listed_by_page_and_by_metadata(client: OpenAI, training_file: str):
    def create(metadata: dict[str, str] | None) -> str:
        found = client.fine_tuning.jobs.create(
            model="tiny", training_file=training_file, metadata=metadata
        )
        return found.id

    key = "odd] = 'x"
    ids = [create({"team": "z", key: str(i)}) for i in range(5)]
    create(None)
    listed = [job.id for job in client.fine_tuning.jobs.list(metadata={"team": "z"}, limit=2)]
    assert listed == ids[::-1]
    both = client.fine_tuning.jobs.list(metadata={"team": "z", key: "3"})
    assert [job.id for job in both] == [ids[3]]
    assert list(client.fine_tuning.jobs.list(metadata={"team": "nobody"})) == []
    without = client.fine_tuning.jobs.list(limit=100, extra_query={"metadata": "null"})
    assert not {job.id for job in without} & set(ids)
    with pytest.raises(openai.NotFoundError) as missing:
        client.fine_tuning.jobs.list(after="ftjob-nothing")
    assert missing.value.param == "after"


def test_a_queued_job_is_paused_resumed_and_cancelled(client: OpenAI, training_file: str):
    job = client.fine_tuning.jobs.create(model="tiny", training_file=training_file)
    wait_for(client, job.id, "queued")
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    done = client.fine_tuning.jobs.cancel(job.id)
    assert done.status == "cancelled"
    assert done.finished_at is not None
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="has the status cancelled"):
        client.fine_tuning.jobs.resume(job.id)


def test_a_wrong_line_fails_the_job_with_its_number_and_the_remedy(client: OpenAI):
    rows: list[Any] = [*SUPERVISED]
    rows[6] = {"messages": [{"role": "robot", "content": "x"}]}
    file = client.files.create(file=("t.jsonl", jsonl(rows)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    while (found := client.fine_tuning.jobs.retrieve(job.id)).status == "validating_files":
        pass
    assert found.status == "failed"
    assert found.error is not None
    assert (found.error.code, found.error.param) == ("invalid_training_file", "training_file")
    assert "line 7: messages[0].role is 'robot'; expected one of system" in found.error.message
    assert next(iter(client.fine_tuning.jobs.list_events(job.id))).level == "error"


def test_a_validation_file_with_trained_questions_fails_the_job(client: OpenAI, training_file: str):
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=training_file, validation_file=training_file
    )
    while (found := client.fine_tuning.jobs.retrieve(job.id)).status == "validating_files":
        pass
    assert found.error is not None
    assert (found.error.code, found.error.param) == ("invalid_training_file", "validation_file")
    assert found.error.message == (
        "validation_file: line 1: its first user message is also in line 1 of training_file. "
        "Remove the row from one of the files."
    )


def test_what_a_request_must_not_hold_is_refused(client: OpenAI, training_file: str):
    create = client.fine_tuning.jobs.create
    good: dict[str, Any] = {"model": "tiny", "training_file": training_file}
    other = client.files.create(file=("x.jsonl", b"{}"), purpose="user_data").id
    wrong: list[tuple[dict[str, Any], str, str | None]] = [
        ({"training_file": "file-nothing"}, "no such file", "training_file"),
        ({"training_file": other}, "upload it with fine-tune", "training_file"),
        ({"validation_file": "../../etc/passwd"}, "no such file", "validation_file"),
        ({"suffix": "a:b"}, "pattern", "suffix"),
        ({"suffix": "x" * 65}, "64", "suffix"),
        ({"seed": -1}, "seed", "seed"),
        ({"metadata": {"k" * 65: "v"}}, "metadata: expected up to 16", "metadata"),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 3}}}},
            "less than or equal to 2",
            "method.dpo.hyperparameters.beta",
        ),
        (
            {"integrations": [{"type": "wandb", "wandb": {"project": "p", "entity": "e"}}]},
            "entity",
            "integrations.0.wandb.entity",
        ),
        ({"extra_body": {"nonsense": 1}}, "nonsense", "nonsense"),
        ({"method": {"type": "reinforcement"}}, "grader", "method"),
        ({"method": {"type": "dpo", "supervised": {}}}, "settings of supervised", "method"),
        ({"hyperparameters": {"n_epochs": 0}}, "n_epochs", "hyperparameters.n_epochs"),
        # Not 1, and not 3.
        ({"hyperparameters": {"n_epochs": True}}, "n_epochs", "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": "3"}}, "n_epochs", "hyperparameters.n_epochs"),
        ({"seed": True}, "seed", "seed"),
    ]
    for change, message, param in wrong:
        with pytest.raises(openai.BadRequestError, match=message) as error:
            create(**{**good, **change})
        assert error.value.type == "invalid_request_error", change
        assert error.value.param == param, change
    asking = {
        "type": "score_model",
        "name": "judge",
        "model": "gpt-5",
        "input": [{"role": "user", "content": "Rate {{ sample.output_text }}"}],
    }
    method: Any = {"type": "reinforcement", "reinforcement": {"grader": asking}}
    with pytest.raises(openai.NotFoundError, match="gpt-5"):
        create(**{**good, "method": method})
    with pytest.raises(openai.NotFoundError, match="Base models: tiny, org/tiny") as missing:
        create(**{**good, "model": "gpt-5"})
    assert missing.value.code == "model_not_found"


# ---- models, graders, who asks


def test_models_are_listed_and_found_by_names_with_slashes(client: OpenAI):
    assert [model.id for model in client.models.list()] == ["tiny", "org/tiny"]
    assert client.models.retrieve("org/tiny").id == "org/tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("../tiny")
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete("tiny")


def test_graders_are_validated_and_run(client: OpenAI):
    graders = client.fine_tuning.alpha.graders
    assert graders.validate(grader=GRADER).grader is not None
    item = REINFORCEMENT[0]
    ran = graders.run(grader=GRADER, model_sample="sun", item=item)
    assert ran.reward == 1.0
    assert ran.metadata.type == "text_similarity"
    assert not ran.metadata.errors.other_error
    with pytest.raises(openai.BadRequestError, match="evaluation_metric"):
        graders.validate(grader={**GRADER, "evaluation_metric": "vibes"})
    lost = {**GRADER, "reference": "{{ item.nothing }}"}
    ran = graders.run(grader=lost, model_sample="sun", item=item)
    assert ran.reward == 0.0
    assert ran.metadata.errors.invalid_variable_error


def test_a_wrong_token_is_an_authentication_error(server: Running):
    with pytest.raises(openai.AuthenticationError) as error:
        server.openai(token="sk-align-wrong").models.list()
    assert error.value.code == "invalid_api_key"
    assert error.value.request_id is not None
    assert error.value.request_id.startswith("req_")


def test_what_belongs_to_another_token_is_not_found(
    server: Running, client: OpenAI, training_file: str
):
    job = client.fine_tuning.jobs.create(model="tiny", training_file=training_file)
    other = server.openai(token=server.services.auth.new_token("somebody else"))
    assert list(other.files.list()) == []
    assert list(other.fine_tuning.jobs.list()) == []
    for call in (
        lambda: other.files.retrieve(training_file),
        lambda: other.files.content(training_file),
        lambda: other.files.delete(training_file),
        lambda: other.fine_tuning.jobs.retrieve(job.id),
        lambda: other.fine_tuning.jobs.cancel(job.id),
        lambda: other.fine_tuning.jobs.list_events(job.id),
        lambda: other.fine_tuning.jobs.checkpoints.list(job.id),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    with pytest.raises(openai.BadRequestError, match="no such file"):
        other.fine_tuning.jobs.create(model="tiny", training_file=training_file)


def test_requests_and_jobs_and_files_are_limited_by_token(tmp_path: Path):
    limits = {"requests_per_minute": 30, "jobs_per_token": 1, "token_gib": 1e-6}
    models = {"tiny": "hub/tiny"}
    with running(tmp_path / "runs", models=models, devices=(), **limits) as own:
        client = own.openai(max_retries=0)
        file = client.files.create(file=("t.jsonl", jsonl(SUPERVISED[:10])), purpose="fine-tune")
        with pytest.raises(openai.PermissionDeniedError, match="quota") as full:
            client.files.create(file=("t.jsonl", jsonl(SUPERVISED)), purpose="fine-tune")
        assert full.value.code == "insufficient_quota"
        client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
        with pytest.raises(openai.RateLimitError, match="unfinished jobs"):
            client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
        listing = (client.models.list() for _ in range(100))
        with pytest.raises(openai.RateLimitError, match="30 requests per minute"):
            list(listing)
        assert own.openai().models.list().data  # the client waits as it is told, and tries again


# ---- retries


def test_a_key_of_the_client_makes_a_request_count_once(client: OpenAI, training_file: str):
    def create(key: str, **more: Any) -> str:
        made = client.fine_tuning.jobs.create(
            model="tiny",
            training_file=training_file,
            metadata={"test": "key"},
            extra_headers={"Idempotency-Key": key},
            **more,
        )
        return made.id

    first = create("k1")
    assert create("k1") == first
    assert create("k2") != first
    with pytest.raises(openai.BadRequestError, match="another request"):
        create("k1", suffix="other")
