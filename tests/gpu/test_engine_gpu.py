"""The vLLM engine on an accelerator: pushes arrive, and sleeping gives the memory back."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from engine_models import exact_logprobs, save_tiny, tiny_model

from align.sampling.build import build_engine
from align.sampling.engine import EngineOptions
from align.sampling.push import check_answers, push
from align.tuning.export import full_weights

PROBE = [(7 * i + 3) % 61 + 2 for i in range(40)]


@pytest.mark.gpu
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_vllm_on_gpu_sleeps_wakes_and_follows_each_push(tmp_path, tied):
    pytest.importorskip("vllm")
    directory = save_tiny(tiny_model(0, tied=tied), tmp_path)
    engine = build_engine(
        "vllm",
        EngineOptions(
            directory, dtype="bfloat16", max_model_len=128, memory_frac=0.1, stop_token_ids=(1,)
        ),
    )
    asleep, total = torch.cuda.mem_get_info()
    for version in (1, 2):
        new = tiny_model(version, tied=tied)
        rounded = tiny_model(version, tied=tied).bfloat16().float()
        with engine.awake():
            awake, _ = torch.cuda.mem_get_info()
            assert asleep - awake > 0.04 * total
            proof = push(engine, full_weights(new.cuda()), version=version)
            assert not proof.unplaced
            wanted = torch.tensor(exact_logprobs(rounded, PROBE[:1], PROBE[1:]))
            check_answers(engine, PROBE, logprobs=wanted, rounding=torch.full((len(wanted),), 0.02))
            groups = engine.generate([PROBE], n=4, max_new_tokens=8, temperature=1.0, seeds=[3])
            again = engine.generate([PROBE], n=4, max_new_tokens=8, temperature=1.0, seeds=[3])
            assert groups == again
            for answer in groups[0]:
                exact = exact_logprobs(rounded, PROBE, answer.token_ids)
                assert answer.logprobs == pytest.approx(exact, abs=0.35)
        assert torch.cuda.mem_get_info()[0] - awake > 0.04 * total
    engine.close()
