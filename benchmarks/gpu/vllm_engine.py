"""Check vLLM beside the trainer: sleep, push, sampling twice alike, and a second engine."""

import os
import time
from typing import Any

import torch

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from align.core import distributed
from align.models.loading import load_policy
from align.models.logprobs import LogprobModel
from align.sampling.build import build_engine
from align.sampling.engine import EngineOptions
from align.sampling.push import push
from align.tuning.export import full_weights
from benchmarks.gpu.common import failure, make_run, result

PROBE = [(7 * i + 3) % 4000 + 2 for i in range(512)]


def free_gib() -> float:
    """Return the free memory of the GPU."""
    return torch.cuda.mem_get_info()[0] / 2**30


def start(folder: Any) -> Any:
    """Start vLLM on a model."""
    return build_engine(
        "vllm",
        EngineOptions(
            folder, dtype="bfloat16", max_model_len=1024, memory_frac=0.3, stop_token_ids=(0,)
        ),
    )


def model_runner(engine: Any) -> str:
    """Return the module of vLLM's model runner, which tells its generation."""
    try:
        executor = engine._llm.llm_engine.model_executor
        return type(executor.driver_worker.worker.model_runner).__module__
    except AttributeError:
        return "unknown"


def perturb(policy: LogprobModel) -> None:
    """Move every weight by a twentieth of its spread."""
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(torch.randn_like(p) * p.float().std().to(p.dtype) * 0.05)


def check_version(engine: Any, policy: LogprobModel, version: int) -> None:
    """Push new weights; compare log-probabilities, sample twice, and print what was found."""
    perturb(policy)
    began = time.perf_counter()
    with engine.awake():
        wake_s = time.perf_counter() - began
        began = time.perf_counter()
        push(engine, full_weights(policy.model), version=version)
        push_s = time.perf_counter() - began
        positions = torch.arange(len(PROBE), device="cuda").unsqueeze(0)
        with torch.no_grad():
            mine = policy(torch.tensor([PROBE], device="cuda"), positions).logprobs[0, 1:]
        gap = (torch.tensor(engine.token_logprobs(PROBE)) - mine.cpu()).abs()
        ask = {"n": 8, "max_new_tokens": 256, "temperature": 1.0, "seeds": list(range(32))}
        began = time.perf_counter()
        groups = engine.generate([PROBE[:128]] * 32, **ask)
        seconds = time.perf_counter() - began
        again = engine.generate([PROBE[:128]] * 32, **ask)
    tokens = sum(len(c.token_ids) for group in groups for c in group)
    result(
        version=version,
        wake_s=wake_s,
        push_s=push_s,
        gap_max=float(gap.max()),
        gap_mean=float(gap.mean()),
        gap_rms=float(gap.square().mean().sqrt()),
        tokens_s=tokens / seconds,
        same_again=groups == again,
        asleep_free_gib=free_gib(),
    )


def main() -> None:
    """Start, push three times, close, and start again in the same process."""
    distributed.init_process_group()
    folder = make_run("0.5B") / "base" / "model"
    began = time.perf_counter()
    engine = start(folder)
    result(
        start_s=time.perf_counter() - began,
        runner=model_runner(engine),
        asleep_free_gib=free_gib(),
    )
    policy = LogprobModel(load_policy(folder, dtype="bfloat16")).eval()
    for version in (1, 2, 3):
        check_version(engine, policy, version)
    try:
        engine.close()
        result(closed="yes", free_gib=free_gib())
        second = start(folder)
        with second.awake():
            second.generate([PROBE[:64]], n=1, max_new_tokens=8, temperature=0.0)
        second.close()
        result(second_engine="works")
    except Exception as error:  # how it fails is the result
        result(second_engine=failure(error))


if __name__ == "__main__":
    main()
