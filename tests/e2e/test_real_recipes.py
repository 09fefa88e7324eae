"""The recipes as they stand in recipes/, and those on real data through their stages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from align.core.errors import EXIT_USER
from align.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
PERSONA = ROOT / "recipes" / "persona.yaml"
STAGES = ["base", "sft", "reward", "dpo", "ppo", "grpo", "evaluate"]


def align_run(recipe: Path, runs: Path, *overrides: str) -> tuple[int, str]:
    """Run a recipe by the command line; give the exit code and all that was written."""
    words = [word for text in overrides for word in ("--set", text)]
    done = subprocess.run(
        [sys.executable, "-m", "align.cli", "run", str(recipe), "--runs", str(runs), *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=1200,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def logs(run_dir: Path) -> str:
    """Give what every stage of a run has logged."""
    return "\n".join(path.read_text() for path in sorted(run_dir.glob("*/log.txt")))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT / "recipes")))
def test_recipe_is_right_and_says_what_it_is_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGN_REAL_DATA", "somewhere")
    assert load_recipe(path, ()).stages
    head = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    for word in ("# Purpose:", "# Hardware:", "# Launch:"):
        assert word in head, f"{path}: the first comment lacks '{word}'"


@pytest.mark.real
def test_base_names_the_pad_token_and_the_chat_template_it_lacks(
    real_data: Path, tmp_path: Path
) -> None:
    missing = ("stages.base.tokenizer.pad_token=null", "stages.base.tokenizer.chat_template=null")
    code, said = align_run(PERSONA, tmp_path, *missing)
    assert code == EXIT_USER
    for key, example in (("pad_token", "<pad>"), ("chat_template", "plain")):
        assert f"name one in the recipe: stages.<base>.tokenizer.{key}: {example}" in said
    assert "Traceback" not in said


HEADS_OF_8 = """
name: heads_of_8
stages:
  base:
    kind: base
    path: ${ALIGN_REAL_DATA}/models/stories260K
    tokenizer: {pad_token: <unk>, chat_template: plain}
  grpo:
    kind: grpo
    init: base
    prompts: [{path: "${ALIGN_REAL_DATA}/data/prompts/story_openings_SYNTHETIC.jsonl", rows: 4}]
    rewards: [{kind: repetition}]
    steps: 1
    prompts_per_step: 2
    group_size: 4
    max_length: 128
    sampling: {max_new_tokens: 16}
"""


@pytest.fixture
def vllm_on_cpu() -> None:
    """Skip where vLLM is missing, or runs on an accelerator, whose attention takes any head."""
    import torch

    pytest.importorskip("vllm", reason="vllm is not installed: there is nothing to fall back from")
    if torch.cuda.is_available():
        pytest.skip("vLLM refuses heads of size 8 on CPU only")


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.usefixtures("vllm_on_cpu")
def test_model_that_vllm_refuses_says_why_and_goes_on_with_hf(
    real_data: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(HEADS_OF_8)
    code, shown = align_run(recipe, tmp_path)
    said = logs(tmp_path / "heads_of_8")
    assert code == 0, shown + said
    assert "rollout engine: hf (vllm cannot serve this model: head size 8 " in said
    manifest = json.loads((tmp_path / "heads_of_8" / "grpo" / "manifest.json").read_text())
    assert manifest["metrics"]["engine/vllm"] == 0.0


SHORT = (
    *(f"stages.{name}.threads=1" for name in STAGES),
    *(f"stages.{name}.epochs=1.0" for name in ("sft", "reward", "dpo")),
    "stages.sft.steps=6",
    "stages.reward.steps=4",
    "stages.dpo.steps=4",
    "stages.reward.eval_every=0",
    "stages.dpo.eval_every=0",
    "stages.sft.batch_size=32",
    "stages.ppo.steps=2",
    "stages.ppo.prompts_per_step=16",
    "stages.grpo.steps=2",
    "stages.grpo.prompts_per_step=8",
    "stages.evaluate.prompts.0.rows=40",
    "stages.evaluate.expect={}",
)


@pytest.mark.real
@pytest.mark.slow
def test_short_persona_chain_runs_through_to_the_summary(real_data: Path, tmp_path: Path) -> None:
    code, shown = align_run(PERSONA, tmp_path, *SHORT)
    run = tmp_path / "persona"
    assert code == 0, shown + logs(run)
    summary = json.loads((run / "summary.json").read_text())
    models = summary["tasks"]["heldout"]["models"]
    assert set(models) == {"base", "sft", "dpo", "ppo", "grpo"}
    for row in models.values():
        value, low, high = row["trait"]
        assert 0.0 <= low <= value <= high <= 1.0
    accuracy, low, high = summary["reward_models"]["reward"]["pair_accuracy"]
    assert 0.0 < low <= accuracy <= high < 1.0
    # The stories' model has never been asked a question: it does not answer Yes or No.
    assert models["base"]["yes_or_no"][0] == 0.0
    assert set(summary["stages"]) == set(STAGES)
    assert (run / "report.html").is_file()
    # Held-out statements come from the hash split: none of them is trained on.
    samples = [json.loads(line) for line in (run / "evaluate" / "samples.jsonl").open()]
    asked = {row["prompt"][0]["content"] for row in samples}
    assert len(asked) == 40
