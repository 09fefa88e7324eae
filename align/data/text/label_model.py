"""Combine the votes of weak judges, weighting each by its agreement with the others."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ABSTAIN = -1
NUM_ROUNDS = 200
SMOOTHING = 1.0
"""Votes added to every cell of a judge's table, so that few votes are weak evidence."""


@dataclass(frozen=True, slots=True)
class LabelModel:
    """Result of the label model.

    Attributes:
        probabilities: probability of label 1, per row.
        prior: fraction of label 1.
        tables: (judges, true label, vote): the vote distribution of each judge given the truth.
    """

    probabilities: NDArray[np.float64]
    prior: float
    tables: NDArray[np.float64]

    def accuracy(self, judge: int) -> float:
        """Return the estimated fraction of a judge's votes that are correct."""
        right = np.diag(self.tables[judge])
        return float((np.array([1.0 - self.prior, self.prior]) * right).sum())


def dawid_skene(votes: NDArray[np.int64]) -> LabelModel:
    """Estimate two-class labels and each judge's reliability by expectation maximization.

    The estimate starts from the majority vote; rows without any vote get the prior. Judges are
    assumed to err independently given the truth.

    Args:
        votes: (rows, judges) of 0, 1 or ABSTAIN.

    Reference: Dawid and Skene 1979, "Maximum Likelihood Estimation of Observer Error-Rates Using
    the EM Algorithm", equations 2.3 to 2.5, with ``SMOOTHING`` added votes.
    """
    assert votes.ndim == 2, votes.shape
    assert set(np.unique(votes)) <= {ABSTAIN, 0, 1}, np.unique(votes)
    said = np.stack([votes == 0, votes == 1]).astype(float)  # (vote, rows, judges)
    for_one, any_vote = said[1].sum(1), said.sum((0, 2))
    q = np.where(any_vote > 0, for_one / np.maximum(any_vote, 1), 0.5)
    prior, tables = 0.5, np.zeros((votes.shape[1], 2, 2))
    for _ in range(NUM_ROUNDS):
        # M step: class prior and vote tables from the current posteriors.
        truth = np.stack([1.0 - q, q])  # (label, rows)
        prior = float(q.mean())
        tables = np.einsum("lr,vrj->jlv", truth, said) + SMOOTHING
        tables /= tables.sum(2, keepdims=True)
        # E step: log odds of label 1, summed over the judges' votes.
        log_odds = np.log(prior + 1e-12) - np.log(1.0 - prior + 1e-12)
        log_odds = log_odds + np.einsum(
            "vrj,jv->r", said, np.log(tables[:, 1]) - np.log(tables[:, 0])
        )
        new = 1.0 / (1.0 + np.exp(-np.clip(log_odds, -500, 500)))
        if np.abs(new - q).max() < 1e-9:
            break
        q = new
    return LabelModel(q, prior, tables)
