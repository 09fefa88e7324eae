"""Stage curate: keep a few good and diverse rows (LIMA, arXiv:2305.11206), and log what is dropped.

The filters run in this order: response length, quality, near-duplicates, diversity. Of two similar
rows the better one is kept; without quality scores, the earlier one.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from align.core.types import Example
from align.data.load import fingerprints, load_examples
from align.data.text.similarity import diverse, near_duplicates, tfidf
from align.preflight.checks import Check, spread
from align.recipe.schema import CurateStage
from align.stages.base import Prepared, StageContext, StageResult
from align.stages.data.checks import (
    NUM_SCORED,
    answers_of,
    row_check,
    score_checks,
    words_check,
)
from align.stages.data.rows import Ledger, answer_text, score_rows, texts_of, to_row, write_data

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Pool:
    """Rows that are still kept, best first, and the ledger of dropped rows."""

    examples: Sequence[Example]
    # A dict keeps its order, and drops a row without a search through all others.
    kept: dict[int, None]
    quality: dict[int, float]
    ledger: Ledger

    def drop(self, i: int, reason: str, **details: object) -> None:
        """Drop row i and record the reason."""
        del self.kept[i]
        self.ledger.add(self.examples[i].source, reason, **details)

    def text(self, i: int) -> str:
        """Return question and responses of row i; two pairs differ if either response differs."""
        return "\n".join(texts_of(self.examples[i]))


def prepare(spec: CurateStage, context: StageContext) -> Prepared:
    """Load the rows of ``spec.data``."""
    examples = load_examples(spec.data, kind=spec.of, seed=context.seed)
    return Prepared(
        train=partial(curate, spec, context, examples), checks=checks(spec, examples, context)
    )


def curate(spec: CurateStage, context: StageContext, examples: Sequence[Example]) -> StageResult:
    """Write the rows that pass every filter, in their original order."""
    pool = Pool(examples, dict.fromkeys(range(len(examples))), {}, Ledger())
    # Filters, cheapest first; those after quality prefer the better of two similar rows.
    by_words(pool, spec)
    by_quality(pool, spec, context)
    by_likeness(pool, spec)
    by_diversity(pool, spec)
    rows = [
        to_row(examples[i]) | ({"quality": pool.quality[i]} if pool.quality else {})
        for i in sorted(pool.kept)
    ]
    count = write_data(context, rows, pool.ledger)
    found = {"rows/in": float(len(examples)), "rows/kept": float(count)}
    found |= {f"left/{reason}": float(n) for reason, n in pool.ledger.counts().items()}
    log.info(
        "%s: kept %d of %d rows; dropped: %s",
        context.name,
        count,
        len(examples),
        pool.ledger.counts(),
    )
    metrics = context.metrics(1)
    metrics.log(1, found)
    metrics.close()
    return StageResult(found, fingerprints(spec.data))


def checks(spec: CurateStage, examples: Sequence[Example], context: StageContext) -> list[Check]:
    """Return the checks that run before filtering: rows, word bounds, scores."""
    few = spread(examples, NUM_SCORED)
    by_name: dict[str, list[float | None]] = {}
    if spec.quality:
        by_name = score_rows(few, answers_of(few), specs=spec.quality, context=context)
    return [
        row_check(examples),
        *words_check(spec, examples),
        *score_checks("quality", by_name),
    ]


def by_words(pool: Pool, spec: CurateStage) -> None:
    """Drop responses that are too short or too long."""
    if spec.words is None:
        return
    most = spec.words.max or math.inf
    for i in list(pool.kept):
        count = len(answer_text(pool.examples[i]).split())
        if not spec.words.min <= count <= most:
            pool.drop(i, "too short" if count < spec.words.min else "too long", words=count)


def by_quality(pool: Pool, spec: CurateStage, context: StageContext) -> None:
    """Score the rows, drop the bad ones and sort the rest, best first."""
    if not spec.quality or not pool.kept:
        return
    examples = [pool.examples[i] for i in pool.kept]
    by_name = score_rows(examples, answers_of(examples), specs=spec.quality, context=context)
    for place, i in enumerate(list(pool.kept)):
        scores = {name: values[place] for name, values in by_name.items()}
        # A sum with a missing score would rank the row too low; drop it with its own reason.
        if None in scores.values():
            pool.drop(i, "quality unknown", scores=scores)
            continue
        parts = [r.weight * (scores[r.label] or 0.0) for r in spec.quality]
        pool.quality[i] = sum(parts)
        if spec.min_quality is not None and pool.quality[i] < spec.min_quality:
            pool.drop(i, "low quality", quality=pool.quality[i])
    ranked = sorted(pool.kept, key=lambda i: -pool.quality[i])
    pool.kept = dict.fromkeys(ranked)
    if spec.keep_frac is not None:
        for i in ranked[math.ceil(spec.keep_frac * len(ranked)) :]:
            pool.drop(i, "lower quality", quality=pool.quality[i])


def by_likeness(pool: Pool, spec: CurateStage) -> None:
    """Drop rows that are near-duplicates of a better one."""
    if spec.near_duplicates is None:
        return
    order = list(pool.kept)
    # Best first: of two near-duplicates the later one in this order is dropped.
    texts = [pool.text(i) for i in order]
    for late, early, value in near_duplicates(texts, threshold=spec.near_duplicates):
        twin = pool.examples[order[early]].source
        pool.drop(order[late], "near-duplicate", of=twin, similarity=round(value, 4))


def by_diversity(pool: Pool, spec: CurateStage) -> None:
    """Keep the best rows that differ from each other, up to ``spec.diversity.rows``."""
    if spec.diversity is None or not pool.kept:
        return
    order = list(pool.kept)
    taken, passed = diverse(
        tfidf([pool.text(i) for i in order]),
        range(len(order)),
        rows=spec.diversity.rows,
        min_distance=spec.diversity.min_distance,
    )
    chosen = {order[place] for place in taken}
    for place, i in enumerate(order):
        if place in passed:
            pool.drop(i, "too like another", distance=round(passed[place], 4))
        # Different enough, but there were enough rows before it.
        elif i not in chosen:
            pool.drop(i, "enough rows")
