"""The trainer on a GPU against plain float32 and against the CPU."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "numeric"))
sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from alone import world_of_one
from engine_models import save_tiny, tiny_model

from align.core.types import TokenRow
from align.models import fused_head
from align.models.attention import packed_attention, segments_from_positions
from align.models.loading import load_policy
from align.models.logprobs import LogprobModel
from align.recipe.schema import OptimSpec, ZeroSpec
from align.stages.sft import collate, sft_loss
from align.training.learner import Learner

pytestmark = pytest.mark.gpu
ROWS = [
    TokenRow(tuple(3 + (7 * r * t + t) % 60 for t in range(n)), tuple(t > 2 for t in range(n)))
    for r, n in enumerate((9, 4, 17, 6, 12))
]


@pytest.mark.parametrize("elements", [64 * 512, 2**28])
def test_fused_head_on_gpu_equals_float32_autograd(monkeypatch, elements):
    monkeypatch.setattr(fused_head, "CHUNK_ELEMENTS_GPU", elements)
    torch.manual_seed(0)
    h = torch.randn(300, 64, device="cuda", requires_grad=True)
    w = torch.randn(512, 64, device="cuda").mul_(0.1).requires_grad_()
    y = torch.randint(0, 512, (300,), device="cuda")
    values, _ = fused_head.head_logprobs(h, w, y, temperature=0.7, entropy=False)
    (values * torch.linspace(-1, 1, 300, device="cuda")).sum().backward()
    found = values.detach(), h.grad.clone(), w.grad.clone()
    h.grad = w.grad = None
    plain = (h @ w.T / 0.7).log_softmax(-1).gather(-1, y[:, None])[:, 0]
    (plain * torch.linspace(-1, 1, 300, device="cuda")).sum().backward()
    for a, b in zip(found, (plain.detach(), h.grad, w.grad), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


def test_packed_attention_on_gpu_equals_each_sequence_alone():
    torch.manual_seed(0)
    lengths = (70, 3, 33, 64)
    positions = torch.cat([torch.arange(n) for n in lengths]).cuda()
    q, k, v = (torch.randn(1, h, sum(lengths), 32, device="cuda") for h in (4, 2, 2))
    module = torch.nn.Module()
    packed, _ = packed_attention(module, q, k, v, None, segments=segments_from_positions(positions))
    begin = 0
    for n in lengths:
        part = slice(begin, begin + n)
        scores = q[:, :, part] @ k[:, :, part].repeat_interleave(2, 1).transpose(2, 3) / 32**0.5
        mask = torch.ones(n, n, device="cuda", dtype=torch.bool).tril()
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        alone = (weights @ v[:, :, part].repeat_interleave(2, 1)).transpose(1, 2)
        torch.testing.assert_close(packed[:, part], alone, atol=2e-3, rtol=2e-3)
        begin += n


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_steps_on_gpu_follow_the_cpu(tmp_path, stage):
    """Take three steps; the oracle is AdamW on the CPU, each row alone, from the logits."""
    with world_of_one():
        folder = save_tiny(tiny_model(1, tied=True), tmp_path)
        module = LogprobModel(load_policy(folder, dtype="float32"))
        optim = OptimSpec(learning_rate=5e-3, schedule="constant", warmup_frac=0.0, eps=1e-4)
        learner = Learner(
            module, optim=optim, zero=ZeroSpec(stage=stage), dtype="float32", total_steps=3
        )
        batches = [collate(ROWS[:2], ROWS), collate(ROWS[2:], ROWS)]
        found = [learner.step(batches, sft_loss)["loss"] for _ in range(3)]
    assert found == pytest.approx(losses_on_cpu(), rel=2e-4)


def losses_on_cpu() -> list[float]:
    model = tiny_model(1, tied=True).float()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=5e-3, betas=OptimSpec().betas, eps=1e-4, weight_decay=0.0
    )
    found = []
    for _ in range(3):
        total, count = torch.zeros(()), 0
        for row in ROWS:
            logits = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
            for t in range(1, len(row.input_ids)):
                if row.trained[t]:
                    total, count = total - logits[t - 1, row.input_ids[t]], count + 1
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OptimSpec().max_grad_norm)
        optimizer.step()
        found.append(loss.item())
    return found
