"""The processes that generate text: both engines respond alike, with and without adapters."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from align.serve.errors import ServeError
from align.serve.finetuning import generation
from align.serve.finetuning.generation import _Process
from tests.serve.tiny_model import TEMPLATE, WORDS, user
from tests.unit.small_tokenizers import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
FAKE = [sys.executable, str(Path(__file__).with_name("fake_generator.py"))]
LORA = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
LIMIT_S = 300
BARE = {"adapter": None, "format": None, "checkpoint": None, "like": None}


# ---- what the server does with a process, by a stand-in


@pytest.fixture
def process() -> Iterator[_Process]:
    found = _Process(FAKE)
    yield found
    found.close()


def asked_for(said: str) -> dict[str, Any]:
    return {"messages": [user(said)]}


def text_of(process: _Process, said: str) -> str:
    return "".join(part.get("text", "") for part in process.events(asked_for(said)))


def test_answers_that_come_in_turns_reach_their_own_requests(process: _Process):
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: text_of(process, "both"), range(2)))
    assert found == ["both-a both-b both-c "] * 2
    # A request that waits for another one does not hold it up.
    waiting = process.events(asked_for("wait"))
    assert next(waiting)["text"] == ""
    assert text_of(process, "hello") == "hello-a hello-b hello-c "
    assert "".join(part.get("text", "") for part in waiting) == "wait-a wait-b wait-c "


def test_a_client_that_leaves_ends_its_answer_only(process: _Process):
    left = process.events(asked_for("hello"))
    assert next(left)["text"] == "hello-a "
    left.close()
    assert not process._answers
    assert text_of(process, "cancelled?") == "cancelled?:0-a cancelled?:0-b cancelled?:0-c "


def test_a_process_that_was_idle_has_time_for_its_next_answer(
    process: _Process, monkeypatch: pytest.MonkeyPatch
):
    assert text_of(process, "hello")
    process._heard -= generation.TOKEN_S + 1  # nobody has asked for that long
    assert text_of(process, "slow") == "slow-a slow-b slow-c "
    monkeypatch.setattr(generation, "TOKEN_S", 0.1)
    with pytest.raises(ServeError, match="has ended") as stuck:
        text_of(process, "wait")
    assert stuck.value.status == 503
    assert not process.alive


def test_all_requests_of_a_process_that_dies_are_told(process: _Process):
    waiting = process.events(asked_for("wait"))
    assert next(waiting)["text"] == ""
    for said in ("die", "hello"):
        with pytest.raises(ServeError, match="has ended"):
            text_of(process, said)
    with pytest.raises(ServeError, match="has ended"):
        next(waiting)


def test_a_model_that_cannot_be_loaded_says_why():
    broken = _Process([*FAKE, "broken"])
    for _ in range(2):
        with pytest.raises(ServeError, match="no such model") as error:
            text_of(broken, "hello")
        assert (error.value.status, error.value.code) == (400, "model_not_loaded")
    broken.close()


# ---- the engines


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of ASCII characters, two adapters, and another template for one of them."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer(TEMPLATE, eos="<|im_end|>")
    tokenizer.save_pretrained(folder / "base")
    byte_tokenizer("{{ messages[0].content }}", eos="<|im_end|>").save_pretrained(folder / "plain")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,  # vLLM's attention on a CPU needs heads of at least 32 numbers
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    base = LlamaForCausalLM(config)
    # Bytes that are parts of a character are never likely: the engines cut those differently.
    other = [i for i in range(len(tokenizer)) if not tokenizer.decode([i]).isascii()]
    base.lm_head.weight.data[other] = 0.0
    base.save_pretrained(folder / "base")
    for name in ("one", "two"):
        tuned = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), LORA)
        tuned.save_pretrained(folder / name)
    return folder


@contextmanager
def started(model: Path, engine: str) -> Iterator["subprocess.Popen[str]"]:
    argv = [sys.executable, "-m", "align.stages.tools.generate", str(model / "base")]
    process = subprocess.Popen(
        [*argv, "--engine", engine],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    guard = threading.Timer(LIMIT_S, process.kill)
    guard.start()
    try:
        yield process
    finally:
        guard.cancel()
        process.kill()
        process.wait()


def request(number: int, **changed: Any) -> dict[str, Any]:
    asked = {"id": number, "messages": [user(f"Say {WORDS[number % 12]}.")], "max_tokens": 8}
    asked |= {"temperature": 0, "top_p": 1.0, "n": 1, "seed": 7, "stop": [], "logprobs": 2}
    return {**asked, **BARE, **changed}


def send(process: "subprocess.Popen[str]", lines: list[dict[str, Any]]) -> None:
    assert process.stdin is not None
    process.stdin.write("".join(json.dumps(line) + "\n" for line in lines))
    process.stdin.flush()


def answers(process: "subprocess.Popen[str]", numbers: set[int]) -> dict[int, Any]:
    """Return text, entries, reasons and counts of each answer, and the order of its parts."""
    assert process.stdout is not None
    found: dict[int, Any] = {number: {"parts": []} for number in numbers}
    waiting, count = set(numbers), 0
    while waiting:
        part = json.loads(process.stdout.readline())
        own, count = found[part["id"]], count + 1
        own["parts"].append(count)
        if "error" in part or "done" in part:
            own["last"] = part
            waiting.remove(part["id"])
            continue
        choice = own.setdefault(part["index"], {"text": "", "logprobs": [], "finish": None})
        choice["text"] += part.get("text", "")
        choice["logprobs"] += part.get("logprobs", [])
        choice["finish"] = part.get("finish", choice["finish"])
    return found


def asked_of(model: Path, engine: str) -> dict[int, Any]:
    """Return an engine's answers to requests that are there before its model is loaded."""
    adapters = [None, str(model / "one"), str(model / "two")]
    requests = [request(i, adapter=adapters[i % 3]) for i in range(6)]
    requests += [
        request(6, temperature=1.0, n=2),
        request(7, n=2),
        request(8, messages=[user("x" * 200)]),
        request(9, messages=[{"role": "user"}]),
        request(10, adapter=adapters[1], format=str(model / "plain")),
        request(11, max_tokens=100),
    ]
    with started(model, engine) as process:
        send(process, [{"cancel": 11}, *requests])
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"ready": engine}
        found = answers(process, set(range(12)))
        text = found[0][0]["text"]
        # A stop text ends the response before it; a seed decides what is sampled, whatever else
        # is asked at the same time.
        send(process, [request(12, stop=[text[3:5]], messages=requests[0]["messages"])])
        send(process, [{**requests[6], "id": 13}])
        again = answers(process, {12, 13})
    assert again[12][0]["finish"] == "stop"
    assert again[12][0]["text"] == text[: text.index(text[3:5])]
    assert again[13][0]["text"] == found[6][0]["text"]
    return found


@pytest.fixture(scope="module")
def answers_of_hf(model: Path) -> dict[int, Any]:
    return asked_of(model, "hf")


def check(found: dict[int, Any]) -> None:
    """Check what holds for the answers of each engine alone."""
    # The same question has another answer with each adapter.
    assert len({json.dumps(found[i][0]["logprobs"]) for i in range(3)}) == 3
    assert found[6][0]["text"] != found[6][1]["text"]
    assert found[7][0]["text"] == found[7][1]["text"]
    assert found[7]["last"]["completion_tokens"] == 2 * len(found[7][0]["logprobs"])
    assert found[8]["last"]["code"] == "context_length_exceeded"
    assert found[9]["last"]["code"] == "generation_failed"
    # The template of the adapter's own job: only the bytes of the question.
    assert found[10]["last"]["prompt_tokens"] == len("Say sea.")
    assert found[11]["last"]["completion_tokens"] <= 1


@pytest.mark.slow
def test_transformers_responds_with_the_adapter_that_is_asked_for(
    model: Path, answers_of_hf: dict[int, Any]
):
    found = answers_of_hf
    check(found)
    for number, adapter in ((3, None), (4, "one"), (5, "two")):
        base: Any = LlamaForCausalLM.from_pretrained(model / "base")
        if adapter is not None:
            tuned = get_peft_model(base, LORA)
            tuned.load_adapter(str(model / adapter), adapter_name="own")
            tuned.set_adapter("own")
        tokenizer = byte_tokenizer(TEMPLATE, eos="<|im_end|>")
        ids = tokenizer.apply_chat_template(
            [user(f"Say {WORDS[number]}.")],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=False,
        )
        for entry in found[number][0]["logprobs"]:
            with torch.inference_mode():
                row = base(ids).logits[0, -1].log_softmax(-1)
            token = row.argmax()
            assert entry["token"] == tokenizer.decode([token])
            assert entry["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
            ids = torch.cat([ids, token.reshape(1, 1)], 1)


@pytest.mark.slow
def test_vllm_responds_to_all_requests_at_once_as_transformers_does(
    model: Path, answers_of_hf: dict[int, Any]
):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    found = {"hf": answers_of_hf, "vllm": asked_of(model, "vllm")}
    check(found["vllm"])
    # The first part of the last request came before the last part of the first one.
    assert found["vllm"][6]["parts"][0] < found["vllm"][0]["parts"][-1]
    assert found["hf"][6]["parts"][0] > found["hf"][0]["parts"][-1]
    for i in (*range(6), 7, 10):
        one, two = (found[engine][i][0] for engine in ("hf", "vllm"))
        assert one["text"] == two["text"]
        assert one["finish"] == two["finish"]
        assert found["hf"][i]["last"] == found["vllm"][i]["last"]
        for a, b in zip(one["logprobs"], two["logprobs"], strict=True):
            assert a["token"] == b["token"]
            assert a["logprob"] == pytest.approx(b["logprob"], abs=2e-3)
            tops = [[t["token"] for t in entry["top_logprobs"]] for entry in (a, b)]
            assert tops[0] == tops[1]
