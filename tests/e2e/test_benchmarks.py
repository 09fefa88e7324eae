"""The benchmark harness: both sides take the same step on the smallest work, and say so."""

from dataclasses import replace

import pytest

from benchmarks.rows import ROWS
from benchmarks.run import measure
from benchmarks.table import render


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft-skewed", "reward-skewed"])
def test_both_sides_of_the_smallest_row_compute_the_same_loss_and_gradient_norm(tmp_path, name):
    row = ROWS[name]
    row = replace(
        row,
        rows=4,
        longest=48,
        median=16,
        rounds=2,
        candidates=row.candidates[:1],
        check=[(a, b, n, 1e-4) for a, b, n, _ in row.check],
    )
    found = measure(row, tmp_path, shape="tiny", dtype="float32", threads=1)
    assert found["same"]["equal"], found["same"]
    assert len(found["ours"]["rates"]) == len(found["theirs"]["rates"]) == 2
    assert ("roof_share" in found["ours"]) == (name == "sft-skewed")
    assert 0.0 < found["ours"].get("roof_share", 0.5) < 1.0
    text = render({name: found})
    assert text.count("not measured |") > len(ROWS)
    assert f"**{found['ratio']['median']:.2f}**" in text
