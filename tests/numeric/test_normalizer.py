"""The gradient of a batch is the same however it is cut: micro-batches, packing, padding, order."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from align.core.types import PairRow, TokenRow
from align.models.attention import PACKED
from align.models.logprobs import LogprobModel
from align.recipe.schema import DpoStage
from align.stages import dpo, sft
from align.training.batch import label_probs, pack, pack_pairs, pair_length

ROWS = [
    TokenRow((3, 5, 7, 9, 2), (False, False, True, True, True)),
    TokenRow((4, 4, 8, 1, 2, 6, 2), (False, True, False, False, True, True, True)),
    TokenRow((9, 2), (False, True)),
    TokenRow((5, 6, 7), (False, False, False)),  # nothing trained: must not change the mean
    TokenRow((1, 8, 3, 2), (False, False, False, True)),
]
PAIRS = [
    PairRow(ROWS[0], TokenRow((3, 5, 1, 2), (False, False, True, True)), 2),
    PairRow(ROWS[2], TokenRow((9, 8, 8, 2), (False, True, True, True)), 1),
    PairRow(ROWS[4], TokenRow((1, 8, 3, 7, 7, 2), (False,) * 3 + (True,) * 3), 3),
]


def build() -> LogprobModel:
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation=PACKED,
    )
    return LogprobModel(Qwen2ForCausalLM(config).double())


def gradient(micro_batches: list, loss_fn) -> Tensor:
    model = build()
    for batch in micro_batches:
        loss_fn(model, batch)[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def naive_sft_gradient() -> Tensor:
    """Mean over all trained tokens of the batch, each row alone, straight from the logits."""
    model = build()
    total, count = 0.0, 0
    for row in ROWS:
        logits = model.model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        for t in range(1, len(row.input_ids)):
            if row.trained[t]:
                total, count = total - logits[t - 1, row.input_ids[t]], count + 1
    (total / count).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(len(ROWS))), st.sets(st.integers(1, len(ROWS) - 1)))
def test_sft_gradient_is_the_token_mean_for_every_split(order: list[int], cuts: set[int]) -> None:
    edges = [0, *sorted(cuts), len(ROWS)]
    parts = [[ROWS[i] for i in order[a:b]] for a, b in pairwise(edges)]
    parts.append([])  # the placeholder of a rank without work
    found = gradient([sft.collate(part, ROWS) for part in parts], sft.sft_loss)
    torch.testing.assert_close(found, naive_sft_gradient(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "robust"])
@pytest.mark.parametrize("split", [[[0, 1, 2]], [[0], [1], [2]], [[2, 0], [], [1]]])
def test_dpo_gradient_does_not_depend_on_the_split(kind: str, split: list[list[int]]) -> None:
    spec = DpoStage(
        kind="dpo",
        init="x",
        data=[{"path": "x"}],
        beta=0.3,
        loss=kind,
        label_smoothing=0.1 if kind == "robust" else 0.0,
    )
    rows = [dpo.ReferencePair(p, -1.0 - i, -2.0) for i, p in enumerate(PAIRS)]
    loss_fn = partial(dpo.preference_loss, spec)
    whole = gradient([dpo.collate(rows, rows)], loss_fn)
    parts = gradient([dpo.collate([rows[i] for i in part], rows) for part in split], loss_fn)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-6)


def test_dpo_starts_at_ln_two_with_zero_margins() -> None:
    spec = DpoStage(kind="dpo", init="x", data=[{"path": "x"}], beta=0.3)
    model = build().float()
    rows = dpo.reference_pairs(model, PAIRS, micro_tokens=16)
    loss, stats = dpo.preference_loss(spec, model, dpo.collate(rows, rows))
    assert loss.item() == pytest.approx(0.6931472, abs=1e-5)
    assert stats["margin"].item() == pytest.approx(0.0, abs=1e-5)


def test_pack_placeholder_trains_nothing() -> None:
    found = gradient([pack([], counts={"tokens": 3.0})], sft.sft_loss)
    assert found.abs().max() == 0


def test_a_pair_is_packed_with_its_prompt_once_and_to_its_last_trained_token() -> None:
    """Prompt 3 5, a response of 7 9 2 and one of 1 2; what a template writes behind 2 is cut."""
    for behind in ((), (8, 8)):
        chosen = TokenRow(
            (3, 5, 7, 9, 2, *behind), (False,) * 2 + (True,) * 3 + (False,) * len(behind)
        )
        pair = PairRow(chosen, PAIRS[0].rejected, 2)
        batch = pack_pairs([pair])
        assert batch.input_ids.tolist() == [[3, 5, 7, 9, 2, 1, 2]]
        assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3]]
        assert batch.segment_ids.tolist() == [0, 0, 0, 0, 0, 1, 1]
    for pair in PAIRS:
        assert pair_length(pair) == pack_pairs([pair]).input_ids.numel()


def test_both_responses_of_a_pair_have_its_probability() -> None:
    unsure = [replace(pair, label_prob=p) for pair, p in zip(PAIRS, (0.8, 1.0, 0.6), strict=True)]
    assert label_probs(unsure) == {"label_prob": [0.8, 0.8, 1.0, 1.0, 0.6, 0.6]}
    assert label_probs(PAIRS) == {}
