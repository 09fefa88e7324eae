"""EWC on problems whose Fisher information, gradient and optimum are known in closed form."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import alone

from align.core.errors import DataError
from align.recipe.schema import LayersSpec, OptimSpec, ZeroSpec
from align.training.learner import Learner
from align.tuning.ewc import Anchor, anchor_at, fisher_diagonal, scaled
from align.tuning.export import full_weights


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """Join a world of one."""
    with alone.world_of_one():
        yield


class Softmax(nn.Module):
    """Give class log-probabilities of a linear classifier."""

    def __init__(self, weight: np.ndarray) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ x).log_softmax(0)


def test_fisher_is_the_mean_of_squared_gradients_of_single_rows() -> None:
    """d log p_y / dW = (onehot_y - p) x^T; squared row by row, then averaged."""
    rng = np.random.default_rng(0)
    weight, xs, ys = rng.normal(size=(3, 4)), rng.normal(size=(5, 4)), [0, 2, 1, 1, 0]
    expected = np.zeros((3, 4))
    for x, y in zip(xs, ys, strict=True):
        p = np.exp(weight @ x) / np.exp(weight @ x).sum()
        expected += np.outer(np.eye(3)[y] - p, x) ** 2 / 5
    rows = list(zip(torch.tensor(xs), ys, strict=True))
    found = fisher_diagonal(Softmax(weight), rows, lambda m, row: m(row[0])[row[1]])
    np.testing.assert_allclose(found["weight"].numpy(), expected, rtol=1e-6)


def test_fisher_of_rows_that_pull_apart_does_not_cancel() -> None:
    """Two rows with gradients +g and -g: the gradient of the batch is 0, the information is not."""
    weight = np.zeros((2, 1))
    rows = [(torch.ones(1, dtype=torch.float64), y) for y in (0, 1)]
    found = fisher_diagonal(Softmax(weight), rows, lambda m, row: m(row[0])[row[1]])
    assert found["weight"].tolist() == [[0.25], [0.25]]


def test_scaled_information_has_mean_one_before_the_cap() -> None:
    """Mean of (1, 2, 3, 14) is 5: 0.2, 0.4, 0.6, 2.8, and 2.8 is capped at 2."""
    found = scaled({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 14.0])}, cap=2.0)
    assert torch.cat([found["a"], found["b"]]).tolist() == pytest.approx([0.2, 0.4, 0.6, 2.0])
    with pytest.raises(DataError, match="mean Fisher information of its rows is 0"):
        scaled({"a": torch.zeros(3)}, cap=2.0)


class Point(nn.Module):
    """Two blocks of weights that the loss pulls to a target."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.ParameterDict({"w": nn.Parameter(torch.tensor(x))}) for x in START]
        )

    def forward(self) -> Tensor:
        w = torch.cat([block["w"] for block in self.layers])
        return 0.5 * (torch.tensor(CURVE) * (w - torch.tensor(TARGET)).square()).sum()


START, TARGET = ([1.0, -1.0], [0.5, 2.0]), [3.0, 1.0, -2.0, 0.0]
CURVE, FISHER, COEF = [1.0, 2.0, 0.5, 4.0], ([2.0, 0.0], [1.0, 0.5]), 4.0
NAMES = ("layers.0.w", "layers.1.w")


def learner_of(stage: int, steps: int, layers: LayersSpec | None = None) -> Learner:
    fisher = dict(zip(NAMES, map(torch.tensor, FISHER), strict=True))
    module = Point()
    return Learner(
        module,
        optim=OptimSpec(learning_rate=0.05, schedule="linear", warmup_frac=0.0, max_grad_norm=1e9),
        zero=ZeroSpec(stage=stage),
        dtype="float32",
        total_steps=steps,
        layers=layers,
        anchor=anchor_at(module, fisher, coef=COEF),
    )


def loss_fn(model: nn.Module, micro: float) -> tuple[Tensor, dict]:
    """Give a share of the loss: micro-batches must not repeat the penalty."""
    return model() * micro, {}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_ends_at_the_optimum_of_both_pulls(stage: int) -> None:
    """The minimum of c/2 (w - t)^2 + L F/2 (w - s)^2 is at (c t + L F s) / (c + L F)."""
    learner = learner_of(stage, 400)
    for _ in range(400):
        stats = learner.step([0.25, 0.75], loss_fn)
    start, fisher = np.concatenate(START), np.concatenate(FISHER)
    curve, target = np.array(CURVE), np.array(TARGET)
    at = (curve * target + COEF * fisher * start) / (curve + COEF * fisher)
    found = torch.cat([p.clone() for _, p in full_weights(learner.module)]).numpy()
    np.testing.assert_allclose(found, at, atol=1e-3)
    penalty = float((COEF / 2 * fisher * (at - start) ** 2).sum())
    assert stats["ewc"] == pytest.approx(penalty, rel=1e-2)
    loss = float((curve / 2 * (at - target) ** 2).sum())
    assert stats["loss"] == pytest.approx(loss + penalty, rel=1e-3)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_gradient_is_the_sum_of_both_pulls_and_frozen_layers_have_none(stage: int) -> None:
    """Layer 0 is frozen to the end: neither its penalty nor its gradient counts."""
    learner = learner_of(stage, 3, LayersSpec(freeze_first=1))
    for _ in range(3):
        w = dict(full_weights(learner.module))["layers.1.w"].double().clone().numpy()
        stats = learner.step([1.0], loss_fn)
        expected = np.array([0.5, 4.0]) * (w - [-2.0, 0.0])
        expected += COEF * np.array(FISHER[1]) * (w - np.array(START[1]))
        assert stats["grad_norm"] == pytest.approx(np.linalg.norm(expected), rel=1e-5)
        penalty = COEF / 2 * (np.array(FISHER[1]) * (w - np.array(START[1])) ** 2).sum()
        assert stats["ewc"] == pytest.approx(penalty, rel=1e-5, abs=1e-9)
    assert dict(full_weights(learner.module))["layers.0.w"].tolist() == START[0]


def test_pull_is_the_gradient_of_the_penalty() -> None:
    fisher, start = torch.tensor([2.0, 0.5]), torch.tensor([1.0, -1.0])
    anchor = Anchor(3.0, {"w": start}, {"w": fisher})
    w = nn.Parameter(torch.tensor([2.0, 3.0]))
    value = anchor.penalty([("w", w)])
    value.backward()
    assert value.item() == 3.0 / 2 * (2.0 * 1.0 + 0.5 * 16.0)
    share, gradient = anchor.pull("w", w.detach())
    assert share.item() == value.item()
    assert torch.equal(gradient, w.grad)
