"""Run on one rank and on two: adapters that also train the rows of two tokens, under each stage."""

import argparse
import sys
from pathlib import Path

import torch
from transformers import Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import ranks
from tuned_stages import tuning_spec
from tunings import partition_everything

from align.core import distributed
from align.models.logprobs import LogprobModel
from align.training import learner
from align.tuning.wrap import add_tuner


def trained(method: str, stage: int, *, tied: bool) -> dict[str, torch.Tensor]:
    """Return the merged weights before and after two steps of sft, and the losses."""
    config = ranks.config()
    config.tie_word_embeddings = tied
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(config)
    # Tokens of the first batch: what does not occur has no gradient in the embeddings.
    tokens = sorted(set(ranks.sft_batch(0)[0].input_ids))[:2]
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    module = LogprobModel(add_tuner(model, tuning_spec(method), seed=3, tokens=tokens))
    own = ranks.learner_of(module, stage)
    losses = [step["loss"] for step in ranks.sft_steps(own, range(2))]
    weights = ranks.weights_of(own.module.model)
    table = "model.embed_tokens.weight"
    changed = (weights[table] != start[table]).any(1).nonzero().flatten()
    return weights | {
        "losses": torch.tensor(losses),
        "changed": changed,
        "tokens": torch.tensor(tokens),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", type=int, required=True)
    args = parser.parse_args()
    distributed.init_process_group()
    torch.set_num_threads(1)
    learner.deepspeed_config = partition_everything(learner.deepspeed_config)
    found = {
        (method, tied, stage): trained(method, stage, tied=tied)
        for stage in args.stages
        for method in ("lora", "dora")
        for tied in (True, False)
    }
    if distributed.rank() == 0:
        torch.save(found, args.out / f"rows-{distributed.world_size()}.pt")
    distributed.shutdown()
    distributed.end_process(0)


if __name__ == "__main__":
    main()
