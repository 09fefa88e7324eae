"""Compare losses and gradients with TRL's trainers on the same model and batch.

    python -m benchmarks.differential              # the table of docs/algorithms.md
    python -m benchmarks.differential --write      # put it there
    python -m benchmarks.differential --seed 7     # on another model and batch

Both sides start from one folder: a Llama of two layers whose weights are in float64. TRL's head
computes in float32, so that agreement is to about 1e-6.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}

import datasets
import transformers
from torch import Tensor

from benchmarks.differential import ours, theirs
from benchmarks.differential.cases import CASES, CISPO_CLIP, CLIP, GSPO_CLIP, LACKS, Case
from benchmarks.differential.world import World, new_world

PAGE = Path(__file__).parents[2] / "docs" / "algorithms.md"
BEGIN, END = "<!-- differential -->", "<!-- end of differential -->"
SEED = 1
SAME = ("epsilon", "epsilon_high")
"""Settings that say the same as `clip`, which the table leaves out."""
CLIPS = (CLIP, GSPO_CLIP, CISPO_CLIP)
HEAD = ("align", "TRL 1.16", "loss", "gradient", "gradient, two micro-batches", "")


def loss_gap(a: float, b: float) -> float:
    """Return the difference of two losses, relative to the larger one.

    The terms of a policy loss cancel; below 0.1 the difference is relative to 0.1.
    """
    return abs(a - b) / max(abs(a), abs(b), 0.1)


def gradient_gap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return the largest difference of a gradient, relative to the largest one of its parameter."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return max(
        float((x - b[name]).abs().max() / max(x.abs().max(), b[name].abs().max()))
        for name, x in a.items()
    )


def gaps(case: Case, world: World) -> tuple[float, float, float | None]:
    """Return the gaps of loss and gradient on a whole batch, and of the gradient in two parts."""
    sides = [
        (ours.measure(case, world, n), theirs.measure(case, world, n))
        for n in ((1, 2) if case.micro else (1,))
    ]
    mine, other = sides[0]
    grads = [gradient_gap(a.gradients, b.gradients) for a, b in sides]
    return loss_gap(mine.loss, other.loss), grads[0], grads[1] if case.micro else None


def lines(seed: int) -> Iterator[str]:
    """Yield the table as Markdown, line by line, and what align lacks."""
    yield "| " + " | ".join(HEAD) + " |"
    yield "|" + "---|" * len(HEAD)
    with new_world(seed) as world:
        for case in CASES:
            loss, gradient, micro = gaps(case, world)
            cells = [
                _ours(case),
                _theirs(case),
                _number(loss),
                _number(gradient),
                "" if micro is None else _number(micro),
                _verdict(case),
            ]
            yield "| " + " | ".join(cells) + " |"
    yield ""
    for what, names in LACKS.items():
        yield f"- TRL only, {what}: {', '.join(f'`{name}`' for name in names)}."


def _number(gap: float) -> str:
    return f"{gap:.2g}" if gap > 1e-4 else f"{gap:.0e}"


def _ours(case: Case) -> str:
    kind = {"cpo": "dpo", "orpo": "dpo", "rloo": "grpo"}.get(case.kind, case.kind)
    options = _flow({n: v for n, v in case.ours.items() if v not in CLIPS})
    return f"{kind} `{options}`" if options else kind


def _flow(options: Mapping[str, Any]) -> str:
    """Return options as YAML in one line."""
    parts = (
        f"{n}: {{{_flow(v)}}}" if isinstance(v, Mapping) else f"{n}: {str(v).lower()}"
        for n, v in options.items()
    )
    return ", ".join(parts)


def _theirs(case: Case) -> str:
    settings = ", ".join(f"{n}={v!r}" for n, v in case.theirs.items() if n not in SAME)
    name = theirs.CLASSES[case.kind][1].__name__.removesuffix("Trainer")
    extra = {"response without a score": case.unscored, "response cut off": case.cut}
    notes = "".join(f"; one {what}" for what, number in extra.items() if number is not None)
    return (f"{name} `{settings}`" if settings else name) + notes


def _verdict(case: Case) -> str:
    if case.differs:
        return f"differ: {case.differs}"
    return f"agree; differ in micro-batches: {case.splits}" if case.splits else "agree"


def main() -> None:
    """Print the table, or put it between the two marks of the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=SEED, help="of the model and the batch")
    parser.add_argument("--write", action="store_true", help="write the table into the page")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    if not args.write:
        for line in lines(args.seed):
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        return
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    table = "\n".join(lines(args.seed))
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
