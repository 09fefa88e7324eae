"""Search in the responses that a run has sampled, in training and in evaluation."""

from collections.abc import Iterator
from dataclasses import dataclass

from align.core.text import visible
from align.report.answers import clip
from align.report.read import Row, RunRecord

PAGE = 25


@dataclass(frozen=True, slots=True)
class Found:
    """A page of samples.

    Attributes:
        samples: texts of the samples, the newest first.
        count: number of all that were found.
        next: number of the page after this one; None for the last one.
    """

    samples: list[dict[str, str]]
    count: int
    next: int | None


def search(run: RunRecord, *, words: str, stage: str, page: int) -> Found:
    """Return the samples that contain all words, of one stage or of all.

    Args:
        run: the run.
        words: separated by spaces; upper and lower case are the same.
        stage: name of a stage; empty for all.
        page: number of the page, from 0.
    """
    wanted = words.lower().split()
    found = [
        (name, row)
        for name, row in _rows(run)
        if (not stage or stage == name) and all(word in _text(name, row) for word in wanted)
    ]
    start = max(0, page) * PAGE
    part = found[start : start + PAGE]
    more = page + 1 if start + PAGE < len(found) else None
    return Found([_shown(name, row) for name, row in part], len(found), more)


def _rows(run: RunRecord) -> Iterator[tuple[str, Row]]:
    for stage in reversed(run.stages):
        for row in reversed(stage.samples):
            yield stage.name, row


def _text(stage: str, row: Row) -> str:
    parts = (stage, row.get("model", ""), row.get("prompt", ""), row.get("completion", ""))
    return "\n".join(map(str, parts)).lower()


def _shown(stage: str, row: Row) -> dict[str, str]:
    where = [stage, *(f"{key} {row[key]}" for key in ("step", "model", "task") if key in row)]
    score = row.get("score")
    if isinstance(score, int | float):
        where.append(f"score {score:.4g}")
    return {
        "where": visible(", ".join(where)),
        "prompt": visible(clip(row.get("prompt"))),
        "completion": visible(clip(row.get("completion"))),
    }
