"""Convert one row of each data format to examples, with one function per format.

Each function takes ``(row, source)`` and returns the examples in the row. An empty list means a
valid row without an example (such as an UltraFeedback row whose responses all have the same score).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from typing import Any

from align.core.errors import DataError
from align.core.types import Example, Text, Turn
from align.data.formats.pairs import as_turns, explicit_pair, implicit_pair, make_pair
from align.data.formats.questions import (
    ANSWERED,
    objects_field,
    other_fields,
    question_and_answer,
    question_of,
    text_field,
    with_input,
)
from align.data.formats.tools import objects_of, schemas_of
from align.data.formats.turns import is_nothing, not_text, shown, to_text, to_turns
from align.recipe.schema.formats import ASKED, FORMATS, as_boolean

Row = dict[str, Any]

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


_OPENAI_INPUT = ("messages", "tools", "parallel_tool_calls")
_FINAL = re.compile(r"####\s*(.+?)\s*$")
"""Matches the final number in a GSM8K answer."""


def from_messages(row: Row, source: str) -> list[Example]:
    """Read ``messages``; with a ``label`` the last turn is the rated response (unpaired)."""
    turns = to_turns(row["messages"], field="messages", source=source)
    rest = other_fields(row, "messages", *_LABELS)
    if _label_name(row):
        return [_judged(turns[:-1], turns[-1:], row, rest=rest, source=source)]
    return [Example(prompt=[], completion=turns, columns=rest, source=source)]


def from_prompt_completion(row: Row, source: str) -> list[Example]:
    """Read a question (``prompt``) and its answer (``completion``), text or turns."""
    prompt, completion, rest = question_and_answer(row, source)
    return [Example(prompt=prompt, completion=completion, columns=rest, source=source)]


def from_question_answer(row: Row, source: str) -> list[Example]:
    """Read a question and its answer as turns.

    For rewards, the column ``answer`` contains the row's own answer, or the text after ``####`` in
    it, and ``solution`` the whole response.
    """
    prompt, completion, rest = question_and_answer(row, source)
    said = as_turns(completion, "assistant")
    whole = said[-1]["content"]
    final = _FINAL.search(whole)
    answer = {"answer": final.group(1), "solution": whole} if final else {"answer": whole}
    return [Example(as_turns(prompt, "user"), said, columns={**answer, **rest}, source=source)]


def from_question(row: Row, source: str) -> list[Example]:
    """Read a question for sampling; its answer is a column, and may be of any type."""
    answers = [row[name] for name in ANSWERED if name in row]
    if answers and all(isinstance(answer, str) or _is_turns(answer) for answer in answers):
        return from_question_answer(row, source)
    prompt, rest = question_of(row, source)
    return [Example(as_turns(prompt, "user"), columns=rest, source=source)]


def _is_turns(value: object) -> bool:
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, dict) and "content" in item for item in items)


def from_unpaired(row: Row, source: str) -> list[Example]:
    """Read a question, its answer and the binary ``label``; only ``prompt`` may be plain text."""
    prompt, completion, rest = question_and_answer(row, source)
    if "prompt" not in row:
        prompt, completion = as_turns(prompt, "user"), as_turns(completion, "assistant")
    return [_judged(prompt, completion, row, rest=other_fields(rest, *_LABELS), source=source)]


def from_segments(row: Row, source: str) -> list[Example]:
    """Read axolotl's ``input_output`` rows: texts, of which those with label true are trained."""
    segments = objects_field(row, "segments", source)
    labels = [bool(segment.get("label")) for segment in segments]
    texts = [text_field(s, "text", f"{source}: segments[{i}]") for i, s in enumerate(segments)]
    # Prompt and completion are one border: untrained text first, trained text after it.
    start = labels.index(True) if True in labels else len(labels)
    if not all(labels[start:]) or start == len(labels):
        raise DataError(
            f"{source}: segments: untrained text follows trained text, or no text is "
            "trained. Write the row as messages, where every assistant turn is trained.",
            code="D058",
        )
    prompt, completion = "".join(texts[:start]), "".join(texts[start:])
    return [Example(prompt, completion, columns=other_fields(row, "segments"), source=source)]


def from_prompt(row: Row, source: str) -> list[Example]:
    """Read ``prompt`` alone, or the first entry of MT-bench's ``turns``."""
    if "prompt" in row:
        prompt, rest = question_of(row, source)
        return [Example(prompt=prompt, columns=rest, source=source)]
    turns = row["turns"]
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
        raise DataError(
            f"{source}: turns: expected a list of texts, found {shown(turns)}", code="D055"
        )
    prompt = [Turn(role="user", content=turns[0])]
    return [Example(prompt=prompt, columns=dict(row), source=source)]


def from_verl(row: Row, source: str) -> list[Example]:
    """Read verl's rows: ``prompt``, and ``reward_model.ground_truth`` as column ``answer``."""
    prompt = to_text(row["prompt"], field="prompt", source=source)
    model = row["reward_model"]
    truth = model.get("ground_truth") if isinstance(model, dict) else None
    answer = {} if truth is None else {"answer": truth}
    return [
        Example(prompt=prompt, columns={**answer, **other_fields(row, "prompt")}, source=source)
    ]


def from_preference(row: Row, source: str) -> list[Example]:
    """Read ``chosen`` and ``rejected`` with an explicit prompt or with their common prefix."""
    names = ("chosen", "rejected") if "chosen" in row else ("chosen_messages", "rejected_messages")
    chosen, rejected = (to_text(row[name], field=name, source=source) for name in names)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(f"{source}: chosen and rejected: one is text, the other turns", code="D073")
    rest = other_fields(row, *names, "margin")
    if not any(name in row for name in ASKED):
        return [implicit_pair(chosen, rejected, row=row, rest=rest, source=source)]
    if "prompt" not in row and isinstance(chosen, str) and isinstance(rejected, str):
        # As in Alpaca rows, these are a question and its responses, not a text and its
        # continuations.
        chosen, rejected = as_turns(chosen, "assistant"), as_turns(rejected, "assistant")
    prompt, rest = question_of(rest, source)
    return [explicit_pair(prompt, chosen, rejected, row=row, rest=rest, source=source)]


def from_hh(row: Row, source: str) -> list[Example]:
    r"""Read ``chosen`` and ``rejected`` dialogues of "\n\nHuman: ... \n\nAssistant: ..."."""
    sides = [_hh_turns(row[side], field=side, source=source) for side in ("chosen", "rejected")]
    return [
        implicit_pair(
            sides[0],
            sides[1],
            row=row,
            rest=other_fields(row, "chosen", "rejected", "margin"),
            source=source,
        )
    ]


def from_openai_dpo(row: Row, source: str) -> list[Example]:
    """Read OpenAI's preference rows: ``input.messages`` and the two outputs."""
    given = row["input"]
    if not isinstance(given, dict) or "messages" not in given:
        raise DataError(
            f"{source}: input: expected an object with 'messages', {shown(given)}", code="D050"
        )
    names = ("preferred_output", "non_preferred_output")
    chosen, rejected = (to_turns(row[name], field=name, source=source) for name in names)
    prompt = to_turns(given["messages"], field="input.messages", source=source)
    strange = [k for k in given if k not in _OPENAI_INPUT and not is_nothing(given[k])]
    if strange:
        raise DataError(
            f"{source}: input.{strange[0]}: {shown(given[strange[0]])} would be dropped; remove it",
            code="D045",
        )
    rest = other_fields(row, "input", *names)
    pair = make_pair(prompt, chosen, rejected, row=row, rest=rest, source=source)
    tools = schemas_of(given.get("tools"), where=f"{source}: input.tools")
    return [replace(pair, tools=tools)]


def from_alpaca(row: Row, source: str) -> list[Example]:
    """Read ``instruction``, ``input`` (dolly: ``context``), ``history`` and the answer."""
    output = "output" if "output" in row else "response"
    given = {key: row[key] for key in ("input", "context") if not is_nothing(row.get(key))}
    if len(given) > 1:
        raise DataError(
            f"{source}: input and context: one of the two would be dropped; keep one, or "
            "write both into the instruction (templates, or map: FILE.py:NAME)",
            code="D045",
        )
    row = {**other_fields(row, "input", "context"), "input": next(iter(given.values()), None)}
    prompt, rest = question_of(row, source)
    answer = [Turn(role="assistant", content=text_field(row, output, source))]
    rest = other_fields(rest, output, "kto_tag")
    if "kto_tag" in row:
        return [_judged(as_turns(prompt, "user"), answer, row, rest=rest, source=source)]
    return [Example(as_turns(prompt, "user"), answer, columns=rest, source=source)]


def from_sharegpt(row: Row, source: str) -> list[Example]:
    """Read ``conversations`` of from/value turns; chosen/rejected make it a preference row."""
    turns = to_turns(row["conversations"], field="conversations", source=source)
    rest = other_fields(row, "conversations", "chosen", "rejected", "margin", *_LABELS)
    if "chosen" in row and "rejected" in row:
        sides = [to_turns(row[s], field=s, source=source) for s in ("chosen", "rejected")]
        return [make_pair(turns, sides[0], sides[1], row=row, rest=rest, source=source)]
    if _label_name(row):
        return [_judged(turns[:-1], turns[-1:], row, rest=rest, source=source)]
    return [Example(prompt=[], completion=turns, columns=rest, source=source)]


def from_ultrafeedback(row: Row, source: str) -> list[Example]:
    """Read ``instruction`` and scored ``completions``: best against worst, gap as margin.

    A system prompt that both responses were written with becomes a turn. Different ones are
    columns, since a pair has one prompt.
    """
    scored = []
    for i, entry in enumerate(objects_field(row, "completions", source)):
        keys = ("overall_score", "score", "fine-grained_score")
        key = next((k for k in keys if _is_finite(entry.get(k))), None)
        if key is None or not isinstance(entry.get("response"), str):
            raise DataError(
                f"{source}: completions[{i}]: expected 'response' and one of {keys}, "
                f"found {sorted(entry)}",
                code="D040",
            )
        scored.append((float(entry[key]), entry))
    if len(scored) < 2:
        return []
    # The first of equally good (or bad) responses, so the result does not depend on a sort.
    best, worst = max(scored, key=lambda s: s[0]), min(scored, key=lambda s: s[0])
    if best[0] == worst[0]:
        return []
    prompt = [Turn(role="user", content=text_field(row, "instruction", source))]
    chosen, rejected = best[1], worst[1]
    sides = [[Turn(role="assistant", content=side["response"])] for side in (chosen, rejected)]
    rest = other_fields(row, "instruction", "completions")
    systems = [side.get("custom_system_prompt") for side in (chosen, rejected)]
    if systems[0] and systems[0] == systems[1]:
        said = text_field(chosen, "custom_system_prompt", source)
        prompt = [Turn(role="system", content=said), *prompt]
    else:
        named = zip(("chosen_system_prompt", "rejected_system_prompt"), systems, strict=True)
        rest = {**{name: value for name, value in named if value}, **rest}
    margin = {"margin": best[0] - worst[0]}
    return [make_pair(prompt, sides[0], sides[1], row=margin, rest=rest, source=source)]


def from_text(row: Row | str, source: str) -> list[Example]:
    """Read plain text: a paragraph of a .txt file or the field ``text``."""
    text = row if isinstance(row, str) else text_field(row, "text", source)
    rest = {} if isinstance(row, str) else other_fields(row, "text")
    return [Example(prompt="", completion=text, columns=rest, source=source)]


def from_seed_tasks(row: Row, source: str) -> list[Example]:
    """Read self-instruct seed tasks: ``instruction`` and ``instances`` of input and output."""
    rest = other_fields(row, "instruction", "instances")
    examples = []
    for instance in objects_field(row, "instances", source):
        asked = with_input(text_field(row, "instruction", source), instance.get("input"), source)
        answer = [Turn(role="assistant", content=text_field(instance, "output", source))]
        prompt = [Turn(role="user", content=asked)]
        examples.append(Example(prompt, answer, columns=rest, source=source))
    return examples


def from_model_solutions(row: Row, source: str) -> list[Example]:
    """Read nested ``{"solution", "is_correct"}``: the first correct against each incorrect one."""
    tried = {k: v for k, v in row.items() if isinstance(v, dict) and "is_correct" in v}
    texts = {k: text_field(v, "solution", f"{source}: {k}") for k, v in tried.items()}
    right = [texts[k] for k, v in tried.items() if v["is_correct"] is True]
    wrong = [texts[k] for k, v in tried.items() if v["is_correct"] is False]
    prompt = [Turn(role="user", content=text_field(row, "question", source))]
    rest = other_fields(row, "question", *tried)
    if not right:
        return []
    chosen = [Turn(role="assistant", content=right[0])]
    sides = [[Turn(role="assistant", content=text)] for text in dict.fromkeys(wrong)]
    return [make_pair(prompt, chosen, side, row={}, rest=rest, source=source) for side in sides]


def _is_finite(score: object) -> bool:
    return isinstance(score, int | float) and not isinstance(score, bool) and isfinite(score)


def from_rated_question(row: Row, source: str) -> list[Example]:
    """Read a rated row for sampling; only an answer that is rated good is a column."""
    if not FORMATS["question_answer"].most_fields(row):
        return from_unpaired(row, source)
    good = as_boolean(row["label"])
    given = other_fields(row, "label", *(() if good else ANSWERED))
    return [replace(example, label=good) for example in from_question(given, source)]


_LABELS = ("label", "kto_tag")


def _label_name(row: Row) -> str | None:
    return next((name for name in _LABELS if name in row), None)


def _judged(prompt: Text, completion: Text, row: Row, *, rest: Row, source: str) -> Example:
    name = _label_name(row) or "label"
    label = as_boolean(row[name])
    if label is None:
        raise DataError(
            f"{source}: {name}: expected true or false, found {shown(row[name])}. A label that "
            "does not rate the response needs another name (rename: {label: class}).",
            code="D080",
        )
    return Example(prompt, completion, label=label, columns=rest, source=source)


def _hh_turns(text: object, *, field: str, source: str) -> list[Turn]:
    text = text.replace("\r\n", "\n") if isinstance(text, str) else text
    if not isinstance(text, str) or not text.lstrip(" ").startswith("\n\nHuman:"):
        raise DataError(
            f'{source}: {field}: expected text that starts "\\n\\nHuman:", found {shown(text)}',
            code="D055",
        )
    pieces = _HH_TURN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        Turn(role=roles[name], content=said.strip())
        for name, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


FIELDS = ("text", "messages", "prompt")
"""Fields that may contain the text of a row; the first that is present is used."""


def from_classes(row: dict[str, Any], source: str) -> list[Example]:
    """Read ``text``, ``messages`` or ``prompt``, and the class ``label``: text, number or boolean.

    The example's completion is the text (no template is applied) or the conversation; its column
    ``label`` is the name of the class.
    """
    field = next(name for name in FIELDS if name in row)
    text = to_text(row[field], field=field, source=source)
    if "label_prob" in row:
        raise DataError(f"{source}: label_prob has no effect on classes. Remove the column.")
    columns = {key: value for key, value in row.items() if key not in (field, "label")}
    columns["label"] = _class_name(row["label"], source)
    return [Example(prompt="", completion=text, columns=columns, source=source)]


def _class_name(label: object, source: str) -> str:
    """Return the name of a class: text unchanged, a whole number or a boolean as text.

    Raises:
        DataError: the label is something else, or empty.
    """
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, int) or (isinstance(label, str) and label.strip()):
        return str(label)
    raise DataError(
        f"{source}: label: expected the name or the number of a class, found {shown(label)}"
    )


def from_steps(row: Row, source: str) -> list[Example]:
    """Read ``prompt`` and ``steps`` of ``{text, label}``, or TRL's ``completions`` and ``labels``.

    The columns ``steps`` and ``step_labels`` contain the texts and their correctness. A prompt that
    is a string becomes one user turn.
    """
    # Two spellings: one list of objects, or TRL's two parallel lists.
    texts, labels = _listed(row, source) if "steps" in row else _parallel(row, source)
    if not texts:
        raise DataError(f"{source}: steps: the list is empty", code="D050")
    for i, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if not isinstance(text, str) or not text.strip():
            raise not_text(text, where=f"{source}: steps[{i}]")
        if as_boolean(label) is None:
            raise DataError(
                f"{source}: steps[{i}]: label: expected true or false, found {shown(label)}. In "
                "ratings of -1, 0 and 1, 0 is not false: write true or false (map: FILE.py:NAME)",
                code="D080",
            )
    prompt: Text = to_text(row["prompt"], field="prompt", source=source)
    if isinstance(prompt, str):
        prompt = [Turn(role="user", content=prompt)]
    used = ("prompt", "steps", "completions", "labels")
    columns = {key: value for key, value in row.items() if key not in used}
    # For process reward models, which join the steps by a separator of their own.
    columns |= {"steps": texts, "step_labels": [as_boolean(label) for label in labels]}
    answer = [Turn(role="assistant", content="\n".join(texts))]
    return [Example(prompt, answer, columns=columns, source=source)]


def _listed(row: Row, source: str) -> tuple[list[Any], list[Any]]:
    steps = objects_of(row["steps"], ("text", "label"), where=f"{source}: steps")
    if not isinstance(steps, list) or not all(isinstance(s, Mapping) for s in steps):
        raise DataError(
            f"{source}: steps: expected a list of {{text, label}}, found {shown(steps)}",
            code="D050",
        )
    return [s.get("text") for s in steps], [s.get("label") for s in steps]


def _parallel(row: Row, source: str) -> tuple[list[Any], list[Any]]:
    texts, labels = row["completions"], row["labels"]
    if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
        raise DataError(
            f"{source}: completions and labels: expected two lists of equal length", code="D050"
        )
    return texts, labels


def from_labeled_solutions(row: Row, source: str) -> list[Example]:
    """Read nested ``{"solution", "is_correct"}``: each attempt, with its correctness as label."""
    tried = {k: v for k, v in row.items() if isinstance(v, dict) and "is_correct" in v}
    rest = {key: value for key, value in row.items() if key not in tried and key != "question"}
    examples = []
    seen: set[str] = set()
    for name, attempt in tried.items():
        text, good = attempt.get("solution"), attempt["is_correct"]
        if not isinstance(text, str) or not isinstance(good, bool):
            raise DataError(f"{source}: {name}: expected a solution and true or false", code="D080")
        # The same solution under two names would count twice.
        if text in seen:
            continue
        seen.add(text)
        prompt = [Turn(role="user", content=str(row["question"]))]
        answer = [Turn(role="assistant", content=text)]
        examples.append(Example(prompt, answer, label=good, columns=rest, source=source))
    return examples
