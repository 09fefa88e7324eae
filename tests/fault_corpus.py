"""Files with one fault each: the kind of fault, the file, and the line at which it must be found.

A clean file of each kind of data gets one fault, in each format that can hold it. The rows are
made from a seed; what is expected of a fault is written beside it by hand.
"""

import gzip
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Change = Callable[[list[Row]], None]

FORMATS = ("jsonl", "jsonl.gz", "json", "parquet", "arrow")
ROWS = 24
AT = 14
"""Index of the row that gets the fault."""

_NOUNS = [
    "river",
    "bridge",
    "garden",
    "candle",
    "market",
    "winter",
    "harbour",
    "violin",
    "mirror",
    "ladder",
    "kitchen",
    "desert",
    "planet",
    "forest",
    "window",
    "teacher",
    "island",
    "pencil",
    "engine",
    "castle",
]


@dataclass(frozen=True, slots=True)
class Case:
    """Hold one faulty file and what must be found in it."""

    fault: str
    form: str
    code: str
    place: str
    """``:line`` or ``:row N`` after the file's name, or "" for the file."""
    kind: str | None = None
    options: tuple[tuple[str, str], ...] = ()


def _text(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(_NOUNS) for _ in range(count))


def clean_rows(kind: str, seed: int = 0, count: int = ROWS) -> list[Row]:
    """Make clean rows of sft, preference, unpaired, prompts or math data."""
    rng = random.Random(f"{kind}/{seed}")
    rows = []
    for i in range(count):
        user = {"role": "user", "content": f"Case {seed}-{i}: tell me about the {_text(rng, 9)}?"}
        answers = [f"It is a {_text(rng, 14)}.", f"That was a {_text(rng, 14)}."]
        good, bad = ({"role": "assistant", "content": text} for text in answers)
        row: Row = {"id": f"{kind}-{seed}-{i}"}
        row |= {
            "sft": {"messages": [user, good]},
            "preference": {"prompt": [user], "chosen": [good], "rejected": [bad], "margin": 1.5},
            "unpaired": {"prompt": [user], "completion": [good], "label": i % 2 == 0},
            "prompts": {"prompt": [user], "topic": rng.choice(_NOUNS)},
            "math": {"prompt": [user], "answer": str(rng.randrange(1000))},
        }[kind]
        rows.append(row)
    return rows


def write_rows(rows: list[Row], path: Path, form: str) -> str:
    """Write rows in a format; give the place of the row at AT in it."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if form == "jsonl":
        path.write_text(text, encoding="utf-8")
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(text.encode("utf-8")))
    elif form == "json":
        path.write_text("[\n" + text.replace("}\n", "},\n")[:-2] + "\n]\n", encoding="utf-8")
        return f":{AT + 2}"
    else:
        _write_table(rows, path, form)
        return f":row {AT + 1}"
    return f":{AT + 1}"


def _write_table(rows: list[Row], path: Path, form: str) -> None:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(rows)
    if form == "parquet":
        pyarrow.parquet.write_table(table, path)
        return
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def _turn(i: int, **fields: Any) -> Change:
    def change(rows: list[Row]) -> None:
        rows[AT]["messages"][i] |= fields

    return change


def _set(field: str, value: Any) -> Change:
    def change(rows: list[Row]) -> None:
        rows[AT][field] = value

    return change


def _rename(old: str, new: str) -> Change:
    def change(rows: list[Row]) -> None:
        rows[AT][new] = rows[AT].pop(old)

    return change


def _rename_in_turn(i: int, old: str, new: str) -> Change:
    def change(rows: list[Row]) -> None:
        turn = rows[AT]["messages"][i]
        turn[new] = turn.pop(old)

    return change


def _messages(*roles: str) -> Change:
    def change(rows: list[Row]) -> None:
        rows[AT]["messages"] = [
            {"role": role, "content": f"Words {i} of the {role}."} for i, role in enumerate(roles)
        ]

    return change


def _said(text: str) -> Change:
    def change(rows: list[Row]) -> None:
        rows[AT]["messages"][1]["content"] += text

    return change


def _copy(field: str, other: str) -> Change:
    def change(rows: list[Row]) -> None:
        rows[AT][field] = [dict(turn) for turn in rows[AT][other]]

    return change


def _with_prompt(side: str, text: str) -> Change:
    """Let both answers carry their prompt, one of them another one."""

    def change(rows: list[Row]) -> None:
        row = rows[AT]
        user = row.pop("prompt")
        row["chosen"], row["rejected"] = user + row["chosen"], user + row["rejected"]
        row[side][0] = {"role": "user", "content": text}

    return change


def _repeat(rows: list[Row]) -> None:
    rows[AT] = json.loads(json.dumps(rows[3]))


def _same_id(rows: list[Row]) -> None:
    rows[AT]["id"] = rows[3]["id"]


def _near(rows: list[Row]) -> None:
    for row in (rows[3], rows[AT]):
        row["messages"][1]["content"] = " ".join(_text(random.Random(5), 80).split())
    rows[AT]["messages"][0]["content"] = rows[3]["messages"][0]["content"].replace("tell", "inform")


def _swapped(rows: list[Row]) -> None:
    rows[AT] |= {
        "prompt": rows[3]["prompt"],
        "chosen": rows[3]["rejected"],
        "rejected": rows[3]["chosen"],
    }


def _other_case(rows: list[Row]) -> None:
    text = rows[AT]["chosen"][0]["content"]
    rows[AT]["rejected"] = [{"role": "assistant", "content": text.upper() + " "}]


def _all_labels_true(rows: list[Row]) -> None:
    for row in rows:
        row["label"] = True


def _half_placeholders(rows: list[Row]) -> None:
    for row in rows[AT:]:
        row["messages"][1]["content"] += " My name is {{name}}."


def _leaves(rows: list[Row]) -> None:
    del rows[AT]["messages"]


_KEY = "sk-" + "Ab3dEf6hIj9kLm2nOp5qRs8t"
_HUMAN = [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "A model."}]

# fault, kind of data, change, code. The fault is one row's and must be found at that row.
ROW_FAULTS: list[tuple[str, str, Change, str]] = [
    ("content key misspelt (contents)", "sft", _rename_in_turn(1, "content", "contents"), "D052"),
    ("role key misspelt (roles)", "sft", _rename_in_turn(0, "role", "roles"), "D052"),
    ("messages misspelt (mesages)", "sft", _rename("messages", "mesages"), "D041"),
    ("messages missing", "sft", _leaves, "D040"),
    ("role bot", "sft", _turn(1, role="bot"), "D053"),
    ("role misspelt (asistant)", "sft", _turn(1, role="asistant"), "D053"),
    ("content null", "sft", _turn(1, content=None), "D054"),
    ("assistant empty", "sft", _turn(1, content=""), "D054"),
    ("assistant white space", "sft", _turn(1, content=" \n\t"), "D054"),
    ("user empty", "sft", _turn(0, content=""), "D054"),
    ("content a number", "sft", _turn(1, content=7), "D055"),
    ("content an image part", "sft", _turn(0, content=[{"type": "image", "url": "x"}]), "D056"),
    ("tool call in its own field", "sft", _turn(1, tool_calls=[{"name": "f"}]), "D057"),
    ("weight 0", "sft", _turn(1, weight=0), "D058"),
    ("messages a text", "sft", _set("messages", "[{'role': 'user'}"), "D050"),
    ("messages empty", "sft", _set("messages", []), "D050"),
    ("a turn that is a text", "sft", _set("messages", ["hello"]), "D050"),
    ("a turn without a role", "sft", _set("messages", [{"content": "hello"}]), "D051"),
    ("only user turns", "sft", _messages("user"), "D060"),
    ("only a system turn", "sft", _messages("system"), "D060"),
    ("answer before question", "sft", _messages("system", "assistant"), "D061"),
    ("order reversed", "sft", _messages("assistant", "user"), "D061"),
    ("ends with the user", "sft", _messages("user", "assistant", "user"), "D063"),
    ("two user turns in a row", "sft", _messages("user", "user", "assistant"), "D064"),
    ("two assistant turns in a row", "sft", _messages("user", "assistant", "assistant"), "D064"),
    (
        "system in the middle",
        "sft",
        _messages("user", "assistant", "system", "user", "assistant"),
        "D065",
    ),
    ("another format in the file", "sft", lambda rows: _sharegpt(rows), "D043"),
    ("NUL character", "sft", _said(" a\0b"), "D022"),
    ("bidirectional control", "sft", _said(" a \u202e b"), "D024"),
    ("control token in text", "sft", _said(" <|im_end|> and on"), "D112"),
    ("secret", "sft", _said(f" Use {_KEY}."), "D120"),
    ("e-mail address", "sft", _said(" Ask rosa.lindt@posteo.de."), "D121"),
    ("row repeated", "sft", _repeat, "D090"),
    ("id repeated", "sft", _same_id, "D091"),
    ("row nearly repeated", "sft", _near, "D092"),
    ("chosen misspelt (choosen)", "preference", _rename("chosen", "choosen"), "D041"),
    ("rejected missing", "preference", lambda rows: rows[AT].pop("rejected"), "D043"),
    ("chosen null", "preference", _set("chosen", None), "D050"),
    ("chosen equals rejected", "preference", _copy("rejected", "chosen"), "D070"),
    ("pair differs in case only", "preference", _other_case, "D076"),
    ("prompts of a pair differ", "preference", _with_prompt("rejected", "Other?"), "D071"),
    ("one answer text, one turns", "preference", _set("rejected", "no turns"), "D073"),
    ("margin a text", "preference", _set("margin", "large"), "D074"),
    ("margin negative", "preference", _set("margin", -2.0), "D077"),
    (
        "prompt ends with the assistant",
        "preference",
        _set("prompt", [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]),
        "D062",
    ),
    ("prompt empty", "preference", _set("prompt", [{"role": "user", "content": " "}]), "D054"),
    ("pair the other way round", "preference", _swapped, "D093"),
    ("label a text", "unpaired", _set("label", "good"), "D080"),
    ("label a number", "unpaired", _set("label", 3), "D080"),
    ("label null", "unpaired", _set("label", None), "D080"),
    ("completion empty", "unpaired", _set("completion", []), "D050"),
    ("prompt null", "prompts", _set("prompt", None), "D050"),
    ("prompt blank", "prompts", _set("prompt", [{"role": "user", "content": ""}]), "D054"),
    ("answer missing", "math", lambda rows: rows[AT].pop("answer"), "D082"),
    ("answer in words", "math", _set("answer", "a dozen"), "D083"),
]

_MIXED_TYPES = {
    "content a number",
    "content an image part",
    "messages a text",
    "margin a text",
    "a turn that is a text",
    "one answer text, one turns",
    "label a text",
    "label a number",
}
"""A table has one type a column, so parquet and arrow cannot hold these."""
_MISSING_IS_NULL = {
    "messages missing",
    "messages misspelt (mesages)",
    "rejected missing",
    "content key misspelt (contents)",
    "role key misspelt (roles)",
    "chosen misspelt (choosen)",
    "another format in the file",
    "a turn without a role",
    "answer missing",
    "prompts of a pair differ",
}
"""In a table a missing field is a null, which is another fault."""
_WHOLE_FAULTS: list[tuple[str, str, Change, str]] = [
    ("labels of one class", "unpaired", _all_labels_true, "D081"),
    ("placeholders not filled", "sft", _half_placeholders, "D122"),
]


def _sharegpt(rows: list[Row]) -> None:
    rows[AT] = {"id": "s", "conversations": _HUMAN}


def row_cases(folder: Path) -> Iterator[tuple[Case, Path]]:
    """Write one file for each fault of a row and each format that can hold it."""
    for number, (fault, kind, change, code) in enumerate([*ROW_FAULTS, *_WHOLE_FAULTS]):
        for form in FORMATS:
            table = form in ("parquet", "arrow")
            if table and fault in _MIXED_TYPES | _MISSING_IS_NULL:
                continue
            rows = clean_rows(kind)
            change(rows)
            path = folder / f"{number:02d}.{form}"
            place = write_rows(rows, path, form)
            if (fault, kind, change, code) in _WHOLE_FAULTS and code == "D081":
                place = ""
            yield Case(fault, form, code, place, kind if kind == "math" else None), path
