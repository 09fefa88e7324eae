"""Micro-batch plans and the stateless sampler."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.data.batching import plan_micro_batches
from align.data.sampler import batch_indices


@given(
    lengths=st.lists(st.integers(1, 40), max_size=40),
    micro_tokens=st.integers(1, 60),
    ranks=st.integers(1, 5),
)
def test_plan_places_every_row_once_within_the_budget(
    lengths: list[int], micro_tokens: int, ranks: int
) -> None:
    plan = plan_micro_batches(lengths, micro_tokens=micro_tokens, ranks=ranks)
    assert len(plan) == ranks
    assert len({len(micros) for micros in plan}) == 1
    flat = [i for micros in plan for micro in micros for i in micro]
    assert sorted(flat) == list(range(len(lengths)))
    for micro in (micro for micros in plan for micro in micros):
        assert len(micro) == 1 or sum(lengths[i] for i in micro) <= micro_tokens
    loads = [sum(lengths[i] for micro in micros for i in micro) for micros in plan]
    # Dealing to the least loaded rank keeps two ranks within one (the longest) row of each other.
    assert max(loads) - min(loads) <= max(lengths, default=0)
    assert plan == plan_micro_batches(lengths, micro_tokens=micro_tokens, ranks=ranks)


@given(lengths=st.lists(st.integers(1, 30), max_size=80), micro_tokens=st.integers(1, 40))
def test_plan_is_first_fit_longest_first(lengths: list[int], micro_tokens: int) -> None:
    micros: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        sums = [sum(lengths[k] for k in micro) for micro in micros]
        fits = [k for k, total in enumerate(sums) if total + lengths[i] <= micro_tokens]
        if fits:
            micros[fits[0]].append(i)
        else:
            micros.append([i])
    assert plan_micro_batches(lengths, micro_tokens=micro_tokens, ranks=1) == [micros]


class Counted(list):
    """A list that counts how often its items are read."""

    reads = 0

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        Counted.reads += 1
        return super().__getitem__(index)


def test_a_plan_does_not_compare_every_row_with_every_micro_batch() -> None:
    # No two rows fit together: each row would be compared with all rows before it.
    lengths = Counted([6] * 4000)
    plan = plan_micro_batches(lengths, micro_tokens=10, ranks=1)
    assert len(plan[0]) == 4000
    assert Counted.reads < 10 * 4000


def test_plan_of_a_hand_example() -> None:
    # Longest first: 9 to rank 0, 8 to rank 1, 5 to rank 1 (8 < 9), 4 to rank 0 (9 < 13),
    # 2 to rank 0 (13 = 13, both hold two rows, the lower rank). Budget 10:
    # rank 0 [9], [4, 2]; rank 1 [8], [5].
    plan = plan_micro_batches([4, 9, 2, 8, 5], micro_tokens=10, ranks=2)
    assert plan == [[[1], [0, 2]], [[3], [4]]]


def test_plan_gives_empty_micro_batches_to_ranks_without_rows() -> None:
    assert plan_micro_batches([7], micro_tokens=4, ranks=3) == [[[0]], [[]], [[]]]
    assert plan_micro_batches([], micro_tokens=4, ranks=2) == [[], []]


@pytest.mark.parametrize(("num_rows", "batch_size"), [(7, 3), (12, 4), (5, 8), (1, 4)])
def test_sampler_covers_each_epoch_exactly_once(num_rows: int, batch_size: int) -> None:
    steps = 3 * num_rows  # so that the stream is a whole number of epochs
    stream = [
        i for step in range(steps) for i in batch_indices(num_rows, batch_size, seed=4, step=step)
    ]
    assert len(stream) == steps * batch_size
    for start in range(0, len(stream), num_rows):
        assert Counter(stream[start : start + num_rows]) == Counter(range(num_rows))


def test_sampler_epochs_and_seeds_have_their_own_order() -> None:
    orders = {tuple(batch_indices(50, 50, seed=s, step=e)) for s in range(3) for e in range(3)}
    assert len(orders) == 9


@given(
    lengths=st.lists(st.integers(1, 40), max_size=40),
    micro_tokens=st.integers(1, 60),
    ranks=st.integers(1, 3),
)
def test_padded_plan_counts_the_padding(lengths: list[int], micro_tokens: int, ranks: int) -> None:
    plan = plan_micro_batches(lengths, micro_tokens=micro_tokens, ranks=ranks, padded=True)
    assert len({len(micros) for micros in plan}) == 1
    flat = [i for micros in plan for micro in micros for i in micro]
    assert sorted(flat) == list(range(len(lengths)))
    for micro in (micro for micros in plan for micro in micros):
        area = len(micro) * max((lengths[i] for i in micro), default=0)
        assert len(micro) <= 1 or area <= micro_tokens
