"""Drawing by the inverse of the cumulative distribution."""

import torch

from align.sampling.vllm_sampler import draw_tokens


def test_draws_have_the_frequencies_of_the_distribution():
    probs = torch.tensor([0.5, 0.0, 0.2, 0.29, 0.01, 0.0])
    num = 200_000
    drawn = draw_tokens(probs.expand(num, -1), {})
    counts = torch.bincount(drawn, minlength=6)
    assert counts[1] == counts[5] == 0
    # Five standard deviations of a binomial count.
    bound = 5 * (num * probs * (1 - probs)).sqrt()
    assert ((counts - num * probs).abs() <= bound).all(), counts


def test_a_row_with_a_generator_draws_from_it_alone():
    probs = torch.full((3, 1000), 1e-3)

    def draw(seed: int) -> list[int]:
        return draw_tokens(probs, {1: torch.Generator().manual_seed(seed)}).tolist()

    first, again = draw(5), draw(5)
    assert first[1] == again[1]
    assert first[0] != again[0] or first[2] != again[2]
    only = torch.rand(1, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert first[1] == int(only * 1000)


def test_a_certain_token_is_always_drawn():
    probs = torch.zeros(50, 7)
    probs[:, 6] = 1.0
    assert draw_tokens(probs, {}).eq(6).all()
