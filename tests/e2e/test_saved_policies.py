"""The saved policy of a bfloat16 LoRA is the policy that was trained."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_tuning_stages import alone
from tuned_stages import make_base, run_stage

from align.core.errors import TrainingError
from align.stages.offline import check_saved_loss
from align.tuning import merging


def held_out(folder: Path) -> list[dict]:
    """Write four rows that no world makes."""
    rows = [
        {"prompt": f"Say the number {i} again.", "completion": f"{i} {i}"} for i in range(900, 904)
    ]
    path = folder / "heldout.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return [{"path": str(path)}]


def test_sft_measures_what_it_saved_of_a_bfloat16_lora(tmp_path):
    with alone.world_of_one():
        folder = make_base(tmp_path)
        found = run_stage(
            folder,
            "sft",
            {"method": "lora", "rank": 4},
            name="s",
            dtype="bfloat16",
            heldout=held_out(tmp_path),
        )
    metrics = found.manifest["metrics"]
    assert metrics["eval/loss_saved"] == pytest.approx(metrics["eval/loss"], abs=0.1)


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_stage_stops_where_merging_makes_another_model(tmp_path, kind, monkeypatch):
    def doubled(total: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return (2.0 * total).to(dtype)

    monkeypatch.setattr(merging, "keep_update", doubled)
    keys = {"heldout": held_out(tmp_path)} if kind == "sft" else {}
    if kind == "grpo":  # the engine is given what the trainer has; only what is saved is wrong
        monkeypatch.setattr("align.stages.rollouts.pushed_weights", right_weights)
    with alone.world_of_one():
        folder = make_base(tmp_path)
        with pytest.raises(TrainingError, match="merged weights"):
            run_stage(folder, kind, {"method": "lora", "rank": 4}, name="s", **keys)


def right_weights(module, *, adapter_alone=False):
    """Merge by peft itself, on a copy."""
    import copy

    whole = copy.deepcopy(module).merge_and_unload()
    yield from whole.named_parameters()


@pytest.mark.parametrize("loss", [0.3, 4.0])
def test_bound_of_the_saved_loss_is_relative_above_one_nat(loss):
    near, far = 0.09 * max(1.0, loss), 0.11 * max(1.0, loss)
    check_saved_loss({"eval/loss": loss, "eval/loss_saved": loss + near}, dtype="bfloat16")
    for saved in (loss + far, loss - far, float("nan")):
        with pytest.raises(TrainingError, match="eval/loss_saved"):
            check_saved_loss({"eval/loss": loss, "eval/loss_saved": saved}, dtype="bfloat16")
    with pytest.raises(TrainingError, match="in float32"):
        check_saved_loss({"eval/loss": loss, "eval/loss_saved": loss + near}, dtype="float32")
