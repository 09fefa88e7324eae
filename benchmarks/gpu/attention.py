"""Time packed attention against torch's variable-length kernel: one 7B layer, 16k tokens."""

import inspect
import random
import sys

import torch
from torch import Tensor

from align.models.attention import packed_attention, segments_from_positions
from benchmarks.gpu.common import (
    DEVICE,
    SMOKE,
    failure,
    milliseconds,
    peak_gib,
    reset_peak,
    result,
)

HEADS, KEY_HEADS, HEAD_SIZE = (4, 2, 32) if SMOKE else (28, 4, 128)
TOKENS = 512 if SMOKE else 16384


def draw_lengths() -> list[int]:
    """Draw log-normal sequence lengths up to a total of ``TOKENS``."""
    source, found = random.Random(0), []
    while sum(found) < TOKENS:
        found.append(min(4096, TOKENS // 4, max(64, int(source.lognormvariate(6.5, 1)))))
    return found


def varlen(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> None:
    """Run torch's variable-length kernel forward and backward."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *lengths], device=DEVICE, dtype=torch.int32).cumsum(
        0, dtype=torch.int32
    )
    a, b, c = (x[0].transpose(0, 1) for x in (q, k, v))
    b, c = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (b, c))
    known = inspect.signature(varlen_attn).parameters
    causal = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    longest = max(lengths)
    varlen_attn(a, b, c, ends, ends, longest, longest, **causal).sum().backward()


def profile(run) -> None:
    """Print the GPU kernels that take most time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        run()
    events = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)
    for event in events[:10]:
        ms = event.self_device_time_total / 1e3
        sys.stdout.write(f"{ms:8.3f} ms {event.count:4d} {event.key[:90]}\n")


def main() -> None:
    """Print milliseconds and memory of both."""
    torch.manual_seed(0)
    lengths = draw_lengths()
    positions = torch.cat([torch.arange(n) for n in lengths]).to(DEVICE)
    segments = segments_from_positions(positions)
    q, k, v = (
        torch.randn(
            1, h, sum(lengths), HEAD_SIZE, device=DEVICE, dtype=torch.bfloat16, requires_grad=True
        )
        for h in (HEADS, KEY_HEADS, KEY_HEADS)
    )

    def packed() -> None:
        module = torch.nn.Module()
        scaling = HEAD_SIZE**-0.5
        out, _ = packed_attention(module, q, k, v, None, scaling=scaling, segments=segments)
        out.sum().backward()

    reset_peak()
    slots = sum(layout.num * layout.max_length for layout in segments.layouts)
    result(
        packed_ms=milliseconds(packed),
        layouts=len(segments.layouts),
        slots_per_token=slots / sum(lengths),
        gib=peak_gib(),
    )
    try:
        result(varlen_ms=milliseconds(lambda: varlen(q, k, v, lengths)))
    except Exception as error:  # the kernel is a prototype of torch: any failure is the result
        result(varlen=failure(error))
    # Causal: half of the products; forward 2, backward 5.
    result(gflop=sum(n * n for n in lengths) * HEADS * HEAD_SIZE * 7 / 1e9)
    if not SMOKE:
        profile(packed)


if __name__ == "__main__":
    main()
