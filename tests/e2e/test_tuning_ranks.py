"""Every tuning method under ZeRO-2 and ZeRO-3 on two ranks: the steps of one process."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import stage_runs as runs
from tuned_stages import TUNINGS

from align.recipe.schema.tuning import METHODS

WORKER = Path(__file__).parent / "workers" / "tunings.py"
WEIGHTS = "model/model.safetensors"
ADAPTER = "adapter/adapter_model.safetensors"


def work(folder: Path, *, ranks: int, stages: tuple[int, ...]) -> None:
    """Run the worker as ``ranks`` processes; all must end well."""
    command = [str(WORKER), "--out", str(folder), "--stages", *map(str, stages)]
    runs.finish_ranks(command, ranks)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tunings")
    work(folder, ranks=1, stages=(0,))
    work(folder, ranks=2, stages=(2, 3))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("method", TUNINGS)
def test_two_ranks_train_and_save_what_one_process_does(out: Path, method: str, stage: int) -> None:
    one, two = torch.load(out / "steps-1.pt"), torch.load(out / "steps-2.pt")
    for name in ("loss", "grad_norm"):
        expected = [step[name] for step in one["sft", method, 0]]
        found = [step[name] for step in two["sft", method, stage]]
        assert found == pytest.approx(expected, rel=2e-5)
    # Unmerged adapters leave model/ as it is: without a gradient nothing above would differ.
    assert min(step["grad_norm"] for step in two["sft", method, stage]) > 0.0
    source = load_file(out / "source-1" / WEIGHTS)
    parts = [WEIGHTS] if method == "full" else [WEIGHTS, ADAPTER]
    for part in parts:
        expected, found = (
            load_file(out / d / part) for d in (f"{method}-0-1", f"{method}-{stage}-2")
        )
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0.0, atol=1e-6, msg=name)
    merged = load_file(out / f"{method}-{stage}-2" / WEIGHTS)
    same = all(torch.equal(merged[name], tensor) for name, tensor in source.items())
    assert same == (not METHODS[method].merges)


@pytest.mark.slow
@pytest.mark.parametrize("method", TUNINGS)
def test_partitioned_checkpoint_goes_on_to_the_same_bytes(out: Path, method: str) -> None:
    folder = out / f"{method}-3-2"
    for part in [WEIGHTS] if method == "full" else [WEIGHTS, ADAPTER]:
        assert (folder / "resumed" / part).read_bytes() == (folder / part).read_bytes(), part


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("method", ["bottleneck", "loreft"])
@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_adapter_off_is_the_reference_on_two_ranks_too(
    out: Path, kind: str, method: str, stage: int
) -> None:
    """What one process finds against a copy of the start, two ranks find with the adapter off."""
    one, two = (torch.load(out / f"steps-{n}.pt") for n in (1, 2))
    expected, found = one[kind, method, 0], two[kind, method, stage]
    for step in range(2):
        assert found[step] == pytest.approx(expected[step], rel=1e-4, abs=1e-6)


ROWS_WORKER = Path(__file__).parent / "workers" / "new_rows.py"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool, int], dict]:
    """What one process trains without ZeRO, and two under ZeRO-3 (its key is stage 3)."""
    folder = tmp_path_factory.mktemp("rows")
    for ranks, stage in ((1, 0), (2, 3)):
        command = [str(ROWS_WORKER), "--out", str(folder), "--stages", str(stage)]
        runs.finish_ranks(command, ranks)
    return torch.load(folder / "rows-1.pt") | torch.load(folder / "rows-2.pt")


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_rows_of_new_tokens_train_under_zero_3_as_in_one_process(
    rows: dict, method: str, tied: bool
) -> None:
    one, two = rows[method, tied, 0], rows[method, tied, 3]
    assert one["changed"].tolist() == two["changed"].tolist() == one["tokens"].tolist()
    assert ("lm_head.weight" in two) == (not tied)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=2e-5, atol=1e-6, msg=name)
