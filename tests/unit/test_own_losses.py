"""Advantages and losses of the user: found by their signature, checked, and named when wrong."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from align.api.given import Writer
from align.api.running import load_recipe as load_plain
from align.core.artifacts import spec_hash
from align.core.errors import RecipeError, TrainingError
from align.online.algorithms import build_algorithm
from align.online.objective import policy_loss
from align.recipe.algorithms import of_estimator
from align.recipe.load import load_recipe
from align.recipe.schema import DpoStage, GrpoStage, KtoStage, RewardStage
from align.recipe.schema.offline import OfflineStage
from align.stages import classify, kto, sft
from align.stages.dpo import Sides, pair_losses
from align.stages.reward import tasks
from align.training.batch import PackedBatch
from align.training.own_code import check_loss_options, own_losses

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
def focal(logprobs): return -(1 - logprobs.exp()) ** 2 * logprobs
def constant(logprobs): return logprobs.detach() + 1.0
def hinge(policy, ref, good, *, kl, undesirable_weight):
    sign = torch.where(good, 1.0, -undesirable_weight)
    return torch.relu(1.0 - sign * (policy - ref - kl))
def margins(chosen, rejected, *, margin, center_coef):
    return torch.relu(margin - chosen + rejected) + center_coef * chosen
def everything(chosen, rejected, **options): return (chosen - rejected) * len(options)
def squares(scores, good): return (scores - good.float()) ** 2
class Estimator:
    def __call__(self, scores, group_ids): return scores
class Greedy:
    def __call__(self, scores, greedy_scores): return scores - greedy_scores
unnamed, against_greedy = Estimator(), Greedy()
from functools import partial
bound = partial(smooth, label_smoothing=0.1)
alike = partial(total)
def brier(logits, labels):
    return (1 - logits.softmax(-1).gather(-1, labels[:, None])[:, 0]) ** 2
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


class Answers(torch.nn.Module):
    """Return fixed values, whatever is asked: ``.logprobs`` of a policy, or a scorer's values."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.values = torch.nn.Parameter(values)

    def forward(self, input_ids, position_ids, **options):
        return SimpleNamespace(logprobs=self.values) if options else self.values


def spec_of(kind, **keys):
    return kind(kind=kind.__name__[:-5].lower(), init="base", data=[{"path": "x"}], **keys)


def batch_of(mask, *, counts, per_token=None, segments=None, num=1, **per_sequence) -> PackedBatch:
    mask = torch.tensor([mask], dtype=torch.bool)
    ids = torch.zeros_like(mask, dtype=torch.long)
    return PackedBatch(
        input_ids=ids,
        position_ids=ids,
        mask=mask,
        segment_ids=torch.tensor(segments or [0] * mask.shape[1]),
        num=num,
        counts=counts,
        per_token=per_token or {},
        per_sequence={name: torch.tensor(values) for name, values in per_sequence.items()},
    )


def test_a_loss_of_sft_gets_the_trained_tokens_and_is_weighted_as_the_suites_own(code: Path):
    probs = torch.tensor([[0.5, 0.25, 0.9, 1.0]])
    model = Answers(probs.log())
    batch = batch_of(
        [1, 1, 0, 1], counts={"tokens": 5.0}, per_token={"weight": torch.tensor([[1.0, 2, 7, 1]])}
    )
    loss, _ = sft.sft_loss(model, batch, own=f"{code}:focal")
    # (1 - p)^2 (-ln p): 0.25 * 0.693147 and 0.5625 * 1.386294 with weight 2; p = 1 gives 0.
    assert loss.item() == pytest.approx((0.25 * 0.693147 + 2 * 0.5625 * 1.386294) / 5, rel=1e-5)
    loss.backward()
    # d/dx of -(1 - e^x)^2 x at x = ln 0.5: 2 * 0.5 * 0.5 * ln 0.5 - 0.25, over 5.
    assert model.values.grad is not None
    expected = (0.5 * math.log(0.5) - 0.25) / 5
    assert model.values.grad[0, 0].item() == pytest.approx(expected, rel=1e-5)
    assert model.values.grad[0, 2].item() == 0.0
    with pytest.raises(TrainingError, match="returned a tensor without a gradient"):
        sft.sft_loss(model, batch, own=f"{code}:constant")
    # A rank without a row in this micro-batch has no loss, but takes part in the backward pass.
    empty, _ = sft.sft_loss(model, batch_of([0] * 4, counts={"tokens": 5.0}), own=f"{code}:focal")
    empty.backward()
    assert empty.item() == 0.0


def test_a_loss_of_kto_gets_policy_reference_label_and_kl(code: Path):
    batch = batch_of(
        [1, 1, 1],
        counts={"rows": 2.0, "good": 1.0, "bad": 1.0, "kl": 0.25},
        segments=[0, 0, 1],
        num=2,
        ref=[-3.0, -2.0],
        good=[1.0, 0.0],
    )
    spec = spec_of(KtoStage, loss=f"{code}:hinge", undesirable_weight=2.0)
    loss, stats = kto.labeled_loss(spec, Answers(torch.tensor([[-1.0, -1.5, -2.5]])), batch)
    # Ratios: -2.5 + 3 = 0.5 and -0.5. Good: 1 - (0.5 - 0.25); bad: 1 + 2 (-0.5 - 0.25) < 0.
    assert loss.item() == pytest.approx(0.75 / 2)
    assert float(stats["good_reward"]) == pytest.approx(0.1 * 0.5)


def test_a_loss_of_a_reward_model_gets_the_scores_of_pairs_responses_or_steps(code: Path):
    counts = {"pairs": 2.0, "ranked": 2.0, "answers": 4.0, "steps": 2.0}
    batch = batch_of(
        [1] * 4,
        counts=counts,
        per_token={"end": torch.tensor([[0, 1.0, 0, 1]]), "label": torch.tensor([[0, 1.0, 0, 0]])},
        segments=[0, 1, 2, 3],
        num=4,
        margin=[0.5, 0.5, 3.0, 3.0],
        tie=[0.0] * 4,
        good=[1.0, 0.0, 0.0, 1.0],
        **{"weight/0": [1.0] * 4},
    )
    model = Answers(torch.tensor([[2.0, 1.0, 4.0, 3.0]]))
    pairs = spec_of(RewardStage, loss=f"{code}:margins", center_coef=0.1)
    # relu(0.5 - 1) + 0.2 and relu(3 - 1) + 0.4, halved.
    assert tasks.pair_loss(pairs, model, batch)[0].item() == pytest.approx((0.2 + 2.4) / 2)
    options = spec_of(RewardStage, loss=f"{code}:everything")
    assert tasks.pair_loss(options, model, batch)[0].item() == pytest.approx(5 * (1 + 1) / 2)
    answers = spec_of(RewardStage, loss=f"{code}:squares", supervision="answers")
    found, _ = tasks.labeled_loss(model, batch, spec=answers, class_weights=(9.0, 9.0))
    assert found.item() == pytest.approx(((2 - 1) ** 2 + 1 + 16 + (3 - 1) ** 2) / 4)
    # Only at the ends of the steps: scores 1 and 3, labels 1 and 0.
    steps, _ = tasks.steps_loss(model, batch, own=f"{code}:squares")
    assert steps.item() == pytest.approx((0 + 9) / 2)


def test_a_loss_of_a_classifier_gets_logits_and_labels(code: Path):
    batch = batch_of([1, 1], counts={"rows": 2.0}, segments=[0, 1], num=2, label=[0.0, 1.0])
    model = Answers(torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)]]))
    loss, _ = classify.labeled_loss(model, batch, own=f"{code}:brier")
    # Probabilities of the labels: 1/2 and 3/4.
    assert loss.item() == pytest.approx((0.25 + 0.0625) / 2)


def test_a_compiled_function_has_no_known_options_and_gets_none():
    logits = torch.tensor([0.0, 1.0], requires_grad=True)
    found = own_losses(
        "torch.nn.functional:softplus", logits, each="rows", options={"label_smoothing": 0.1}
    )
    assert found.tolist() == pytest.approx([math.log(2), math.log(1 + math.e)])


def test_options_that_a_loss_does_not_take_are_refused_also_if_only_its_import_tells(code: Path):
    # The recipe is valid: without importing the file nobody knows what a partial takes.
    for loss, said in (
        (f"{code}:alike", "label_smoothing: no effect with loss .*:alike, which takes policy_"),
        ("torch.nn.functional:softplus", "whose parameters are not known"),
    ):
        with pytest.raises(RecipeError, match=said):
            check_loss_options(dpo(loss=loss, label_smoothing=0.1))
        check_loss_options(dpo(loss=loss))
    check_loss_options(dpo(loss=f"{code}:bound", label_smoothing=0.1))
    check_loss_options(dpo(loss="sigmoid", label_smoothing=0.1))


def test_an_estimator_whose_parameters_only_its_import_tells_is_checked_then(code: Path):
    def build(estimator: str, **keys):
        rewards = [{"kind": "length", "target": 2, "limit": 9}]
        given = {"init": "base", "prompts": [{"path": "x"}], "rewards": rewards, "steps": 1}
        plain = {"kind": "grpo", "estimator": f"{code}:{estimator}", **given, **keys}
        return build_algorithm(GrpoStage.model_validate_json(json.dumps(plain)))

    build("unnamed", scale="none")
    with pytest.raises(RecipeError, match="takes scores, group_ids: scale 'std' has no effect"):
        build("unnamed")
    with pytest.raises(RecipeError, match="write the estimator as a 'def' at the top level"):
        build("against_greedy", scale="none")


def test_a_function_of_python_is_the_loss_of_every_offline_stage(tmp_path: Path):
    def own(first, second):
        return first - second

    for kind in ("sft", "dpo", "kto", "reward", "classify"):
        block = Writer(tmp_path).plain({"kind": kind, "loss": own})
        stage = {**block, "init": "base", "data": [{"path": "x.jsonl"}]}
        stages = {"base": {"kind": "base", "path": "org/m"}, "own": stage}
        spec = load_plain({"name": "own", "stages": stages}).stages["own"]
        assert isinstance(spec, OfflineStage)
        assert spec.own_loss == block["loss"]
        assert Path(block["loss"].rpartition(":")[0]).is_file()


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
  last: {{kind: {last}, init: base, data: [{{path: p.jsonl}}]}}
"""


def test_a_recipe_names_them_from_its_folder_and_their_source_identifies_the_stage(code: Path):
    file = code.parent / "r.yaml"

    def read(grpo: str = "group_size: 4", dpo: str = "epochs: 1", last: str = "sft"):
        file.write_text(RECIPE.format(folder=code.parent, grpo=grpo, dpo=dpo, last=last))
        return load_recipe(file).stages

    own = "{estimator: losses.py:grouped, objective: losses.py:tokens}"[1:-1].replace(
        ", ", "\n    "
    )
    stages = read(
        own, 'loss: "losses.py:smooth", label_smoothing: 0.1', 'sft, loss: "losses.py:focal"'
    )
    assert stages["grpo"].estimator == f"{code}:grouped"
    assert stages["dpo"].loss == f"{code}:smooth"
    before = [spec_hash(s.settings(), seed=0, inputs={}) for s in stages.values()]
    code.write_text(CODE + "# changed\n")
    after = [spec_hash(s.settings(), seed=0, inputs={}) for s in stages.values()]
    code.write_text(CODE)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False, False]
    for keys, said in (
        ({"grpo": "estimator: losses.py:alon"}, "did you mean 'alone'"),
        ({"grpo": "estimator: losses.py:alone"}, "scale: 'std' has no effect with .*:alone"),
        ({"grpo": "estimator: group_relativ"}, "found 'group_relativ'; expected one of"),
        ({"dpo": "loss: sigmoi"}, "found 'sigmoi'; expected one of 'sigmoid'"),
        (
            {"dpo": 'loss: "losses.py:total", label_smoothing: 0.1'},
            "label_smoothing: has no effect with loss",
        ),
        ({"last": "sft, loss: focal"}, "found 'focal'; expected FILE.py:NAME or MODULE:NAME"),
        ({"last": 'kto, loss: "losses.py:hinges"'}, "did you mean 'hinge'"),
        (
            {"last": 'sft, loss: "losses.py:focal", label_smoothing: 0.1'},
            "label_smoothing: has no effect with loss",
        ),
        (
            {"last": 'reward, loss: "losses.py:margins", use_margin: true'},
            "use_margin: has no effect with loss .* if it names 'margin'",
        ),
        (
            {"last": 'reward, loss: "losses.py:margins", tie_margin: 1.0'},
            "tie_margin: has no effect with loss",
        ),
        (
            {"last": 'kto, loss: "losses.py:hinge", desirable_weight: 2.0'},
            "desirable_weight: has no effect with loss",
        ),
    ):
        with pytest.raises(RecipeError, match=said):
            read(**keys)
