"""Frozen and thawed layers, and EWC, on two ranks under ZeRO: the same as one process without."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_ranks import MAX_GRAD_NORM, assert_close, assert_equal, load, one, work

pytestmark = pytest.mark.slow
SCENARIOS = ("layers", "layers_lora", "layers_bf16", "ewc")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every scenario on two ranks, and in one process without ZeRO."""
    folder = tmp_path_factory.mktemp("ranks")
    work(folder, SCENARIOS, ranks=1, stages=(0,))
    work(folder, SCENARIOS, ranks=2, stages=(0, 2, 3))
    return folder


@pytest.mark.parametrize("scenario", ["layers", "layers_lora", "ewc"])
def test_zero_on_two_ranks_equals_one_process(out: Path, scenario: str) -> None:
    expected, first, second = (load(out, scenario, p) for p in ("0of1", "0of2", "1of2"))
    assert min(expected[0]["grad_norm"]) > 2 * MAX_GRAD_NORM  # clipping is at work
    for stage, found in first.items():
        assert_close(found["weights"], expected[0]["weights"])
        assert_equal(found["weights"], second[stage]["weights"])
        assert found["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("scenario", ["layers", "layers_lora", "layers_bf16"])
def test_resuming_across_a_thaw_ends_with_the_same_bytes(out: Path, scenario: str) -> None:
    for place in ("0of1", "0of2", "1of2"):
        for found in load(out, scenario, place).values():
            assert_equal(found["resumed"], found["weights"])


@pytest.mark.parametrize("scenario", ["layers", "layers_bf16"])
def test_frozen_layers_keep_their_bytes_and_thawed_ones_move(out: Path, scenario: str) -> None:
    """Half-way both layers train and the embeddings do not; at the end all do.

    In bfloat16 a norm's weight near 1 is too coarse to show one step.
    """
    for place in ("0of1", "0of2", "1of2"):
        for found in load(out, scenario, place).values():
            before, halfway, end = (found[k] for k in ("before", "halfway", "weights"))
            for name, tensor in before.items():
                frozen, visible = "embed_tokens" in name, "norm" not in name
                assert not frozen or torch.equal(halfway[name], tensor), name
                assert frozen or not visible or not torch.equal(halfway[name], tensor), name
                assert not visible or not torch.equal(end[name], halfway[name]), name


def test_penalty_begins_at_zero_and_is_the_same_under_every_zero_stage(out: Path) -> None:
    expected = one(out, "ewc")["ewc"]
    assert expected[0] == 0.0
    assert min(expected[1:]) > 0.01  # it is at work
    for found in load(out, "ewc", "0of2").values():
        assert found["ewc"] == pytest.approx(expected, rel=1e-4, abs=1e-9)
