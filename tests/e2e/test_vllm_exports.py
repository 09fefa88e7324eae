"""vLLM reads what the suite saves and exports: equal scores, equal greedy text, a small KL."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from export_models import SIZES, save, tokenizer

from align.stages.tools.export import export
from reward_models.scalar import RewardModel, score_heads

LIMIT_S = 900.0
"""A guard against hanging, not a measurement."""
# vLLM's attention on a CPU needs heads of at least 32 numbers.
CONFIG = SIZES | {"hidden_size": 128, "eos_token_id": 2, "bos_token_id": None}
TOP, NEW = 20, 12
KL_BOUND = 1e-3
"""In nats: both compute in float32, and the difference is that of two kernels."""
START = """\
import json, sys
from vllm import LLM, PoolingParams, SamplingParams
folder, rows = sys.argv[1], json.loads(sys.argv[2])
options = dict(dtype="float32", max_model_len=128, enforce_eager=True, enable_chunked_prefill=False)
options |= dict(max_num_batched_tokens=512)
prompts = [{"prompt_token_ids": row} for row in rows]
"""
SCORE = """\
llm = LLM(folder, runner="pooling", **options)
params = PoolingParams(task="classify", use_activation=False)
found = [x.outputs.data.tolist() for x in llm.encode(prompts, params, pooling_task="classify")]
print("FOUND" + json.dumps(found))
"""
RESPOND = f"""\
llm = LLM(folder, generation_config="vllm", **options)
params = SamplingParams(temperature=0, max_tokens={NEW}, logprobs={TOP}, ignore_eos=True,
                        detokenize=False)
found = [x.outputs[0] for x in llm.generate(prompts, params)]
found = [(list(x.token_ids), [{{i: t.logprob for i, t in at.items()}} for at in x.logprobs])
         for x in found]
print("FOUND" + json.dumps(found))
"""


def by_vllm(code: str, folder: Path, rows: list[list[int]]) -> Any:
    """Run vLLM in a process of its own, which ends with it."""
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [sys.executable, "-c", START + code, str(folder), json.dumps(rows)],
        env=os.environ | env | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        text=True,
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("FOUND")]
    return json.loads(line.removeprefix("FOUND"))


@pytest.mark.slow
def test_vllm_pooling_computes_the_scores_of_a_reward_model(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    torch.manual_seed(0)
    scorer = RewardModel(AutoModel.from_config(LlamaConfig(**CONFIG)), 128).eval()
    scorer.save(tmp_path / "scorer", tokenizer=tokenizer())
    assert AutoConfig.from_pretrained(tmp_path / "scorer").num_labels == 1
    rows = [[5, 6, 7, 2], [8] * 40 + [2], [9, 2]]
    expected = [score for (score,) in score_heads(scorer, rows)]
    found = by_vllm(SCORE, tmp_path / "scorer", rows)
    assert [score for (score,) in found] == pytest.approx(expected, abs=1e-4)
    assert len(set(expected)) == len(rows)


def coarse_kl(ours: torch.Tensor, theirs: dict[str, float]) -> float:
    """KL over the tokens that vLLM names and all others as one: never above the whole KL."""
    terms, rest_p, rest_q = 0.0, 1.0, 1.0
    for token, theirs_logprob in theirs.items():
        logprob = float(ours[int(token)])
        terms += math.exp(logprob) * (logprob - theirs_logprob)
        rest_p, rest_q = rest_p - math.exp(logprob), rest_q - math.exp(theirs_logprob)
    if min(rest_p, rest_q) > 1e-9:
        terms += rest_p * math.log(rest_p / rest_q)
    return terms


@pytest.mark.slow
def test_an_export_answers_in_vllm_as_in_transformers(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    torch.manual_seed(0)
    save(LlamaForCausalLM(LlamaConfig(**CONFIG)), tmp_path / "tiny")
    lines = export(tmp_path / "tiny", tmp_path / "out", dtype="float32", readers="vllm")
    assert lines[1].startswith("read by vLLM: 8 of 8 greedy responses are equal")
    parity = json.loads((tmp_path / "out" / "export.json").read_text())["parity_vllm"]
    assert 0.0 <= parity["kl_max"] <= KL_BOUND
    rows = [[5, 6, 7], [40, 41, 42, 43, 44], list(range(60, 100))]
    found = by_vllm(RESPOND, tmp_path / "out", rows)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny", dtype=torch.float32).eval()
    for row, (tokens, logprobs) in zip(rows, found, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*row, *tokens]])).logits[0, len(row) - 1 : -1]
        ours = logits.double().log_softmax(-1)
        # The greedy tokens of transformers, given the ones before.
        assert tokens == ours.argmax(-1).tolist()
        for at, theirs in zip(ours, logprobs, strict=True):
            assert len(theirs) >= TOP
            assert 0.0 <= coarse_kl(at, theirs) + 1e-6 <= KL_BOUND
