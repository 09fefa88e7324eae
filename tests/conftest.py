"""What every test shares: no network, one thread, and the reasons of the skips."""

import os
from pathlib import Path

# Set before any test module imports torch, vllm or transformers; a value from outside wins for
# the thread count only.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The tests are written for the CPU. ALIGN_TEST_GPU=1 shows the GPU to those marked gpu.
os.environ.update({} if "ALIGN_TEST_GPU" in os.environ else {"CUDA_VISIBLE_DEVICES": ""})
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "WANDB_MODE": "offline",
        "TOKENIZERS_PARALLELISM": "false",
    }
)

import pytest

REAL_DATA_REASON = "ALIGN_REAL_DATA is not set: it names a folder that holds data/ and models/"
LONG_REASON = "a longer form of a test that ran; run by: make test-long"
NO_GPU_REASON = "run on one GPU by: ALIGN_TEST_GPU=1 pytest tests/gpu"


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def pytest_configure(config: pytest.Config) -> None:
    """Keep torch to one thread: two test processes on two cores must not fight."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run; nothing is deselected."""
    without_gpu = not _num_gpus()
    without_data = not os.environ.get("ALIGN_REAL_DATA")
    for item in items:
        if without_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU_REASON))
        if "ALIGN_TEST_LONG" not in os.environ and item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason=LONG_REASON))
        if without_data and item.get_closest_marker("real"):
            item.add_marker(pytest.mark.skip(reason=REAL_DATA_REASON))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Give the folder of real data and models; without ALIGN_REAL_DATA the test is skipped."""
    folder = os.environ.get("ALIGN_REAL_DATA")
    if not folder:
        pytest.skip(REAL_DATA_REASON)
    path = Path(folder).resolve()
    if not (path / "data").is_dir() or not (path / "models").is_dir():
        pytest.fail(f"ALIGN_REAL_DATA={folder}: expected a folder that holds data/ and models/")
    return path
