"""A model mapped over rows: every row's own result, in order, however rows are packed."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import alone

from align.core.types import TokenRow
from align.training.batch import PackedBatch, pack
from align.training.infer import map_rows
from align.training.learner import evaluate, infer

ROWS = [TokenRow(tuple(range(1, n + 1)), (True,) * n) for n in (3, 7, 1, 7, 2, 12, 5)]


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """Join a world of one."""
    with alone.world_of_one():
        yield


class Squares(nn.Module):
    """Square every token id; refuse to be asked while it trains, or with gradients."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        return ids.float().square()


@pytest.mark.parametrize("micro_tokens", [1, 8, 100])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_every_row_has_its_own_result_in_order(micro_tokens, padded, share):
    def sums(model: nn.Module, batch: PackedBatch) -> list[float]:
        return batch.segment_sums(model(batch.input_ids)).tolist()

    found = map_rows(
        Squares().train(),
        ROWS,
        sums,
        length=lambda row: len(row.input_ids),
        collate=pack,
        micro_tokens=micro_tokens,
        padded=padded,
        share=share,
    )
    # 1 + 4 + 9 + ... + n^2 = n (n + 1) (2 n + 1) / 6.
    assert found == [n * (n + 1) * (2 * n + 1) / 6 for n in (3, 7, 1, 7, 2, 12, 5)]


def test_a_function_that_forgets_a_row_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        map_rows(
            Squares(),
            ROWS,
            lambda model, batch: [0.0],
            length=lambda row: len(row.input_ids),
            collate=pack,
            micro_tokens=8,
        )


def test_nothing_is_dropped_and_no_graph_is_kept_where_nothing_is_trained():
    """A model in train mode that drops half of what it sees: every caller must switch that off."""
    model = torch.nn.Dropout(0.5)
    batch = pack([TokenRow((1,) * 64, (True,) * 64)])

    def kept(module, batch):
        return module(torch.ones(1, 64, requires_grad=True)).mean()

    def loss_fn(module, batch):
        found = kept(module, batch)
        return found, {"mean": found}

    def rows_of(module):
        (found,) = map_rows(
            module,
            [TokenRow((1, 2), (False, True))],
            lambda m, b: [kept(m, b)],
            length=lambda row: 2,
            collate=pack,
            micro_tokens=8,
        )
        return found

    for run in (
        lambda: infer(model, [batch], kept)[0],
        lambda: torch.tensor(evaluate(model, [batch], loss_fn)["mean"]),
        lambda: rows_of(model),
    ):
        model.train()
        found = run()
        assert found.item() == 1.0
        assert not found.requires_grad
        assert not model.training
