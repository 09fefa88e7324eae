"""README's sections on own rewards, Python and export, executed with a small model and rows."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e import stage_runs
from tests.serve.tiny_model import TEMPLATE
from tests.unit.small_models import small_llama
from tests.unit.small_tokenizers import byte_tokenizer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 900.0
SMALL = "steps=1, prompts_per_step=2, group_size=2, sampling={'engine': 'hf', 'max_new_tokens': 4}"
"""Instead of README's ``steps=100``, which is not for a test."""
MODEL, REWARDS = '"Qwen/Qwen2.5-0.5B"', 'rewards=[short, "math"]'


def section(title: str) -> str:
    """Return the first block of code below a title of README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^### {title}\n.*?^```\w+\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


def run(folder: Path, *words: str) -> str:
    env = stage_runs.environment() | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, rows, README's reward, and the runs of its Python section."""
    folder = tmp_path_factory.mktemp("readme")
    tokenizer = byte_tokenizer(TEMPLATE, eos="<|im_end|>")
    for part in (small_llama(tokenizer), tokenizer):
        part.save_pretrained(folder / "my" / "model")
    rows = [{"prompt": f"Say {n}.", "completion": str(n)} for n in range(8)]
    prompts = [{"prompt": f"Say {n}.", "answer": str(n)} for n in range(8)]
    for name, lines in (("instructions", rows), ("prompts", prompts)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "my" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    code = section("Your own reward")
    (folder / "my_reward.py").write_text(code, encoding="utf-8")
    code = section("From Python")
    for readme, here in ((MODEL, '"my/model"'), ("steps=100", SMALL)):
        assert code.count(readme) == 1
        code = code.replace(readme, here)
    assert REWARDS in code
    (folder / "page.py").write_text(code + "print(type(model).__name__)\n", encoding="utf-8")
    return folder


def test_each_section_takes_ten_lines():
    for title in ("Your own reward", "From Python", "Use the result elsewhere"):
        assert len([line for line in section(title).splitlines() if line]) <= 10


def test_python_and_export_do_what_readme_says(folder: Path):
    assert run(folder, "page.py").endswith("LlamaForCausalLM\n")
    command = section("Use the result elsewhere").splitlines()[0].partition("#")[0].split()
    assert command[:3] == ["align", "export", "runs/my/dpo"]
    (stage,) = (path.parent for path in (folder / "runs").glob("*/grpo/manifest.json"))
    run(folder, "-m", "align", "export", str(stage), command[3])
    exported = folder / command[3]
    assert (exported / "model.safetensors").is_file()


def test_the_reward_of_readme_is_right_for_the_stripped_answer_alone(folder: Path):
    words = ("reward", "test", "my_reward.py:score", "--data", "my/prompts.jsonl")
    assert "the right answer         mean    1.000" in run(folder, "-m", "align", *words)
    score = runpy.run_path(str(folder / "my_reward.py"))["score"]
    said = [" 7 ", "7.", [{"role": "assistant", "content": "7"}]]
    assert score(prompts=["Say 7."] * 3, completions=said, answer=["7"] * 3) == [1.0, 0.0, 1.0]
