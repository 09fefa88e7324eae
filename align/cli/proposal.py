"""Propose a recipe for a model and data, by the format of the first rows."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from align.core.artifacts import artifact_kind, find_model
from align.core.errors import DataError, RecipeError
from align.recipe.reference import SCHEMA_FILE
from align.recipe.schema.formats import FORMATS, Kind

ROWS = 50
"""Rows of each source that are looked at."""
STAGE_OF = {
    "preference": "dpo",
    "unpaired": "kto",
    "sft": "sft",
    "prompts": "grpo",
    "steps": "reward",
    "classes": "classify",
    "corpus": "sft",
}
"""The stage for rows of each kind; the first kind that a format gives decides."""
ORDER = ("sft", "reward", "classify", "dpo", "kto", "grpo")
ANSWERS = ("answer", "solution")
"""Columns with the expected answer of a prompt."""
KINDS: dict[str, Kind] = {"sft": "sft", "dpo": "preference", "kto": "unpaired", "grpo": "prompts"}
"""What the rows are read as, for the stages that take plain texts and conversations."""
STRINGS = (
    "# strings: chat renders plain prompts and responses as turns of the model's chat template; "
    "text uses them as they are."
)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A recipe as text, and what was found in each source, one line each."""

    text: str
    found: list[str]


def propose(
    model: str, sources: Sequence[str], *, name: str, tuning: str, runs: Path = Path("runs")
) -> Proposal:
    """Return a recipe with one stage for each source, which start from each other in order.

    Args:
        model: folder or hub id of a transformers model, or RUN/STAGE, which needs no base stage.
        sources: files, folders or hub ids.
        name: name of the run.
        tuning: method of the training stages.
        runs: folder in which RUN/STAGE is looked up.

    Raises:
        DataError: a source cannot be read, or no format fits its rows.
        ArtifactError: the model is not there.
        RecipeError: the rows do not tell how to train on them.
    """
    place = find_model(model, runs)
    is_stage = artifact_kind(place) is not None
    stages: dict[str, Any] = {} if is_stage else {"base": _base(place, tuning=tuning)}
    looked = [_look(source) for source in sources]
    if not looked:
        raise RecipeError("--data: expected at least one file or hub id")
    before = model if is_stage else "base"
    # Rows of plain text are for the template of an instruct model, and beside conversations.
    chat = _has_template(place) or any(seen.said == "turns" for seen in looked)
    for kind in sorted({seen.stage for seen in looked}, key=ORDER.index):
        mine = [seen for seen in looked if seen.stage == kind]
        stages[kind] = {
            "kind": kind,
            "init": before,
            **_stage(kind, mine, tuning=tuning, chat=chat),
        }
        before = kind if kind in ("sft", "dpo", "kto", "grpo") else before
    found = [f"{seen.source}: {seen.form}, for a {seen.stage} stage" for seen in looked]
    head = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        f"# Purpose: {model} trained on {', '.join(sources)}.",
        "# Launch: align run, after a look at rows and model with align check --deep",
        *([STRINGS] if any(seen.said == "texts" for seen in looked) else []),
    ]
    body = yaml.safe_dump({"name": name, "stages": stages}, sort_keys=False, allow_unicode=True)
    return Proposal("\n".join(" ".join(line.split()) for line in head) + "\n" + body, found)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the first rows of a source tell."""

    source: str
    form: str
    stage: str
    splits: list[str]
    said: str
    """Whether prompts and responses are ``texts`` or ``turns``; empty where there is no prompt."""
    answers: dict[str, bool]
    """Columns with an answer in every row, and whether all of them have a digit."""


def _look(source: str) -> _Seen:
    from align.data.formats.detect import detect
    from align.data.reading.sources import own_splits, read_rows

    splits = own_splits(source)
    first = f"{source}:{'train' if 'train' in splits else splits[0]}" if splits else source
    forms: dict[str, str] = {}
    rows = list(islice(read_rows(first), ROWS))
    for row, place in rows:
        forms.setdefault(detect(row, kind="sft", source=place), place)
    if len(forms) > 1:
        told = " and ".join(f"{form} ({place})" for form, place in forms.items())
        raise RecipeError(f"{source}: rows of two formats: {told}; split the file")
    if not forms:
        raise RecipeError(f"{source}: no rows in it")
    form = next(iter(forms))
    mappings = [row for row, _ in rows if isinstance(row, dict)]
    answers = {
        name: all(any(c.isdigit() for c in str(row[name])) for row in mappings)
        for name in ANSWERS
        if len(mappings) == len(rows) and all(row.get(name) for row in mappings)
    }
    stage = _stage_of(form, {name for row in mappings for name in row})
    return _Seen(source, form, stage, splits, _said(rows, stage), answers)


def _said(rows: Sequence[tuple[Any, str]], stage: str) -> str:
    """Return whether the first valid row has texts or turns; empty where there is no prompt."""
    from align.data.formats.detect import to_examples

    for row, place in rows if stage in KINDS else ():
        try:
            made = to_examples(row, kind=KINDS[stage], format="auto", source=place)
        except DataError:  # align check --deep lists them
            continue
        for example in made:
            if isinstance(example.prompt, str) and example.prompt:
                return "texts"
            sides = (example.prompt, example.completion)
            return "" if all(isinstance(side, str) for side in sides) else "turns"
    return ""


def _stage_of(form: str, columns: set[str]) -> str:
    """Return the stage for rows of a format; further columns tell what conversations are for."""
    gives = FORMATS[form].gives
    if "preference" in gives and {"chosen", "rejected"} <= columns:
        return "dpo"
    if "unpaired" in gives and columns & {"label", "kto_tag"}:
        return "kto"
    return STAGE_OF[gives[0]]


def _base(model: Path, *, tuning: str) -> dict[str, Any]:
    keys = {"kind": "base", "path": str(model)}
    return keys | (_tokenizer(model, tuning=tuning) if model.exists() else {})


def _saved_tokenizer(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _has_template(place: Path) -> bool:
    """Return whether a model's folder, or that of a stage, has a chat template."""
    folder = place / "model" if (place / "model").is_dir() else place
    saved = _saved_tokenizer(folder)
    return bool(saved.get("chat_template")) or (folder / "chat_template.jinja").is_file()


def _tokenizer(folder: Path, *, tuning: str) -> dict[str, Any]:
    """Return the settings that a saved tokenizer lacks."""
    saved = _saved_tokenizer(folder)
    if not saved:
        return {}
    lacking = {}
    if not saved.get("pad_token") and isinstance(saved.get("eos_token"), str):
        lacking["pad_token"] = saved["eos_token"]
    if not _has_template(folder):
        # chatml adds tokens, whose rows are saved beside an adapter; plain adds none.
        lacking["chat_template"] = "chatml" if tuning == "full" else "plain"
    return {"tokenizer": lacking} if lacking else {}


def _stage(kind: str, seen: Sequence[_Seen], *, tuning: str, chat: bool) -> dict[str, Any]:
    train = [_side(one, heldout=False, chat=chat) for one in seen]
    method: dict[str, Any] = {} if tuning == "full" else {"tuning": {"method": tuning}}
    if kind == "grpo":
        answers = {"answer": True} if seen[0].form == "verl" else seen[0].answers
        column = next(iter(answers), None)
        if column is None:
            raise RecipeError(
                f"{seen[0].source}: prompts without an expected answer ({', '.join(ANSWERS)}); "
                "write a grpo stage with a reward of your own: docs/own-code.md"
            )
        kind_of_reward = "math" if answers[column] else "exact_match"
        rewards = [{"kind": kind_of_reward, "column": column}]
        return {"prompts": train, "rewards": rewards, "steps": 100, **method}
    steps = {"supervision": "steps"} if kind == "reward" else {}
    heldout = [_side(one, heldout=True, chat=chat) for one in seen]
    return {**steps, "data": train, "heldout": heldout, "eval_every": 50, **method}


def _side(seen: _Seen, *, heldout: bool, chat: bool) -> dict[str, Any]:
    """Return the source of one side: the data's own splits, or a split by the prompts."""
    strings = {"strings": "chat" if chat else "text"} if seen.said == "texts" else {}
    if not seen.splits:
        return {"path": seen.source, "split": "heldout" if heldout else "train", **strings}
    train = "train" if "train" in seen.splits else seen.splits[0]
    own = next((name for name in ("validation", "test") if name in seen.splits), None)
    if own is None or own == train:
        path = f"{seen.source}:{train}"
        return {"path": path, "split": "heldout" if heldout else "train", **strings}
    return {"path": seen.source, "split": own if heldout else train, **strings}
