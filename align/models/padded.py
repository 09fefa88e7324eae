"""Packed rows laid out right-padded: for models that would look across the seams of a pack."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Padded:
    """Hold the sequences of a packed row (1, N) as rows (S, T), and where each token went.

    Attributes:
        input_ids: (S, T). mask: (S, T), 1 on real tokens.
        number, at: (N,) row and column of each packed token.
    """

    input_ids: Tensor
    mask: Tensor
    number: Tensor
    at: Tensor


def right_padded(input_ids: Tensor, position_ids: Tensor, *, fill: int) -> Padded:
    """Lay the sequences of a packed row out, each from the first column on.

    Args:
        input_ids: (1, N). position_ids: (1, N), restarting at 0 with each sequence.
        fill: token id of the padding.
    """
    at = position_ids[0]
    number = (at == 0).cumsum(0) - 1
    shape = (int(number[-1]) + 1, int(at.max()) + 1)
    ids = input_ids.new_full(shape, fill)
    ids[number, at] = input_ids[0]
    mask = input_ids.new_zeros(shape)
    mask[number, at] = 1
    return Padded(ids, mask, number, at)
