"""A prompt computed once for all its answers gives what each answer alone gives."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import one_by_one, tiny_llama

from align.core.types import TokenRow
from align.models import attention
from align.models.heads import ValueModel
from align.models.logprobs import LogprobModel
from align.training.batch import PackedBatch, pack
from reward_models.scalar import RewardModel

TOKEN = st.integers(0, 60)
GROUP = st.tuples(
    st.lists(TOKEN, min_size=1, max_size=9),
    st.lists(st.lists(TOKEN, min_size=1, max_size=12), min_size=1, max_size=4),
)


def packed(groups: list[tuple[list[int], list[list[int]]]], *, once: bool) -> PackedBatch:
    rows, shared = [], []
    for prompt, answers in groups:
        for i, answer in enumerate(answers):
            trained = (False,) * len(prompt) + (True,) * len(answer)
            rows.append(TokenRow((*prompt, *answer), trained))
            shared.append(len(prompt) if once and i else 0)
    return pack(rows, shared=shared)


@settings(max_examples=25, deadline=None)
@given(st.lists(GROUP, min_size=1, max_size=3), st.sampled_from([0.0, 0.7, 1.0]))
def test_logprobs_equal_each_answer_alone(groups, alike) -> None:
    model = tiny_llama()
    batch = packed(groups, once=True)
    assert batch.input_ids.numel() == sum(len(p) + sum(map(len, a)) for p, a in groups)
    before = attention.ALIKE
    attention.ALIKE = alike
    try:
        out = LogprobModel(model)(batch.input_ids, batch.position_ids, mask=batch.mask)
    finally:
        attention.ALIKE = before
    wanted = [
        value
        for prompt, answers in groups
        for answer in answers
        for value in one_by_one(model, [*prompt, *answer], 1.0)[0][len(prompt) :]
    ]
    assert out.logprobs[batch.mask].tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-7)


GROUPS = [
    ([5, 9, 2, 33], [[7, 1], [8, 8, 3, 1], [60]]),
    ([4], [[11, 12, 13, 14, 15, 1]]),
    ([3, 2, 1], [[2], [9, 9]]),
]


def test_gradients_equal_those_of_prompts_computed_for_each_answer() -> None:
    gradients = []
    for once in (True, False):
        model = tiny_llama()
        batch = packed(GROUPS, once=once)
        out = LogprobModel(model)(batch.input_ids, batch.position_ids, mask=batch.mask)
        weight = torch.arange(1.0, 1 + int(batch.mask.sum()), dtype=torch.float64)
        (out.logprobs[batch.mask] * weight.cos()).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[1].items():
        # The head works in float32: 1e-6 of rounding, and nothing else.
        assert (gradients[0][name] - wanted).norm() < 1e-5 * wanted.norm(), name


def test_values_at_answers_equal_those_of_prompts_computed_for_each_answer() -> None:
    llama = tiny_llama()
    scorer = RewardModel(llama.model, 32).double()
    torch.nn.init.normal_(scorer.head.weight)
    found = []
    for once in (True, False):
        batch = packed(GROUPS, once=once)
        values = ValueModel(scorer)(batch.input_ids, batch.position_ids)
        found.append(values[batch.mask])
    assert torch.allclose(found[0], found[1], rtol=1e-5, atol=1e-6)
    assert found[0].unique().numel() > 5


def test_a_value_is_that_of_the_state_before_its_token() -> None:
    llama = tiny_llama()
    scorer = RewardModel(llama.model, 32).double()
    torch.nn.init.normal_(scorer.head.weight)
    batch = packed(GROUPS, once=True)
    with torch.no_grad():
        values = ValueModel(scorer)(batch.input_ids, batch.position_ids)
        wanted = [
            float(scorer(torch.tensor([[*prompt, *answer[:t]]]))[0, -1])
            for prompt, answers in GROUPS
            for answer in answers
            for t in range(len(answer))
        ]
    assert values[batch.mask].tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    # Nothing precedes the first token of a sequence.
    assert not values[batch.position_ids == 0].any()


def test_a_shared_token_must_not_be_trained() -> None:
    row = TokenRow((1, 2, 3), (False, True, True))
    with pytest.raises(AssertionError):
        pack([row, row], shared=[0, 2])
