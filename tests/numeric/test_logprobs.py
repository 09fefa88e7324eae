"""Chunked log-probabilities and packed attention against float64 definitions and transformers."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import one_by_one, tiny_llama

from align.models import fused_head
from align.models.attention import PACKED
from align.models.logprobs import token_logprobs

SEQUENCES = [[5, 9, 2, 33, 7], [1, 60], [8, 8, 8, 1, 4, 50, 12], [3]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_token_logprobs_of_padded_rows_equal_each_sequence_alone(side: str) -> None:
    model = tiny_llama()
    width = 9
    ids, real = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width, dtype=torch.long)
    for i, s in enumerate(SEQUENCES):
        at = slice(0, len(s)) if side == "right" else slice(width - len(s), width)
        ids[i, at], real[i, at] = torch.tensor(s), 1
    out = token_logprobs(model, ids, real, temperature=0.7, entropy=True)
    assert out.logprobs.shape == ids.shape
    assert out.logprobs[real == 0].abs().max() == 0
    for i, s in enumerate(SEQUENCES):
        logprobs, entropies = one_by_one(model, s, 0.7)
        assert out.logprobs[i][real[i] == 1].tolist() == pytest.approx(logprobs, abs=1e-6)
        assert out.entropy[i][real[i] == 1].tolist() == pytest.approx(entropies, abs=1e-6)


def test_token_logprobs_of_a_packed_row_equal_each_sequence_alone() -> None:
    model = tiny_llama()
    ids = torch.tensor([[t for s in SEQUENCES for t in s]])
    positions = torch.tensor([[p for s in SEQUENCES for p in range(len(s))]])
    out = token_logprobs(model, ids, position_ids=positions).logprobs[0].tolist()
    expected = [x for s in SEQUENCES for x in one_by_one(model, s, 1.0)[0]]
    assert out == pytest.approx(expected, abs=1e-6)


def test_token_logprobs_in_many_chunks_have_the_same_values_and_gradients(monkeypatch) -> None:
    ids = torch.tensor([SEQUENCES[2]])
    found = []
    for elements in (2**24, 61):  # the second holds the logits of one token at a time
        monkeypatch.setattr(fused_head, "CHUNK_ELEMENTS", elements)
        model = tiny_llama()
        out = token_logprobs(model, ids).logprobs
        (out * torch.arange(1.0, 8.0)).sum().backward()
        found.append((out, [p.grad for p in model.parameters()]))
    assert torch.equal(found[0][0], found[1][0]) or torch.allclose(found[0][0], found[1][0])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_token_logprobs_mask_chooses_positions_and_sends_no_gradient_elsewhere() -> None:
    model = tiny_llama()
    ids = torch.tensor([SEQUENCES[0]])
    mask = torch.tensor([[False, False, True, False, False]])
    full = token_logprobs(model, ids).logprobs
    some = token_logprobs(model, ids, mask=mask).logprobs
    assert some[0, 2].item() == pytest.approx(full[0, 2].item(), abs=1e-7)
    assert some[~mask].abs().sum() == 0
    # Token 3 and 4 come after the only trained token: their embeddings must get no gradient.
    some.sum().backward()
    grad = model.get_input_embeddings().weight.grad
    assert grad[[33, 7]].abs().max() == 0
    assert grad[[5, 9]].abs().max() > 0


def test_token_logprobs_with_nothing_trained_stay_connected_to_the_graph() -> None:
    model = tiny_llama()
    ids = torch.tensor([SEQUENCES[0]])
    token_logprobs(model, ids, mask=torch.zeros_like(ids).bool()).logprobs.sum().backward()
    grads = [p.grad for n, p in model.named_parameters() if "layers" in n]
    assert all(g is not None and g.abs().max() == 0 for g in grads)


def test_packed_attention_respects_a_sliding_window() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=3,
        attn_implementation=PACKED,
    )
    model = MistralForCausalLM(config).double()
    ids = torch.tensor([SEQUENCES[2]])
    packed = token_logprobs(model, ids).logprobs
    model.set_attn_implementation("eager")
    logits = model(ids).logits[0].log_softmax(-1)
    expected = [0.0] + [logits[t - 1, ids[0, t]].item() for t in range(1, ids.shape[1])]
    assert packed[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_token_logprobs_work_on_learned_positions_too() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    config._attn_implementation = PACKED
    model = GPT2LMHeadModel(config).double().eval()
    ids = torch.tensor([[t for s in SEQUENCES for t in s]])
    positions = torch.tensor([[p for s in SEQUENCES for p in range(len(s))]])
    packed = token_logprobs(model, ids, position_ids=positions).logprobs[0].tolist()
    model.set_attn_implementation("eager")
    expected = []
    for s in SEQUENCES:
        logits = model(torch.tensor([s])).logits[0].log_softmax(-1)
        expected += [0.0] + [logits[t - 1, s[t]].item() for t in range(1, len(s))]
    assert packed == pytest.approx(expected, abs=1e-6)
