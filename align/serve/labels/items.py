"""What is labeled: pairs and responses from files, and from the samples that runs have written."""

import hashlib
import json
import math
import sqlite3
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from align.core.errors import DataError
from align.core.types import Example, Text
from align.data.load import load_examples
from align.data.reading.sources import read_rows
from align.recipe.schema import DataSpec
from align.serve.labels.tables import Kind, Project

SAMPLES_FILE = "samples.jsonl"
_EXAMPLES = {"pairwise": "preference", "thumbs": "sft", "steps": "sft"}
_KNOWN = {"pairwise": "preference", "thumbs": "unpaired", "steps": "steps"}
"""Kind of rows whose answer is known."""
_NEEDED = {
    "preference": "pairs: prompt, response_a and response_b (with --gold: chosen and rejected)",
    "sft": "single responses without a label: prompt and completion",
    "unpaired": "single responses with a label: prompt, completion and label",
    "steps": "responses whose steps have labels: prompt and steps",
}
ANSWERS: Mapping[str, Sequence[str]] = {
    "pairwise": ("a", "b", "tie", "bad"),
    "thumbs": ("good", "bad"),
}
"""Answers of each kind of project but steps, independent of the order shown."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An item before it is in a project.

    Attributes:
        prompt: of the responses.
        responses: two of a pair, one to rate, or the steps of one.
        models: which model wrote each response; empty if nobody knows.
        source: place of origin, for messages and the export.
        gold: known answer, as in the export; None for an item that needs labels.
        margins: reward of the first response minus that of the second, by each reward model.
    """

    prompt: Text
    responses: tuple[Text, ...]
    models: tuple[str, ...] = ()
    source: str = ""
    gold: str | None = None
    margins: tuple[float, ...] = ()


# ---- files


def read_file(path: str, kind: Kind, *, gold: bool = False) -> list[Candidate]:
    """Return the items of a data file in any format of a recipe.

    Pairs may also have ``response_a`` and ``response_b``. Rows may have ``margin``,
    ``reward_margins`` (one of each reward model), ``models`` and ``gold``.

    Args:
        path: a file, folder or hub id.
        kind: of the project.
        gold: the label of each row is its known answer.

    Raises:
        DataError: rows are invalid.
    """
    first = next((row for row, _ in read_rows(path)), None)
    neutral = isinstance(first, dict) and {"response_a", "response_b"} <= first.keys()
    if neutral and gold:
        raise DataError(
            f"{path}: response_a and response_b do not say which one is better. Use chosen and "
            "rejected, or a column 'gold'"
        )
    rename = {"response_a": "chosen", "response_b": "rejected"} if neutral else {}
    wanted: Any = (_KNOWN if gold else _EXAMPLES)[kind]
    try:
        examples = load_examples([DataSpec(path=path, rename=rename)], kind=wanted, seed=0)
    except DataError as error:
        if "but the stage needs" not in str(error):  # a project has no stages
            raise
        place = str(error).partition(": ")[0]
        known = " with --gold" if gold else ""
        raise DataError(
            f"{place}: found a row of another kind; items of kind {kind}{known} are "
            f"{_NEEDED[wanted]}"
        ) from None
    return [_candidate(example, kind, gold=gold) for example in examples]


def _candidate(example: Example, kind: Kind, *, gold: bool) -> Candidate:
    columns, where = example.columns, example.source
    prompt, responses = _parts(example, kind)
    answer = columns.get("gold")
    if gold:
        answer = _known_answer(example, kind)
    elif answer is not None and (kind == "steps" or answer not in ANSWERS[kind]):
        expected = ", ".join(ANSWERS.get(kind, ("import with --gold instead",)))
        raise DataError(f"{where}: gold: found {str(answer)[:40]!r}, expected one of {expected}")
    models = columns.get("models", ())
    if not isinstance(models, list | tuple) or not all(isinstance(m, str) for m in models):
        raise DataError(f"{where}: models: expected a list with the name of each response's model")
    margins = columns.get("reward_margins", () if example.margin is None else (example.margin,))
    if not isinstance(margins, list | tuple) or not all(_is_number(m) for m in margins):
        raise DataError(f"{where}: reward_margins: expected a list of numbers")
    return Candidate(prompt, responses, tuple(models), where, answer, tuple(map(float, margins)))


def _parts(example: Example, kind: Kind) -> tuple[Text, tuple[Text, ...]]:
    prompt, completion = example.prompt, example.completion
    if kind == "pairwise":
        assert completion is not None
        assert example.rejected is not None
        return prompt, (completion, example.rejected)
    if not prompt and isinstance(completion, list):  # a conversation: its last turn is rated
        prompt, completion = completion[:-1], completion[-1:]
    assert completion is not None
    if kind == "thumbs":
        return prompt, (completion,)
    steps = example.columns.get("steps") or _lines(plain_text(completion))
    if not steps:
        raise DataError(f"{example.source}: the response has no steps: no line with text")
    return prompt, tuple(steps)


def _known_answer(example: Example, kind: Kind) -> str:
    if kind == "pairwise":
        return "a"
    if kind == "thumbs":
        return "good" if example.label else "bad"
    return json.dumps(example.columns["step_labels"])


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def plain_text(text: Text) -> str:
    """Return a text or the contents of its turns."""
    return text if isinstance(text, str) else "\n".join(str(turn["content"]) for turn in text)


# ---- samples of runs


@dataclass(frozen=True, slots=True)
class Side:
    """Samples of one model: the folder of a stage, and a model if the stage sampled several."""

    folder: Path
    model: str = ""

    @property
    def name(self) -> str:
        """Return the name under which the model's wins are counted."""
        return self.model or f"{self.folder.parent.name}/{self.folder.name}"


def side_of(text: str, runs: Path) -> Side:
    """Return the side that ``RUN/STAGE`` or ``RUN/STAGE:MODEL`` refers to, or a folder instead.

    Raises:
        DataError: there is no such folder.
    """
    place, _, model = text.partition(":")
    for folder in (runs / place, Path(place)):
        if (folder / SAMPLES_FILE).is_file():
            return Side(folder, model)
    raise DataError(
        f"{text}: no {SAMPLES_FILE} in {runs / place}; expected RUN/STAGE of an evaluate, ppo or "
        "grpo stage"
    )


def sampled_models(folder: Path) -> list[str]:
    """Return the models whose samples a stage has written; one empty name if it names none."""
    names = {str(row.get("model", "")) for row, _ in _sample_rows(folder)}
    return sorted(names)


def from_samples(sides: Sequence[Side], kind: Kind, *, by: Sequence[str] = ()) -> list[Candidate]:
    """Return items made of the samples of one or two models.

    Two models: the n-th sample of each to the same prompt is a pair. One model: its first and
    second sample to a prompt are a pair, then the next two. Equal responses are left out.

    Args:
        sides: one or two models.
        kind: of the project.
        by: names of scores of the samples; their differences are the margins of a pair.

    Raises:
        DataError: there are no samples, no pairs, or a score is missing.
    """
    found = [_by_prompt(side) for side in sides]
    if kind != "pairwise":
        return [
            candidate
            for side, samples in zip(sides, found, strict=True)
            for candidate in _responses(side, samples, kind)
        ]
    # Samples to one prompt: of one model in twos, of two models the n-th ones of both.
    if len(sides) == 1:
        pairs = [
            (rows[i], rows[i + 1]) for rows in found[0].values() for i in range(0, len(rows) - 1, 2)
        ]
    else:
        pairs = [
            pair
            for key, rows in found[0].items()
            for pair in zip(rows, found[1].get(key, ()), strict=False)
        ]
    names = (sides[0].name, sides[-1].name)
    made = [
        _pair(a, b, names=names, by=by)
        for a, b in pairs
        if a[0]["completion"] != b[0]["completion"]
    ]
    if not made:
        raise DataError(
            f"{' and '.join(f'{s.folder}:{s.name}' for s in sides)}: no two different responses "
            "to the same prompt. Sample both models in one evaluate stage, or set its 'samples' "
            "to 2"
        )
    return made


_Sampled = tuple[dict[str, Any], str]


def _responses(
    side: Side, samples: Mapping[Any, Sequence[_Sampled]], kind: Kind
) -> Iterator[Candidate]:
    """Yield an item of each response of a model that is not empty."""
    for rows in samples.values():
        for row, where in rows:
            text = row["completion"]
            if text.strip():
                shown = tuple(_lines(text)) if kind == "steps" else (text,)
                yield Candidate(row["prompt"], shown, (side.name,), where)


def _pair(a: _Sampled, b: _Sampled, *, names: tuple[str, str], by: Sequence[str]) -> Candidate:
    margins = tuple(_score(a, name) - _score(b, name) for name in by)
    responses = (a[0]["completion"], b[0]["completion"])
    return Candidate(a[0]["prompt"], responses, names, f"{a[1]} {b[1]}", None, margins)


def _score(sampled: _Sampled, name: str) -> float:
    row, where = sampled
    scores = row.get("scores")
    known = {**scores, "score": row.get("score")} if isinstance(scores, dict) else row
    value = known.get(name)
    if not _is_number(value):
        has = ", ".join(sorted(n for n, v in known.items() if _is_number(v))) or "none"
        raise DataError(f"{where}: no score '{name}'; this sample has: {has}")
    return float(value)


def _by_prompt(side: Side) -> dict[str, list[_Sampled]]:
    found: dict[str, list[_Sampled]] = {}
    for row, where in _sample_rows(side.folder):
        if side.model in ("", str(row.get("model", ""))):
            found.setdefault(json.dumps(row["prompt"], sort_keys=True), []).append((row, where))
    if not found:
        models = ", ".join(filter(None, sampled_models(side.folder))) or "no named models"
        raise DataError(f"{side.folder}: no samples of '{side.model}'; it has {models}")
    return found


def _sample_rows(folder: Path) -> Iterable[_Sampled]:
    path = folder / SAMPLES_FILE
    if not path.is_file():
        raise DataError(
            f"{folder}: no {SAMPLES_FILE} in it; expected the folder of an evaluate, ppo or grpo "
            "stage, such as runs/quickstart/evaluate"
        )
    for row, where in read_rows(str(path)):
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("completion"), str)
            or not isinstance(row.get("prompt"), str | list)
        ):
            raise DataError(f"{where}: expected a sample with prompt and completion")
        yield row, where


# ---- into a project


def add_items(
    db: sqlite3.Connection, project: Project, candidates: Iterable[Candidate], *, batch: str = ""
) -> tuple[int, int]:
    """Add items to a project; one that is in it already, in either order, is not added again.

    Args:
        db: inside a transaction that may write.
        project: receives the items.
        candidates: the items.
        batch: name under which the project's page shows their progress.

    Returns:
        The numbers of added and of left out items.

    Raises:
        DataError: the queue of the project needs margins that an item lacks, or nothing to label
            is in the responses.
    """
    insert = "INSERT INTO label_batches (project_id, name, created_at) VALUES (?, ?, ?)"
    number = db.execute(insert, (project.id, batch, time.time())).lastrowid
    added = total = 0
    for item in candidates:
        total += 1
        added += db.execute(
            "INSERT INTO label_items (project_id, key, prompt, responses, models, source, gold, "
            "priority, position, open, batch_id) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (project_id, key) DO NOTHING",
            (*_row(project, item), number),
        ).rowcount
    if not added:
        db.execute("DELETE FROM label_batches WHERE id = ?", (number,))
    return added, total - added


def _row(project: Project, item: Candidate) -> tuple[Any, ...]:
    key = _key(item, project.kind)
    if project.kind == "pairwise" and item.responses[0] == item.responses[1]:
        raise DataError(f"{item.source}: both responses are the same; remove this pair")
    return (
        project.id,
        key,
        json.dumps(item.prompt, ensure_ascii=False),
        json.dumps(item.responses, ensure_ascii=False),
        json.dumps(item.models),
        item.source,
        item.gold,
        0.0 if item.gold is not None else _priority(project, item),
        # A random order that does not depend on the order or number of imports.
        int.from_bytes(hashlib.sha256(f"{project.seed}/{key}".encode()).digest()[:6], "big"),
        item.gold is None,
    )


def _key(item: Candidate, kind: Kind) -> str:
    texts = [json.dumps(r, sort_keys=True) for r in item.responses]
    content: Mapping[str, Any] = {
        "prompt": item.prompt,
        "responses": sorted(texts) if kind == "pairwise" else texts,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _priority(project: Project, item: Candidate) -> float:
    """Return the place of an item in the queue; the smallest comes first."""
    if project.queue == "random":
        return 0.0
    needed = 1 if project.queue == "margin" else 2
    if len(item.margins) < needed:
        raise DataError(
            f"{item.source}: the queue of {project.name} is {project.queue}, which needs the "
            f"margins of {'a reward model' if needed == 1 else 'two or more reward models'}; found "
            f"{len(item.margins)}. Add 'margin' or 'reward_margins' to the rows, or name scores of "
            "the samples with --by"
        )
    if project.queue == "margin":
        return abs(statistics.fmean(item.margins))
    return -statistics.pstdev(item.margins)
