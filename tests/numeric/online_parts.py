"""What the tests of the online step share: tiny parts, and slow float64 arithmetic."""

import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from engine_models import VOCAB, exact_logprobs, tiny_model

from align.core.types import Completion, PromptRow
from align.losses.kl import FixedKL
from align.models.heads import ValueModel, scorer_from
from align.models.loading import load_policy
from align.models.logprobs import LogprobModel
from align.online.algorithms import build_algorithm
from align.online.loop import OnlineRun
from align.online.scoring import Scores, apply_scores
from align.recipe.schema import GrpoStage, OptimSpec, PpoStage, ZeroSpec
from align.recipe.schema.tuning import FullTuning, LoraTuning, TuningSpec
from align.sampling.rollout import Experience, gather_experience
from align.training.learner import Learner
from align.tuning.wrap import add_tuner

OPTIM = OptimSpec(learning_rate=1e-3, schedule="constant", warmup_frac=0.0, eps=1e-4)
TEMPERATURE = 0.7
FULL = FullTuning()
LORA = LoraTuning(method="lora", rank=4)
COMMON: dict[str, Any] = {
    "init": "x",
    "prompts": [{"path": "x"}],
    "rewards": [{"kind": "regex", "pattern": "x"}],
    "steps": 4,
    "prompts_per_step": 4,
    "micro_tokens": 20,
    "optim": OPTIM,
    "sampling": {"temperature": TEMPERATURE, "max_new_tokens": 6, "engine": "hf"},
}
STOP = (1,)


def grpo_spec(**changed: Any) -> GrpoStage:
    return GrpoStage(kind="grpo", **(COMMON | {"group_size": 2} | changed))


def ppo_spec(**changed: Any) -> PpoStage:
    return PpoStage(kind="ppo", **(COMMON | changed))


def policy_of(model_dir: Path, tuning: TuningSpec = FULL) -> Learner:
    model = load_policy(model_dir, dtype="float32")
    return learner_of(LogprobModel(add_tuner(model, tuning)))


def learner_of(module: torch.nn.Module) -> Learner:
    return Learner(module, optim=OPTIM, zero=ZeroSpec(), dtype="float32", total_steps=8)


def reference_of(model_dir: Path) -> LogprobModel:
    return LogprobModel(load_policy(model_dir, dtype="float32")).requires_grad_(False)


def critic_of(model_dir: Path) -> Learner:
    torch.manual_seed(4)
    return learner_of(ValueModel(scorer_from(model_dir, dtype="float32")))


def sampled(lengths: tuple[tuple[int, ...], ...], *, length: tuple[int, ...] = ()) -> Experience:
    """Lay out answers of the given numbers of tokens; those numbered in ``length`` are cut off."""
    draw = random.Random(5)
    prompts = [
        PromptRow(tuple(draw.choices(range(2, VOCAB), k=2 + p)), "", {})
        for p in range(len(lengths))
    ]
    number, groups = 0, []
    for row in lengths:
        group = []
        for n in row:
            ids = tuple(draw.choices(range(2, VOCAB), k=n))
            logprobs = tuple(-5.0 + draw.random() for _ in ids)
            reason = "length" if number in length else "stop"
            group.append(Completion(ids, logprobs, reason, "", 0))
            number += 1
        groups.append(group)
    return gather_experience(prompts, groups)


def scored(experience: Experience, scores: list[float | None], **rules: Any) -> Experience:
    rules = {"truncated_score": None, "mask_truncated": False} | rules
    return apply_scores(experience, Scores(scores, {}), **rules)


def naive_logprobs(model_dir_seed: int, experience: Experience) -> list[list[float]]:
    """Score each answer alone in float64."""
    model = tiny_model(model_dir_seed, tied=True)
    return [
        exact_logprobs(model, p.input_ids, c.token_ids, temperature=TEMPERATURE)
        for p, c in zip(experience.prompts, experience.completions, strict=True)
    ]


def naive_values(critic: Learner, experience: Experience) -> list[list[float]]:
    """Read the state before each token off a float64 run over one answer."""
    scorer: Any = critic.module.scorer
    backbone = type(scorer.backbone)(tiny_model(1, tied=True).config).double().eval()
    backbone.load_state_dict(scorer.backbone.state_dict())
    head = scorer.head.weight.detach().double().flatten()
    found = []
    for prompt, answer in zip(experience.prompts, experience.completions, strict=True):
        ids = torch.tensor([[*prompt.input_ids, *answer.token_ids]])
        with torch.no_grad():
            states = backbone(input_ids=ids, use_cache=False).last_hidden_state[0] @ head
        start = len(prompt.input_ids)
        found.append(states[start - 1 : ids.shape[1] - 1].tolist())
    return found


def at_answers(x: Tensor, experience: Experience) -> list[list[float]]:
    return [row[keep].tolist() for row, keep in zip(x, experience.completion, strict=True)]


def run_of(spec: Any, policy: Learner, **parts: Any) -> OnlineRun:
    given = {
        "spec": spec,
        "algorithm": build_algorithm(spec),
        "seed": 3,
        "prompts": [],
        "rewards": [],
        "engine": None,
        "push": None,
        "stop_token_ids": STOP,
        "policy": policy,
        "critic": None,
        "reference": None,
        "kl": FixedKL(spec.kl.coef),
    }
    return OnlineRun(**(given | parts))


def weights(learner: Learner) -> list[Tensor]:
    return [p.detach().clone() for p in learner.module.parameters()]
