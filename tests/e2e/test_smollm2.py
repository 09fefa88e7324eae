"""recipes/smollm2 on the real SmolLM2-135M-Instruct: the short version of `make real`."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "numeric"))
from alone import world_of_one

from align.stages import base

ROOT = Path(__file__).resolve().parents[2]
CHAIN = ROOT / "recipes" / "smollm2" / "chain.yaml"
MODEL = Path.home() / ".cache" / "align" / "SmolLM2-135M-Instruct"
SMALL = [f"stages.{s}.heldout.0.rows=9" for s in ("sft", "sft_full", "reward", "dpo")]
SMALL += [f"stages.{s}.steps=1" for s in ("sft", "sft_full", "reward", "dpo", "grpo")]
SMALL += [f"stages.{s}.batch_size=4" for s in ("sft", "sft_full", "reward", "dpo")]
SMALL += ["stages.grpo.prompts_per_step=2", "stages.grpo.group_size=2"]
SMALL += ["stages.grpo.sampling.engine=hf", "stages.grpo.sampling.max_new_tokens=8"]
SMALL += ["stages.reward.norm_prompts=2"]

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (MODEL / "config.json").is_file(),
        reason=f"no model in {MODEL}: python scripts/real_models.py smollm2 installs it",
    ),
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with world_of_one():
        yield tmp_path_factory.mktemp("runs") / "smollm2"


def finish(run_dir: Path, *stages: str) -> dict[str, dict]:
    """Run stages that are not done yet; return their manifests."""
    kinds = {"sft_full": "sft"}
    found = {}
    for stage in stages:
        given = {"resolved": None, "recipe": str(CHAIN), "stage": stage, "overrides": SMALL}
        args = argparse.Namespace(**given, runs=run_dir.parent, run_dir=str(run_dir), force=False)
        assert base.run_stage(kinds.get(stage, stage), args) == 0
        found[stage] = json.loads((run_dir / stage / "manifest.json").read_text())
    return found


def test_base_is_linked_and_sft_takes_a_step(run_dir: Path) -> None:
    found = finish(run_dir, "base", "sft")
    weights = run_dir / "base" / "model" / "model.safetensors"
    assert os.stat(weights).st_dev != os.stat(MODEL).st_dev or os.stat(weights).st_nlink > 1
    metrics = found["sft"]["metrics"]
    # A pretrained model reads these short English rows far better than chance, ln 49152 = 10.8.
    assert 0.5 < metrics["train/loss"] < 6.0
    assert metrics["tuning/trained_params"] < 0.05 * metrics["tuning/params"]
    card = json.loads((run_dir / "sft" / "preflight.json").read_text())
    assert not [line for line in card["lines"] if line["verdict"] == "fail"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft_full", "reward", "dpo", "grpo"])
def test_every_other_stage_takes_a_step(run_dir: Path, stage: str) -> None:
    found = finish(run_dir, "base", "sft", stage)
    assert found[stage]["kind"] == ("reward_model" if stage == "reward" else "policy")
    if stage == "dpo":
        # Policy and reference are one model before the first step: ln 2, and its NLL term.
        lines = (run_dir / stage / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[0])["eval/margin"] == pytest.approx(0.0, abs=1e-2)
