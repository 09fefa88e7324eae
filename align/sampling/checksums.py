"""Checksums of pushed tensors, to verify bit for bit that an engine received what was sent."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
import xxhash
from torch import Tensor

WIDTH = 1 << 16
"""Number of 8-byte lanes that share one weight of their row."""

ROWS = 256
"""Number of rows of ``WIDTH`` lanes processed at once: few kernels, buffers of 128 MiB."""


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a saved tensor that one rank of an engine has: a slice of one dimension."""

    dim: int
    start: int
    length: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return this part of the whole tensor."""
        return tensor.narrow(self.dim, self.start, self.length)


class Sent:
    """Named tensors on their way to an engine, with a checksum of each tensor that has passed.

    Args:
        named_tensors: the trainer's tensors, which are passed through unchanged.
        dtype: dtype of the engine's weights.
        device: device of the engine's weights.
        shares: the part of a tensor that this rank's engine has, by name; the others are whole.
    """

    def __init__(
        self,
        named_tensors: Iterable[tuple[str, Tensor]],
        *,
        dtype: torch.dtype,
        device: torch.device,
        shares: Mapping[str, Share] | None = None,
    ) -> None:
        self._named, self._dtype, self._device = named_tensors, dtype, device
        self._shares = shares or {}
        self._sums: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor after computing its checksum."""
        for name, tensor in self._named:
            # In the engine's dtype and on its device, so that the sums compare equal bit for bit.
            share = self._shares.get(name)
            part = tensor if share is None else share.of(tensor)
            self._sums[name] = checksum(part.to(self._device, self._dtype))
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

    On a CPU it is XXH3 of the bytes, which reads them once, about as fast as memory delivers them.
    Torch has no such kernel for an accelerator, where it is ``weighted_sum``. Either misses a
    change with a probability of about 2^-64; swapped elements count as changed.
    """
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if tensor.device.type != "cpu":
        return weighted_sum(data)
    digest = xxhash.xxh3_64_digest(data.numpy().data)
    return torch.tensor(int.from_bytes(digest, "big", signed=True))


def weighted_sum(data: Tensor) -> Tensor:
    """Return a 64-bit checksum of bytes, (N,), from few kernels.

    The bytes are read as 64-bit lanes x, zero-padded at the end. The checksum is the sum over rows
    r of ``WIDTH`` lanes of ``w2[r] * sum(w0[i] * x[r, i] + w1[i] * (x[r, i] >> 32))`` mod 2^64,
    with odd pseudo-random weights. A single changed lane always changes the sum, since an odd
    number does not divide 0. Other changes are missed with a probability of about 2^-64 (2^-32 if
    only the top bits of lanes differ).
    """
    if over := data.numel() % 8:
        data = torch.cat([data, data.new_zeros(8 - over)])
    elif data.storage_offset() % 8:
        data = data.clone()  # a slice whose lanes are not aligned
    lanes = data.view(torch.int64)
    whole = lanes.numel() // WIDTH * WIDTH
    first, second = _weights(WIDTH, 0, data.device), _weights(WIDTH, 1, data.device)
    # (rows, WIDTH) each; the last part is (1, remaining lanes).
    parts = [*lanes[:whole].view(-1, WIDTH).split(ROWS), lanes[whole:].view(1, -1)]
    sums = []
    for part in parts:
        n = part.shape[1]
        # int64 products and sums wrap around, which is arithmetic mod 2^64. There, the top bits of
        # x reach only the top bits of the sum, so the upper half is added once more, shifted down.
        sums.append((part * first[:n]).sum(1) + ((part >> 32) * second[:n]).sum(1))
    by_row = torch.cat(sums)
    # A different weight for each row: swapped rows change the sum.
    return (by_row * _odd(torch.arange(len(by_row), device=data.device), 2)).sum()


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
