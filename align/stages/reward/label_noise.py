"""Find pairs with likely wrong labels by cross-validation: train on some, score the others."""

import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from align.core import distributed
from align.core.types import PairRow
from align.stages.base import StageContext
from align.training.batch import flatten_pairs
from reward_models.scalar import RewardModel, score_token_ids

log = logging.getLogger(__name__)
NOISE_FILE = "noise.jsonl"


def noise_report(
    pairs: Sequence[PairRow],
    context: StageContext,
    *,
    folds: int,
    train: Callable[[list[PairRow], StageContext], RewardModel],
) -> dict[str, Any]:
    """Write noise.jsonl, most likely errors first, and return its summary for the manifest.

    The pairs are split into ``folds`` parts; all pairs of a prompt are in the same part. Each part
    is scored by a reward model trained on the other parts. ``probability`` =
    sigmoid(rejected - chosen) is that model's probability that the rejected response is better; a
    pair is flagged if it exceeds 0.5. Ties are left out.

    Args:
        pairs: the training pairs. context: context of the stage.
        folds: number of parts, at least 2.
        train: (pairs, context of the part) -> reward model; runs on every rank.
    """
    # A tie has no label that could be wrong, but every part still trains on the ties.
    rows = [pair for pair in pairs if not pair.tie]
    part_of = cut(rows, folds=folds, seed=context.seed)
    ties = [pair for pair in pairs if pair.tie]
    lines: list[dict[str, Any]] = []
    for part in range(folds):
        inside = replace(context, name=f"{context.name}/noise-{part + 1}")
        _empty(inside.out)
        others = [row for row, p in zip(rows, part_of, strict=True) if p != part]
        scored = [row for row, p in zip(rows, part_of, strict=True) if p == part]
        lines += _scored(scored, train([*others, *ties], inside), part=part)
        distributed.barrier()
        if distributed.rank() == 0:
            shutil.rmtree(inside.out)
    # The source breaks ties, so the file does not depend on the order of the parts.
    lines.sort(key=lambda line: (-line["probability"], line["row"]))
    if distributed.rank() == 0:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (context.out / NOISE_FILE).write_text(text, encoding="utf-8")
    flagged = sum(line["flagged"] for line in lines)
    log.info(
        "labels: %d of %d pairs are likely mislabeled, see %s", flagged, len(lines), NOISE_FILE
    )
    return {
        "pairs": len(lines),
        "flagged": flagged,
        "flagged_frac": flagged / max(len(lines), 1),
        "mean_probability": sum(line["probability"] for line in lines) / max(len(lines), 1),
        "folds": folds,
        "file": NOISE_FILE,
    }


def _scored(pairs: Sequence[PairRow], model: RewardModel, *, part: int) -> list[dict[str, Any]]:
    """Return the line of each pair, with the probability that its label is wrong."""
    scores = score_token_ids(model, [row.input_ids for row in flatten_pairs(pairs)])
    lines = []
    for row, chosen, rejected in zip(pairs, scores[0::2], scores[1::2], strict=True):
        # exp overflows in float64 above about 709.
        wrong = 1.0 / (1.0 + math.exp(min(chosen - rejected, 700.0)))
        line = {"row": row.source, "probability": wrong, "part": part + 1, "flagged": wrong > 0.5}
        lines.append(line)
    return lines


def cut(pairs: Sequence[PairRow], *, folds: int, seed: int) -> list[int]:
    """Return the part of each pair, from 0; pairs of one prompt are in the same part.

    Raises:
        ValueError: there are fewer prompts than parts.
    """
    prompts = [pair.chosen.input_ids[: pair.num_prompt_tokens] for pair in pairs]
    names = list(dict.fromkeys(prompts))
    if len(names) < folds:
        raise ValueError(f"noise_folds: {len(names)} prompts cannot be split into {folds} parts")
    # Shuffle the prompts, then deal them out: parts differ by at most one prompt.
    rng = np.random.default_rng(distributed.derive_seed(seed, "noise"))
    place = {names[i]: k % folds for k, i in enumerate(rng.permutation(len(names)).tolist())}
    return [place[prompt] for prompt in prompts]


def _empty(folder: Path) -> None:
    """Empty a part's folder: an interrupted part starts over instead of resuming."""
    distributed.barrier()
    if distributed.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    distributed.barrier()
