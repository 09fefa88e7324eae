"""The Learner's step against plain AdamW, and what must not change it."""

import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from deepspeed.ops.op_builder import CPUAdamBuilder
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from engine_models import tiny_model

from align.core.errors import TrainingError
from align.core.types import TokenRow
from align.models.loading import load_policy
from align.models.logprobs import LogprobModel
from align.recipe.schema import OptimSpec, ZeroSpec
from align.stages.sft import collate, length_of, sft_loss
from align.training.learner import Learner, evaluate, learning_rate
from align.training.task import OfflineTask, micro_batches
from align.tuning.export import full_weights

ROWS = [
    TokenRow(tuple(3 + (7 * r * t + t) % 60 for t in range(n)), tuple(t > 2 for t in range(n)))
    for r, n in enumerate((9, 4, 17, 6, 12))
]
# A key's bias has gradient 0 but for rounding; with a small eps Adam would make a step of it.
OPTIM = OptimSpec(
    learning_rate=5e-3,
    schedule="linear",
    warmup_frac=0.25,
    weight_decay=0.1,
    betas=(0.9, 0.95),
    max_grad_norm=0.3,
    eps=1e-4,
)
STEPS = 4


def learner_of(
    module: nn.Module, stage: int = 0, optim: OptimSpec = OPTIM, offload: str = "none"
) -> Learner:
    zero = ZeroSpec(stage=stage, offload=offload)
    return Learner(module, optim=optim, zero=zero, dtype="float32", total_steps=STEPS)


def trained(
    model_dir: Path,
    *,
    micro_tokens: int,
    checkpointing: bool = False,
    stage: int = 0,
    offload: str = "none",
):
    """Train on the rows; give weights, losses and norms."""
    model = load_policy(model_dir, dtype="float32", gradient_checkpointing=checkpointing)
    learner = learner_of(LogprobModel(model), stage, offload=offload)
    task = OfflineTask([], [], length_of, collate, sft_loss)
    stats = [learner.step(micro_batches(task, ROWS, micro_tokens), sft_loss) for _ in range(STEPS)]
    weights = {n: p.clone() for n, p in full_weights(model)}
    return weights, [s["loss"] for s in stats], [s["grad_norm"] for s in stats]


def plain_adamw() -> tuple[dict[str, Tensor], list[float], list[float]]:
    """Do the same in float64 by the textbook, each row alone, straight from the logits."""
    model = tiny_model(1, tied=True).double().train()
    parameters = dict(model.named_parameters())
    first = {n: torch.zeros_like(p) for n, p in parameters.items()}
    second = {n: torch.zeros_like(p) for n, p in parameters.items()}
    losses, norms = [], []
    for step in range(STEPS):
        total, count = 0.0, 0
        for row in ROWS:
            logprobs = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
            for t in range(3, len(row.input_ids)):
                total, count = total - logprobs[t - 1, row.input_ids[t]], count + 1
        gradients = torch.autograd.grad(total / count, list(parameters.values()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        # Warm-up: round(0.25 * 4) = 1 step at 1/2 of the peak; then 3/3, 2/3, 1/3 of it.
        rate = 5e-3 * (0.5, 1.0, 2 / 3, 1 / 3)[step]
        for (name, p), g in zip(parameters.items(), gradients, strict=True):
            g = g * min(1.0, 0.3 / norm)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g * g
            m = first[name] / (1 - 0.9 ** (step + 1))
            v = second[name] / (1 - 0.95 ** (step + 1))
            decay = 0.1 if p.ndim == 2 else 0.0
            with torch.no_grad():
                p.mul_(1 - rate * decay).sub_(rate * m / (v.sqrt() + 1e-4))
        losses.append(float((total / count).detach()))
        norms.append(norm)
    return {n: p.detach() for n, p in parameters.items()}, losses, norms


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("micro_tokens", [1, 20, 1000])
def test_learner_equals_textbook_adamw_for_every_micro_batch_size(
    model_dir: Path, stage: int, micro_tokens: int
) -> None:
    weights, losses, norms = plain_adamw()
    assert min(norms) > 0.6  # more than the limit of 0.3: clipping is at work
    found, found_losses, found_norms = trained(model_dir, micro_tokens=micro_tokens, stage=stage)
    assert found_losses == pytest.approx(losses, rel=1e-5)
    assert found_norms == pytest.approx(norms, rel=1e-5)
    for name, expected in weights.items():
        torch.testing.assert_close(found[name].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def cpu_adam(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile DeepSpeed's CPU Adam, which offloading uses: half a minute to two.

    In a folder of its own, because torch would wait for ever on a lock that a killed build left.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        CPUAdamBuilder().load()
        yield


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler for DeepSpeed's CPU Adam")
@pytest.mark.usefixtures("cpu_adam")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_learner_equals_textbook_adamw(model_dir: Path, stage: int) -> None:
    weights, losses, norms = plain_adamw()
    found = trained(model_dir, micro_tokens=20, stage=stage, offload="cpu")
    assert found[1] == pytest.approx(losses, rel=1e-5)
    assert found[2] == pytest.approx(norms, rel=1e-5)
    for name, expected in weights.items():
        torch.testing.assert_close(found[0][name].double(), expected, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_changes_nothing(model_dir: Path) -> None:
    plain, losses, _ = trained(model_dir, micro_tokens=20)
    found, found_losses, _ = trained(model_dir, micro_tokens=20, checkpointing=True)
    assert found_losses == losses
    for name, expected in plain.items():
        assert torch.equal(found[name], expected), name


def test_frozen_weights_do_not_move(model_dir: Path) -> None:
    model = load_policy(model_dir, dtype="float32")
    model.model.layers[0].requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    learner = learner_of(LogprobModel(model))
    learner.step([collate(ROWS, ROWS)], sft_loss)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (not p.requires_grad), name


def test_model_without_trainable_weights_is_refused(model_dir: Path) -> None:
    model = load_policy(model_dir, dtype="float32").requires_grad_(False)
    with pytest.raises(TrainingError, match="no parameter is trainable"):
        learner_of(LogprobModel(model))


@pytest.mark.parametrize("stage", [0, 2])
def test_gradient_that_is_not_finite_stops_the_run(model_dir: Path, stage: int) -> None:
    """The loss is finite, its gradient is not: sqrt at 0."""
    learner = learner_of(LogprobModel(load_policy(model_dir, dtype="float32")), stage)

    def loss_fn(model, batch):
        loss, stats = sft_loss(model, batch)
        return loss + (0.0 * loss).sqrt(), stats

    with pytest.raises(TrainingError, match="gradient norm is"):
        learner.step([collate(ROWS, ROWS)], loss_fn)


def test_a_loss_that_is_not_finite_stops_the_run(model_dir: Path) -> None:
    learner = learner_of(LogprobModel(load_policy(model_dir, dtype="float32")))
    before = [p.detach().clone() for p in learner.module.parameters()]

    def loss_fn(model, batch):
        loss, stats = sft_loss(model, batch)
        return loss * float("nan"), stats

    with pytest.raises(TrainingError, match="the loss is nan"):
        learner.step([collate(ROWS, ROWS)], loss_fn)
    assert all(
        torch.equal(p, old) for p, old in zip(learner.module.parameters(), before, strict=True)
    )


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Three steps of warm-up rise by quarters of the peak; then the last, which is the floor.
        ("constant", {0: 2.0, 1: 4.0, 2: 6.0, 3: 8.0, 6: 8.0, 12: 8.0}),
        ("linear", {0: 2.0, 1: 4.0, 2: 6.0, 3: 8.0, 6: 6.0, 9: 4.0, 12: 2.0, 13: 2.0}),
        # A third and two thirds of the way: 0.5 (1 + cos 60) = 3/4 and 1/4 of what lies above 2.
        ("cosine", {0: 2.0, 2: 6.0, 3: 8.0, 6: 6.5, 9: 3.5, 12: 2.0}),
    ],
)
def test_schedules_by_hand(schedule: str, expected: dict[int, float]) -> None:
    optim = OptimSpec(learning_rate=8.0, schedule=schedule, warmup_frac=0.25, min_lr_frac=0.25)
    for step, rate in expected.items():
        assert learning_rate(optim, step, 12) == pytest.approx(rate)


def test_evaluation_neither_trains_nor_depends_on_micro_batches(model_dir: Path) -> None:
    learner = learner_of(LogprobModel(load_policy(model_dir, dtype="float32")))
    before = [p.detach().clone() for p in learner.module.parameters()]
    task = OfflineTask([], [], length_of, collate, sft_loss)
    losses = [
        evaluate(learner.engine, micro_batches(task, ROWS, size), sft_loss)["loss"]
        for size in (1, 20, 999)
    ]
    assert losses == pytest.approx([plain_adamw()[1][0]] * 3, rel=1e-5)
    assert all(
        torch.equal(p, old) and p.grad is None
        for p, old in zip(learner.module.parameters(), before, strict=True)
    )
