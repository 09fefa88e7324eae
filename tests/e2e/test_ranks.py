"""One process, two ranks and three, ZeRO 0 to 3: the same steps give the same weights."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import stage_runs as runs

WORKER = Path(__file__).parent / "workers" / "uneven.py"  # with those of ranks.py
SCENARIOS = (
    *("sft", "sft_lora", "sft_bf16", "grpo", "grpo_lora", "grpo_bf16"),
    *("ppo", "not_finite", "long_rows"),
)
UNEVEN = ("uneven", "no_prompts", "dynamic")
LEARNING_RATE, STEPS, MAX_GRAD_NORM = 2e-3, 4, 0.05  # as in the worker


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every scenario on two ranks, and in one process without ZeRO."""
    folder = tmp_path_factory.mktemp("ranks")
    work(folder, (*SCENARIOS, *UNEVEN), ranks=1, stages=(0,))
    work(folder, (*SCENARIOS, *UNEVEN), ranks=2, stages=(0, 1, 2, 3))
    work(folder, UNEVEN, ranks=3, stages=(0, 3))
    return folder


def work(folder: Path, scenarios: tuple[str, ...], *, ranks: int, stages: tuple[int, ...]) -> None:
    """Run the worker as ``ranks`` processes; all must end well."""
    command = [str(WORKER), "--out", str(folder)]
    command += ["--scenarios", *scenarios, "--stages", *map(str, stages)]
    runs.finish_ranks(command, ranks)


def load(out: Path, scenario: str, place: str) -> dict[int, dict]:
    return torch.load(out / f"{scenario}-{place}.pt")


def one(out: Path, scenario: str) -> dict:
    """Give what one process without ZeRO found."""
    return load(out, scenario, "0of1")[0]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Hold weights equal to 1e-5 of the largest weight or, if more, of what a step can move."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        bound = 1e-5 * max(float(tensor.abs().max()), LEARNING_RATE)
        torch.testing.assert_close(found[name], tensor, rtol=0.0, atol=bound, msg=name)


@pytest.mark.parametrize("scenario", ["sft", "sft_lora", "grpo", "grpo_lora", "ppo", "long_rows"])
def test_every_zero_stage_on_two_ranks_equals_one_process(out: Path, scenario: str) -> None:
    expected, first, second = (load(out, scenario, p) for p in ("0of1", "0of2", "1of2"))
    assert len(first) >= 2
    for stage in first:
        for part in {"weights", "critic"} & expected[0].keys():
            assert_close(first[stage][part], expected[0][part])
            assert_equal(first[stage][part], second[stage][part])


PLACES = [(2, r) for r in range(2)] + [(3, r) for r in range(3)]


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "reward"])
def test_ranks_without_rows_and_of_unequal_tokens_equal_one_process(out: Path, kind: str) -> None:
    """The global counts are in the loss: its value and the clipped gradient's norm are the same."""
    expected = one(out, "uneven")
    for ranks, rank in PLACES:
        for found in load(out, "uneven", f"{rank}of{ranks}").values():
            for a, b in zip(found[f"{kind} stats"], expected[f"{kind} stats"], strict=True):
                assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
            assert_close(found[f"{kind} weights"], expected[f"{kind} weights"])


@pytest.mark.parametrize("scenario", ["no_prompts", "dynamic"])
def test_online_steps_on_ranks_without_prompts_and_on_chosen_groups_equal_one_process(
    out: Path, scenario: str
) -> None:
    expected = one(out, scenario)
    for ranks, rank in PLACES:
        for found in load(out, scenario, f"{rank}of{ranks}").values():
            for a, b in zip(found["stats"], expected["stats"], strict=True):
                assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
            assert_close(found["weights"], expected["weights"])


def test_dynamic_sampling_keeps_the_same_answers_on_any_number_of_ranks(out: Path) -> None:
    expected = one(out, "dynamic")
    assert len(expected["kept"]) == 2 * 6 * 2
    assert all(expected["live"])  # as in every draw some are not, prompts came from several
    assert len({len(ids) for ids in expected["kept"]}) > 3
    for ranks, rank in PLACES:
        for found in load(out, "dynamic", f"{rank}of{ranks}").values():
            assert found["kept"] == expected["kept"]


@pytest.mark.parametrize("scenario", ["sft", "sft_lora"])
def test_losses_and_clipped_norms_equal_those_of_one_process(out: Path, scenario: str) -> None:
    expected = one(out, scenario)
    assert min(expected["grad_norm"]) > 2 * MAX_GRAD_NORM  # clipping is at work
    for found in load(out, scenario, "0of2").values():
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("scenario", ["grpo", "grpo_lora", "ppo"])
def test_statistics_of_online_updates_equal_those_of_one_process(out: Path, scenario: str) -> None:
    expected = one(out, scenario)["stats"]
    for found in load(out, scenario, "0of2").values():
        for step in range(2):
            assert found["stats"][step] == pytest.approx(expected[step], rel=1e-4, abs=1e-6)
    assert expected[0]["policy/grad_norm"] > 2 * MAX_GRAD_NORM


@pytest.mark.parametrize("scenario", ["sft", "sft_lora", "sft_bf16"])
def test_checkpoint_of_every_zero_stage_goes_on_to_the_same_bytes(out: Path, scenario: str) -> None:
    for place in ("0of1", "0of2", "1of2"):
        for found in load(out, scenario, place).values():
            assert_equal(found["resumed"], found["weights"])


def test_bfloat16_moves_weights_as_float32_does(out: Path) -> None:
    """Bound the loss by 0.1 % and a weight by all steps together plus bfloat16's rounding."""
    expected = one(out, "sft")
    for place in ("0of1", "0of2"):
        for found in load(out, "sft_bf16", place).values():
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
            for name, tensor in expected["weights"].items():
                moved = found["weights"][name]
                assert moved.dtype == torch.bfloat16
                assert moved.isfinite().all()
                bound = 2 * STEPS * LEARNING_RATE + 2**-8 * tensor.abs()
                assert ((moved.float() - tensor).abs() <= bound).all(), name


def test_bfloat16_takes_the_same_grpo_steps(out: Path) -> None:
    """Rounding moves tokens over the edge of the clip: later gradients agree only roughly."""
    expected = one(out, "grpo")["stats"]
    for place in ("0of1", "0of2"):
        for found in load(out, "grpo_bf16", place).values():
            assert all(tensor.isfinite().all() for tensor in found["weights"].values())
            for step in range(2):
                loss, norm = "policy/loss", "policy/grad_norm"
                assert found["stats"][step][loss] == pytest.approx(expected[step][loss], abs=2e-3)
                assert found["stats"][step][norm] == pytest.approx(expected[step][norm], rel=0.1)


def test_bfloat16_is_the_same_training_under_every_zero_stage(out: Path) -> None:
    """The step on zero gradients of DeepSpeed's wrapper without ZeRO made it 25 % less."""
    expected = one(out, "sft")["weights"]
    bfloat16 = [one(out, "sft_bf16"), *load(out, "sft_bf16", "0of2").values()]
    matrix = "model.layers.0.mlp.up_proj.weight"
    distances = [float((f["weights"][matrix] - expected[matrix]).norm()) for f in bfloat16]
    assert max(distances) == pytest.approx(min(distances), rel=0.02)


@pytest.mark.parametrize("place", ["0of1", "0of2", "1of2"])
def test_loss_that_is_not_finite_on_one_rank_stops_all_before_the_step(
    out: Path, place: str
) -> None:
    for found in load(out, "not_finite", place).values():
        assert "optimizer step 2: the loss is nan" in found["said"]
        assert_equal(found["weights"], found["before"])


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (0, 2), (2, 2), (3, 2)])
def test_saved_lora_model_is_base_with_adapter(out: Path, stage: int, ranks: int) -> None:
    saved, source = out / f"lora-{stage}-{ranks}", out / f"source-{ranks}" / "model"
    merged = AutoModelForCausalLM.from_pretrained(saved / "model")
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(source), saved / "adapter"
    )
    ids = torch.tensor([[5, 900, 17, 33, 1200, 2, 8]])
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(source)(ids).logits
        found, expected = merged(ids).logits, adapted(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - plain).abs().max() > 1e-3
    final = load(out, "grpo_lora", f"0of{ranks}")[stage]["weights"]
    assert_equal({n: p for n, p in merged.named_parameters() if n in final}, final)


@pytest.mark.slow
def test_every_group_waits_as_long_as_the_user_says(tmp_path, monkeypatch):
    """Also those of ranks that share an engine or a row, and DeepSpeed's own."""
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "2000")
    runs.finish_ranks([str(WORKER.with_name("waits.py")), str(tmp_path)], 2)
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        # Of all ranks, of ZeRO, of an engine and of a row.
        assert found == {"groups": [2000 * 60.0] * 4, "store": 2000 * 60.0}
