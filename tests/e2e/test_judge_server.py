"""A judge behind a real vLLM server: constrained verdicts, both orders, cache, cost."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="the judge's client is the package openai")
pytest.importorskip("vllm", reason="the server is vLLM")

from align.evaluation.judge import Bench, EndpointJudge, Pair
from align.pipeline.processes import free_port
from reward_models.judge import Endpoint, JudgeClient, JudgeError

LIMIT_S = 1200.0
TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
OPTIONS = (
    "--served-model-name",
    "tiny",
    "--host",
    "127.0.0.1",
    "--dtype",
    "float32",
    "--enforce-eager",
    "--max-model-len",
    "1024",
    "--hf-overrides",
    '{"max_position_embeddings": 1024}',
    # A model this small would fill its answer with the spaces that JSON allows between tokens.
    "--structured-outputs-config",
    '{"backend": "xgrammar", "disable_any_whitespace": true}',
)


@pytest.fixture(scope="module")
def url(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "chat.jinja").write_text(TEMPLATE)
    port = free_port()
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port)]
    argv += ["--model", str(real_data / "models" / "stories260K-hd32"), *OPTIONS]
    argv += ["--chat-template", str(folder / "chat.jinja")]
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with (folder / "log.txt").open("wb") as log:
        server = subprocess.Popen(argv, stdout=log, stderr=log, env=env, start_new_session=True)
    try:
        _wait(server, f"http://127.0.0.1:{port}/health", folder / "log.txt")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(timeout=120)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _wait(server: subprocess.Popen[bytes], health: str, log: Path) -> None:
    limit = time.monotonic() + LIMIT_S
    while time.monotonic() < limit:
        assert server.poll() is None, log.read_text(errors="replace")[-3000:]
        try:
            with urllib.request.urlopen(health, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    pytest.fail("the server did not start: " + log.read_text(errors="replace")[-3000:])


@pytest.mark.real
@pytest.mark.slow
def test_real_server_gives_verdicts_in_both_orders_and_the_cache_gives_them_again(
    url: str, tmp_path: Path
) -> None:
    endpoint = Endpoint(url=url, model="tiny", max_tokens=64, cache=tmp_path)
    pairs = [Pair(f"what is {i} plus one?", f"it is {i + 1}.", "i like fish") for i in range(6)]
    bench = Bench(EndpointJudge(JudgeClient(endpoint), "Which answer is right?"))
    said = bench.judge(pairs)
    # A story model judges nothing well, but the server holds it to the schema.
    assert all(pair.result in (0.0, 0.25, 0.5, 0.75, 1.0) for pair in said)
    report = bench.report()
    assert (report["requests"], report["cached"], report["invalid"]) == (12, 0, {})
    assert report["prompt_tokens"] > 12 * 20
    again = Bench(EndpointJudge(JudgeClient(endpoint), "Which answer is right?"))
    assert again.judge(pairs) == said
    assert (again.report()["requests"], again.report()["cached"]) == (0, 12)


@pytest.mark.real
@pytest.mark.slow
def test_real_server_cuts_a_verdict_and_refuses_an_unknown_model(url: str) -> None:
    short = Bench(
        EndpointJudge(JudgeClient(Endpoint(url=url, model="tiny", max_tokens=2)), "Judge.")
    )
    assert short.judge([Pair("q", "a", "b")])[0].result is None
    assert short.report()["invalid"] == {"cut": 2}
    unknown = JudgeClient(Endpoint(url=url, model="other"))
    with pytest.raises(JudgeError, match=r"rejected.*other"):
        unknown.ask([[{"role": "user", "content": "hello"}]], {"type": "object"})
