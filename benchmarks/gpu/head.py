"""Compare the fused head with float32 and time it for several chunk sizes."""

import torch

from align.models import fused_head
from benchmarks.gpu.common import DEVICE, SMOKE, milliseconds, peak_gib, reset_peak, result

SIZES = ((64, 512),) if SMOKE else ((896, 151936), (3584, 152064))
CHUNKS = (2**12,) if SMOKE else (2**26, 2**28, 2**30)


def main() -> None:
    """Print milliseconds, TFLOP/s and GiB of forward and backward, and the worst error in nats."""
    torch.manual_seed(0)
    rows = 256 if SMOKE else 8192
    for hidden_size, vocab_size in SIZES:
        options = {"device": DEVICE, "dtype": torch.bfloat16}
        hidden = torch.randn(rows, hidden_size, **options).mul_(0.3).requires_grad_()
        weight = torch.randn(vocab_size, hidden_size, **options).mul_(0.02).requires_grad_()
        labels = torch.randint(0, vocab_size, (rows,), device=DEVICE)

        def once(h: torch.Tensor = hidden, w: torch.Tensor = weight, y: torch.Tensor = labels):
            values, _ = fused_head.head_logprobs(h, w, y, temperature=1.0, entropy=False)
            values.sum().backward()
            h.grad = w.grad = None

        for elements in CHUNKS:
            fused_head.CHUNK_ELEMENTS_GPU = elements
            reset_peak()
            ms = milliseconds(once)
            # Forward, its repetition in the backward pass, and two products for the gradients.
            rate = 8 * rows * hidden_size * vocab_size / ms / 1e9
            name = f"H{hidden_size}_chunk{elements >> 20}M"
            result(**{f"{name}_ms": ms, "tflops": rate, "gib": peak_gib()})
        with torch.no_grad():
            few = hidden[:512], weight, labels[:512]
            values, _ = fused_head.head_logprobs(*few, temperature=1.0, entropy=False)
            logits = few[0].float() @ weight.float().T
            exact = logits.log_softmax(-1).gather(-1, few[2][:, None])[:, 0]
            result(worst_nats=float((values - exact).abs().max()))


if __name__ == "__main__":
    main()
