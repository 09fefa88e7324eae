"""Reductions against float64 plain Python, and their invariance to padding, packing and splits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.losses.reduce import (
    masked_moments,
    masked_whiten,
    segment_mean,
    segment_sum,
    token_mean,
)
from align.losses.supervised import nll

NAN = float("nan")
numbers = st.floats(-10, 10, width=32)
sequences = st.lists(
    st.lists(st.tuples(numbers, st.booleans()), min_size=1, max_size=6), min_size=1, max_size=5
)


def padded(rows, width, *, left=False):
    """Lay rows of (value, keep) out as a padded pair of tensors; the padding holds NaN."""
    values, mask = [], []
    for row in rows:
        pad = [(NAN, False)] * (width - len(row))
        full = pad + row if left else row + pad
        values.append([v for v, _ in full])
        mask.append([keep for _, keep in full])
    return torch.tensor(values, dtype=torch.float64), torch.tensor(mask)


def mean_of_sequence_means(rows):
    """Give the mean over non-empty sequences of the mean over kept tokens, and their number."""
    kept = [[v for v, keep in row if keep] for row in rows]
    means = [math.fsum(row) / len(row) for row in kept if row]
    return (math.fsum(means) / len(means) if means else 0.0), len(means)


def test_token_mean_gradient_is_one_over_the_global_count_and_zero_on_masked_tokens():
    x = torch.tensor([3.0, NAN, -1.0], requires_grad=True)
    loss = token_mean(x, torch.tensor([True, False, True]), 8)
    loss.backward()
    assert loss.item() == pytest.approx(2 / 8)
    assert x.grad.tolist() == [0.125, 0.0, 0.125]


@pytest.mark.parametrize("count", [0, 5, torch.tensor(0), torch.tensor(5)])
def test_token_mean_of_a_masked_out_batch_is_a_zero_on_the_graph(count):
    x = torch.tensor([NAN, 2.0], requires_grad=True)
    loss = token_mean(x, torch.zeros(2, dtype=torch.bool), count)
    loss.backward()
    assert loss.item() == 0.0
    assert x.grad.tolist() == [0.0, 0.0]


@given(sequences, st.data())
def test_token_mean_shares_of_any_split_add_up_to_the_mean(rows, data):
    flat = [token for row in rows for token in row]
    kept = [v for v, keep in flat if keep]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(flat)), max_size=3)))
    shares = []
    for start, end in zip([0, *cuts], [*cuts, len(flat)], strict=True):
        x = torch.tensor([v for v, _ in flat[start:end]], dtype=torch.float64)
        mask = torch.tensor([keep for _, keep in flat[start:end]], dtype=torch.bool)
        shares.append(token_mean(x, mask, len(kept)).item())
    expected = math.fsum(kept) / len(kept) if kept else 0.0
    assert math.fsum(shares) == pytest.approx(expected, abs=1e-12)


@given(sequences)
def test_segment_mean_of_a_packed_row_equals_the_definition(rows):
    expected, count = mean_of_sequence_means(rows)
    flat = [(v, keep, i) for i, row in enumerate(rows) for v, keep in row] + [
        (NAN, False, -1),
        (NAN, False, 99),
    ]
    x = torch.tensor([v for v, _, _ in flat], dtype=torch.float64)
    mask = torch.tensor([keep for _, keep, _ in flat])
    ids = torch.tensor([i for _, _, i in flat])
    means = segment_mean(x, ids, len(rows), mask=mask)
    assert means.sum().item() / max(count, 1) == pytest.approx(expected, abs=1e-12)


def test_segment_sum_adds_tokens_of_each_sequence():
    x = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    sums = segment_sum(x, torch.tensor([0, 2, 0, 2]), 3)
    assert sums.tolist() == [5.0, 0.0, 10.0]
    (sums * torch.tensor([1.0, 1.0, 3.0])).sum().backward()
    assert x.grad.tolist() == [1.0, 3.0, 1.0, 3.0]


def test_masked_whiten_by_hand():
    # Kept 0 and 4: mean 2, population standard deviation 2 (that of a sample would be 2.83).
    x = torch.tensor([0.0, 100.0, 4.0, NAN])
    mask = torch.tensor([True, False, True, False])
    assert masked_whiten(x, mask).tolist() == pytest.approx([-1.0, 0.0, 1.0, 0.0])
    assert masked_whiten(x, mask, center=False).tolist() == pytest.approx([1.0, 0.0, 3.0, 0.0])


@given(st.lists(numbers, min_size=2, max_size=20), st.booleans())
def test_masked_whiten_moments(values, center):
    x = torch.tensor(values, dtype=torch.float64)
    mean = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
    if spread < 1e-3:
        return
    out = masked_whiten(x, torch.ones(len(values), dtype=torch.bool), center=center).tolist()
    new_mean = math.fsum(out) / len(out)
    assert new_mean == pytest.approx(0.0 if center else mean, abs=1e-6)
    variance = math.fsum((v - new_mean) ** 2 for v in out) / len(out)
    assert variance == pytest.approx(1.0, abs=1e-6)


def test_masked_whiten_with_summed_moments_does_not_depend_on_the_rank_count():
    generator = torch.Generator().manual_seed(0)
    x = 3.0 + torch.randn(40, generator=generator)
    x[20:] += 5.0
    mask = torch.rand(40, generator=generator) > 0.3
    whole = masked_whiten(x, mask)
    count, total, total_sq = masked_moments(x[:20], mask[:20]) + masked_moments(x[20:], mask[20:])
    parts = [
        masked_whiten(x[part], mask[part], count=count, total=total, total_sq=total_sq)
        for part in (slice(0, 20), slice(20, 40))
    ]
    torch.testing.assert_close(torch.cat(parts), whole)
    # Each rank on its own would call its own mean zero, although the second half is far better.
    assert parts[1][mask[20:]].mean().item() > 0.8
    assert masked_whiten(x[20:], mask[20:])[mask[20:]].mean().item() == pytest.approx(0.0, abs=1e-6)


def test_masked_whiten_of_constant_values_makes_no_signal_of_rounding():
    x = torch.full((7,), 0.95)
    mask = torch.ones(7, dtype=torch.bool)
    assert masked_whiten(x, mask).tolist() == [0.0] * 7
    assert masked_whiten(x, mask, center=False).tolist() == x.tolist()
    x[0] = torch.nextafter(x[0], torch.tensor(2.0))
    assert masked_whiten(x, mask).tolist() == [0.0] * 7


def test_masked_whiten_refuses_half_of_the_moments():
    with pytest.raises(AssertionError, match="total_sq"):
        masked_whiten(torch.ones(2), torch.ones(2, dtype=torch.bool), count=2)


def test_nll_by_hand():
    # -log of 1/2 and 1/8 are 1 and 3 times log 2; the masked token's probability is no matter.
    logprobs = torch.tensor([[0.5, 0.125, 0.3]]).log().requires_grad_()
    mask = torch.tensor([[True, True, False]])
    loss = nll(logprobs, mask, 2)
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.log(2))
    assert logprobs.grad.tolist() == [[-0.5, -0.5, 0.0]]
    weighted = nll(logprobs, mask, 4, weights=torch.tensor([[3.0, 1.0, 1.0]]))
    assert weighted.item() == pytest.approx(6 * math.log(2) / 4)


@given(st.lists(numbers, min_size=1, max_size=8), st.integers(0, 3))
def test_nll_ignores_what_stands_on_masked_tokens(values, pad):
    bare = torch.tensor(values, dtype=torch.float64)
    more = torch.cat([bare, torch.full((pad,), NAN, dtype=torch.float64)])
    mask = torch.arange(len(more)) < len(values)
    assert nll(more, mask, 5).item() == nll(bare, mask[: len(values)], 5).item()
