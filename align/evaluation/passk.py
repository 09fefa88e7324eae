"""pass@k from several responses to each prompt."""

from collections.abc import Hashable, Sequence
from math import comb
from typing import TypeVar

Prompt = TypeVar("Prompt", bound=Hashable)


def pass_at_k(num_answers: int, num_right: int, k: int) -> float:
    """Return the unbiased estimate of the probability that one of k responses is correct.

    1 - C(n - c, k) / C(n, k): the fraction of all subsets of k of the n responses that contain at
    least one of the c correct ones.

    Raises:
        ValueError: there are fewer than k responses.

    Reference:
        arXiv:2107.03374 eq. 1.
    """
    if not 0 <= num_right <= num_answers or not 1 <= k <= num_answers:
        raise ValueError(
            f"{num_right} correct of {num_answers} responses, k {k}: expected c <= n >= k"
        )
    return 1.0 - comb(num_answers - num_right, k) / comb(num_answers, k)


def pass_by_prompt(
    scores: Sequence[float | None], prompts: Sequence[Prompt], *, k: int
) -> dict[Prompt, float]:
    """Return pass@k of each prompt that has at least k valid scores; a score of 1 is correct.

    Args:
        scores: one per response, None if it is invalid.
        prompts: the prompt of each response.
        k: number of responses of which at least one must be correct.
    """
    # Per prompt: valid responses, correct responses.
    counts: dict[Prompt, list[int]] = {}
    for score, prompt in zip(scores, prompts, strict=True):
        if score is not None:
            known = counts.setdefault(prompt, [0, 0])
            known[0] += 1
            known[1] += score >= 1.0
    return {name: pass_at_k(n, c, k) for name, (n, c) in counts.items() if n >= k}
