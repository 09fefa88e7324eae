"""Report the machine: driver, card, toolchain, and the rate of a bf16 matrix product."""

import shutil
import subprocess
import sys

import torch

from benchmarks.gpu.common import DEVICE, SMOKE, milliseconds, result


def main() -> None:
    """Print the facts; fail where torch sees no GPU."""
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)
    subprocess.run([sys.executable, "-m", "pip", "list"], check=False)
    assert SMOKE or torch.cuda.is_available(), "torch sees no GPU: is the driver too old for it?"
    size = 256 if SMOKE else 8192
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    seconds = milliseconds(lambda: a @ b, rounds=10) / 1e3
    if not SMOKE:
        card = torch.cuda.get_device_properties(0)
        result(gpu=card.name.replace(" ", "_"), gib=card.total_memory / 2**30)
    result(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        matmul_tflops=2 * size**3 / seconds / 1e12,
        nvcc=bool(shutil.which("nvcc")),
        gxx=bool(shutil.which("g++")),
        ninja=bool(shutil.which("ninja")),
    )


if __name__ == "__main__":
    main()
