"""Convert packed rows to right-padded ones for models that would attend across sequences."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Padded:
    """The sequences of a packed row (1, N) as rows (S, T), and the place of each token.

    Attributes:
        input_ids: (S, T).
        mask: (S, T), 1 on real tokens.
        number: (N,) row of each packed token.
        at: (N,) column of each packed token.
    """

    input_ids: Tensor
    mask: Tensor
    number: Tensor
    at: Tensor


def right_padded(input_ids: Tensor, position_ids: Tensor, *, fill: int) -> Padded:
    """Return the sequences of a packed row as right-padded rows.

    Args:
        input_ids: (1, N).
        position_ids: (1, N), restarting at 0 with each sequence.
        fill: token id of the padding.
    """
    at = position_ids[0]
    # Each position 0 begins the next row.
    number = (at == 0).cumsum(0) - 1
    # (S, T) with T the longest sequence.
    shape = (int(number[-1]) + 1, int(at.max()) + 1)
    ids = input_ids.new_full(shape, fill)
    ids[number, at] = input_ids[0]
    mask = input_ids.new_zeros(shape)
    mask[number, at] = 1
    return Padded(ids, mask, number, at)
