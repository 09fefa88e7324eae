"""The reference pass of dpo and kto: only drawn rows, kept on disk, bit-identical when resumed."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
import alone
import curves
from engine_models import save_tiny, tiny_model
from online_parts import policy_of

from align.core import checkpoints
from align.data.sampler import pick
from align.recipe.schema import DpoStage
from align.stages import dpo, kto
from align.stages.offline import offline_schedule
from align.stages.reference import reference_file, rows_needed
from align.training.results import ResultFile


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nn.Module]:
    """Return a tiny policy in a world of one."""
    with alone.world_of_one():
        folder = save_tiny(tiny_model(1, tied=True), tmp_path_factory.mktemp("policy"))
        yield policy_of(folder).module


def store(path: Path, name: str = "a") -> ResultFile:
    return ResultFile(path, key={"identity": name}, what="reference")


def kto_rows() -> list[kto.KtoRow]:
    rows = [kto.KtoRow(p.chosen.input_ids, p.chosen.trained) for p in curves.pairs()]
    return kto.mismatch(rows, max_length=32)


def run(module: nn.Module, method: str, **options: Any) -> list[tuple[float, float]]:
    if method == "dpo":
        pairs = dpo.reference_pairs(module, curves.pairs(), micro_tokens=60, **options)
        return [(row.ref_chosen, row.ref_rejected) for row in pairs]
    rows = kto.reference_rows(module, kto_rows(), micro_tokens=60, **options)
    return [(row.ref, row.ref_mismatched) for row in rows]


class Killed(BaseException):
    """Stand for a signal that no code can catch."""


class Counted(nn.Module):
    """Pass through to a model; die before pass number ``last``."""

    def __init__(self, model: nn.Module, last: int = 10**9) -> None:
        super().__init__()
        self.model, self.last, self.passes = model, last, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.passes == self.last:
            raise Killed
        self.passes += 1
        return self.model(*args, **kwargs)


@pytest.mark.parametrize("method", ["dpo", "kto"])
@pytest.mark.parametrize("killed_at", [1, 3])
def test_pass_that_died_goes_on_where_it_was_and_gives_the_same_bits(
    module: nn.Module, tmp_path: Path, method: str, killed_at: int
) -> None:
    whole = Counted(module)
    expected = run(whole, method)
    path = tmp_path / "reference" / "0.jsonl"
    with pytest.raises(Killed):
        run(Counted(module, killed_at), method, store=store(path))
    again = Counted(module)
    assert run(again, method, store=store(path)) == expected
    assert again.passes == whole.passes - killed_at
    # A third process finds everything; one of another stage finds nothing.
    third = Counted(module)
    assert run(third, method, store=store(path)) == expected
    assert third.passes == 0
    other = Counted(module)
    assert run(other, method, store=store(path, "b")) == expected
    assert other.passes == whole.passes


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_only_needed_rows_are_computed_and_the_others_are_nan(
    module: nn.Module, method: str
) -> None:
    everything = run(module, method)
    counted = Counted(module)
    needed = [1, 5, 38]
    found = run(counted, method, needed=needed)
    for i, (pair, expected) in enumerate(zip(found, everything, strict=True)):
        if i in needed:
            # Packed with other rows, so equal up to float32 rounding.
            assert pair == pytest.approx(expected, abs=1e-4)
        else:
            assert all(map(math.isnan, pair))
    assert counted.passes <= 3


@pytest.mark.parametrize("damage", ["cut", "digit", "zeros"])
def test_damaged_line_is_computed_again(module: nn.Module, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "0.jsonl"
    expected = run(module, "dpo", store=store(path))
    lines = path.read_text().splitlines()
    number = json.loads(lines[2])["results"][0][0]
    if damage == "cut":
        path.write_text("\n".join(lines[:3])[:-20])
    elif damage == "digit":
        lines[2] = lines[2].replace(str(number), str(number + 1.0))
        path.write_text("\n".join(lines))
    else:
        path.write_bytes("\n".join(lines[:3]).encode() + bytes(40))
    assert run(module, "dpo", store=store(path)) == expected


def context(out: Path, seed: int = 3, *, check_only: bool = False) -> Any:
    return cast("Any", SimpleNamespace(seed=seed, out=out, check_only=check_only))


def test_rows_needed_are_those_of_the_steps(tmp_path: Path) -> None:
    spec = DpoStage(kind="dpo", init="x", data=[{"path": "x"}], steps=3, batch_size=4)  # pyright: ignore
    needed = rows_needed(spec, context(tmp_path), num_training=100, num_heldout=2)
    schedule = offline_schedule(spec, 100, 3)
    drawn = {
        i for step in range(3) for i in pick(list(range(100)), 4, seed=schedule.seed, step=step)
    }
    # The preflight looks at rows 0, 25, 50 and 75; held-out rows follow the training rows.
    assert needed == [*sorted(drawn | {0, 25, 50, 75}), 100, 101]
    whole = spec.model_copy(update={"steps": 25})
    assert rows_needed(whole, context(tmp_path), num_training=100, num_heldout=0) == list(
        range(100)
    )


def test_file_belongs_to_the_stage_and_to_its_rows(tmp_path: Path) -> None:
    checkpoints.belong_to({"spec_hash": "1"})
    try:
        kept = reference_file(context(tmp_path), [0, 1])
        assert kept is not None
        kept.write(0, [0, 1], [[-1.5, -2.5], [-3.5, -4.5]])
        again = reference_file(context(tmp_path), [0, 1])
        assert again is not None
        assert again.read(0, [0, 1]) == [[-1.5, -2.5], [-3.5, -4.5]]
        assert again.read(0, [1, 0]) is None
        checkpoints.belong_to({"spec_hash": "2"})
        other = reference_file(context(tmp_path), [0, 1])
        assert other is not None
        assert other.read(0, [0, 1]) is None
    finally:
        checkpoints.belong_to(None)
    assert reference_file(context(tmp_path, check_only=True), [0]) is None


def test_losses_with_needed_rows_are_bit_equal_when_all_rows_are_drawn(module: nn.Module) -> None:
    assert torch.equal(
        torch.tensor(run(module, "dpo", needed=list(range(40)))), torch.tensor(run(module, "dpo"))
    )
