"""The example of docs/serve.md: the openai client fine-tunes the quickstart's base and chats."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.running import running

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("supervised", "dpo", "reinforcement")
JOB_KEYS = (
    *(f"{method}.tuning={{method: full}}" for method in METHODS),
    *("dpo.nll_coef=1", "reinforcement.sampling.max_new_tokens=32"),
)


@pytest.mark.long
def test_each_method_improves_what_it_is_for(tmp_path: Path):
    runs = tmp_path / "runs"
    recipe = str(ROOT / "recipes/quickstart.yaml")
    built = [sys.executable, "-m", "align", "run", recipe, "--until", "base", "--runs", str(runs)]
    subprocess.run(built, cwd=ROOT, check=True, timeout=3600)
    models = {"base": str(runs / "quickstart/base/model")}
    with running(runs, models=models, job_keys=JOB_KEYS) as server:
        script = str(ROOT / "docs/examples/finetune.py")
        argv = [sys.executable, script, server.token, "--url", f"{server.url}/v1"]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=7200)
    assert done.returncode == 0, done.stderr[-2000:]
    row = re.compile(r"\| (\w+) \| [\d.]+ \[([\d.]+), ([\d.]+)\] \| [\d.]+ \[([\d.]+), ([\d.]+)\]")
    found = {name: list(map(float, ends)) for name, *ends in row.findall(done.stdout)}
    assert found.keys() == {"base", *METHODS}, done.stdout
    assert found["supervised"][0] > found["base"][1]
    assert found["reinforcement"][0] > found["supervised"][1]
    assert found["dpo"][2] > found["supervised"][3]
