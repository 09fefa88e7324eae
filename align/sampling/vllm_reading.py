"""A saved model as vLLM reads it for other tools: greedy responses and their likeliest tokens.

vLLM runs in a process of its own, which ends with it: ``python -m align.sampling.vllm_reading``.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.core.errors import TrainingError

TOP = 20
"""Likeliest tokens whose log-probabilities are returned."""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
_MARK = "READING "

Reading = tuple[list[int], list[dict[int, float]]]
"""Token ids of a greedy response, and the log-probabilities of the likeliest tokens at each."""


def read_by_vllm(
    folder: Path, prompts: Sequence[Sequence[int]], *, max_new_tokens: int
) -> list[Reading]:
    """Return vLLM's greedy responses to token ids, computed in float32.

    A response ends with the stop tokens of the folder's own files.

    Args:
        folder: model folder with configuration and tokenizer. prompts: token ids.
        max_new_tokens: longest response.

    Raises:
        TrainingError: vLLM cannot start, or it cannot load the model.
    """
    asked = {"prompts": [list(p) for p in prompts], "max_new_tokens": max_new_tokens}
    done = subprocess.run(
        [sys.executable, "-m", "align.sampling.vllm_reading", str(folder)],
        input=json.dumps(asked),
        env=ENVIRONMENT | os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith(_MARK)]
    if done.returncode or not lines:
        said = [x for x in (done.stderr or done.stdout).splitlines() if x.strip()]
        last = " ".join(said[-1].split())[:300] if said else f"exit code {done.returncode}"
        raise TrainingError(f"{folder}: vLLM cannot load it: {last}")
    found = json.loads(lines[-1].removeprefix(_MARK))
    return [
        (tokens, [{int(token): value for token, value in at.items()} for at in tops])
        for tokens, tops in found
    ]


def main() -> None:
    """Answer the prompts of standard input with the model of the first argument."""
    from vllm import LLM, SamplingParams

    asked: dict[str, Any] = json.loads(sys.stdin.read())
    room = max(len(prompt) for prompt in asked["prompts"]) + asked["max_new_tokens"]
    model = LLM(
        model=sys.argv[1],
        dtype="float32",
        max_model_len=room,
        max_num_batched_tokens=max(room, 512),
        enforce_eager=True,
        enable_chunked_prefill=False,
        use_tqdm_on_load=False,
    )
    # Greedy whatever the folder's generation configuration says; it only adds its stop tokens.
    params = SamplingParams(
        temperature=0.0, max_tokens=asked["max_new_tokens"], logprobs=TOP, detokenize=False
    )
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
    outputs = [one.outputs[0] for one in model.generate(prompts, params, use_tqdm=False)]
    found = [
        (list(one.token_ids), [{i: x.logprob for i, x in at.items()} for at in one.logprobs or ()])
        for one in outputs
    ]
    sys.stdout.write(f"\n{_MARK}{json.dumps(found)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
