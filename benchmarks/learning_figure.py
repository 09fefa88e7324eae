"""Draw the learning curves of benchmarks/learning.py as one SVG, a panel for each algorithm."""

from pathlib import Path
from typing import Any

import numpy as np

WIDTH, HEIGHT, LEFT, TOP, COLUMNS = 170, 110, 34, 26, 5
LOW, HIGH = 0.30, 0.50
OURS, THEIRS = "#1f6fb2", "#8a8a8a"
Curves = list[list[dict[str, float]]]


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw held-out reward over sampled tokens, mean and range over seeds, TRL's GRPO in grey."""
    runs = result["runs"]
    names = [name for name in runs if name != "trl grpo"]
    budget = max(curve[-1]["tokens"] for curves in runs.values() for curve in curves)
    rows = -(-len(names) // COLUMNS)
    width, height = COLUMNS * (WIDTH + LEFT) + 10, rows * (HEIGHT + 2 * TOP) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="10">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i, name in enumerate(names):
        x, y = LEFT + (i % COLUMNS) * (WIDTH + LEFT), TOP + (i // COLUMNS) * (HEIGHT + 2 * TOP)
        parts.append(f'<g transform="translate({x},{y})">{_frame(name, budget)}')
        for curves, color in ((runs["trl grpo"], THEIRS), (runs[name], OURS)):
            parts.append(_band(curves, color, budget))
        parts.append("</g>")
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _frame(name: str, budget: float) -> str:
    ticks = "".join(
        f'<line x1="0" x2="{WIDTH}" y1="{_y(v):.1f}" y2="{_y(v):.1f}" stroke="#e4e4e4"/>'
        f'<text x="-4" y="{_y(v) + 3:.1f}" text-anchor="end">{v:.2f}</text>'
        for v in (0.30, 0.35, 0.40, 0.45, 0.50)
    )
    return (
        f'{ticks}<text x="0" y="-8" font-size="12">{name}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 13}" text-anchor="end">{budget:,.0f} tokens</text>'
    )


def _band(curves: Curves, color: str, budget: float) -> str:
    at = np.linspace(0.0, min(curve[-1]["tokens"] for curve in curves), 21)
    values = np.array(
        [np.interp(at, [p["tokens"] for p in c], [p["reward"] for p in c]) for c in curves]
    )
    xs = at / budget * WIDTH

    def points(line: Any) -> list[str]:
        return [f"{x:.1f},{_y(v):.1f}" for x, v in zip(xs, line, strict=True)]

    around = points(values.max(0)) + points(values.min(0))[::-1]
    return (
        f'<polygon points="{" ".join(around)}" fill="{color}" fill-opacity="0.15"/>'
        f'<polyline points="{" ".join(points(values.mean(0)))}" fill="none" stroke="{color}" '
        'stroke-width="1.5"/>'
    )


def _y(value: float) -> float:
    return HEIGHT * (1.0 - (value - LOW) / (HIGH - LOW))
