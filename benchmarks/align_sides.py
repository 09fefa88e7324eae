"""align's sides: the stages' own ``run`` on a recipe's spec, let through a gate step by step."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from align.core import distributed
from align.core.artifacts import Artifact
from align.recipe.schema import DpoStage, GrpoStage, PpoStage, RewardStage, SftStage
from align.stages.base import StageContext, prepare_stage
from benchmarks.gate import Gate

FOREVER = 10_000
"""Steps of a benchmark's stage: it ends when the harness has its rounds."""


class GatedLog:
    """Stand where the stage's metrics log stands, and end a round with each step's metrics."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        gate.ready()

    def log(self, step: int, metrics: Mapping[str, float], *, sample: Any = None) -> None:
        """End the round."""
        self.gate.done(**{k: v for k, v in metrics.items() if isinstance(v, int | float)})

    def close(self) -> None:
        """Have nothing to flush."""


@dataclass(frozen=True, slots=True)
class BenchContext(StageContext):
    """Return the context of a stage without a pipeline around it."""

    gate: Gate | None = None

    def folder_of(self, reference: str) -> Path:
        """Return a folder of the benchmark."""
        return self.run_dir / reference

    def artifact(self, reference: str, kind: str, *, with_adapter: bool = False) -> Artifact:
        """Name a folder of the benchmark; there is no manifest to verify."""
        return Artifact(self.folder_of(reference), {"kind": kind})

    def metrics(self, total_steps: int) -> Any:
        """Begin the rounds."""
        assert self.gate is not None
        return GatedLog(self.gate)


def _context(gate: Gate, work: Mapping[str, Any]) -> BenchContext:
    import torch

    torch.set_num_threads(work["threads"])
    distributed.init_process_group()
    distributed.seed_everything(0)
    recipe: Any = SimpleNamespace(stages={})  # a stage looks for held-out prompts of others here
    return BenchContext(recipe, "bench", Path(work["folder"]), 0, gate=gate)


def _train(spec: Any, context: StageContext) -> None:
    """Train without the preflight, which would, rightly, refuse random weights."""
    prepare_stage(spec, context).train()


def _shared(work: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "init": "base",
        "dtype": work["dtype"],
        "max_length": work["max_length"],
        "optim": {
            "learning_rate": work["learning_rate"],
            "schedule": "constant",
            "warmup_frac": 0.0,
        },
        "max_lost_frac": 0.0,
        # TRL's sides save nothing either.
        "checkpoint_every": 0,
        **work["settings"],
    }


def _offline(work: Mapping[str, Any], kind: str) -> dict[str, Any]:
    data = [{"path": str(Path(work["folder"]) / "rows.jsonl"), "format": kind}]
    return {"data": data, "batch_size": work["rows"], "steps": FOREVER, **_shared(work)}


def sft(gate: Gate, work: Mapping[str, Any]) -> None:
    """Train stage sft; a round is one optimizer step over all rows."""
    _train(SftStage(kind="sft", **_offline(work, "prompt_completion")), _context(gate, work))


def reward(gate: Gate, work: Mapping[str, Any]) -> None:
    """Train stage reward; a round is one optimizer step over all pairs."""
    from align.stages.reward import stage as stage

    _start_head_like_trl(stage, Path(work["folder"]))
    spec = RewardStage(kind="reward", center_coef=0.0, **_offline(work, "preference"))
    _train(spec, _context(gate, work))


def _start_head_like_trl(stage: Any, folder: Path) -> None:
    """Begin from the head that the other side begins from; the stage draws a random one."""
    import torch

    load = stage.new_reward_model

    def load_with_head(*args: Any, **keys: Any) -> Any:
        model = load(*args, **keys)
        with torch.no_grad():
            model.head.weight.copy_(torch.load(folder / "head.pt"))
        return model

    stage.new_reward_model = load_with_head


def dpo(gate: Gate, work: Mapping[str, Any]) -> None:
    """Train stage dpo; a round is the reference pass and one optimizer step over all pairs.

    In one epoch a pair meets the reference once and the policy once. The stage makes the
    reference pass before its first step; here each round repeats it, unused, inside its time.
    """
    from align.stages import dpo as stage

    original, calls = stage.reference_pairs, []

    def remember(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    class WithReference(GatedLog):
        def log(self, step: int, metrics: Mapping[str, float], *, sample: Any = None) -> None:
            super().log(step, metrics)
            args, kwargs = calls[0]
            original(*args, **kwargs)

    class Context(BenchContext):
        def metrics(self, total_steps: int) -> Any:
            log = WithReference(gate)
            args, kwargs = calls[0]
            original(*args, **kwargs)
            return log

    stage.reference_pairs = remember
    plain = _context(gate, work)
    context = Context(plain.recipe, plain.name, plain.run_dir, plain.seed, gate=gate)
    _train(DpoStage(kind="dpo", beta=0.1, **_offline(work, "preference")), context)


def _online(work: Mapping[str, Any]) -> dict[str, Any]:
    shared = _shared(work)
    rows = str(Path(work["folder"]) / "rows.jsonl")
    return {
        "prompts": [{"path": rows, "format": "prompt"}],
        "prompts_per_step": work["rows"],
        "group_size": work["group_size"],
        "steps": FOREVER,
        "sampling": {
            "engine": "vllm",
            "max_new_tokens": work["new_tokens"],
            "cache_gib": work["cache_gib"],
        },
        **shared,
    }


def grpo(gate: Gate, work: Mapping[str, Any]) -> None:
    """Train stage grpo; a round is one step: push, rollout, update."""
    rewards = [{"kind": "regex", "pattern": work["reward_pattern"]}]
    _train(GrpoStage(kind="grpo", rewards=rewards, **_online(work)), _context(gate, work))


def ppo(gate: Gate, work: Mapping[str, Any]) -> None:
    """Train stage ppo with a learned reward; a round is one step with its update epochs."""
    spec = PpoStage(
        kind="ppo",
        rewards=[{"kind": "scalar", "model": "scorer", "dtype": work["dtype"]}],
        minibatches=work["minibatches"],
        update_epochs=work["update_epochs"],
        critic={
            "optim": {
                "learning_rate": work["learning_rate"],
                "schedule": "constant",
                "warmup_frac": 0.0,
            }
        },
        **_online(work),
    )
    _train(spec, _context(gate, work))


def rollout(gate: Gate, work: Mapping[str, Any]) -> None:
    """Sample groups with the engine alone, as the online loop does."""
    from align.recipe.schema import SamplingSpec
    from align.sampling.build import build_engine
    from align.sampling.engine import EngineOptions
    from align.sampling.rollout import sample_groups
    from align.stages.base import chat_format

    context = _context(gate, work)
    chat = chat_format(context.run_dir / "base" / "model")
    engine = build_engine(
        "vllm",
        EngineOptions(
            context.run_dir / "base" / "model",
            dtype=work["dtype"],
            max_model_len=work["max_length"],
            cache_gib=work["cache_gib"],
            stop_token_ids=chat.stop_token_ids,
        ),
    )
    from align.data.load import load_examples
    from align.recipe.schema import DataSpec

    data = [DataSpec(path=str(context.run_dir / "rows.jsonl"), format="prompt")]
    prompts = [chat.prompt_row(e) for e in load_examples(data, kind="prompts", seed=0)]
    gate.ready()
    step = 0
    while True:
        with engine.awake():
            groups = sample_groups(
                engine,
                prompts,
                n=work["group_size"],
                step=step,
                seed=0,
                sampling=SamplingSpec(max_new_tokens=work["new_tokens"]),
                stop_token_ids=chat.stop_token_ids,
            )
        step += 1
        gate.done(tokens=sum(len(c.token_ids) for g in groups for c in g))
