"""Run by the launcher on two ranks: train a step, push, compare; ZeRO-2 and then ZeRO-3."""

import argparse
import json
import sys
from pathlib import Path

import deepspeed
import torch

sys.path.insert(0, str(Path(__file__).parent))
from engine_models import tiny_model

from align.core import distributed
from align.sampling.build import build_engine
from align.sampling.engine import EngineOptions
from align.sampling.push import check_answers, push
from align.tuning.export import full_weights

PROBE = [3, 9, 27, 17, 51, 25, 11, 33]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    distributed.init_process_group()
    rank = torch.distributed.get_rank()
    engine = build_engine("vllm", EngineOptions(args.model, max_model_len=64, cache_gib=0.02))
    result: dict = {str(stage): push_after_training(engine, stage, rank) for stage in (2, 3)}
    engine.close()
    # The trainer's process group outlives the engine.
    total = torch.tensor([float(rank)])
    torch.distributed.all_reduce(total)
    result["sum_after_close"] = total.item()
    (args.out / f"rank{rank}.json").write_text(json.dumps(result))


def push_after_training(engine, stage: int, rank: int) -> dict:
    model = tiny_model(stage, tied=True)
    learner, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.05, "torch_adam": True}},
            "zero_optimization": {
                "stage": stage,
                # Small enough that these tiny weights really are partitioned.
                "stage3_param_persistence_threshold": 0,
            },
        },
    )
    before = trainer_logprobs(learner)
    ids = torch.tensor([PROBE if rank == 0 else PROBE[::-1]])
    learner.backward(learner(input_ids=ids, labels=ids).loss)
    learner.step()
    after = trainer_logprobs(learner)
    push(engine, full_weights(model), version=stage)
    rounding = torch.full((len(after),), 1e-5)
    difference = float(
        check_answers(engine, PROBE, logprobs=torch.tensor(after), rounding=rounding).max()
    )
    prompts = [[5, 6], [7], [8, 9, 10]] if rank == 0 else []
    groups = engine.generate(prompts, n=2, max_new_tokens=4 + 20 * rank, temperature=1.0)
    return {
        "moved": max(abs(a - b) for a, b in zip(before, after, strict=True)),
        "difference": difference,
        "answers": len(groups),
    }


def trainer_logprobs(learner) -> list[float]:
    ids = torch.tensor([PROBE])
    with torch.no_grad():
        logits = learner(input_ids=ids).logits[0, :-1]
    return logits.double().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].tolist()


if __name__ == "__main__":
    main()
