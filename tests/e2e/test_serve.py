"""The line that an export prints starts a server that answers as the model does."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from export_models import SIZES, save

from align.stages.tools.export import export

DEADLINE_S = 1200.0
"""A guard against hanging, not a measurement."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(process: subprocess.Popen[bytes], url: str) -> None:
    began = time.monotonic()
    while time.monotonic() - began < DEADLINE_S:
        assert process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)  # between two questions, until the server listens
    raise AssertionError(f"no answer from {url}")


@pytest.mark.slow
def test_printed_line_serves_the_exported_model(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    # vLLM's attention on a CPU needs heads of at least 32 numbers.
    sizes = SIZES | {"hidden_size": 128, "eos_token_id": 2, "bos_token_id": None}
    torch.manual_seed(0)
    save(LlamaForCausalLM(LlamaConfig(**sizes)), tmp_path / "tiny")
    line = export(tmp_path / "tiny", tmp_path / "out", dtype="float32")[-1]
    port = free_port()
    argv = [*shlex.split(line), "--port", str(port), "--max-model-len", "128", "--enforce-eager"]
    argv[0] = str(Path(sys.executable).with_name(argv[0]))
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with (tmp_path / "log.txt").open("wb") as log:
        process = subprocess.Popen(argv, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(process, f"http://127.0.0.1:{port}/health")
        asked = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "the sea"}],
            "max_tokens": 7,
            "temperature": 0,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            data=json.dumps(asked).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=1200) as answer:
            said = json.load(answer)["choices"][0]["message"]["content"]
    except AssertionError as error:
        tail = (tmp_path / "log.txt").read_text(errors="replace")[-2000:]
        raise AssertionError(f"{error}: {tail}") from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # its own session: the server and its workers
        process.wait(timeout=120)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    ids = tokenizer.apply_chat_template(
        asked["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny").eval()
    found = model.generate(**ids, max_new_tokens=7, do_sample=False)
    expected = tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    # The server leaves out the unfinished character at the end.
    assert len(said) > 4
    assert said.rstrip("\ufffd") == expected.rstrip("\ufffd")
