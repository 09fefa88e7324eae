"""Loss and gradients of TRL's trainers, through their own ``training_step``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from align.core.types import TokenRow
from align.training.batch import trim_after_last_trained
from benchmarks.differential.cases import Case
from benchmarks.differential.ours import TEMPERATURE, Side, changed, halves
from benchmarks.differential.world import (
    GROUP_SIZE,
    MAX_LENGTH,
    MAX_NEW_TOKENS,
    PAD,
    Rollout,
    Weights,
    World,
)

Batch = dict[str, Any]
TEXT = {"prompt": "w1 w2", "chosen": "w3", "rejected": "w4"}
DUMMY = {
    "sft": {"input_ids": [1, 2]},
    "dpo": TEXT,
    "cpo": TEXT,
    "orpo": TEXT,
    "reward": TEXT,
    "kto": {"prompt": "w1 w2", "completion": "w3", "label": True},
    "grpo": {"prompt": "w1 w2"},
    "rloo": {"prompt": "w1 w2"},
}
"""A row that a trainer can be built with; the batches are made here."""


def measure(case: Case, world: World, num_micro: int) -> Side:
    """Return the loss and the gradients of a step in ``num_micro`` micro-batches of equal rows."""
    return TRAINERS[case.kind](case, world, num_micro)


def _build(case: Case, world: World, num_micro: int, **more: Any) -> Any:
    """Return a trainer as its users build it, from the folder of the policy."""
    config_class, trainer_class = CLASSES[case.kind]
    settings = {n: v for n, v in case.theirs.items() if n != "margin"}
    args = config_class(
        output_dir=str(world.folder.parent / "out"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        gradient_accumulation_steps=num_micro,
        model_init_kwargs={"dtype": "auto"},
        **{**more, **settings},
    )
    extra = {}
    if case.kind in ("grpo", "rloo"):
        extra["reward_funcs"] = lambda completions, **_: [0.0] * len(completions)
    trainer = trainer_class(
        str(world.folder),
        args=args,
        train_dataset=Dataset.from_list([DUMMY[case.kind]] * 24),
        processing_class=AutoTokenizer.from_pretrained(world.folder),
        **extra,
    )
    trainer.current_gradient_accumulation_steps = num_micro
    return trainer


def _fill(model: Any, weights: Weights) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = weights[name].clone()


def _step(trainer: Any, micro: Sequence[Batch]) -> Side:
    """Return the sum of the losses and gradients that one optimizer step accumulates."""
    trainer.model.zero_grad()
    batches, num_items = trainer.get_batch_samples(iter(micro), len(micro), torch.device("cpu"))
    losses = [float(trainer.training_step(trainer.model, b, num_items)) for b in batches]
    grads = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return Side(sum(losses), grads)


def _sft(case: Case, world: World, num_micro: int) -> Side:
    trainer = _build(case, world, num_micro, dataset_kwargs={"skip_prepare_dataset": True})
    _fill(trainer.model, world.now)
    rows = [{"input_ids": list(r.input_ids), "labels": _labels(r)} for r in world.rows]
    return _step(trainer, [trainer.data_collator(part) for part in halves(rows, num_micro)])


def _labels(row: TokenRow) -> list[int]:
    return [t if keep else -100 for t, keep in zip(row.input_ids, row.trained, strict=True)]


def _mask(rows: Sequence[TokenRow], width: int) -> Tensor:
    """Return the trained tokens of rows as the mask of a right-padded batch."""
    padded = [[*row.trained, *[False] * (width - len(row.trained))] for row in rows]
    return torch.tensor(padded).long()


def _dpo(case: Case, world: World, num_micro: int) -> Side:
    trainer = _build(case, world, num_micro, max_length=MAX_LENGTH)
    _fill(trainer.model, world.now)
    micro = []
    for part in halves(world.pairs, num_micro):
        rows = [
            {
                "prompt_ids": list(p.chosen.input_ids[: p.num_prompt_tokens]),
                "chosen_ids": list(p.chosen.input_ids[p.num_prompt_tokens :]),
                "rejected_ids": list(p.rejected.input_ids[p.num_prompt_tokens :]),
            }
            for p in part
        ]
        batch = trainer.data_collator(rows)
        sides = [p.chosen for p in part] + [p.rejected for p in part]
        batch["completion_mask"] = _mask(sides, batch["input_ids"].shape[1])
        micro.append(batch)
    return _step(trainer, micro)


def _pairs_of_rows(case: Case, world: World, num_micro: int) -> Side:
    """Return the side of the trainers that keep chosen and rejected rows apart (CPO, ORPO)."""
    trainer = _build(case, world, num_micro, max_length=MAX_LENGTH)
    _fill(trainer.model, world.now)
    micro = []
    for part in halves(world.pairs, num_micro):
        batch: Batch = {}
        for name, rows in (
            ("chosen", [p.chosen for p in part]),
            ("rejected", [p.rejected for p in part]),
        ):
            columns = {
                "input_ids": ([list(r.input_ids) for r in rows], PAD),
                "attention_mask": ([[1] * len(r.input_ids) for r in rows], 0),
                "labels": ([_labels(r) for r in rows], -100),
            }
            for column, (values, fill) in columns.items():
                padded = pad_sequence(
                    [torch.tensor(v) for v in values], batch_first=True, padding_value=fill
                )
                batch[f"{name}_{column}"] = padded
        micro.append(batch)
    return _step(trainer, micro)


def _kto(case: Case, world: World, num_micro: int) -> Side:
    parts = halves(world.judged, num_micro)
    trainer = _build(
        case, world, num_micro, max_length=MAX_LENGTH, per_device_train_batch_size=len(parts[0])
    )
    _fill(trainer.model, world.now)
    micro = []
    for part in parts:
        start = [row.trained.index(True) for row in part]
        rows = [
            {
                "prompt_ids": list(row.input_ids[:n]),
                "completion_ids": list(row.input_ids[n:]),
                # The mismatched response stands behind the same prompt.
                "KL_completion_ids": list(row.mismatched.input_ids[n:]),
                "label": row.good,
            }
            for row, n in zip(part, start, strict=True)
        ]
        batch = trainer.data_collator(rows)
        batch["completion_mask"] = _mask(part, batch["input_ids"].shape[1])
        micro.append(batch)
    return _step(trainer, micro)


def _reward(case: Case, world: World, num_micro: int) -> Side:
    trainer = _build(case, world, num_micro, max_length=MAX_LENGTH)
    _fill(trainer.model, {**world.now, "score.weight": world.score_head})
    micro = []
    for part in halves(world.pairs, num_micro):
        rows = []
        for pair in part:
            sides = {"chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
            row: Batch = {n: list(trim_after_last_trained(s).input_ids) for n, s in sides.items()}
            rows.append(row | ({"margin": pair.margin} if case.theirs.get("margin") else {}))
        micro.append(trainer.data_collator(rows))
    return _step(trainer, micro)


def _online(case: Case, world: World, num_micro: int) -> Side:
    """Return the second pass over a generation batch, after the weights have moved."""
    num_rows = len(world.rollout.scores)
    trainer = _build(
        case,
        world,
        num_micro,
        per_device_train_batch_size=num_rows // num_micro,
        steps_per_generation=num_micro,
        num_generations=GROUP_SIZE,
        num_iterations=2,
        max_completion_length=MAX_NEW_TOKENS,
        temperature=TEMPERATURE,
    )
    given = changed(case, world)
    trainer.use_vllm = case.sampler  # building with vLLM would start an engine
    trainer._generate = lambda prompts: _generated(case, given)
    scores = [float("nan") if s is None else s for s in given.scores]
    trainer._calculate_rewards = lambda *_: torch.tensor(scores).unsqueeze(1)
    trainer.model.train()
    _fill(trainer.model, world.old)
    inputs = [{"prompt": p.prompt} for p in given.prompts for _ in range(GROUP_SIZE)]
    torch.manual_seed(0)  # TRL shuffles the responses over the micro-batches
    trainer._step = 0
    trainer._prepare_inputs(inputs)
    if not case.on_policy:
        _fill(trainer.model, world.now)
    trainer._step = num_micro
    return _step(trainer, [{}] * num_micro)


def _generated(case: Case, given: Rollout) -> tuple[Any, ...]:
    """Return what the trainer's ``_generate`` returns."""
    prompts = [list(p.input_ids) for p, _ in given.flat()]
    completions = [list(c.token_ids) for _, c in given.flat()]
    texts = [""] * len(prompts)
    if case.kind == "rloo":
        return prompts, completions, texts
    tools = [[int(keep) for keep in row] for row in given.trained]
    sampled = [list(c.logprobs) for _, c in given.flat()] if case.sampler else None
    return prompts, completions, tools, texts, sampled, {}, None, None


CLASSES: dict[str, tuple[Any, Any]] = {
    "sft": (SFTConfig, SFTTrainer),
    "dpo": (DPOConfig, DPOTrainer),
    "cpo": (CPOConfig, CPOTrainer),
    "orpo": (ORPOConfig, ORPOTrainer),
    "kto": (KTOConfig, KTOTrainer),
    "reward": (RewardConfig, RewardTrainer),
    "grpo": (GRPOConfig, GRPOTrainer),
    "rloo": (RLOOConfig, RLOOTrainer),
}
TRAINERS: dict[str, Callable[[Case, World, int], Side]] = {
    "sft": _sft,
    "dpo": _dpo,
    "cpo": _pairs_of_rows,
    "orpo": _pairs_of_rows,
    "kto": _kto,
    "reward": _reward,
    "grpo": _online,
    "rloo": _online,
}
