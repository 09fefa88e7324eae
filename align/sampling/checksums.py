"""Checksums of pushed tensors, to verify bit for bit that an engine received what was sent."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cache

import torch
from torch import Tensor

WIDTH = 1 << 16
"""Number of 8-byte lanes processed at once, sized for a CPU's second-level cache."""

ROWS_ON_DEVICE = 256
"""Number of rows of ``WIDTH`` lanes processed at once on an accelerator: few kernels, 128 MiB."""


class Sent:
    """Named tensors on their way to an engine, with a checksum of each tensor that has passed.

    Args:
        named_tensors: the trainer's tensors, which are passed through unchanged.
        dtype: dtype of the engine's weights.
        device: device of the engine's weights.
    """

    def __init__(
        self,
        named_tensors: Iterable[tuple[str, Tensor]],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._named, self._dtype, self._device = named_tensors, dtype, device
        self._sums: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor after computing its checksum."""
        for name, tensor in self._named:
            # In the engine's dtype and on its device, so that the sums compare equal bit for bit.
            self._sums[name] = checksum(tensor.to(self._device, self._dtype))
            yield name, tensor

    def altered(self, held: Mapping[str, Tensor]) -> list[str]:
        """Return the names of tensors whose checksum in the engine differs."""
        both = [name for name in self._sums if name in held]
        if not both:
            return []
        # One comparison and one transfer for all tensors: each .item() would wait for the GPU.
        sent = torch.stack([self._sums[name] for name in both])
        found = torch.stack([held[name] for name in both])
        return [name for name, same in zip(both, (sent == found).tolist(), strict=True) if not same]

    def unplaced(self, held: Mapping[str, Tensor]) -> list[str]:
        """Return the names of tensors that have no single place in the engine."""
        return [name for name in self._sums if name not in held]

    def __len__(self) -> int:
        """Return the number of tensors that have passed."""
        return len(self._sums)


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Return a 64-bit checksum of a tensor's elements in order, as a number on its device.

    The bytes are read as 64-bit lanes x, zero-padded at the end. The checksum is the sum over rows
    r of ``WIDTH`` lanes of ``w2[r] * sum(w0[i] * x[r, i] + w1[i] * (x[r, i] >> 32))`` mod 2^64,
    with odd pseudo-random weights. A single changed lane always changes the sum, since an odd
    number does not divide 0. Other changes are missed with a probability of about 2^-64 (2^-32 if
    only the top bits of lanes differ). Swapped elements count as changed.
    """
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if over := data.numel() % 8:
        data = torch.cat([data, data.new_zeros(8 - over)])
    elif data.storage_offset() % 8:
        data = data.clone()  # a slice whose lanes are not aligned
    lanes = data.view(torch.int64)
    # A CPU takes one row at a time, which stays in its cache; a GPU takes many to save kernels.
    rows = 1 if tensor.device.type == "cpu" else ROWS_ON_DEVICE
    whole = lanes.numel() // WIDTH * WIDTH
    first, second = _weights(WIDTH, 0, tensor.device), _weights(WIDTH, 1, tensor.device)
    # (rows, WIDTH) each; the last part is (1, remaining lanes).
    parts = [*lanes[:whole].view(-1, WIDTH).split(rows), lanes[whole:].view(1, -1)]
    # One buffer for all parts: on a CPU, allocating this much memory costs more than the
    # arithmetic.
    buffer = torch.empty_like(max(parts, key=Tensor.numel))
    sums = []
    for part in parts:
        n, room = part.shape[1], buffer.view(-1)[: part.numel()].view(part.shape)
        # int64 products and sums wrap around, which is arithmetic mod 2^64. There, the top bits of
        # x reach only the top bits of the sum, so the upper half is added once more, shifted down.
        low = torch.mul(part, first[:n], out=room).sum(1)
        high = torch.bitwise_right_shift(part, 32, out=room).mul_(second[:n]).sum(1)
        sums.append(low + high)
    by_row = torch.cat(sums)
    # A different weight for each row: swapped rows change the sum.
    return (by_row * _odd(torch.arange(len(by_row), device=tensor.device), 2)).sum()


@cache
def _weights(count: int, stream: int, device: torch.device) -> Tensor:
    return _odd(torch.arange(count, device=device), stream)


def _odd(index: Tensor, stream: int) -> Tensor:
    """Return an odd pseudo-random 64-bit number for each index, mixed as in SplitMix64."""
    # The decimal literals are the hexadecimal constants as signed 64-bit integers.
    x = (index + (stream << 40) + 1) * -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ _shifted(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shifted(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return (x ^ _shifted(x, 31)) | 1


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right without sign extension, which torch's shift of int64 would do."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
