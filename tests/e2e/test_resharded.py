"""A checkpoint of some ranks and ZeRO stage is continued by others: the uninterrupted training."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import stage_runs as runs
from test_ranks import assert_close, assert_equal

from align.report.read import read_run
from align.report.sections import cost

WORKER = Path(__file__).parent / "workers" / "reshard.py"
STEPS = (
    # Ranks, the stages that they save, and ranks-stage-new stage that they continue.
    (1, (0, 1, 3), ()),
    (2, (1, 2, 3), ("1-0-2", "1-1-3", "1-3-0", "2-1-3")),
    (4, (1, 3), ("1-0-3", "2-3-1", "2-2-0")),
    (2, (), ("4-3-3", "4-1-2")),
    (1, (), ("4-3-0", "2-3-3", "2-2-1")),
)
TRANSITIONS = [f"{n[:3]}-{ranks}-{n[4]}" for ranks, _, loads in STEPS for n in loads]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """Run the worker with 1, 2 and 4 ranks; give what each rank found by the transition."""
    out = tmp_path_factory.mktemp("resharded")
    found: dict[str, list[dict]] = {}
    for ranks, saves, loads in STEPS:
        command = [str(WORKER), "--out", str(out)]
        command += ["--save", *map(str, saves), "--load", *loads]
        runs.finish_ranks(command, ranks)
        for rank in range(ranks):
            path = out / f"{rank}of{ranks}-{'save' if saves else ''}.pt"
            for name, part in torch.load(path).items():
                found.setdefault(name, []).append(part)
    return found


def test_twelve_transitions_are_tried() -> None:
    assert len(set(TRANSITIONS)) == 12


@pytest.mark.parametrize("name", TRANSITIONS)
def test_losses_and_weights_are_those_of_one_process_without_a_break(
    found: dict, name: str
) -> None:
    expected = found["1-0"][0]
    for rank in found[name]:
        # float32: ranks add up the same numbers in another order.
        assert rank["loss"] == pytest.approx(expected["loss"][2:], rel=1e-5)
        assert_close(rank["weights"], expected["weights"])
        assert_equal(rank["weights"], found[name][0]["weights"])


@pytest.mark.parametrize("name", TRANSITIONS)
def test_it_needs_consent_is_written_down_and_leaves_nothing(found: dict, name: str) -> None:
    ranks, old, here, new = map(int, name.split("-"))
    change = {
        "step": 2,
        "old": {"ranks": ranks, "zero/policy": old},
        "new": {"ranks": here, "zero/policy": new},
    }
    for rank in found[name]:
        assert "reshard: true" in rank["said"]
        assert f"saved by {ranks} rank" in rank["said"]
        assert rank["history"] == ([change], [change])
        assert rank["left"] == ["step-00000002"]
        assert_equal(rank["again"], rank["weights"])


def test_each_rank_hashes_what_it_wrote_and_any_damage_is_seen_by_all(found: dict) -> None:
    ranks = found["hashing"]
    # Each file once: those of a rank by itself.
    assert sorted(ranks[0]["noted"] + ranks[1]["noted"]) == sorted(ranks[0]["files"])
    for number, rank in enumerate(ranks):
        assert f"rng-{number}.pt" in rank["noted"]
        own = [n for n in rank["noted"] if n.startswith(f"zero_pp_rank_{number}_")]
        assert len(own) == 2  # the weights and the optimizer's states
        assert rank["whole"]
        assert rank["seen"] == dict.fromkeys(rank["files"], True)


def test_a_stage_goes_on_with_fewer_ranks_and_says_so(tmp_path: Path) -> None:
    recipe, run = runs.write_recipe(tmp_path), tmp_path / "run"
    runs.finish(recipe, "base", run)
    short = ["stages.sft.steps=6"]
    two = [*short, "stages.sft.ranks=2", "stages.sft.zero.stage=3"]
    runs.finish(recipe, "sft", run, ranks=2, overrides=two)
    whole, before = runs.numbers(run, "sft"), runs.manifest(run, "sft")
    assert "resharded" not in before
    # As if it had been killed in step 5.
    (run / "sft" / "manifest.json").unlink()
    shutil.rmtree(run / "sft" / "checkpoints" / "step-00000006")
    code, said = runs.run(recipe, "sft", run, overrides=short)
    assert code != 0
    assert "different settings" in said
    # A setting that changes the batches is no layout.
    other = [*short, "stages.sft.reshard=true", "stages.sft.batch_size=4"]
    code, said = runs.run(recipe, "sft", run, overrides=other)
    assert code != 0
    assert "different settings" in said
    said = runs.finish(recipe, "sft", run, overrides=[*short, "stages.sft.reshard=true"])
    assert "saved by 2 ranks under ZeRO-3, continued by 1 rank under ZeRO-0" in said
    found = runs.numbers(run, "sft")
    assert [row["step"] for row in found] == [row["step"] for row in whole]
    losses = [
        [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
        for rows in (found, whole)
    ]
    assert [step for step, _ in losses[0]] == [1, 2, 3, 4, 5, 6]
    for (step, loss), (same, expected) in zip(*losses, strict=True):
        assert (step, loss) == (same, pytest.approx(expected, rel=1e-4))
    change = runs.manifest(run, "sft")["resharded"]
    assert change == [
        {
            "step": 3,
            "old": {"ranks": 2, "zero/policy": 3},
            "new": {"ranks": 1, "zero/policy": 0},
        }
    ]
    card = (run / "sft" / "model" / "README.md").read_text(encoding="utf-8")
    assert "Continued after step 3 by 1 rank under ZeRO-0, saved by 2 ranks under ZeRO-3" in card
    assert "not bit by bit" in card
    assert "sft: Continued after step 3 by 1 rank under ZeRO-0" in str(cost(read_run(run)))
