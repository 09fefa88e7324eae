"""Every metric that a stage logs: its unit and what it measures.

The report, ``align explain`` and docs/metrics.md read this table.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple


class Metric(NamedTuple):
    """A metric of metrics.jsonl.

    Attributes:
        unit: such as nats or tokens/s; empty for a plain number.
        meaning: one line.
    """

    unit: str
    meaning: str


OPTIMIZER = {
    "grad_norm": Metric("", "norm of the gradient before clipping"),
    "learning_rate": Metric("", "learning rate of this optimizer step"),
    "update_ratio": Metric(
        "", "norm of the step's update divided by the norm of the weights, on a sample of weights"
    ),
    "update_per_rate": Metric(
        "", "largest change of a sampled weight divided by the learning rate; about 1 for Adam"
    ),
    "weight_rms": Metric("", "root mean square of a sample of the trained weights"),
}
"""Logged for every optimizer: as ``optim/`` offline, as ``policy/`` and ``value/`` online."""

OFFLINE = {
    "loss": Metric("nats", "the stage's loss: per token (sft), pair, response or step"),
    "accuracy": Metric(
        "fraction",
        "pairs whose chosen response scores higher (a tie counts half), or correct labels",
    ),
    "margin": Metric("nats", "mean difference of chosen and rejected scores, or of DPO's rewards"),
    "chosen_logprob": Metric(
        "nats", "log-probability of the chosen response (sum over its tokens), mean over pairs"
    ),
    "kl": Metric("nats", "KTO's estimate of the KL to the reference, on mismatched responses"),
    "good_reward": Metric(
        "nats", "KTO: mean reward beta log(policy / reference) of good responses"
    ),
    "bad_reward": Metric("nats", "KTO: the same mean over bad responses"),
    "ewc": Metric("nats", "EWC's penalty, which is part of the loss"),
}
"""Logged as ``train/`` on the batch of the step, and as ``eval/`` on the held-out rows."""

ONLINE = {
    "reward/mean": Metric("score", "mean total reward of the responses with a valid score"),
    "reward/std": Metric("score", "standard deviation of the total reward over those responses"),
    "reward/invalid_frac": Metric(
        "fraction", "responses without a valid score, which are left out"
    ),
    "reward/dead_group_frac": Metric(
        "fraction", "responses in groups whose rewards are all equal, or without a valid score"
    ),
    "prompts/drawn": Metric("prompts", "prompts sampled in this step (dynamic_sampling)"),
    "prompts/live": Metric(
        "prompts", "sampled prompts with unequal rewards; at most prompts_per_step are trained"
    ),
    "reward/disagreement": Metric("score", "mean standard deviation among an ensemble's members"),
    "reward/{name}": Metric("score", "mean of one of the stage's rewards, before its weight"),
    "kl/reference": Metric("nats", "mean over tokens of log(policy / reference), estimator k1"),
    "kl/reference_per_answer": Metric(
        "nats", "mean over responses of log(policy / reference), summed over the tokens"
    ),
    "kl/reference_k3": Metric(
        "nats", "KL to the reference by estimator k3, which is never negative"
    ),
    "kl/reference_rms": Metric("nats", "root mean square over responses of the summed log-ratio"),
    "kl/coef": Metric("", "coefficient of the KL penalty in this step"),
    "kl/sampler": Metric("nats", "mean over tokens of log(sampler / trainer); should be near 0"),
    "sampler/logprob_gap": Metric(
        "nats", "mean absolute difference of log-probabilities of sampler and trainer"
    ),
    "sampler/importance_weight": Metric("", "mean importance weight (trainer / sampler)"),
    "sampler/bounded_frac": Metric(
        "fraction", "tokens whose importance weight was clipped or set to 0"
    ),
    "advantage/rms": Metric("", "root mean square of the advantage over trained tokens"),
    "length/mean": Metric("tokens", "mean length of a response"),
    "length/truncated_frac": Metric(
        "fraction", "responses that reached the limit without a stop token"
    ),
    "tokens/sampled": Metric("tokens", "tokens sampled in this step"),
    "answers/num": Metric("responses", "responses sampled in this step"),
    "policy/loss": Metric(
        "", "the policy's loss, including the KL penalty if it is part of the loss"
    ),
    "policy/entropy": Metric("nats", "mean entropy of the policy at each trained token"),
    "policy/ratio": Metric("", "mean probability ratio of current to old policy"),
    "policy/clip_frac": Metric("fraction", "tokens whose ratio is clipped, over all updates"),
    "policy/clip_frac_last": Metric(
        "fraction", "tokens whose ratio is clipped, in the last update of the step"
    ),
    "policy/ewc": Metric("nats", "EWC's penalty, which is part of the loss"),
    "policy/approx_kl": Metric("nats", "how far the updates moved from the old policy, by k3"),
    "value/loss": Metric("", "mean squared error of the critic, clipped"),
    "value/clip_frac": Metric(
        "fraction", "tokens whose value prediction moved beyond the clip range"
    ),
    "value/explained_variance": Metric(
        "fraction", "fraction of the returns' variance that the critic explains; 1 is perfect"
    ),
    "time/step_s": Metric("s", "time of the whole step"),
    "time/watch_s": Metric("s", "time of the evaluation during training"),
    "time/{phase}_s": Metric("s", "time of a phase: push, rollout, score or update"),
}

WATCHED = {
    "eval/gold": Metric("score", "mean gold score on the watched prompts; training never sees it"),
    "eval/proxy": Metric("score", "mean training reward on the same responses"),
    "eval/length": Metric("tokens", "mean length of those responses"),
    "eval/repetition": Metric("fraction", "repeated trigrams in those responses"),
    "eval/stop_rate": Metric("fraction", "those of the responses that end with a stop token"),
    "eval/disagreement": Metric("score", "disagreement of an ensemble on those responses"),
    "eval/reward_{name}": Metric("score", "mean of one training reward on those responses"),
    "eval/gold_{name}": Metric("score", "mean of one gold scorer on those responses"),
    "eval/alarms": Metric("", "alarms that the guard raised at this evaluation"),
}

FINAL = {
    "change/{name}_low": Metric("", "lower 95 % bound of that change, clustered by prompt"),
    "change/{name}_high": Metric("", "upper 95 % bound of that change, clustered by prompt"),
    "change/{name}": Metric("", "change of a held-out metric since before the first step"),
    "eval/loss_saved": Metric("nats", "held-out loss of the weights as they were saved"),
    "eval/stop_prob": Metric(
        "fraction", "sft: median probability of the stop token after up to 16 supervised responses"
    ),
    "eval/macro_f1": Metric("fraction", "classifier: mean of the F1 scores of the classes"),
    "eval/pair_accuracy": Metric("fraction", "held-out pairs that a reward model ranks correctly"),
    "eval/{model}/{score}": Metric("", "evaluate: mean of a score over one model's responses"),
    "scorer/mean": Metric("score", "mean score of the reference responses, before normalizing"),
    "scorer/std": Metric("score", "standard deviation of those scores"),
    "tuning/params": Metric("parameters", "parameters of the model"),
    "tuning/trained_params": Metric("parameters", "trained parameters of the model"),
    "engine/vllm": Metric(
        "", "1 if vLLM generated the responses, 0 if Hugging Face generation did"
    ),
    "merge/alpha": Metric("", "weight of the tuned model in the interpolation"),
    "merge/{set}": Metric(
        "score", "mean score of the merged model on a set of prompts, for one alpha"
    ),
    "rows/in": Metric("rows", "rows that a data stage read"),
    "rows/kept": Metric("rows", "rows that a data stage wrote"),
    "left/{reason}": Metric("rows", "rows that a data stage dropped, by reason"),
    "label/prior": Metric("fraction", "weak labels: estimated fraction of good responses"),
    "label/confidence": Metric("fraction", "weak labels: mean probability of the likelier label"),
    "{judge}/accuracy": Metric("fraction", "weak labels: estimated accuracy of one labeler"),
    "{judge}/coverage": Metric("fraction", "weak labels: rows on which a labeler votes"),
    "train/{name}": Metric("", "a TRL trainer's own metric under its own name"),
    "eval/{name}": Metric("", "a TRL trainer's own metric on its held-out rows"),
}
"""Logged once, or by stages that do not train; the last names are patterns."""

EVERYWHERE = {
    "step": Metric("steps", "optimizer steps done so far"),
    "total_steps": Metric("steps", "optimizer steps of the whole stage"),
    "time_s": Metric("s", "time since the stage's process began to log"),
    "tokens/trained": Metric("tokens", "tokens trained in this step (offline stages)"),
    "tokens/per_s": Metric(
        "tokens/s", "tokens trained per second; in online stages, tokens sampled per second"
    ),
}


def metrics() -> dict[str, Metric]:
    """Return every metric by name; names with braces are patterns and follow the plain ones."""
    found = dict(EVERYWHERE)
    for group in ("train", "eval"):
        found |= {f"{group}/{name}": metric for name, metric in OFFLINE.items()}
    for group in ("optim", "policy", "value"):
        found |= {f"{group}/{name}": metric for name, metric in OPTIMIZER.items()}
    found |= ONLINE | WATCHED | FINAL
    return dict(sorted(found.items(), key=lambda item: "{" in item[0]))


def described(name: str) -> Metric | None:
    """Return the metric of a logged name, or None if it is unknown.

    ``loss`` without a group is looked up as ``train/loss``, as the report's panels are named.
    """
    known = metrics()
    found = known.get(name) or known.get(f"train/{name}") or known.get(f"eval/{name}")
    if found is not None or "/" not in name:
        return found
    return next((known[p] for p, rule in _patterns() if rule.fullmatch(name)), None)


@cache
def _patterns() -> tuple[tuple[str, re.Pattern[str]], ...]:
    rules = ((name, re.split(r"\{\w+\}", name)) for name in metrics() if "{" in name)
    return tuple((name, re.compile(".+".join(map(re.escape, parts)))) for name, parts in rules)


def page() -> Iterator[str]:
    """Yield the lines of docs/metrics.md's tables."""
    groups = {
        "Every stage": EVERYWHERE,
        "Training: `train/` and `eval/`": OFFLINE,
        "Optimizer: `optim/`; online `policy/` and `value/`": OPTIMIZER,
        "PPO and GRPO": ONLINE,
        "Evaluation during training (`watch`)": WATCHED,
        "Results and data stages": FINAL,
    }
    for title, group in groups.items():
        yield from (f"## {title}", "", "| name | unit | meaning |", "|---|---|---|")
        yield from (f"| `{name}` | {m.unit} | {m.meaning} |" for name, m in group.items())
        yield ""
