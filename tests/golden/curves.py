"""Twenty steps of every kind of stage on made rows: loss and gradient norm, one thread, float32.

    python tests/golden/curves.py            # record tests/golden/*.json again
    python tests/golden/curves.py --check    # say how far this machine is from the record

Record only when a change is meant to move the curves, and say so in the commit: nothing else tells
a reader that training has changed. Answers are drawn beforehand by Python's random, so that
rounding cannot change what is sampled; the eps of Adam is large (1e-4), so that a gradient that is
0 but for rounding does not become a whole step.
"""

import json
import random
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "numeric"))
import alone
from engine_models import VOCAB, save_tiny, tiny_model
from online_parts import (
    COMMON,
    OPTIM,
    critic_of,
    learner_of,
    policy_of,
    reference_of,
    run_of,
    scored,
)

from align.core.types import Completion, PairRow, PromptRow, TokenRow
from align.data.sampler import pick
from align.models.heads import SequenceValues, scorer_from
from align.online.algorithms import build_algorithm
from align.online.annotate import annotate
from align.online.loop import update
from align.recipe.schema import DpoStage, GrpoStage, KtoStage, PpoStage, RewardStage
from align.sampling.rollout import gather_experience
from align.stages import dpo, kto, sft
from align.stages.reward import tasks as scorer_rows
from align.training.learner import Learner
from align.training.task import OfflineTask, measured

HERE = Path(__file__).resolve().parent
STEPS = 20
Curve = dict[str, list[float]]
OFFLINE: dict[str, Any] = {"init": "x", "data": [{"path": "x"}], "micro_tokens": 60}


def row(draw: random.Random, prompt: list[int], length: int) -> TokenRow:
    """Make a row of random words whose tokens after the prompt are trained."""
    ids = [*prompt, *draw.choices(range(2, VOCAB), k=length), 1]
    return TokenRow(tuple(ids), tuple(t >= len(prompt) for t in range(len(ids))))


def pairs() -> list[PairRow]:
    """Make 40 pairs; what is chosen has smaller words, so that there is something to learn."""
    draw, found = random.Random(1), []
    for _ in range(40):
        prompt = draw.choices(range(2, VOCAB), k=draw.randint(2, 6))
        sides = [row(draw, prompt, draw.randint(1, 8)) for _ in range(2)]
        sides.sort(key=lambda side: sum(side.input_ids) / len(side.input_ids))
        found.append(PairRow(sides[0], sides[1], len(prompt)))
    return found


def offline(learner: Learner, task: OfflineTask[Any]) -> Curve:
    """Take the steps of an offline stage."""
    curve: Curve = {"loss": [], "grad_norm": []}
    for step in range(STEPS):
        batch = pick(task.rows, 8, seed=2, step=step)
        stats = learner.step(measured(learner.engine, task, batch, micro_tokens=60), task.loss_fn)
        for name, values in curve.items():
            values.append(stats[name])
    return curve


def sft_curve(model_dir: Path) -> Curve:
    """Maximum likelihood of the chosen answers."""
    rows = [pair.chosen for pair in pairs()]
    return offline(
        policy_of(model_dir), OfflineTask(rows, [], sft.length_of, sft.collate, sft.sft_loss)
    )


def reward_curve(model_dir: Path) -> Curve:
    """Bradley-Terry, centred."""
    torch.manual_seed(4)
    module = SequenceValues(scorer_from(model_dir, dtype="float32"))
    spec = RewardStage(kind="reward", **OFFLINE)
    rows = [scorer_rows.WeightedPair(pair, (1.0,)) for pair in pairs()]
    loss_fn = partial(scorer_rows.pair_loss, spec)
    task = OfflineTask(
        rows, [], lambda r: dpo.pair_length(r.pair), scorer_rows.collate_pairs, loss_fn
    )
    return offline(learner_of(module), task)


def dpo_curve(model_dir: Path) -> Curve:
    """DPO with a little label smoothing and the likelihood term."""
    spec = DpoStage(kind="dpo", beta=0.3, label_smoothing=0.1, nll_coef=0.1, **OFFLINE)
    policy = policy_of(model_dir)
    rows = dpo.reference_pairs(policy.module, pairs(), micro_tokens=60)
    loss_fn = partial(dpo.preference_loss, spec)
    task = OfflineTask(rows, [], lambda r: dpo.pair_length(r.pair), dpo.collate, loss_fn)
    return offline(policy, task)


def kto_curve(model_dir: Path) -> Curve:
    """KTO on both sides of the pairs."""
    spec = KtoStage(kind="kto", beta=0.3, **OFFLINE)
    policy = policy_of(model_dir)
    judged = [
        kto.KtoRow(side.input_ids, side.trained, good=good)
        for pair in pairs()
        for side, good in ((pair.chosen, True), (pair.rejected, False))
    ]
    rows = kto.reference_rows(policy.module, kto.mismatch(judged, max_length=32), micro_tokens=60)
    task = OfflineTask(
        rows,
        [],
        lambda r: len(r.input_ids),
        kto.collate,
        partial(kto.labeled_loss, spec),
        measure=partial(kto.mismatched_kl, spec),
    )
    return offline(policy, task)


def answers(step: int) -> Any:
    """Give four prompts with two drawn answers each; a score is the share of small words."""
    draw = random.Random(100 + step)
    prompts, groups, scores = [], [], []
    for _ in range(4):
        prompts.append(
            PromptRow(tuple(draw.choices(range(2, VOCAB), k=draw.randint(2, 6))), "", {})
        )
        group = []
        for _ in range(2):
            ids = tuple(draw.choices(range(2, VOCAB), k=draw.randint(1, 6)))
            group.append(Completion(ids, (-4.0,) * len(ids), "stop", "", 0))
            scores.append(sum(i < VOCAB // 2 for i in ids) / len(ids))
        groups.append(group)
    return scored(gather_experience(prompts, groups), scores)


def online(spec: Any, model_dir: Path) -> Curve:
    """Take the steps of an online stage: annotate, estimate, update."""
    policy = policy_of(model_dir)
    critic = critic_of(model_dir) if spec.kind == "ppo" else None
    run = run_of(spec, policy, critic=critic, reference=reference_of(model_dir))
    names = {"loss": "policy/loss", "grad_norm": "policy/grad_norm"}
    names |= {"value_loss": "value/loss"} if critic is not None else {}
    curve: Curve = {name: [] for name in names}
    for step in range(STEPS):
        experience = annotate(
            answers(step), policy, spec, old=True, reference=run.reference, critic=critic
        )
        experience = build_algorithm(spec).estimate(experience, spec.kl.coef)
        stats = update(run, experience, step=step, kl_coef=spec.kl.coef)
        for name, values in curve.items():
            values.append(stats[names[name]])
    return curve


def ppo_curve(model_dir: Path) -> Curve:
    """PPO: two epochs of two mini-batches, KL in the reward, a critic."""
    changed = {"importance": {"mode": "none"}, "minibatches": 2, "update_epochs": 2}
    return online(PpoStage(kind="ppo", **(COMMON | {"group_size": 2} | changed)), model_dir)


def grpo_curve(model_dir: Path) -> Curve:
    """GRPO with KL in the loss, two mini-batches."""
    kl = {"coef": 0.1, "place": "loss", "estimator": "k3"}
    changed = {"importance": {"mode": "none"}, "minibatches": 2, "kl": kl, "group_size": 2}
    return online(GrpoStage(kind="grpo", **(COMMON | changed)), model_dir)


CURVES: dict[str, Callable[[Path], Curve]] = {
    "sft": sft_curve,
    "reward": reward_curve,
    "dpo": dpo_curve,
    "kto": kto_curve,
    "ppo": ppo_curve,
    "grpo": grpo_curve,
}


def recorded(name: str) -> Curve:
    """Read a curve of the record."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def distance(found: Curve, expected: Curve) -> float:
    """Give the largest difference over all steps, relative to the largest value of its curve."""
    assert found.keys() == expected.keys(), (found.keys(), expected.keys())
    return max(
        max(abs(a - b) for a, b in zip(found[name], expected[name], strict=True))
        / max(map(abs, expected[name]))
        for name in expected
    )


def main() -> None:
    """Record, or with --check compare."""
    torch.set_num_threads(1)
    assert OPTIM.eps == 1e-4
    with alone.world_of_one(), tempfile.TemporaryDirectory() as folder:
        model_dir = save_tiny(tiny_model(1, tied=True), Path(folder))
        for name, curve in CURVES.items():
            found = curve(model_dir)
            if "--check" in sys.argv:
                sys.stdout.write(f"{name}: {distance(found, recorded(name)):.1e}\n")
                continue
            short = {k: [float(f"{v:.8g}") for v in values] for k, values in found.items()}
            text = json.dumps(short).replace('], "', '],\n "') + "\n"
            (HERE / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
