"""A saved model as vLLM reads it for other tools: greedy responses and their likeliest tokens.

vLLM runs in a process of its own, which ends with it: ``python -m align.sampling.vllm_reading``.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.core.errors import TrainingError
from align.core.readers import TOP, ReaderError, Reading, answer, ask_reader, readings

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


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
    try:
        found = ask_reader(
            "align.sampling.vllm_reading",
            str(folder),
            given=asked,
            environment=ENVIRONMENT | os.environ,
        )
    except ReaderError as error:
        raise TrainingError(f"{folder}: vLLM cannot load it: {error}") from None
    return readings(found)


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
    answer(found)


if __name__ == "__main__":
    main()
