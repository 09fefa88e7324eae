"""Load critics and reward models whole in one process, and in the shards of ZeRO-3 on two ranks."""

import argparse
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from ranks import COMMON, OPTIM, sft_batch
from shards import peak_mib

from align.core import distributed
from align.core.artifacts import Artifact
from align.core.checkpoints import load_checkpoint, save_checkpoint
from align.models import saving
from align.models.heads import scorer_from, scorer_on_encoder, values_of
from align.models.sharding import is_sharded
from align.recipe.schema import PpoStage, RewardStage, ZeroSpec
from align.stages.online import build_critic
from align.stages.reward.stage import fresh_scorer, save_scorer, saved_scorer
from align.stages.sft import collate, length_of
from align.training.deepspeed import deepspeed_config
from align.training.infer import map_rows
from align.training.learner import Learner
from align.training.task import OfflineTask, micro_batches
from align.tuning.export import full_tensor

STEPS = 3
CONTEXT: Any = SimpleNamespace(name="x", seed=0)


def square_loss(module: Any, batch: Any) -> tuple[torch.Tensor, dict]:
    """Pull each token's value to 1, or to 1 + its head's number."""
    values = module(batch.input_ids, batch.position_ids)
    values = values.reshape(*batch.mask.shape, -1)
    aim = torch.arange(1, values.shape[-1] + 1, dtype=torch.float32)
    errors = (values - aim).square().mean(-1) * batch.mask
    return errors.sum() / batch.counts["tokens"], {}


def steps(learner: Learner, which: range) -> list[float]:
    task = OfflineTask([], [], length_of, collate, square_loss)
    return [learner.step(micro_batches(task, sft_batch(s), 40), square_loss)["loss"] for s in which]


def values(module: Any) -> list[list]:
    rows = [r for step in range(2) for r in sft_batch(step)]

    def of_rows(model: Any, batch: Any) -> list[list]:
        found = model(batch.input_ids, batch.position_ids)[0]
        return [found[batch.segment_ids == i].tolist() for i in range(batch.num)]

    return map_rows(
        module,
        rows,
        of_rows,
        length=length_of,
        collate=lambda r: collate(r, r),
        micro_tokens=64,
        padded=getattr(getattr(module, "model", None), "reads", "last") == "first",
    )


def weights_of(module: Any) -> dict[str, torch.Tensor]:
    return {name: full_tensor(p).clone() for name, p in module.named_parameters()}


def critic_from(zero: ZeroSpec, model: Path) -> Learner:
    """Give the critic of a stage that starts from a policy."""
    critic: Any = {"optim": OPTIM}
    spec = PpoStage(kind="ppo", zero=zero, critic=critic, **COMMON)
    found = build_critic(spec, model, context=CONTEXT, updates=STEPS)
    assert found is not None
    return found


def critic(zero: ZeroSpec, model: Path, out: Path) -> dict[str, Any]:
    """Train a critic; resume it before its last step."""
    learner = critic_from(zero, model)
    losses = steps(learner, range(STEPS - 1))
    folder = out / f"critic-{distributed.world_size()}"
    path = save_checkpoint(folder, STEPS - 1, engines={"critic": learner.engine}, state={}, keep=1)
    losses += steps(learner, range(STEPS - 1, STEPS))
    again = critic_from(zero, model)
    again.steps, _ = load_checkpoint(path, {"critic": again.engine})
    resumed = steps(again, range(STEPS - 1, STEPS))
    return {
        "loss": losses,
        "weights": weights_of(learner.module),
        "resumed loss": resumed,
        "resumed": weights_of(again.module),
    }


def reward(zero: ZeroSpec, source: Artifact, out: Path) -> dict[str, Any]:
    """Train a reward model of two heads, save it, and load it as the stage does."""
    spec = RewardStage(
        kind="reward", init="x", data=[{"path": "x"}], zero=zero, heads=2, optim=OPTIM
    )
    model = fresh_scorer(spec, source, CONTEXT)
    sharded = is_sharded(model)
    before = values(values_of(model))
    module = values_of(model)
    learner = Learner(module, optim=OPTIM, zero=zero, dtype="float32", total_steps=STEPS)
    losses = steps(learner, range(STEPS))
    folder = out / f"reward-{distributed.world_size()}"
    if distributed.rank() == 0:
        folder.mkdir()
    distributed.barrier()
    save_scorer(spec, model, folder, source=source, numbers=([0.5, 0.25], [2.0, 1.0]))
    loaded = saved_scorer(spec, folder / "model")
    return {
        "sharded": sharded,
        "before": before,
        "loss": losses,
        "weights": weights_of(model),
        "after": values(module),
        "loaded": values(values_of(loaded)),
        "loaded sharded": is_sharded(loaded),
        "numbers": (loaded.mean.tolist(), loaded.std.tolist(), loaded.extra),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "large", "encoder", "split", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    distributed.init_process_group()
    alone = distributed.world_size() == 1
    zero = ZeroSpec(stage=0 if alone else 3)
    shards = None if alone else deepspeed_config(zero, OPTIM, dtype="float32")
    found: dict[str, Any] = {}
    # Memory first: later loads would find memory that earlier ones freed. But not that of imports.
    importlib.import_module("transformers.models.qwen2.modeling_qwen2")
    importlib.import_module("deepspeed.runtime.zero")
    began = peak_mib(reset=True)
    large = scorer_from(args.large, dtype="float32", shards=shards)
    found["grown_mib"] = peak_mib() - began
    del large
    saving.FILE_BYTES = 2**19
    found["critic"] = critic(zero, args.model, args.out)
    source = Artifact(args.model.parent, {"kind": "policy"})
    found["reward"] = reward(zero, source, args.out)
    # A scorer may start another one, also with other heads.
    scorer_dir = args.out / f"reward-{distributed.world_size()}" / "model"
    from_scorer = scorer_from(scorer_dir, dtype="float32", num_heads=2, shards=shards)
    found["started"] = values(values_of(from_scorer))
    other = scorer_from(scorer_dir, dtype="float32", num_heads=3, shards=shards)
    found["other heads"] = tuple(other.head.weight.shape), is_sharded(other)
    encoder, lacking = scorer_on_encoder(args.encoder, dtype="float32", shards=shards)
    torch.nn.init.constant_(encoder.head.weight, 0.1)
    found["encoder"] = values(values_of(encoder)), lacking, is_sharded(encoder)
    found["split"] = is_sharded(scorer_from(args.split, dtype="float32", shards=shards))
    torch.save(found, args.out / f"{distributed.rank()}of{distributed.world_size()}.pt")
    distributed.barrier()
    distributed.end_process(0)


if __name__ == "__main__":
    main()
