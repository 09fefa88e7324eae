"""Checksums against their definitions, and measured rounding against float64."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from engine_models import exact_logprobs, tiny_model

from align.models.logprobs import LogprobModel
from align.sampling.checksums import WIDTH, Sent, checksum, weighted_sum
from align.sampling.push import measured_rounding, probe_logprobs, probe_of
from align.sampling.rounding import FLOOR, excess

PROBE = [(7 * i + 3) % 61 + 2 for i in range(40)]
MASK = 2**64 - 1


def split_mix(index: int, stream: int) -> int:
    """SplitMix64 (Steele, Lea, Flood 2014), made odd, in Python's unbounded integers."""
    x = (index + (stream << 40) + 1) * 0x9E3779B97F4A7C15 & MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return (x ^ (x >> 31)) | 1


def slow_sum(data: bytes) -> int:
    """The weighted sum by its definition, byte by byte."""
    data += bytes(-len(data) % 8)
    total = 0
    for i in range(0, len(data), 8):
        lane = int.from_bytes(data[i : i + 8], "little", signed=True)
        row, place = divmod(i // 8, WIDTH)
        weighed = lane * split_mix(place, 0) + (lane >> 32) * split_mix(place, 1)
        total += weighed * split_mix(row, 2)
    return total & MASK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3, 8, 577, 2 * WIDTH + 5])
def test_weighted_sum_is_its_definition_in_whole_numbers(size, dtype):
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    data = x.view(torch.uint8)
    assert int(weighted_sum(data)) & MASK == slow_sum(data.numpy().tobytes())


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, 0x2D06800538D394C2),
        (1, 0xC44BDFF4074EECDB),
        (24, 0xA3FE70BF9D3510EB),
        (195, 0xCD94217EE362EC3A),
        (512, 0x617E49599013CB6B),
        (2048, 0xDD59E2C3A5F038E0),
    ],
)
def test_checksum_on_a_cpu_is_xxh3(size, expected):
    """The vectors are those of xxHash's own sanity check, and so is the generator of its bytes."""
    state, data = 2654435761, []
    for _ in range(size):
        data.append(state >> 56)
        state = state * 11400714785074694797 & MASK
    assert int(checksum(torch.tensor(data, dtype=torch.uint8))) & MASK == expected


def bytes_sum(x: torch.Tensor) -> torch.Tensor:
    """The checksum that an accelerator computes."""
    return weighted_sum(x.contiguous().view(-1).view(torch.uint8))


@pytest.mark.parametrize("checksum", [checksum, bytes_sum])
def test_checksum_is_of_the_elements_whatever_their_place_in_memory(checksum):
    x = torch.randn(7, 9).bfloat16()
    held = torch.cat([torch.zeros(3, 9).bfloat16(), x])[3:]  # a slice at an odd place
    assert checksum(held) == checksum(x) == checksum(x.t().contiguous().t())
    assert checksum(x.t()) != checksum(x)


@pytest.mark.parametrize("checksum", [checksum, bytes_sum])
def test_checksum_sees_each_single_bit_and_each_exchange(checksum):
    x = torch.randn(64).float()
    seen = {int(checksum(x))}
    for place in (0, 1, 31, 63):
        for bit in range(32):
            y = x.clone().view(torch.int32)
            y[place] ^= -(2**31) if bit == 31 else 1 << bit
            seen.add(int(checksum(y.view(torch.float32))))
    signs = x.clone()
    signs[[1, 3]] *= -1.0  # two top bits of lanes: their sum vanishes mod 2^64
    seen.add(int(checksum(signs)))
    order = torch.arange(64)
    order[[5, 50]] = order[[50, 5]]
    seen.add(int(checksum(x[order])))
    assert len(seen) == 1 + 4 * 32 + 2


def test_sent_names_what_is_held_otherwise_and_what_has_no_place():
    tensors = {"a": torch.ones(3), "b": torch.zeros(2, 2), "c": torch.ones(1)}
    sent = Sent(tensors.items(), dtype=torch.bfloat16, device=torch.device("cpu"))
    assert [name for name, _ in sent] == ["a", "b", "c"]
    held = {"a": checksum(torch.ones(3).bfloat16()), "b": checksum(torch.ones(2, 2).bfloat16())}
    assert sent.altered(held) == ["b"]
    assert sent.unplaced(held) == ["c"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measured_rounding_is_of_the_size_of_the_error_against_float64(dtype):
    model = tiny_model(0, tied=True).to(getattr(torch, dtype))
    trainer = LogprobModel(model)
    logprobs = probe_logprobs(trainer, PROBE)
    rounding = measured_rounding(trainer, PROBE, logprobs)
    error = logprobs - torch.tensor(exact_logprobs(model.float(), PROBE[:1], PROBE[1:]))
    assert 0.25 < float(rounding.mean() / error.abs().mean()) < 4.0
    # The model is as it was before.
    model.to(getattr(torch, dtype))
    assert torch.equal(probe_logprobs(trainer, PROBE), logprobs)


def test_excess_compares_means_and_quantiles_and_no_largest_value():
    rounding = torch.full((100,), 0.01)
    one_far = torch.zeros(100)
    one_far[7] = 0.9  # mean 0.009: a heavy tail is no fault
    assert excess(one_far, rounding) == pytest.approx(0.9, rel=1e-5)
    assert excess(torch.full((100,), 0.06), rounding) == pytest.approx(6.0, rel=1e-5)
    fifth = torch.zeros(100)
    fifth[:20] = 0.04  # mean 0.008, but a fifth of the tokens is four times off
    assert excess(fifth, rounding) == pytest.approx(4.0, rel=1e-5)
    assert excess(torch.tensor([0.0, float("nan")]), rounding[:2]) == float("inf")
    assert excess(torch.full((4,), FLOOR), torch.zeros(4)) == pytest.approx(1.0, rel=1e-5)


def test_the_floor_covers_the_rounding_of_log_softmax_itself():
    # The same logits of up to 31, in 24 rows: the sum is added at once or in seven parts. Both are
    # right to one unit of float32 at 16 to 32, 2^-19 nats, and a check must call them equal.
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(100):
        logits = torch.randn(24, 512, generator=generator)
        logits *= 31.0 / logits.abs().max()
        tokens = logits.softmax(-1).multinomial(1, generator=generator)
        chosen = logits.gather(1, tokens)[:, 0]
        at_once = chosen - logits.logsumexp(-1)
        parts = torch.stack([part.logsumexp(-1) for part in logits.chunk(7, -1)])
        gap = at_once - (chosen - parts.logsumexp(0))
        worst = max(worst, excess(gap, torch.zeros(24)))
    assert 0.5 < worst <= 1.0


def test_probe_has_two_tokens_at_least():
    assert probe_of([9]) == (9, 9)
    assert probe_of(range(3)) == (0, 1, 2)
    assert probe_of(range(500)) == tuple(range(32))
