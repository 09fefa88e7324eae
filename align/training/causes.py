"""Rules that name why a run does not learn, each a function of the evidence.

A rule names a cause only if no healthy run looks like that: a gradient of exactly 0, weights that
did not move, rewards that are all equal and never rose. Rules are ordered in chains, a cause before
its consequences.
"""

import math
from collections.abc import Callable, Sequence

from align.core.types import Alarm
from align.recipe.schema import DpoStage, KtoStage, OnlineStage
from align.training.evidence import WINDOW, Evidence

Rule = Callable[[Evidence], Alarm | None]
SMALLEST_MOVE = 1e-6
"""Relative change of the weights over the whole run that counts as none."""
SMALLEST_UPDATE = 0.2
"""Largest update of any weight, in learning rates; Adam's first is 1 unless eps is in its way."""
LITTLE_ENTROPY = 0.01
"""Nats per token below which nearly all responses to a prompt are the same."""
MOST, NEARLY_ALL = 0.9, 0.98
"""Fraction of rows or responses that makes a fault of some the fault of the run."""
SMALLEST_SPREAD = 1e-4
"""Standard deviation of rewards that is lost in the constant added to a group's (STD_EPS)."""
CONSTANT = 1e-6
"""Standard deviation of rewards, relative to their mean, that is rounding."""
FAR_APART = 0.5
"""Nats per token between sampler and trainer; rounding makes 0.1 at most."""
MOST_CLIPPED = 0.6
"""Fraction of tokens; only tokens that moved with their advantage can be clipped."""
SATURATED = 30.0
"""Margin beyond which the sigmoid of a preference loss is 0 or 1 in float32 (nearly 1e-13)."""


def learning_rate(seen: Evidence) -> Alarm | None:
    """Name a learning rate of 0, or one too small to move the weights in all steps together."""
    rates = seen.values(seen.optim("learning_rate"))
    size = seen.mean(seen.optim("weight_rms"))
    if not rates:
        return None
    peak = seen.spec.optim.learning_rate
    if max(rates) == 0.0:
        reason = f"the learning rate was 0 in the last {len(rates)} steps (optim has {peak:.3g})"
        return Alarm("learning_rate", reason, "lengthen the schedule or raise min_lr_frac")
    # Adam moves a weight by at most about the rate a step: past steps, and the rest at this rate.
    total = seen.rates + sum(rates) / len(rates) * (seen.total_steps - seen.step)
    if total >= SMALLEST_MOVE * size:
        return None
    return Alarm(
        "learning_rate",
        f"the learning rate is {rates[-1]:.3g}: {seen.total_steps} steps move a weight by about "
        f"{total:.2g}, and the weights are about {size:.2g}",
        "raise optim.learning_rate",
    )


def warmup(seen: Evidence) -> Alarm | None:
    """Name a warm-up that lasts as long as the run, or a peak that was never near."""
    optim, steps = seen.spec.optim, seen.total_steps
    if steps < WINDOW or optim.schedule == "slanted" or not seen.largest.get("learning_rate"):
        return None
    highest = seen.largest["learning_rate"]
    # A warm-up of all steps is known at once, a peak that was never near only at the end.
    endless = optim.warmup_frac * steps > steps - 0.5
    if not endless and not (seen.last and highest < 0.1 * optim.learning_rate):
        return None
    return Alarm(
        "warmup",
        f"the warm-up takes all {steps} steps: after {seen.step} the learning rate has reached "
        f"{highest:.3g} of {optim.learning_rate:.3g}",
        "lower optim.warmup_frac",
    )


def zero_adapter(seen: Evidence) -> Alarm | None:
    """Name an adapter whose weights are all 0, so that no gradient reaches them."""
    sizes = seen.values(seen.optim("weight_rms"))
    if not sizes or max(sizes) > 0.0 or seen.largest["grad_norm"] > 0.0:
        return None
    return Alarm(
        "zero_adapter",
        f"all trained weights ({seen.num_trained:,}) and their gradients were 0 in "
        f"{seen.step} steps",
        "reinitialize the adapter: one of its matrices must not be 0",
    )


def zero_gradient(seen: Evidence) -> Alarm | None:
    """Name a gradient that was exactly 0 in every step so far."""
    if not seen.values(seen.optim("grad_norm")) or seen.largest["grad_norm"] > 0.0:
        return None
    return Alarm(
        "zero_gradient",
        f"the gradient was exactly 0 in all {seen.step} steps",
        "check that the trained weights (tuning, layers) take part in the loss",
    )


def small_gradient(seen: Evidence) -> Alarm | None:
    """Name gradients below Adam's epsilon, by themselves or because they are clipped to that."""
    updates = seen.values(seen.optim("update_per_rate"))
    if not updates or seen.largest["update_per_rate"] >= SMALLEST_UPDATE:
        return None
    optim, norm = seen.spec.optim, seen.mean(seen.optim("grad_norm"))
    # Root mean square of the gradient's elements; clipping multiplies it by `share`.
    typical = norm / math.sqrt(max(seen.num_trained, 1))
    share = min(1.0, optim.max_grad_norm / norm) if norm else 1.0
    if not 0.0 < typical * share < optim.eps:
        return None
    told = (
        f"a weight's gradient is about {typical:.2g}, {typical * share:.2g} after clipping, below "
        f"Adam's eps {optim.eps:.2g}: updates are at most {max(updates):.2g} of the learning rate"
    )
    if typical >= optim.eps:
        return Alarm("clipped_gradient", told, "raise optim.max_grad_norm, usually to 1")
    return Alarm("adam_epsilon", told, "lower optim.eps, usually to 1e-8, or scale the loss up")


def frozen_weights(seen: Evidence) -> Alarm | None:
    """Name weights that did not change although there was a gradient and a learning rate."""
    if not seen.values(seen.optim("update_ratio")) or seen.largest["update_ratio"] > 0.0:
        return None
    if not seen.largest["learning_rate"]:
        return None
    norm = seen.mean(seen.optim("grad_norm"))
    return Alarm(
        "frozen_weights",
        f"no trained weight changed in {seen.step} steps, with a gradient norm of {norm:.3g} and a "
        f"learning rate of up to {seen.largest['learning_rate']:.3g}",
        "check that the optimizer has the model's weights; in bfloat16, raise the learning rate",
    )


def one_class(seen: Evidence) -> Alarm | None:
    """Name labels that are all the same."""
    if len(seen.rows.labels) != 1:
        return None
    return Alarm(
        "one_class",
        f"the label is {seen.rows.labels[0]} in all {seen.rows.num} rows",
        "add rows with another label",
    )


def empty_mask(seen: Evidence) -> Alarm | None:
    """Name rows without a trained token."""
    rows = seen.rows
    if rows.untrained < MOST * rows.num or not rows.num:
        return None
    return Alarm(
        "empty_mask",
        f"{rows.untrained} of {rows.num} rows have no token that enters the loss",
        "check the roles and weights of the turns ('align data show FILE')",
    )


def one_row(seen: Evidence) -> Alarm | None:
    """Name a data set whose rows are all the same."""
    if not seen.rows.equal:
        return None
    return Alarm(
        "one_row",
        f"all {seen.rows.num} rows have the same tokens",
        "check how the data set was written; a model only memorizes one row",
    )


def beta(seen: Evidence) -> Alarm | None:
    """Name a beta so small that the preference loss cannot tell the responses apart."""
    margins = _margins(seen)
    if not margins or not isinstance(seen.spec, DpoStage | KtoStage) or seen.spec.beta >= 1e-3:
        return None
    if max(margins) >= 0.01:
        return None
    return Alarm(
        "beta",
        f"with beta {seen.spec.beta:.3g} the margin between good and bad responses is at most "
        f"{max(margins):.2g} after {seen.step} steps: the loss hardly depends on the policy",
        "raise beta, usually to 0.1",
    )


def beta_pins(seen: Evidence) -> Alarm | None:
    """Name a beta so large that the loss is saturated before the policy has moved."""
    margins, losses = _margins(seen), seen.values("train/loss")
    if not margins or not losses or not isinstance(seen.spec, DpoStage | KtoStage):
        return None
    largest = max(*margins, *losses) if isinstance(seen.spec, DpoStage) else max(margins)
    if largest <= SATURATED or largest >= seen.spec.beta:
        return None
    return Alarm(
        "beta",
        f"with beta {seen.spec.beta:.3g} a difference of {largest / seen.spec.beta:.2g} nats to "
        f"the reference makes a margin of {largest:.3g}: the loss is saturated",
        "lower beta, usually to 0.1",
    )


def _margins(seen: Evidence) -> list[float]:
    good, bad = seen.values("train/good_reward"), seen.values("train/bad_reward")
    if good and bad:
        return [abs(a - b) for a, b in zip(good, bad, strict=True)]
    return [abs(x) for x in seen.values("train/margin")]


def diverged(seen: Evidence) -> Alarm | None:
    """Name a loss that rose far above its first value and stays there."""
    losses, first = seen.values("train/loss"), seen.first.get("train/loss", 0.0)
    if not losses or not min(losses) > first or not sum(losses) / len(losses) > 2.0 * first + 1.0:
        return None
    return Alarm(
        "diverged",
        f"the loss rose from {first:.3g} to {sum(losses) / len(losses):.3g}, its mean over the "
        f"last {len(losses)} steps",
        "lower optim.learning_rate or lengthen the warm-up",
    )


def invalid_rewards(seen: Evidence) -> Alarm | None:
    """Name rewards that cannot score the responses."""
    if not seen.always("reward/invalid_frac", MOST):
        return None
    return Alarm(
        "invalid_rewards",
        f"{100 * seen.mean('reward/invalid_frac'):.3g} % of the responses had no valid score in "
        f"the last {len(seen.window)} steps",
        "see samples.jsonl; check the reward's columns, its server or its judge",
    )


def _without_signal(seen: Evidence) -> bool:
    """Return whether no reward tells the responses apart, and that is not because all are good."""
    spec = seen.spec
    assert isinstance(spec, OnlineStage)
    if spec.algorithm_facts.compares_group:
        silent, lived = seen.always("reward/dead_group_frac", 1.0), seen.largest["live"] > 0.0
    else:
        silent, lived = _constant(seen), seen.first.get("reward/std", 0.0) > 0.0
    return silent and not (lived and seen.reward_rose)


def _constant(seen: Evidence) -> bool:
    means, stds = seen.values("reward/mean"), seen.values("reward/std")
    if not means or not stds:
        return False
    size = max(1e-30, *(abs(mean) for mean in means))
    return max(stds) <= CONSTANT * size and max(means) - min(means) <= CONSTANT * size


def taught_nothing(seen: Evidence) -> bool:
    """Return whether no step so far could teach the model anything.

    Either the gradient, the rate or every update was 0 in all of them, or no reward ever told two
    responses apart.
    """
    if min(seen.largest[name] for name in ("grad_norm", "learning_rate", "update_ratio")) == 0.0:
        return True
    if not isinstance(seen.spec, OnlineStage):
        return False
    if seen.spec.algorithm_facts.compares_group:
        return seen.largest["live"] == 0.0
    return seen.largest.get("spread", 1.0) <= CONSTANT


def entropy_collapse(seen: Evidence) -> Alarm | None:
    """Name a policy that always gives the same response."""
    if not _without_signal(seen) or not seen.always("policy/entropy", -1.0, LITTLE_ENTROPY):
        return None
    first = seen.first.get("policy/entropy", 0.0)
    return Alarm(
        "entropy_collapse",
        f"the entropy is {seen.mean('policy/entropy'):.2g} nats per token ({first:.2g} in the "
        "first step): all responses to a prompt are the same, so their rewards are equal",
        "lower the learning rate or raise kl.coef or sampling.temperature, and start over",
    )


def constant_reward(seen: Evidence) -> Alarm | None:
    """Name a reward that is the same number for every response."""
    if not _without_signal(seen) or not _constant(seen):
        return None
    return Alarm(
        "constant_reward",
        f"every response got the reward {seen.mean('reward/mean'):.6g} in the last "
        f"{len(seen.window)} steps",
        "look at samples.jsonl: train on harder prompts if every response deserves this reward, "
        "and on easier ones if no response earns more. A reward for text that the chat template "
        "writes itself, such as <think>, needs prefill: true",
    )


def dead_groups(seen: Evidence) -> Alarm | None:
    """Name groups whose responses all have the same reward."""
    if not _without_signal(seen):
        return None
    return Alarm(
        "dead_groups",
        f"the responses to a prompt had equal rewards for every prompt of the last "
        f"{len(seen.window)} steps: all advantages are 0",
        "use prompts that the policy solves sometimes, a larger group_size or a finer reward",
    )


def saturated_reward(seen: Evidence) -> Alarm | None:
    """Name rewards that differ by less than the constant added to their standard deviation."""
    means = seen.values("reward/mean")
    if not means or not seen.always("reward/std", 0.0, SMALLEST_SPREAD):
        return None
    if seen.reward_rose and seen.first.get("reward/std", 0.0) > SMALLEST_SPREAD:
        return None
    told = f"rewards of about {means[-1]:.6g} differ by {seen.mean('reward/std'):.2g} only"
    if "advantage/rms" in seen.window[-1]:
        told += f"; the advantages are about {seen.mean('advantage/rms'):.2g}"
    return Alarm(
        "saturated_reward",
        told,
        "take the score before its sigmoid or clipping, or raise the weight of the reward",
    )


def all_truncated(seen: Evidence) -> Alarm | None:
    """Name the length limit if it cuts all responses and their rewards tell nothing."""
    return _truncated(seen) if seen.mean("length/truncated_frac") >= NEARLY_ALL else None


def truncated(seen: Evidence) -> Alarm | None:
    """Name the length limit if it cuts most responses and their rewards tell nothing."""
    return _truncated(seen) if seen.mean("length/truncated_frac") >= MOST else None


def _truncated(seen: Evidence) -> Alarm | None:
    spec = seen.spec
    assert isinstance(spec, OnlineStage)
    if not seen.values("length/truncated_frac"):
        return None
    # Truncation is named where rewards then show nothing, or where such responses are left out.
    if not _without_signal(seen) and spec.truncation != "mask":
        return None
    return Alarm(
        "truncated",
        f"{100 * seen.mean('length/truncated_frac'):.3g} % of the responses of the last "
        f"{len(seen.window)} steps reached the limit of {spec.sampling.max_new_tokens} tokens "
        "without a stop token",
        "raise sampling.max_new_tokens; if responses never end, train the stop token with sft",
    )


def sampler_drift(seen: Evidence) -> Alarm | None:
    """Name a sampler that samples from another policy than the trained one."""
    if not seen.always("sampler/logprob_gap", FAR_APART):
        return None
    return Alarm(
        "sampler_drift",
        f"sampler and trainer differ by {seen.mean('sampler/logprob_gap'):.3g} nats per token; "
        f"{100 * seen.mean('sampler/bounded_frac'):.3g} % of the importance weights are cut",
        "check that the sampler has the trainer's weights, temperature and number format",
    )


def clipped_ratios(seen: Evidence) -> Alarm | None:
    """Name a clip range that the policy leaves with the first updates of each step."""
    if not seen.always("policy/clip_frac_last", MOST_CLIPPED) or seen.reward_rose:
        return None
    spec = seen.spec
    assert isinstance(spec, OnlineStage)
    return Alarm(
        "clipped_ratios",
        f"{100 * seen.mean('policy/clip_frac_last'):.3g} % of the tokens are clipped in the last "
        f"update of a step (clip: -{spec.clip.low:g}, +{spec.clip.high:g}): only the first counts",
        "lower the learning rate or update_epochs, or widen clip",
    )


def kl_dominates(seen: Evidence) -> Alarm | None:
    """Name a KL penalty that outweighs the reward although the policy has hardly moved.

    Both are compared by their weight in the gradient of a token's log-probability: in the loss the
    coefficient times the log-ratio against the advantage; in the reward the penalty of a response
    against the standard deviation of the rewards.
    """
    spec = seen.spec
    assert isinstance(spec, OnlineStage)
    if spec.kl.coef == 0.0 or seen.reward_rose:
        return None
    in_loss = spec.kl.place == "loss"
    if in_loss:
        # k3 is about x^2 / 2 for a log-ratio of x, so this is the typical distance of a token.
        moved = [math.sqrt(2.0 * max(x, 0.0)) for x in seen.values("kl/reference_k3")]
        scales, near, limit = seen.values("advantage/rms"), 0.3, 1.0
    else:
        # In the reward, the KL of a whole response stands against the spread of the scores.
        moved = seen.values("kl/reference_rms")
        scales, near, limit = seen.values("reward/std"), 2.0, 2.0
    if not moved or not scales or min(scales) == 0.0:
        return None
    weights = [spec.kl.coef * x / scale for x, scale in zip(moved, scales, strict=True)]
    # A penalty of ten times the limit is wrong at any distance from the reference.
    far = 10.0 * limit
    if not all(w > limit and (x < near or w > far) for w, x in zip(weights, moved, strict=True)):
        return None
    unit = "token" if in_loss else "response"
    return Alarm(
        "kl_dominates",
        f"with kl.coef {seen.mean('kl/coef'):.3g} the penalty weighs {min(weights):.3g} times the "
        f"reward or more, although a {unit} is only {sum(moved) / len(moved):.2g} nats from the "
        "reference policy",
        "lower kl.coef",
    )


def reference_moves(seen: Evidence) -> Alarm | None:
    """Name a reference that is the trained policy itself."""
    if seen.step <= WINDOW or not seen.always("kl/reference_k3", 0.0, 0.0):
        return None
    if not seen.always("policy/update_ratio", SMALLEST_MOVE):
        return None
    return Alarm(
        "reference_moves",
        f"the KL to the reference is exactly 0 after {seen.step} steps that moved the weights",
        "check that the reference is a copy of the initial policy",
    )


UPDATES: Sequence[Rule] = (zero_adapter, zero_gradient, small_gradient, frozen_weights)
OFFLINE: Sequence[Sequence[Rule]] = (
    (learning_rate, one_class, empty_mask, one_row, beta, *UPDATES),
    (warmup,),
    (beta_pins,),
    (diverged,),
)
ONLINE: Sequence[Sequence[Rule]] = (
    (entropy_collapse, all_truncated),
    (
        learning_rate,
        invalid_rewards,
        entropy_collapse,
        constant_reward,
        dead_groups,
        saturated_reward,
        *UPDATES,
    ),
    # Where some responses ended, their rewards are no better than those of the others.
    (entropy_collapse, truncated),
    (warmup,),
    (sampler_drift,),
    (clipped_ratios,),
    (kl_dominates, reference_moves),
)
"""Chains of rules; of each chain the first that holds is named."""
