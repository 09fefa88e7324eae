"""Advantages and losses of the user: found by their signature, checked, and named when wrong."""

from pathlib import Path

import pytest
import torch

from align.core.artifacts import spec_hash
from align.core.errors import RecipeError, TrainingError
from align.online.objective import policy_loss
from align.recipe.algorithms import of_estimator
from align.recipe.load import load_recipe
from align.recipe.schema import DpoStage
from align.stages.dpo import Sides, pair_losses
from align.training.batch import PackedBatch

CODE = """
import torch
def alone(scores): return scores
def grouped(scores, group_ids, scale): return scores
def greedy(scores, greedy_scores): return scores - greedy_scores
def tokens(logprobs, old_logprobs, advantages, mask, *, clip_low, clip_high):
    return -advantages * logprobs
def mean(logprobs, old_logprobs, advantages, mask, **clip): return logprobs.mean()
def smooth(policy_chosen, policy_rejected, ref_chosen, ref_rejected, *, beta, label_smoothing):
    d = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
    e = label_smoothing
    return -(1 - e) * torch.log(torch.sigmoid(d)) - e * torch.log(torch.sigmoid(-d))
def total(policy_chosen, policy_rejected, ref_chosen, ref_rejected): return policy_chosen.sum()
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("own") / "losses.py"
    file.write_text(CODE)
    return file


def test_the_parameters_of_an_estimator_say_what_it_needs(code: Path):
    alone, grouped, greedy = (of_estimator(f"{code}:{n}") for n in ("alone", "grouped", "greedy"))
    assert [a.compares_group for a in (alone, grouped, greedy)] == [False, True, False]
    assert [a.needs_greedy for a in (alone, grouped, greedy)] == [False, False, True]
    assert [a.scales for a in (alone, grouped)] == [("batch", "none"), ("std", "batch", "none")]
    # Those of the suite keep their facts.
    assert of_estimator("leave_one_out").scales == ("none",)


def packed(advantages: torch.Tensor, mask: torch.Tensor) -> PackedBatch:
    ids = torch.zeros_like(mask, dtype=torch.long)
    segments = torch.zeros(mask.shape[1], dtype=torch.long)
    return PackedBatch(
        input_ids=ids,
        position_ids=ids,
        mask=mask,
        segment_ids=segments,
        num=1,
        counts={"tokens": 3.0, "answers": 1.0},
        per_token={"advantages": advantages},
        per_sequence={},
    )


def test_an_objective_may_return_the_loss_of_each_token_alone(code: Path):
    logprobs = torch.tensor([[-1.0, -2.0, -0.5]], requires_grad=True)
    old = torch.tensor([[-1.0, -1.0, -1.0]])
    batch = packed(torch.tensor([[1.0, 2.0, -4.0]]), torch.ones(1, 3, dtype=torch.bool))
    clip = {"clip_low": 0.2, "clip_high": 0.2}
    parts = policy_loss(logprobs, old, batch, objective=f"{code}:tokens", clip=clip)
    # -A log p by hand, and p / p_old = exp(log p - log p_old).
    assert parts.loss.tolist() == [[1.0, 4.0, -2.0]]
    expected = torch.tensor([[1.0, 0.36787944, 1.6487213]])
    torch.testing.assert_close(parts.ratio, expected)
    assert not parts.clipped.any()
    parts.loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-1.0, -2.0, 4.0]]
    with pytest.raises(TrainingError, match=r"returned \(\); expected the loss of"):
        policy_loss(logprobs, old, batch, objective=f"{code}:mean", clip=clip)
    with pytest.raises(TrainingError, match=r"objective '.*:none' cannot be imported"):
        policy_loss(logprobs, old, batch, objective=f"{code}:none", clip=clip)


def dpo(**keys) -> DpoStage:
    return DpoStage(kind="dpo", init="base", data=[{"path": "x"}], **keys)


def test_a_loss_on_pairs_gets_sums_and_the_options_that_it_takes(code: Path):
    sums = torch.tensor([-3.0, -5.0, -8.0, -6.0])
    ref = torch.tensor([-4.0, -4.0, -7.0, -7.0])
    sides = Sides(sums, sums / 2, ref, ref / 2)
    own = pair_losses(dpo(loss=f"{code}:smooth", label_smoothing=0.1), sides)
    # d = 0.1 * 2 and -0.1 * 2; -0.9 ln s(d) - 0.1 ln s(-d), by a calculator.
    torch.testing.assert_close(own.loss, torch.tensor([0.61813886, 0.77813886]))
    suite = pair_losses(dpo(loss="sigmoid", label_smoothing=0.1), sides)
    torch.testing.assert_close(own.loss, suite.loss)
    torch.testing.assert_close(own.chosen_rewards, suite.chosen_rewards)
    torch.testing.assert_close(own.rejected_rewards, suite.rejected_rewards)
    with pytest.raises(
        TrainingError, match=r"returned .*; expected a tensor with one loss for each"
    ):
        pair_losses(dpo(loss=f"{code}:total"), sides)


RECIPE = """
name: own
stages:
  base: {{kind: base, path: {folder}}}
  grpo:
    kind: grpo
    init: base
    prompts: [{{path: p.jsonl}}]
    rewards: [{{kind: length, target: 2, limit: 9}}]
    steps: 1
    {grpo}
  dpo: {{kind: dpo, init: base, data: [{{path: p.jsonl}}], {dpo}}}
"""


def test_a_recipe_names_them_from_its_folder_and_their_source_identifies_the_stage(code: Path):
    file = code.parent / "r.yaml"

    def read(grpo: str = "group_size: 4", dpo: str = "epochs: 1"):
        file.write_text(RECIPE.format(folder=code.parent, grpo=grpo, dpo=dpo))
        return load_recipe(file).stages

    own = "{estimator: losses.py:grouped, objective: losses.py:tokens}"[1:-1].replace(
        ", ", "\n    "
    )
    stages = read(own, 'loss: "losses.py:smooth", label_smoothing: 0.1')
    assert stages["grpo"].estimator == f"{code}:grouped"
    assert stages["dpo"].loss == f"{code}:smooth"
    before = [spec_hash(s.settings(), seed=0, inputs={}) for s in stages.values()]
    code.write_text(CODE + "# changed\n")
    after = [spec_hash(s.settings(), seed=0, inputs={}) for s in stages.values()]
    code.write_text(CODE)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False]
    for keys, said in (
        ({"grpo": "estimator: losses.py:alon"}, "did you mean 'alone'"),
        ({"grpo": "estimator: losses.py:alone"}, "scale: 'std' has no effect with .*:alone"),
        ({"grpo": "estimator: group_relativ"}, "found 'group_relativ'; expected one of"),
        ({"dpo": "loss: sigmoi"}, "found 'sigmoi'; expected one of 'sigmoid'"),
        (
            {"dpo": 'loss: "losses.py:total", label_smoothing: 0.1'},
            "label_smoothing: has no effect with loss",
        ),
    ):
        with pytest.raises(RecipeError, match=said):
            read(**keys)
