"""Measure how often the intervals of align.evaluation cover the truth, on made data that has one.

    python benchmarks/coverage.py [--draws 2000] [--out benchmarks/results/coverage.json]

Each case draws data sets whose true value is known, and counts those whose 95 % interval holds it.
A case passes within 1.5 points of 95 %; cases with fewer than 50 prompts are shown, not promised
(few prompts give few possible win rates, and their intervals cover too much or too little).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from align.core.types import NO_DIFFERENCE
from align.evaluation.length import length_controlled_win_rate
from align.evaluation.sequential import ConfidenceSequence
from align.evaluation.stats import Interval, paired_bootstrap, win_rate_of

LEVEL, TOLERANCE, MIN_PROMPTS = 0.95, 0.015, 50
Draw = Callable[[np.random.Generator], tuple[float, Interval | None]]


@dataclass(frozen=True, slots=True)
class Case:
    """Name a kind of data; ``draw`` gives its true value and the interval of one data set."""

    name: str
    prompts: int
    draw: Draw


def ties(prompts: int, shares: tuple[float, float, float]) -> Draw:
    """Judge one answer per prompt: win, tie or loss with the given chances."""

    def draw(rng: np.random.Generator) -> tuple[float, Interval]:
        return shares[0] + shares[1] / 2, win_rate_of(
            rng.choice([1.0, 0.5, 0.0], prompts, p=shares)
        )

    return draw


def clustered(prompts: int, mean: float, alike: float, sizes: tuple[int, ...]) -> Draw:
    """Judge several answers per prompt, a fifth of them ties; the chance to win is the prompt's.

    Args:
        prompts: number of them. mean: chance to win over all prompts.
        alike: correlation of the outcomes of one prompt. sizes: answers per prompt, drawn evenly.
    """
    tie = 0.2

    def draw(rng: np.random.Generator) -> tuple[float, Interval]:
        chance = rng.beta(mean * (1 / alike - 1), (1 - mean) * (1 / alike - 1), prompts)
        names = np.repeat(np.arange(prompts), rng.choice(sizes, prompts))
        won = rng.random(names.size) < chance[names]
        results = np.where(rng.random(names.size) < tie, 0.5, won)
        return mean * (1 - tie) + tie / 2, win_rate_of(results, clusters=names.tolist())

    return draw


def lengths(prompts: int, *, skewed: bool) -> Draw:
    """Compare unbounded scores of four answers per prompt."""

    def draw(rng: np.random.Generator) -> tuple[float, Interval]:
        names = np.repeat(np.arange(prompts), 4)
        hard = rng.normal(size=prompts)[names] + 0.5 * rng.normal(size=names.size)
        x = np.exp(0.5 * hard) if skewed else hard
        truth = float(np.exp(0.125 * 1.25)) if skewed else 0.0
        seed = int(rng.integers(2**31))
        return truth, paired_bootstrap(x, clusters=names.tolist(), num_draws=600, seed=seed)

    return draw


def same_length(prompts: int, quality: float, taste: float) -> Draw:
    """Judge by quality and by length; the truth is the win rate at equal lengths."""

    def draw(rng: np.random.Generator) -> tuple[float, Interval | None]:
        d = rng.normal(10.0, 20.0, prompts)
        chance = 1 / (1 + np.exp(-quality - taste * np.tanh(d / 20.0)))
        results = (rng.random(prompts) < chance).astype(float)
        return 1 / (1 + np.exp(-quality)), length_controlled_win_rate(results, d)

    return draw


def cases() -> Iterator[Case]:
    """List what is measured."""
    for n in (10, 20, 30, 50, 100, 400):
        for shares in ((0.4, 0.2, 0.4), (0.3, 0.5, 0.2), (0.7, 0.1, 0.2), (0.9, 0.06, 0.04)):
            yield Case(f"win rate, ties {shares}", n, ties(n, shares))
    for n in (10, 20, 30, 50, 100):
        for mean, alike, sizes in ((0.5, 0.3, (4,)), (0.7, 0.3, (1, 2, 4, 8)), (0.8, 0.6, (4,))):
            name = f"win rate, clusters of {sizes}, mean {mean}, correlation {alike}"
            yield Case(name, n, clustered(n, mean, alike, sizes))
    for n in (20, 40, 100):
        yield Case("score, clusters of 4, normal", n, lengths(n, skewed=False))
        yield Case("score, clusters of 4, skewed", n, lengths(n, skewed=True))
    for n in (50, 200):
        for quality, taste in ((0.0, 1.0), (0.8, 0.0), (0.5, -1.5)):
            name = f"length-controlled, quality {quality}, taste for length {taste}"
            yield Case(name, n, same_length(n, quality, taste))


def measure(case: Case, draws: int, seed: int = 0) -> dict[str, object]:
    """Return the share of covering intervals and their mean width."""
    rng = np.random.default_rng([seed, case.prompts, *case.name.encode()])
    covered, widths, absent = 0, [], 0
    for _ in range(draws):
        truth, interval = case.draw(rng)
        if interval is None:
            absent += 1
            continue
        covered += interval.low - 1e-12 <= truth <= interval.high + 1e-12
        widths.append(interval.high - interval.low)
    share = float(covered / len(widths))
    return {
        "case": case.name,
        "prompts": case.prompts,
        "coverage": round(share, 4),
        "mean_width": round(float(np.mean(widths)), 4),
        "not_identified": absent,
        "promised": case.prompts >= MIN_PROMPTS,
        "holds": bool(abs(share - LEVEL) <= TOLERANCE),
    }


def false_verdicts(shares: tuple[float, float, float], prompts: int, draws: int) -> float:
    """Return how often testing after every pair finds a difference where there is none."""
    rng = np.random.default_rng([7, prompts])
    wrong = 0
    for _ in range(draws):
        sequence = ConfidenceSequence(LEVEL)
        for value in rng.choice([1.0, 0.5, 0.0], prompts, p=shares):
            sequence.update(value)
            if sequence.verdict != NO_DIFFERENCE:
                wrong += 1
                break
    return wrong / draws


def main() -> int:
    """Measure all, write the file, print a line each; 1 where a promise does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/coverage.json")
    args = parser.parse_args()
    began = time.monotonic()
    rows = []
    for case in cases():
        rows.append(measure(case, args.draws))
        sys.stdout.write("{prompts:4d}  {coverage:.3f}  {case}\n".format(**rows[-1]))
    looked = {
        f"ties {shares}, {n} pairs": false_verdicts(shares, n, args.draws)
        for shares, n in (((0.4, 0.2, 0.4), 200), ((0.5, 0.0, 0.5), 200), ((0.1, 0.8, 0.1), 200))
    }
    for name, share in looked.items():
        sys.stdout.write(f"      {share:.3f}  false verdicts, looked at after each pair: {name}\n")
    kept = all(row["holds"] for row in rows if row["promised"])
    kept &= max(looked.values()) <= 1 - LEVEL + 3 * (0.05 * 0.95 / args.draws) ** 0.5
    found = {
        "draws": args.draws,
        "level": LEVEL,
        "tolerance": TOLERANCE,
        "promises_kept": kept,
        "seconds": round(time.monotonic() - began, 1),
        "intervals": rows,
        "false_verdicts": looked,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
