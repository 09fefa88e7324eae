"""The rows of the table: what is done, in what size on which device, and TRL's settings to try."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PACKED = {"packing": True, "per_device_train_batch_size": 1}
GROUPED = {"train_sampling_strategy": "group_by_length"}
IN_ORDER = {"train_sampling_strategy": "sequential"}
AUTOCAST, PURE = {"weights": "float32"}, {"weights": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Row:
    """Describe one row of the table.

    Attributes:
        kind: sft, reward, dpo, grpo, ppo or rollout: which functions the sides run.
        unit: what a rate counts. title: in the table.
        theirs: module and function of the other side.
        candidates: settings of the other side; the fastest is compared with.
        settings: of align's stage.
        lengths: uniform or skewed. rows: rows of a step. longest: tokens of the longest row.
        median: of the skewed lengths, in tokens. prompt_frac: share of a row that is its prompt.
        stop_frac: probability of the stop token at each place of an answer; 0 leaves it at 1 / V.
        check: (align's number, the other's, rounds, bound) that must agree, as in `same_numbers`.
        target: ratio to reach on CPU. work: further facts for both sides.
    """

    kind: str
    title: str
    unit: str
    theirs: str
    candidates: Sequence[Mapping[str, Any]]
    target: float
    rows: int
    longest: int
    lengths: str = "skewed"
    median: int = 120
    prompt_frac: float = 0.4
    settings: Mapping[str, Any] = field(default_factory=lambda: {"micro_tokens": 2048})
    stop_frac: float = 0.0
    check: Sequence[tuple[str, str, int, float]] = ()
    work: Mapping[str, Any] = field(default_factory=dict)
    warmup: int = 1
    rounds: int = 5


LOSS = [("train/loss", "loss", 3, 0.01), ("optim/grad_norm", "grad_norm", 1, 0.02)]
PAIR_LOSS = [("train/loss", "loss", 2, 0.02), ("optim/grad_norm", "grad_norm", 1, 0.02)]
SFT = [
    {**GROUPED, **AUTOCAST, "per_device_train_batch_size": 8},
    {**PACKED, **AUTOCAST, "max_length": 1024},
]
PAIRS = [{**IN_ORDER, **AUTOCAST, "per_device_train_batch_size": n} for n in (2, 8)]
GENERATE = [{**AUTOCAST, "per_device_train_batch_size": n} for n in (64, 8)]
BF16_PPO = [
    {**AUTOCAST, "per_device_train_batch_size": n, "local_rollout_forward_batch_size": 64}
    for n in (32, 8)
]
TRL = "benchmarks.trl_sides"
ROWS = {
    "sft-uniform": Row(
        "sft",
        "SFT, uniform 512",
        "tokens",
        f"{TRL}:sft",
        SFT,
        1.5,
        8,
        512,
        lengths="uniform",
        check=LOSS,
    ),
    "sft-skewed": Row("sft", "SFT, skewed", "tokens", f"{TRL}:sft", SFT, 1.5, 32, 1024, check=LOSS),
    "reward-skewed": Row(
        "reward",
        "reward model, skewed",
        "pairs",
        f"{TRL}:reward",
        PAIRS,
        2.0,
        16,
        1024,
        check=PAIR_LOSS,
    ),
    "dpo-skewed": Row(
        "dpo",
        "DPO with reference, skewed",
        "pairs",
        f"{TRL}:dpo",
        PAIRS,
        2.0,
        16,
        1024,
        check=PAIR_LOSS,
    ),
    "grpo-generate": Row(
        "grpo",
        "GRPO 8 x 8 x 64 against generate",
        "steps",
        f"{TRL}:grpo",
        GENERATE,
        3.0,
        8,
        64,
        lengths="uniform",
        work={"group_size": 8, "new_tokens": 64},
    ),
    "grpo-vllm": Row(
        "grpo",
        "GRPO 8 x 8 x 64 against TRL with this engine",
        "steps",
        f"{TRL}:grpo_vllm",
        GENERATE,
        1.5,
        8,
        64,
        lengths="uniform",
        work={"group_size": 8, "new_tokens": 64},
    ),
    "grpo-skewed": Row(
        "grpo",
        "GRPO 8 x 8 x 512 skewed, a quarter of 32 x 8 x 512, against TRL with this engine",
        "steps",
        f"{TRL}:grpo_vllm",
        GENERATE[1:],
        1.5,
        8,
        64,
        lengths="uniform",
        stop_frac=0.008,
        work={"group_size": 8, "new_tokens": 512},
        rounds=3,
    ),
    "ppo": Row(
        "ppo",
        "PPO 64 x 64 against TRL 1.12",
        "steps",
        "benchmarks.trl_ppo_side:ppo",
        BF16_PPO,
        5.0,
        64,
        64,
        lengths="uniform",
        work={"group_size": 1, "new_tokens": 64, "minibatches": 2, "update_epochs": 2},
    ),
    "rollout": Row(
        "rollout",
        "rollout 64 x 4 x 128 against vLLM alone",
        "tokens",
        "benchmarks.vllm_side:rollout",
        [{}, {"logprobs": 0}],
        0.95,
        64,
        64,
        lengths="uniform",
        work={"group_size": 4, "new_tokens": 128},
    ),
}
