"""Jobs end to end: the official client trains a tiny model and chats with the result."""

import csv
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.serve.finetuning.adapters import STATES
from align.stages.tools.generate import write_adapter
from align.tuning.files import WEIGHTS
from reward_models.graders import ask_url, request_of
from tests.moments import wait_at
from tests.serve.running import Running, running
from tests.serve.tiny_model import (
    DPO,
    GRADER,
    JOB_KEYS,
    REINFORCEMENT,
    SUPERVISED,
    WORDS,
    jsonl,
    reply,
    save_model,
    user,
)

pytestmark = pytest.mark.slow
POLL_S = 0.2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model: str) -> Iterator[Running]:
    runs = tmp_path_factory.mktemp("runs")
    with running(runs, models={"tiny": model}, job_keys=JOB_KEYS, devices=("", " ")) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> OpenAI:
    return server.openai()


def start(client: OpenAI, rows: list[Any], method: dict[str, Any], **more: Any) -> Any:
    file = client.files.create(file=("t.jsonl", jsonl(rows)), purpose="fine-tune")
    return client.fine_tuning.jobs.create(
        model="tiny", training_file=file.id, method=method, seed=3, **more
    )


def ended(client: OpenAI, job: str) -> Any:
    while True:
        found = client.fine_tuning.jobs.retrieve(job)
        if found.status in ("succeeded", "failed", "cancelled"):
            return found
        time.sleep(POLL_S)


def supervised(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


def test_a_supervised_job_trains_a_model_that_answers(
    server: Running, client: OpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = [{"messages": [user(f"Say {word}."), reply(word)]} for word in ("lake", "hill")]
    validation = client.files.create(file=("v.jsonl", jsonl(rows)), purpose="fine-tune")
    # It waits to be paused as it writes its first metrics, and goes on from there.
    waits = tmp_path / "waits"
    for name, value in wait_at("train/metrics.jsonl", waits).items():
        monkeypatch.setenv(name, value)
    job = start(
        client,
        SUPERVISED,
        supervised(n_epochs=10, batch_size=2, learning_rate_multiplier=10),
        validation_file=validation.id,
        suffix="words",
    )
    jobs = client.fine_tuning.jobs
    while not waits.exists():
        assert jobs.retrieve(job.id).status != "failed"
        time.sleep(POLL_S)
    assert jobs.pause(job.id).status == "paused"
    assert jobs.resume(job.id).status == "queued"
    done = ended(client, job.id)
    assert done.status == "succeeded", done.error
    # The name has the base, who trained it, the suffix and the job.
    name = done.fine_tuned_model
    assert name == f"ft:tiny:tester:words:{job.id.removeprefix('ftjob-')[:12]}"
    # It is an ordinary run: 12 rows in batches of 2 for 10 epochs are 60 steps,
    # and step 0 measures the validation file before the first one.
    run = server.services.settings.runs / job.id
    logged = [json.loads(line) for line in (run / "train" / "metrics.jsonl").open()]
    assert [row["step"] for row in logged] == list(range(61))
    # Each row is its template's bytes and markers, "user\nSay sun." and "assistant\nsun".
    row_tokens = [len(f"user\nSay {w}.assistant\n{w}") + 4 for w in WORDS]
    assert done.trained_tokens == 10 * sum(row_tokens)
    events = [e for e in client.fine_tuning.jobs.list_events(job.id) if e.type == "metrics"]
    assert [event.data["step"] for event in events] == list(range(60, -1, -1))  # type: ignore[index]
    assert events[0].data["train_loss"] == logged[-1]["train/loss"]  # type: ignore[index]
    table = list(csv.DictReader(io.StringIO(client.files.content(done.result_files[0]).text)))
    assert [float(row["train_loss"]) for row in table[1:]] == [x["train/loss"] for x in logged[1:]]
    assert float(table[0]["valid_loss"]) == logged[0]["eval/loss"]
    assert client.files.retrieve(done.result_files[0]).purpose == "fine-tune-results"
    # One at the end of each epoch of 6 steps and one where the pause stopped the run, at a step
    # that depends on the machine; the last three are kept.
    epochs = {step for step in range(1, 61) if step % 6 == 0}
    folders = (run / "train" / "checkpoints").glob("step-*")
    paused = {int(path.name.removeprefix("step-")) for path in folders} - epochs
    assert len(paused) <= 1
    steps = sorted(epochs | paused, reverse=True)[:3]
    saved = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [(c.step_number, c.fine_tuning_job_id) for c in saved] == [(s, job.id) for s in steps]
    assert [c.metrics.train_loss for c in saved] == [logged[s]["train/loss"] for s in steps]
    checkpoint = saved[0]
    assert name in [model.id for model in client.models.list()]
    _chat(server, client, name, monkeypatch)
    _checkpoints(server, client, name, saved, run=run)
    _shared(server, client, checkpoint.fine_tuned_model_checkpoint, name)


def _chat(server: Running, client: OpenAI, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chat whole and streamed: greedy decoding gives the same text both ways."""
    asked: dict[str, Any] = {
        "model": name,
        "messages": [user("Say sun.")],
        "temperature": 0,
        "max_completion_tokens": 12,
    }
    whole = client.chat.completions.create(**asked)
    assert whole.model == name
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert 1 <= whole.usage.completion_tokens <= 12
    # The template wraps 8 characters, one token a byte, in 3 markers and 3 role lines.
    assert whole.usage.prompt_tokens == len("user\nSay sun.assistant\n") + 3
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    # A stream that its reader leaves frees the model for the next request.
    left = client.chat.completions.create(**{**asked, "max_completion_tokens": 200}, stream=True)
    assert next(iter(left)).choices[0].delta.role == "assistant"
    left.close()
    again = client.chat.completions.create(**asked)
    assert again.choices[0].message.content == text
    # A grader of a job asks in the same way, as the job's owner.
    monkeypatch.setenv("ALIGN_GRADER_KEY", server.services.auth.delegate(1))
    request = request_of(name, asked["messages"], {"temperature": 0, "max_completions_tokens": 12})
    assert ask_url(f"{server.url}/v1", request) == text
    two = client.chat.completions.create(**{**asked, "temperature": 1, "n": 2, "seed": 5})
    again = client.chat.completions.create(**{**asked, "temperature": 1, "n": 2, "seed": 5})
    assert [c.message for c in two.choices] == [c.message for c in again.choices]
    with pytest.raises(openai.BadRequestError, match="context has 256") as long:
        client.chat.completions.create(model=name, messages=[user("x" * 300)])
    assert long.value.code == "context_length_exceeded"
    tool: Any = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(**asked, tools=[tool])


def _checkpoints(
    server: Running, client: OpenAI, name: str, saved: list[Any], *, run: Path
) -> None:
    """The last checkpoint is the model; an earlier one has the weights of its own step."""
    asked: dict[str, Any] = {"messages": [user("Say sun.")], "max_completion_tokens": 3}
    asked |= {"temperature": 0, "logprobs": True, "top_logprobs": 2}

    def likely(model: str) -> list[float]:
        (choice,) = client.chat.completions.create(model=model, **asked).choices
        assert choice.logprobs is not None
        entries = choice.logprobs.content or []
        assert 1 <= len(entries) <= 3
        for entry in entries:  # greedy: the sampled token is the most likely one
            assert entry.top_logprobs[0].logprob == entry.logprob
            assert len(entry.top_logprobs) == 2
        return [entry.logprob for entry in entries]

    last, _, first = (c.fine_tuned_model_checkpoint for c in saved)
    assert likely(last) == likely(name)
    base = likely("tiny")
    assert likely(first) != likely(last)
    assert base not in (likely(first), likely(last))
    # The adapter that is written at the end and the one in the last checkpoint are the same.
    out = run.parent / "taken-out"
    weights = run / "train/checkpoints/step-00000060" / STATES
    write_adapter(weights, like=run / "train/adapter", out=out)
    one, two = (load_file(f / WEIGHTS) for f in (out, run / "train/adapter"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    # By transformers alone: the first token's log-probability of the model that was saved whole.
    model = AutoModelForCausalLM.from_pretrained(run / "train/model")
    tokenizer = AutoTokenizer.from_pretrained(run / "train/model")
    ids = tokenizer.apply_chat_template(
        asked["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    with torch.inference_mode():
        rows = model(ids).logits[0, -1].log_softmax(-1)
    assert likely(name)[0] == pytest.approx(float(rows.max()), abs=1e-4)
    with pytest.raises(openai.BadRequestError, match="no job can start"):
        client.fine_tuning.jobs.create(model=first, training_file="file-x")
    assert client.models.retrieve(first).id == first


def _shared(server: Running, client: OpenAI, checkpoint: str, name: str) -> None:
    """A checkpoint's permission lets another token use it, and only as long as it lasts."""
    other = server.openai(token=server.services.auth.new_token("bob"))
    permissions = client.fine_tuning.checkpoints.permissions
    with pytest.raises(openai.NotFoundError):
        other.models.retrieve(checkpoint)
    (made,) = permissions.create(checkpoint, project_ids=["bob"]).data
    # What is allowed is this checkpoint, which is the model, and no other checkpoint.
    assert other.models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError):
        other.models.retrieve(checkpoint.replace("-60", "-54"))
    assert other.models.retrieve(checkpoint).root == "tiny"  # type: ignore[attr-defined]
    assert permissions.list(checkpoint).data[0].id == made.id
    with pytest.raises(openai.NotFoundError):
        other.fine_tuning.checkpoints.permissions.list(checkpoint)
    assert permissions.delete(made.id, fine_tuned_model_checkpoint=checkpoint).deleted
    with pytest.raises(openai.NotFoundError):
        other.models.retrieve(checkpoint)
    assert client.models.delete(name).deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=name, messages=[user("Say sun.")])


def test_a_dpo_job_and_a_reinforcement_job_succeed(client: OpenAI):
    settings = {"n_epochs": 1, "batch_size": 6}
    pairs = start(
        client, DPO, {"type": "dpo", "dpo": {"hyperparameters": {**settings, "beta": 0.2}}}
    )
    rows = [{"messages": [user(f"Say {w}.")], "reference_answer": w} for w in ("lake", "hill")]
    valid = client.files.create(file=("v.jsonl", jsonl(rows)), purpose="fine-tune")
    source = "def grade(sample, item):\n    return len(sample['output_text']) % 3 / 2\n"
    grader = {
        "type": "multi",
        "name": "both",
        "graders": {
            "close": GRADER,
            "code": {"type": "python", "name": "code", "source": source},
        },
        "calculate_output": "0.5 * close + 0.5 * code",
    }
    graded = start(
        client,
        REINFORCEMENT,
        {
            "type": "reinforcement",
            "reinforcement": {"grader": grader, "hyperparameters": settings},
        },
        validation_file=valid.id,
    )
    for job in (pairs, graded):
        done = ended(client, job.id)
        assert done.status == "succeeded", done.error
    last = next(
        event for event in client.fine_tuning.jobs.list_events(graded.id) if event.type == "metrics"
    )
    assert 0.0 <= last.data["train_reward_mean"] <= 1.0  # type: ignore[index]
