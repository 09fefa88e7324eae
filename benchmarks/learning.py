"""Measure how fast each online algorithm learns beside TRL's GRPO, on the quickstart world.

    python benchmarks/learning.py [--sft runs/quickstart/sft/model] [--seeds 5] [--steps 40]
    python benchmarks/learning.py --draw            # draw docs/learning.svg from the results again

Every run starts from the same weights and answers the same prompts in the same order (16 prompts x
8 answers x at most 32 tokens a step), with the same learning rate. The reward of 400 held-out
prompts, two answers each, is measured by one engine for both sides, outside the clock. Seconds are
those of the CPU on one thread (time.process_time), so that other work on the machine does not
count. TRL generates with transformers: its vLLM mode cannot run on CPU.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ |= {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}

import numpy as np
import torch

from align.core import distributed
from align.core.types import PromptRow
from align.data.load import load_examples
from align.data.sampler import batch_indices
from align.losses.kl import FixedKL
from align.online.algorithms import build_algorithm
from align.online.loop import OnlineRun, online_step
from align.recipe.algorithms import ALGORITHMS
from align.recipe.schema import DataSpec, GrpoStage, OnlineStage, PpoStage
from align.sampling.build import build_engine
from align.sampling.engine import EngineOptions, RolloutEngine
from align.sampling.rollout import sample_groups
from align.stages.base import chat_format
from align.stages.offline import build_policy
from align.stages.online import build_critic, build_reference
from align.stages.rollouts import Push
from align.training.learner import Learner
from align.tuning.export import full_weights
from reward_models import build_reward

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("trl grpo", *ALGORITHMS)
REWARD = {"kind": "exact_match", "pattern": r"answer is ([a-z0-9]+(?: [a-z0-9]+)*)"}
PROMPTS, GROUP, TOKENS, WATCHED = 16, 8, 32, 400
Point = dict[str, float]
"""step, tokens (sampled so far, discarded ones too), seconds (of CPU so far), reward (held-out)."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all runs share."""

    model_dir: Path
    steps: int
    every: int
    rate: float


class Counting:
    """Count the tokens that an engine samples."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine, self.tokens = engine, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Sample as the engine does."""
        groups = self.engine.generate(*args, **kwargs)
        self.tokens += sum(len(answer.token_ids) for group in groups for answer in group)
        return groups


class Clock:
    """Add up CPU seconds of this process while it runs."""

    def __init__(self) -> None:
        self.total, self._since = 0.0, 0.0

    def start(self) -> None:
        """Go on."""
        self._since = time.process_time()

    def stop(self) -> None:
        """Stand still."""
        self.total += time.process_time() - self._since


class Arena:
    """The prompts, the reward and the one engine that every run is measured with."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.version = setting, 0
        self.chat = chat_format(setting.model_dir)
        self.prompts = self._rows("train", 4000)
        self.watched = self._rows("heldout", WATCHED)
        self.reward = build_reward(REWARD)
        engine = build_engine(
            "auto",
            EngineOptions(
                setting.model_dir,
                max_model_len=128,
                stop_token_ids=self.chat.stop_token_ids,
                cache_gib=0.25,
            ),
        )
        self.engine = Counting(engine)

    def _rows(self, split: str, rows: int) -> list[PromptRow]:
        spec = DataSpec(world="prompts", rows=rows, split=split)  # type: ignore[arg-type]
        examples = load_examples([spec], kind="prompts", seed=0)
        return [self.chat.prompt_row(example) for example in examples]

    def next_version(self) -> int:
        """Return a version number that the engine has not seen."""
        self.version += 1
        return self.version

    def order(self, seed: int) -> list[PromptRow]:
        """Return the prompts of all steps of a run in order, as the online loop picks them."""
        picks = partial(
            batch_indices,
            len(self.prompts),
            PROMPTS,
            seed=distributed.derive_seed(seed, "prompts"),
        )
        return [self.prompts[i] for step in range(self.setting.steps) for i in picks(step=step)]

    def reward_of(self, weights: Iterator[tuple[str, torch.Tensor]]) -> float:
        """Return the mean held-out reward of some weights; each call draws with the same seeds."""
        with self.engine.awake():
            self.engine.load_weights(weights, version=self.next_version())
            groups = sample_groups(
                self.engine.engine,
                self.watched,
                n=2,
                step=0,
                seed=12345,
                sampling=stage("grpo", self.setting).sampling,
                stop_token_ids=self.chat.stop_token_ids,
            )
        rows = [(p, a) for p, group in zip(self.watched, groups, strict=True) for a in group]
        columns = {"answer": [p.columns["answer"] for p, _ in rows]}
        said = [[{"role": "assistant", "content": a.text}] for _, a in rows]
        found = self.reward(prompts=[p.prompt for p, _ in rows], completions=said, **columns)
        return float(np.mean([score for score in found if score is not None]))


def stage(name: str, setting: Setting) -> OnlineStage:
    """Write the stage of a bundle: its own defaults, and what all runs share."""
    optim = {"learning_rate": setting.rate, "schedule": "constant", "warmup_frac": 0.0}
    shared: dict[str, Any] = {
        "init": "sft",
        "prompts": [{"world": "prompts"}],
        "rewards": [REWARD],
        "steps": setting.steps,
        "prompts_per_step": PROMPTS,
        "group_size": GROUP,
        "max_length": 128,
        "sampling": {"max_new_tokens": TOKENS},
        "optim": optim,
    }
    if name == "ppo":
        return PpoStage(kind="ppo", **shared, critic={"optim": optim})
    return GrpoStage(kind="grpo", algorithm=name, **shared)


def train(arena: Arena, name: str, seed: int) -> list[Point]:
    """Train one bundle with one seed; give its curve."""
    setting, engine, clock = arena.setting, arena.engine, Clock()
    spec = stage(name, setting)
    distributed.seed_everything(seed)
    module = build_policy(spec, setting.model_dir)
    updates = setting.steps * spec.update_epochs * spec.minibatches
    policy = Learner(
        module, optim=spec.optim, zero=spec.zero, dtype=spec.dtype, total_steps=updates
    )
    push = Push(engine, policy, arena.prompts[0].input_ids, dtype=spec.dtype)
    run = OnlineRun(
        spec=spec,
        algorithm=build_algorithm(spec),
        seed=seed,
        prompts=arena.prompts,
        rewards=[arena.reward],
        engine=engine,  # type: ignore[arg-type]
        stop_token_ids=arena.chat.stop_token_ids,
        push=lambda step: push(arena.next_version()),
        policy=policy,
        critic=build_critic(spec, setting.model_dir, context=None, updates=updates),  # type: ignore[arg-type]
        reference=build_reference(spec, module, setting.model_dir),
        kl=FixedKL(spec.kl.coef),
    )
    engine.tokens = 0
    curve = [_point(0, 0, 0.0, arena.reward_of(full_weights(module.model)))]
    for step in range(setting.steps):
        clock.start()
        online_step(run, step)
        clock.stop()
        if (step + 1) % setting.every == 0:
            reward = arena.reward_of(full_weights(module.model))
            curve.append(_point(step + 1, engine.tokens, clock.total, reward))
    return curve


def train_trl(arena: Arena, seed: int) -> list[Point]:
    """Train TRL's GRPO on the same prompts in the same order; give its curve."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    setting, clock, tokens = arena.setting, Clock(), [0]
    rows = arena.order(seed)
    tokenizer = arena.chat.tokenizer
    for row in rows[:PROMPTS]:
        theirs = tokenizer.apply_chat_template(row.prompt, add_generation_prompt=True)["input_ids"]
        assert tuple(theirs) == row.input_ids, "both sides must read the same prompt"
    curve: list[Point] = []

    def scored(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> Any:
        tokens[0] += sum(map(len, completion_ids))
        return arena.reward(prompts=prompts, completions=completions, answer=columns["answer"])

    class Watching(TrainerCallback):
        def look(self, step: int, model: Any) -> None:
            reward = arena.reward_of(full_weights(model))
            curve.append(_point(step, tokens[0], clock.total, reward))
            model.train()

        def on_train_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            self.look(0, kw["model"])
            clock.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            clock.stop()
            if state.global_step % setting.every == 0:
                self.look(state.global_step, kw["model"])
            clock.start()

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            seed=seed,
            max_steps=setting.steps,
            learning_rate=setting.rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP,
            max_completion_length=TOKENS,
            shuffle_dataset=False,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(setting.model_dir, dtype=torch.float32),
            reward_funcs=scored,
            args=config,
            train_dataset=Dataset.from_list(
                [{"prompt": r.prompt, "answer": r.columns["answer"]} for r in rows]
            ),
            processing_class=tokenizer,
            callbacks=[Watching()],
        ).train()
    return curve


def _point(step: int, tokens: int, seconds: float, reward: float) -> Point:
    return {"step": step, "tokens": tokens, "seconds": round(seconds, 3), "reward": reward}


def reward_at(curve: list[Point], axis: str, budget: float) -> float:
    """Read a curve at a budget of tokens or seconds, by linear interpolation."""
    return float(np.interp(budget, [p[axis] for p in curve], [p["reward"] for p in curve]))


def compare(ours: list[list[Point]], theirs: list[list[Point]], axis: str) -> dict[str, Any]:
    """Compare two sides, seed by seed, at the budget that both have reached.

    Returns:
        Mean reward of both and the paired difference with its 95 % interval (Student's t).
    """
    from scipy.stats import t

    pairs = []
    for a, b in zip(ours, theirs, strict=True):
        budget = min(a[-1][axis], b[-1][axis])
        pairs.append((reward_at(a, axis, budget), reward_at(b, axis, budget)))
    difference = np.array([a - b for a, b in pairs])
    half = 0.0
    if len(pairs) > 1:
        half = float(t.ppf(0.975, len(pairs) - 1) * difference.std(ddof=1) / len(pairs) ** 0.5)
    mean = float(difference.mean())
    ours_mean, theirs_mean = np.mean(pairs, axis=0).round(4).tolist()
    interval = [round(x, 4) for x in (mean, mean - half, mean + half)]
    return {"ours": ours_mean, "trl": theirs_mean, "difference": interval}


def summarize(runs: dict[str, list[list[Point]]]) -> dict[str, Any]:
    """Compare every bundle with TRL over the seeds that both have run."""
    theirs, table = runs.get("trl grpo", []), {}
    for name, ours in runs.items():
        seeds = min(len(ours), len(theirs))
        if name == "trl grpo" or not seeds:
            continue
        table[name] = {
            "tokens": compare(ours[:seeds], theirs[:seeds], "tokens"),
            "seconds": compare(ours[:seeds], theirs[:seeds], "seconds"),
            "seconds_per_step": round(
                float(np.mean([c[-1]["seconds"] / c[-1]["step"] for c in ours])), 3
            ),
        }
    return table


def main() -> None:
    """Run what is asked for, one seed of all after the other, and write the results down."""
    parser = argparse.ArgumentParser(description="Learning curves beside TRL's GRPO.")
    parser.add_argument("--sft", type=Path, default=Path("runs/quickstart/sft/model"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=8, help="steps between evaluations")
    parser.add_argument("--rate", type=float, default=7e-4, help="learning rate of every run")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/learning.json")
    parser.add_argument("--draw", action="store_true", help="draw the figure of --out, no training")
    args = parser.parse_args()
    if args.draw:
        from learning_figure import draw

        draw(json.loads(args.out.read_text(encoding="utf-8")), ROOT / "docs/learning.svg")
        return
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("MASTER_PORT", "29641")
    distributed.init_process_group()
    torch.set_num_threads(1)
    setting = Setting(args.sft.resolve(), args.steps, args.every, args.rate)
    arena = Arena(setting)
    runs: dict[str, list[list[Point]]] = {name: [] for name in args.only}
    for seed in range(args.seeds):
        for name in args.only:
            began = time.monotonic()
            curve = train_trl(arena, seed) if name == "trl grpo" else train(arena, name, seed)
            runs[name].append(curve)
            sys.stderr.write(
                f"seed {seed} {name}: reward {curve[0]['reward']:.3f} -> "
                f"{curve[-1]['reward']:.3f}, "
                f"{curve[-1]['seconds']:.1f} s of CPU, {time.monotonic() - began:.1f} s\n"
            )
            settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(setting).items()}
            settings["model_dir"] = args.sft.as_posix()
            result = {
                "date": time.strftime("%Y-%m-%d"),
                "machine": f"{os.cpu_count()} cores, shared; one thread",
                "engine": arena.engine.name,
                "setting": settings,
                "table": summarize(runs),
                "runs": runs,
            }
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(result["table"], indent=1) + "\n")
    distributed.shutdown()
    distributed.end_process(0)


if __name__ == "__main__":
    main()
