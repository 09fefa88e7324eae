"""Run on one rank and on two: the same updates under every ZeRO stage, weights written down.

The answers of a step are the same however many ranks there are; two ranks share them unevenly.
"""

import argparse
import gc
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine_models import words

from align.core import distributed
from align.core.checkpoints import load_checkpoint, save_checkpoint
from align.core.errors import TrainingError
from align.core.types import Completion, PromptRow, TokenRow
from align.losses.kl import FixedKL
from align.models import logprobs
from align.models.attention import PACKED
from align.models.heads import ValueModel
from align.models.logprobs import LogprobModel
from align.online.algorithms import build_algorithm
from align.online.annotate import annotate
from align.online.loop import OnlineRun, update
from align.online.scoring import Scores, apply_scores
from align.recipe.schema import (
    GrpoStage,
    LayersSpec,
    OnlineStage,
    OptimSpec,
    PpoStage,
    SftStage,
    ZeroSpec,
)
from align.recipe.schema.tuning import FullTuning, LoraTuning, TuningSpec
from align.sampling.rollout import Experience, gather_experience
from align.stages.offline import log_likelihood
from align.stages.saving import save_trained_policy
from align.stages.sft import collate, length_of, sft_loss
from align.training.idle_states import Parking, optimizer_tensors
from align.training.learner import Learner
from align.training.task import OfflineTask, micro_batches
from align.tuning.ewc import Anchor, anchor_at, fisher_diagonal, scaled
from align.tuning.export import full_weights
from align.tuning.wrap import add_tuner
from reward_models.scalar import RewardModel

# Matrices of more than 100 000 numbers: ZeRO-3 never partitions smaller ones for long.
VOCAB, HIDDEN, INNER = 1600, 64, 1600
# The gradient of a key's bias is 0 but for rounding; a small eps would make it a full step.
OPTIM = OptimSpec(
    learning_rate=2e-3, schedule="constant", warmup_frac=0.0, max_grad_norm=0.05, eps=1e-4
)
FULL = FullTuning()
LORA = LoraTuning(method="lora", rank=4, alpha=8.0)
# Layer 1 trains from step 0, layer 0 from step 1, the embeddings from step 2: the first after a
# resumed checkpoint.
LAYERS = LayersSpec(unfreeze={"every_steps": 1}, rate_decay=0.5)
STEPS = 4
Found = dict[str, object]


def config() -> Qwen2Config:
    return Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        initializer_range=0.06,
        attn_implementation=PACKED,
    )


def policy_model(dtype: str = "float32", tuning: TuningSpec = FULL) -> LogprobModel:
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(config())
    for parameter in model.parameters():  # not the rotary buffers, as a loaded model has them
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return LogprobModel(add_tuner(model, tuning))


def learner_of(
    module: torch.nn.Module,
    stage: int,
    dtype: str = "float32",
    layers: LayersSpec | None = None,
    anchor: Anchor | None = None,
) -> Learner:
    return Learner(
        module,
        optim=OPTIM,
        zero=ZeroSpec(stage=stage),
        dtype=dtype,
        total_steps=STEPS,
        layers=layers,
        anchor=anchor,
    )


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in full_weights(module)}


def numbers(seed: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (count,), generator=generator).tolist()


def row(seed: int, length: int) -> TokenRow:
    return TokenRow(tuple(numbers(seed, length)), tuple(t > 1 for t in range(length)))


def sft_batch(step: int) -> list[TokenRow]:
    """Give rows of which one rank needs two micro-batches of 40 tokens and the other one."""
    return [row(10 * step + i, length) for i, length in enumerate((60, 20, 20, 19))]


def sft_steps(learner: Learner, steps: range, batch_of: Callable = sft_batch) -> list[dict]:
    task = OfflineTask([], [], length_of, collate, sft_loss)
    return [learner.step(micro_batches(task, batch_of(s), 40), sft_loss) for s in steps]


def storages_alive() -> list[torch.UntypedStorage]:
    """Return all storages of tensors in this process, each once; the list keeps them alive."""
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and not x.is_meta]
    return list({x.untyped_storage()._cdata: x.untyped_storage() for x in tensors}.values())


def idle(stage: int, out: Path, *, dtype: str = "float32", tuning: TuningSpec = FULL) -> Found:
    """Train with optimizer states whose memory is given back before each step."""
    learner = learner_of(policy_model(dtype, tuning), stage, dtype)
    states = partial(optimizer_tensors, learner._optimizer, learner.module)
    parking, stats, freed, filled = Parking(), [], [], []
    for step in range(STEPS):
        alive = storages_alive()
        before = sum(x.nbytes() for x in alive)
        with parking.parked(states()):
            inside = sum(x.nbytes() for x in alive)
            weights_of(learner.module.model)  # what a push reads
        freed.append(before - inside)
        filled.append(before == sum(x.nbytes() for x in alive))
        stats += sft_steps(learner, range(step, step + 1))
    return {
        "weights": weights_of(learner.module.model),
        "stats": stats,
        "freed": freed,
        "filled": filled,
        "trained": learner.num_trained,
    }


def sft(
    stage: int,
    out: Path,
    *,
    dtype: str = "float32",
    tuning: TuningSpec = FULL,
    layers: LayersSpec | None = None,
) -> Found:
    """Train, save a checkpoint half-way, go on; then go on again from the checkpoint."""
    learner = learner_of(policy_model(dtype, tuning), stage, dtype, layers)
    before = weights_of(learner.module.model)
    stats = sft_steps(learner, range(2))
    halfway = weights_of(learner.module.model)
    engines = {"policy": learner.engine}
    folder = out / "checkpoints" / f"{stage}-{dtype}-{tuning.method}-{layers is not None}"
    folder.parent.mkdir(exist_ok=True)
    path = save_checkpoint(folder, 2, engines=engines, state={"a": 1}, keep=1)
    stats += sft_steps(learner, range(2, STEPS))
    again = learner_of(policy_model(dtype, tuning), stage, dtype, layers)
    again.steps, state = load_checkpoint(path, {"policy": again.engine})
    assert state == {"a": 1}
    sft_steps(again, range(again.steps, STEPS))
    return {
        "weights": weights_of(learner.module.model),
        "resumed": weights_of(again.module.model),
        "before": before,
        "halfway": halfway,
        "loss": [s["loss"] for s in stats],
        "grad_norm": [s["grad_norm"] for s in stats],
    }


def ewc(stage: int, out: Path) -> Found:
    """Train one task with the weights that another needs held back."""
    module = policy_model()
    rows = [row(500 + i, 10 + i) for i in range(5)]  # an odd number: ranks take unequal parts
    fisher = scaled(fisher_diagonal(module, rows, log_likelihood), cap=10.0)
    learner = learner_of(module, stage, anchor=anchor_at(module, fisher, coef=300.0))
    stats = sft_steps(learner, range(STEPS))
    return {
        "weights": weights_of(learner.module.model),
        "loss": [s["loss"] for s in stats],
        "ewc": [s["ewc"] for s in stats],
        "grad_norm": [s["grad_norm"] for s in stats],
    }


def long_rows(stage: int, out: Path) -> Found:
    """Train on one row whose head needs several chunks, beside a short one on the other rank."""
    logprobs.CHUNK_ELEMENTS = 512 * VOCAB
    learner = learner_of(policy_model(), stage)
    stats = sft_steps(learner, range(2), lambda step: [row(step, 2500), row(step + 9, 30)])
    return {"weights": weights_of(learner.module.model), "loss": [s["loss"] for s in stats]}


def answers() -> tuple[list[PromptRow], list[list[Completion]], list[list[float | None]]]:
    """Give four prompts with three answers each: long ones first, short ones last, one invalid."""
    prompts = [PromptRow(tuple(numbers(100 + p, 3 + p)), "x", {}) for p in range(4)]
    lengths = ((30, 25, 12), (20, 28, 9), (5, 2, 3), (4, 1, 6))
    scores: list[list[float | None]] = [[1.0, 0.2, -0.4], [0.0, 3.0, 1.0], [None, 2.0, 0.5]]
    scores.append([0.0, 0.0, 1.0])
    groups = [
        [
            Completion(tuple(numbers(7 * p + a, n)), (-7.0,) * n, "stop", "", 0)
            for a, n in enumerate(lengths[p])
        ]
        for p in range(4)
    ]
    return prompts, groups, scores


def my_experience(num_prompts: int = 4) -> Experience:
    prompts, groups, scores = answers()
    mine = distributed.shard(range(num_prompts))
    experience = gather_experience(
        [prompts[p] for p in mine],
        [groups[p] for p in mine],
        group_numbers=mine,
    )
    total = [s for p in mine for s in scores[p]]
    return apply_scores(experience, Scores(total, {}), truncated_score=None, mask_truncated=False)


COMMON = {
    "init": "x",
    "prompts": [{"path": "x"}],
    "rewards": [{"kind": "regex", "pattern": "x"}],
    "steps": 2,
    "prompts_per_step": 4,
    "micro_tokens": 48,
    "update_epochs": 2,
    "importance": {"mode": "none"},
    "optim": OPTIM,
}


def online_steps(
    spec: OnlineStage,
    policy: Learner,
    critic: Learner | None,
    reference: torch.nn.Module | None,
    num_prompts: int = 4,
) -> list[dict[str, float]]:
    run = OnlineRun(
        spec=spec,
        algorithm=build_algorithm(spec),
        seed=0,
        prompts=[],
        rewards=[],
        engine=None,
        stop_token_ids=(),
        push=None,
        policy=policy,
        critic=critic,
        reference=reference,
        kl=FixedKL(spec.kl.coef),
    )
    found = []
    for step in range(2):
        experience = annotate(
            my_experience(num_prompts), policy, spec, old=True, reference=reference, critic=critic
        )
        experience = build_algorithm(spec).estimate(experience, spec.kl.coef)
        found.append(update(run, experience, step=step, kl_coef=spec.kl.coef))
    return found


def grpo(stage: int, out: Path, *, tuning: TuningSpec = FULL, dtype: str = "float32") -> Found:
    """Take GRPO steps with the KL to the start of the stage in the loss."""
    kl = {"coef": 0.1, "place": "loss", "estimator": "k3"}
    spec = GrpoStage(kind="grpo", group_size=3, kl=kl, **COMMON)
    policy = learner_of(policy_model(dtype, tuning), stage, dtype)
    lora = tuning is LORA
    reference = policy.module if lora else policy_model(dtype).requires_grad_(False)
    stats = online_steps(spec, policy, None, reference)
    found: Found = {"weights": weights_of(policy.module.model), "stats": stats}
    if lora:
        saved = out / f"lora-{stage}-{distributed.world_size()}"
        save(policy.module, tuning, out, saved)
    return found


def save(module: torch.nn.Module, tuning: TuningSpec, out: Path, folder: Path) -> None:
    """Write model/ and adapter/ as a stage does."""
    source = out / f"source-{distributed.world_size()}"
    if distributed.rank() == 0:
        policy_model().model.save_pretrained(source / "model")
        words(VOCAB).save_pretrained(source / "model")
        folder.mkdir(parents=True)
    distributed.barrier()
    spec = SftStage(kind="sft", init="x", data=[{"path": "x"}], tuning=tuning)
    save_trained_policy(spec, module, source_dir=source / "model", out=folder)


def ppo(stage: int, out: Path) -> Found:
    """Take PPO steps: policy and critic are two engines of one process."""
    kl = {"coef": 0.1}
    spec = PpoStage(kind="ppo", group_size=3, kl=kl, gamma=0.99, **COMMON)
    policy = learner_of(policy_model(), stage)
    torch.manual_seed(2)
    critic = learner_of(ValueModel(RewardModel(Qwen2Model(config()), HIDDEN)), stage)
    stats = online_steps(spec, policy, critic, policy_model().requires_grad_(False))
    return {
        "weights": weights_of(policy.module.model),
        "critic": weights_of(critic.module),
        "stats": stats,
    }


def not_finite(stage: int, out: Path) -> Found:
    """Let the loss of the last rank be NaN in the second step."""
    learner = learner_of(policy_model(), stage)
    sft_steps(learner, range(1))
    before = weights_of(learner.module.model)
    bad = distributed.world_size() - 1

    def loss_fn(model, batch):
        loss, stats = sft_loss(model, batch)
        return loss * (float("nan") if distributed.rank() == bad else 1.0), stats

    task = OfflineTask([], [], length_of, collate, loss_fn)
    try:
        learner.step(micro_batches(task, sft_batch(1), 40), loss_fn)
        said = ""
    except TrainingError as error:
        said = str(error)
    return {"before": before, "weights": weights_of(learner.module.model), "said": said}


SCENARIOS: dict[str, tuple[Callable[[int, Path], Found], tuple[int, ...]]] = {
    "sft": (sft, (0, 1, 2, 3)),
    "sft_lora": (partial(sft, tuning=LORA), (0, 2, 3)),
    "sft_bf16": (partial(sft, dtype="bfloat16"), (0, 1, 2, 3)),
    "idle": (idle, (0, 1, 2, 3)),
    "idle_lora": (partial(idle, tuning=LORA), (0, 2, 3)),
    "idle_bf16": (partial(idle, dtype="bfloat16"), (0, 1, 2, 3)),
    "layers": (partial(sft, layers=LAYERS), (0, 1, 2, 3)),
    "layers_lora": (partial(sft, tuning=LORA, layers=LAYERS), (0, 2, 3)),
    "layers_bf16": (partial(sft, dtype="bfloat16", layers=LAYERS), (0, 2, 3)),
    "ewc": (ewc, (0, 1, 2, 3)),
    "grpo": (grpo, (0, 1, 2, 3)),
    "grpo_lora": (partial(grpo, tuning=LORA), (0, 2, 3)),
    "grpo_bf16": (partial(grpo, dtype="bfloat16"), (0, 2, 3)),
    "ppo": (ppo, (0, 1, 2, 3)),
    "not_finite": (not_finite, (0, 1, 2, 3)),
    "long_rows": (long_rows, (0, 3)),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, required=True)
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3])
    args = parser.parse_args()
    distributed.init_process_group()
    torch.set_num_threads(1)
    place = f"{distributed.rank()}of{distributed.world_size()}"
    for name in args.scenarios:
        fn, stages = SCENARIOS[name]
        found = {s: fn(s, args.out) for s in stages if s in args.stages}
        torch.save(found, args.out / f"{name}-{place}.pt")
    distributed.shutdown()
    distributed.end_process(0)


if __name__ == "__main__":
    main()
