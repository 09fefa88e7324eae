"""Metrics of one online step over all ranks."""

import math

import torch

from align.core import distributed
from align.online.advantages import dead_groups
from align.online.scoring import Scores
from align.recipe.schema import OnlineStage
from align.sampling.rollout import Experience


def summarize(experience: Experience, scores: Scores, spec: OnlineStage) -> dict[str, float]:
    """Return mean reward, lengths, KL, invalid and truncated fractions, explained variance."""
    sums = _sums(experience, scores, spec)
    answers = sums["answers"]
    valid = max(sums["valid"], 1.0)
    mean = sums["score"] / valid
    found = {
        "answers/num": answers,
        "reward/mean": mean,
        "reward/std": math.sqrt(max(sums["score_sq"] / valid - mean**2, 0.0)),
        "reward/invalid_frac": 1.0 - sums["valid"] / answers,
        "length/mean": sums["tokens"] / answers,
        "length/truncated_frac": sums["truncated"] / answers,
        "tokens/sampled": sums["tokens"],
    }
    for name in scores.by_name:
        found[f"reward/{name}"] = sums[f"by/{name}"] / max(sums[f"num/{name}"], 1.0)
    if spec.group_size > 1:
        found["reward/dead_group_frac"] = sums["dead"] / answers
    if "ref" in sums:
        found["kl/reference"] = sums["ref"] / max(sums["tokens"], 1.0)
        # Per response, in the unit of the adaptive controller's target.
        found["kl/reference_per_answer"] = sums["ref"] / answers
        found["kl/reference_k3"] = sums["ref_k3"] / max(sums["tokens"], 1.0)
        found["kl/reference_rms"] = math.sqrt(sums["ref_sq"] / answers)
    if "advantages_sq" in sums:
        found["advantage/rms"] = math.sqrt(sums["advantages_sq"] / max(sums["trained"], 1.0))
    if "returns_sq" in sums:
        n = max(sums["trained"], 1.0)
        # Variance as E[x^2] - E[x]^2, because only sums can be added over ranks.
        spread = sums["returns_sq"] / n - (sums["returns"] / n) ** 2
        errors = sums["errors_sq"] / n - (sums["errors"] / n) ** 2
        if spread > 0.0:
            found["value/explained_variance"] = 1.0 - errors / spread
    return found


def _sums(experience: Experience, scores: Scores, spec: OnlineStage) -> dict[str, float]:
    # (B,), NaN where no reward could score the response.
    total = experience.scores.double()
    valid = ~total.isnan()
    tokens, mask = experience.per_token, experience.mask
    sums = {
        "answers": float(len(total)),
        "valid": float(valid.sum()),
        "score": float(total[valid].sum()),
        "score_sq": float(total[valid].square().sum()),
        "tokens": float(experience.completion.sum()),
        "trained": float(mask.sum()),
        "truncated": float(experience.truncated.sum()),
    }
    for name, values in scores.by_name.items():
        known = [v for v in values if v is not None]
        sums[f"by/{name}"], sums[f"num/{name}"] = float(sum(known)), float(len(known))
    if spec.group_size > 1:
        dead = dead_groups(experience.scores[valid], experience.group_ids[valid])
        # An invalid response teaches nothing either.
        sums["dead"] = float(dead.sum()) + float((~valid).sum())
    if "ref_logprobs" in tokens:
        # k1 and k3 over all completion tokens, also those that are not trained.
        x = (tokens["old_logprobs"] - tokens["ref_logprobs"]).double()  # (B, T)
        sums["ref_sq"] = float(x.masked_fill(~experience.completion, 0.0).sum(1).square().sum())
        x = x[experience.completion]
        sums["ref"] = float(x.sum())
        sums["ref_k3"] = float((torch.exp(-x) - 1.0 + x).sum())
    if "advantages" in tokens:
        sums["advantages_sq"] = float(tokens["advantages"].double()[mask].square().sum())
    if "returns" in tokens:
        returns = tokens["returns"].double()[mask]
        errors = returns - tokens["values"].double()[mask]
        sums |= {"returns": float(returns.sum()), "returns_sq": float(returns.square().sum())}
        sums |= {"errors": float(errors.sum()), "errors_sq": float(errors.square().sum())}
    # Every rank has the same keys: they depend on the recipe, not on the responses.
    return distributed.global_sums(sums)
