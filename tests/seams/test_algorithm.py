"""An algorithm is added from outside the package: one function and one line of a dict."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "numeric"))
from online_parts import grpo_spec, sampled, scored

from align.online.algorithms import build_algorithm
from align.recipe.algorithms import ALGORITHMS, Algorithm

# An algorithm, place 1: its entry.
MAX_RL = {"max_rl": Algorithm(f"{__name__}:max_rl", scales=("none",), scale="none")}


# An algorithm, place 2: its advantages.
def max_rl(scores: Tensor, group_ids: Tensor) -> Tensor:
    """Return (score - group mean) / group mean; 0 in a group of mean 0 (arXiv:2602.02710)."""
    advantages = torch.zeros_like(scores)
    for group in group_ids.unique():
        mine = scores[group_ids == group]
        mean = mine.mean()
        advantages[group_ids == group] = (mine - mean) / mean if mean != 0.0 else 0.0
    return advantages


def test_an_algorithm_is_one_function_and_one_line(monkeypatch):
    monkeypatch.setitem(ALGORITHMS, *next(iter(MAX_RL.items())))
    spec = grpo_spec(algorithm="max_rl", group_size=4)
    assert (spec.estimator, spec.scale) == (f"{__name__}:max_rl", "none")
    # Group 1: mean 1/4, so 1 gives 3 and 0 gives -1. Group 2: mean 0. Dr. GRPO has 0.75 and -0.25.
    experience = scored(sampled(((2, 3, 1, 4), (1, 1, 2, 2))), [1.0, 0.0, 0.0, 0.0, *[0.0] * 4])
    found = build_algorithm(spec).estimate(experience, 0.0).per_token["advantages"]
    expected = [3.0, -1.0, -1.0, -1.0, 0.0, 0.0, 0.0, 0.0]
    for row, keep, value in zip(found, experience.completion, expected, strict=True):
        assert row[keep].tolist() == pytest.approx([value] * int(keep.sum()))
        assert (row[~keep] == 0.0).all()


def test_an_algorithm_without_its_line_is_unknown():
    with pytest.raises(ValueError, match="found 'max_rl'; expected one of 'grpo'"):
        grpo_spec(algorithm="max_rl")
