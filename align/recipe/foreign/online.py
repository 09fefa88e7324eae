"""The keys of an online stage: TRL's GRPO, which axolotl has as a block, and PPO."""

from typing import Any

from align.core.text import shown
from align.recipe.foreign.draft import Draft
from align.recipe.foreign.keys import Keys

THINK = r"(?s)<think>\n?.*?\n?</think>\s*<answer>\n?.*?\n?</answer>\s*"
REWARDS: dict[str, dict[str, Any]] = {
    "accuracy": {"kind": "math", "latex": True, "column": "solution"},
    "accuracy_reward": {"kind": "math", "latex": True, "column": "solution"},
    "format": {"kind": "format", "pattern": THINK},
    "think_format_reward": {"kind": "format", "pattern": r"(?s)<think>(?!.*<think>).*?</think>.*"},
    "reasoning_accuracy_reward": {
        "kind": "python",
        "path": "trl.rewards:reasoning_accuracy_reward",
    },
    # With the arguments of TRL's command line.
    "get_soft_overlong_punishment": {
        **{"kind": "python", "path": "trl.rewards:get_soft_overlong_punishment"},
        "args": {"max_completion_len": 1280, "soft_punish_cache": 256},
    },
}
"""Reward functions that TRL and open-r1 ship, by name."""
LOSSES = {
    "grpo": {"aggregation": "sequence"},
    "dapo": {"aggregation": "token"},
    "bnpo": {"aggregation": "token"},
    "dr_grpo": {"aggregation": "constant"},
    "cispo": {"objective": "cispo", "aggregation": "token"},
}
SCALES = {"group": "std", "true": "std", "batch": "batch", "false": "none", "none": "none"}


def set_grpo(draft: Draft, keys: Keys, *, rows: int, beta: float = 0.0, rloo: bool = False) -> None:
    """Convert group, clipping, loss, sampling and rewards.

    Args:
        draft: the recipe.
        keys: where TRL's keys are.
        rows: completions of one process and forward pass.
        beta: coefficient of the KL if ``keys`` have none.
        rloo: the trainer is TRL's RLOO, whose KL is part of the reward.
    """
    stage = draft.stage
    group = keys.count("num_generations", 2 if rloo else 8)
    stage["group_size"] = group
    _set_rollout(draft, keys, rows=rows, group=group)
    beta = float(keys.number("beta", beta))
    if rloo:
        stage["algorithm"] = "rloo"
        stage["kl"] = {"coef": beta, "place": "reward", "estimator": "k1"}
        _set_clip(draft, keys)
        if "clip" in stage:
            told = "the ratio of a token is clipped, in TRL that of a response"
            keys.note("num_iterations", told, lost=True)
    else:
        if beta:
            stage["kl"] = {"coef": beta, "place": "loss", "estimator": "k3"}
        _set_loss(draft, keys)
    # Sampling, and the tokens of a prompt and its response together.
    new = keys.count("max_completion_length", 512)
    sampling: dict[str, Any] = {"max_new_tokens": new}
    if keys.number("temperature", 1.0) != 1.0:
        sampling["temperature"] = float(keys.number("temperature"))
    if keys.number("top_p", 1.0) != 1.0:
        keys.note(
            "top_p",
            "a value below 1 samples from another distribution than the policy's",
            lost=True,
        )
    if keys.has("use_vllm"):
        sampling["engine"] = "auto" if keys.flag("use_vllm") else "hf"
    memory = keys.number("vllm_gpu_memory_utilization")
    if memory and sampling.get("engine") == "auto":
        sampling["memory_frac"] = float(memory)
    stage["sampling"] = sampling
    prompt = keys.count("max_prompt_length", 512)
    stage["max_length"] = prompt + new
    if keys.flag("mask_truncated_completions"):
        stage["truncation"] = "mask"
    rewards = rewards_of(keys)
    if rewards:
        stage["rewards"] = rewards


def _set_rollout(draft: Draft, keys: Keys, *, rows: int, group: int) -> None:
    """Convert completions of a generation to prompts of a rollout step, and its optimizer steps."""
    stage, top = draft.stage, draft.keys
    accumulated = top.count("gradient_accumulation_steps", 1)
    made = keys.count("steps_per_generation", accumulated)
    completions = keys.count("generation_batch_size", rows * made)
    minibatches = max(1, completions // max(1, rows * accumulated))
    prompts = max(1, round(completions / group))
    name = "generation_batch_size" if keys.has("generation_batch_size") else "num_generations"
    if prompts % minibatches:
        prompts = minibatches * max(1, round(prompts / minibatches))
    keys.note(
        name,
        f"{completions} completions of one process in groups of {group} are {prompts} prompts per "
        "step; with ranks (GPUs), multiply prompts_per_step by them",
        lost=completions != prompts * group,
    )
    stage["prompts_per_step"] = prompts
    stage["minibatches"] = minibatches
    stage["update_epochs"] = keys.count("num_iterations", 1)


def _set_loss(draft: Draft, keys: Keys) -> None:
    stage = draft.stage
    loss = keys.text("loss_type", "dapo").lower()
    if loss in LOSSES:
        stage.update(LOSSES[loss])
    else:
        keys.note("loss_type", f"'{loss}'; the mean over tokens (dapo) is used", lost=True)
    scale = str(keys.take("scale_rewards", "group")).lower()
    stage["scale"] = SCALES.get(scale, "std")
    if keys.text("importance_sampling_level", "token") == "sequence":
        stage["algorithm"] = "gspo"
        for name in ("objective", "aggregation"):
            stage.pop(name, None)
    _set_clip(draft, keys)


def _set_clip(draft: Draft, keys: Keys) -> None:
    stage = draft.stage
    low = float(keys.number("epsilon", 0.2))
    high = float(keys.number("epsilon_high", low))
    several = stage["minibatches"] * stage["update_epochs"] > 1
    if several:
        stage["clip"] = {"low": low, "high": high}
        if keys.has("delta"):
            stage["clip"]["dual"] = float(keys.number("delta"))
    for name in ("epsilon", "epsilon_high", "delta"):
        if keys.has(name) and not several:
            keys.take(name)
            keys.note(name, "with one optimizer step per rollout every ratio is 1: no effect")


def rewards_of(keys: Keys) -> list[dict[str, Any]]:
    """Return the rewards: those that align has, and functions by their import path."""
    found = []
    weights = keys.take("reward_weights", [])
    if not isinstance(weights, list) or not all(isinstance(w, int | float) for w in weights):
        raise keys.wrong("reward_weights", f"found {shown(weights)}; expected a list of numbers")
    for i, name in enumerate(keys.texts("reward_funcs")):
        if name in REWARDS:
            reward: dict[str, Any] = dict(REWARDS[name])
        elif ":" in name or "." in name:
            module, _, function = name.replace(":", ".").rpartition(".")
            reward = {"kind": "python", "path": f"{module}:{function}"}
        else:
            told = f"'{name}' is a function of the tool; write it as kind: python, path: FILE:NAME"
            keys.note("reward_funcs", told, lost=True)
            continue
        if i < len(weights) and weights[i] != 1:
            reward["weight"] = float(weights[i])
        found.append(reward)
    if not found:
        keys.note("reward_funcs", "no reward is converted; write 'rewards'", lost=True)
        if weights:
            keys.note("reward_weights", "write weight in each of 'rewards'", lost=True)
    return found
