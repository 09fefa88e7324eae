"""Draw the learning curves of benchmarks/learning.py, one panel for each algorithm."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("svg")
import matplotlib.pyplot as plt

mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "align", "font.size": 8}


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw held-out reward over sampled tokens, mean and range over seeds, TRL's GRPO in grey."""
    runs = result["runs"]
    theirs = runs["trl grpo"]
    names = [name for name in runs if name != "trl grpo"]
    columns = 5
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(10, 2.2 * rows), sharex=True, sharey=True)
    for axis, name in zip(axes.flat, names, strict=False):
        _band(axis, theirs, "0.5", "TRL GRPO")
        _band(axis, runs[name], "tab:blue", name)
        axis.set_title(name, fontsize=9)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    figure.supxlabel("sampled tokens")
    figure.supylabel("right answers, held out")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def _band(axis: Any, curves: list[list[dict[str, float]]], color: str, label: str) -> None:
    budget = min(curve[-1]["tokens"] for curve in curves)
    at = np.linspace(0.0, budget, 21)
    values = np.array(
        [np.interp(at, [p["tokens"] for p in c], [p["reward"] for p in c]) for c in curves]
    )
    axis.plot(at, values.mean(0), color=color, label=label, linewidth=1.2)
    axis.fill_between(at, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
