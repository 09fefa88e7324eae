"""Load one saved model whole and in the shards of ZeRO-3, and train both alike."""

import argparse
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from ranks import COMMON, OPTIM, VOCAB, sft_batch, weights_of

from align.core import distributed
from align.losses.supervised import nll
from align.models import saving
from align.models.loading import load_policy
from align.models.logprobs import LogprobModel
from align.models.sharding import is_sharded
from align.recipe.schema import GrpoStage, SftStage, ZeroSpec
from align.stages.online import build_reference
from align.stages.rollouts import build_rewards
from align.stages.saving import save_trained_policy
from align.stages.sft import collate, length_of
from align.training.deepspeed import deepspeed_config
from align.training.infer import map_rows
from align.training.learner import Learner
from align.training.results import ResultFile
from reward_models.specs import EnsembleSpec, ScalarSpec

ZERO = ZeroSpec(stage=3)


def peak_mib(*, reset: bool = False) -> float:
    """Return this process's peak resident memory, or make the present one the peak."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def token_logprobs(module: Any, batch: Any) -> list[list[float]]:
    found = module(batch.input_ids, batch.position_ids, mask=batch.mask).logprobs[0]
    return [found[batch.segment_ids == i].tolist() for i in range(batch.num)]


def trained(module: LogprobModel) -> dict[str, Any]:
    """Train two steps of unequal rows; return losses and weights."""
    learner = Learner(module, optim=OPTIM, zero=ZERO, dtype="float32", total_steps=4)
    rank = distributed.rank()
    losses = []
    for step in range(2):
        batch = sft_batch(step)
        micro = collate(batch[rank::2], batch)

        def loss(model: Any, b: Any) -> tuple[torch.Tensor, dict]:
            found = model(b.input_ids, b.position_ids, mask=b.mask)
            return nll(found.logprobs, b.mask, b.counts["tokens"]), {}

        losses.append(learner.step([micro], loss)["loss"])
    return {"loss": losses, "weights": weights_of(learner.module.model)}


def values(module: LogprobModel, store: ResultFile | None = None) -> list[list[float]]:
    rows = [r for step in range(3) for r in sft_batch(step)]
    return map_rows(
        module,
        rows,
        token_logprobs,
        length=length_of,
        collate=lambda r: collate(r, r),
        micro_tokens=64,
        store=store,
    )


def scores(folder: Path) -> dict[str, Any]:
    """Score this rank's own responses, whose number and lengths differ, whole and in shards."""
    rank = distributed.rank()
    own = [[3 + rank, *range(5, 5 + 9 * i)] for i in range(1, (6, 3)[rank])]
    given: dict[str, Any] = {
        "prompts": ["w4"] * len(own),
        "completions": ["w5 " * i for i in range(1, len(own) + 1)],
        "prompt_ids": [[7, 8, 9]] * len(own),
        "completion_ids": own,
    }
    context: Any = SimpleNamespace(
        name="ppo", artifact=lambda *_, **__: SimpleNamespace(model_dir=folder)
    )
    one = ScalarSpec(kind="scalar", model="r")
    group = EnsembleSpec(
        kind="ensemble", name="both", members=[one, one.model_copy(update={"name": "again"})]
    )
    found: dict[str, Any] = {}
    for name, zero in (("whole", ZeroSpec(stage=0)), ("sharded", ZERO)):
        single, both = built = build_rewards([one, group], context, zero=zero)
        parts: Any = [single, *both.members]  # type: ignore[attr-defined]
        for part in parts:
            part.micro_tokens = 64
        found[name] = [reward(**given) for reward in built]
        found[f"{name} in shards"] = [is_sharded(part.model) for part in parts]
    return found


def save(module: LogprobModel, source: Path, out: Path) -> None:
    """Save a model as a stage does."""
    out.mkdir(exist_ok=True)
    spec = SftStage(kind="sft", init="x", data=[{"path": "x"}])
    save_trained_policy(spec, module, source_dir=source, out=out)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--large", type=Path, required=True)
    parser.add_argument("--split", type=Path, required=True, help="a model with other names")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    distributed.init_process_group()
    rank = distributed.rank()
    config = deepspeed_config(ZERO, OPTIM, dtype="float32")
    found: dict[str, Any] = {"vocab": VOCAB}
    # Memory first: later loads would find memory that earlier ones freed. But not that of imports.
    importlib.import_module("transformers.models.qwen2.modeling_qwen2")
    importlib.import_module("deepspeed.runtime.zero")
    began = peak_mib(reset=True)
    large = load_policy(args.large, dtype="float32", shards=config)
    found["grown_mib"] = peak_mib() - began
    saving.FILE_BYTES = 2**25
    began = peak_mib(reset=True)
    save(LogprobModel(large), args.large, args.out / "large-saved")
    found["grown_by_saving_mib"] = peak_mib() - began
    del large
    whole = LogprobModel(load_policy(args.model, dtype="float32"))
    sharded = LogprobModel(load_policy(args.model, dtype="float32", shards=config))
    parts: Any = list(sharded.parameters())
    found["held"] = sum(p.ds_tensor.numel() for p in parts), sum(p.numel() for p in parts)
    found["weights"] = {n: (a, b) for (n, a), b in _pairs(whole, sharded)}
    found["tied"] = (
        sharded.model.lm_head.weight is sharded.model.model.embed_tokens.weight,
        whole.model.lm_head.weight is whole.model.model.embed_tokens.weight,
    )
    found["buffers"] = [
        torch.equal(a, b) for a, b in zip(whole.buffers(), sharded.buffers(), strict=True)
    ]
    found["logprobs"] = values(whole), values(sharded)
    # A pass that ended after one batch more on rank 0 than on rank 1.
    path = args.out / f"store-{rank}.jsonl"
    store = ResultFile(path, key={"a": 1}, what="values")
    values(sharded, store)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[: 3 - rank]))
    found["continued"] = values(sharded, ResultFile(path, key={"a": 1}, what="values"))
    found["whole"], found["sharded"] = trained(whole), trained(sharded)
    # The frozen reference of an online stage, beside a policy that is trained.
    spec = GrpoStage(kind="grpo", kl={"coef": 0.1}, zero=ZERO, **COMMON)
    reference: Any = build_reference(spec, sharded, args.model)
    found["reference"] = is_sharded(reference.model), values(reference)
    found["scores"] = scores(args.out / "scorer"), scores(args.out / "encoder")
    saving.FILE_BYTES = 2**19
    for name, module in (("whole", whole), ("sharded", sharded)):
        save(module, args.model, args.out / f"{name}-saved")
    found["refused"] = is_sharded(load_policy(args.split, dtype="float32", shards=config))
    torch.save(found, args.out / f"{rank}.pt")
    distributed.barrier()
    distributed.end_process(0)


def _pairs(whole: LogprobModel, sharded: LogprobModel) -> Any:
    return zip(weights_of(whole.model).items(), weights_of(sharded.model).values(), strict=True)


if __name__ == "__main__":
    main()
