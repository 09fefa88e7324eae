"""Convert datasets to another format, mixed and split, and record their provenance."""

import csv
import gzip
import io
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from align.core.artifacts import file_sha256, write_json_atomic
from align.core.errors import DataError
from align.core.types import Example, Text
from align.data.formats.turns import shown, text_of
from align.data.load import Kind, load_examples, source_of
from align.data.reading.sources import data_fingerprint, suffix_of
from align.recipe.schema import DataSpec

Row = dict[str, Any]


def _turns(text: Text | None, role: str) -> list[Row]:
    if not text:
        return []
    if isinstance(text, str):
        return [{"role": role, "content": text}]
    return [dict(turn) for turn in text]


def extra_fields(example: Example) -> Row:
    """Return the fields for tools, template arguments and weights in a row of any format."""
    fields: Row = {"tools": [dict(tool) for tool in example.tools]} if example.tools else {}
    if example.template_kwargs:
        fields["chat_template_kwargs"] = dict(example.template_kwargs)
    if example.label_prob != 1.0:
        fields["label_prob"] = example.label_prob
    return fields if example.weight == 1.0 else {**fields, "weight": example.weight}


def _messages(example: Example) -> Row:
    turns = _turns(example.prompt, "user") + _turns(example.completion, "assistant")
    label = {} if example.label is None else {"label": example.label}
    return {"messages": turns, **label}


def _prompt_completion(example: Example) -> Row:
    prompt, answer = list(_turns(example.prompt, "user")), _turns(example.completion, "assistant")
    if not prompt:  # a conversation: its last turn is the completion
        prompt, answer = answer[:-1], answer[-1:]
        if any(turn["role"] == "assistant" for turn in prompt):
            raise DataError(
                f"{example.source}: only the last of several assistant turns would be trained. "
                "Use --to messages."
            )
    return {"prompt": prompt, "completion": answer}


def _preference(example: Example) -> Row:
    margin = {} if example.margin is None else {"margin": example.margin}
    return {
        "prompt": _turns(example.prompt, "user"),
        "chosen": _turns(example.completion, "assistant"),
        "rejected": _turns(example.rejected, "assistant"),
        **margin,
    }


def _unpaired(example: Example) -> Row:
    return {**_prompt_completion(example), "label": example.label}


def _prompt(example: Example) -> Row:
    return {"prompt": _turns(example.prompt, "user")}


def _sharegpt(example: Example) -> Row:
    names = {"user": "human", "assistant": "gpt"}
    turns = _messages(example)["messages"]
    said = [
        {
            "from": names.get(turn["role"], turn["role"]),
            "value": turn["content"],
            **{key: value for key, value in turn.items() if key not in ("role", "content")},
        }
        for turn in turns
    ]
    return {"conversations": said}


def _alpaca(example: Example) -> Row:
    row = _prompt_completion(example)
    roles = [turn["role"] for turn in row["prompt"]]
    if roles not in (["user"], ["system", "user"]) or len(row["completion"]) != 1:
        raise DataError(
            f"{example.source}: alpaca rows have one question and one response, found {roles}. "
            "Use --to messages."
        )
    _refuse_more(example, "alpaca")
    system = {"system": row["prompt"][0]["content"]} if len(roles) == 2 else {}
    asked, answer = row["prompt"][-1]["content"], row["completion"][0]["content"]
    return {"instruction": asked, "input": "", "output": answer, **system}


def _refuse_more(example: Example, form: str) -> None:
    """Raise if an example contains more than the text of its turns."""
    turns = [*_turns(example.prompt, "user"), *_turns(example.completion, "assistant")]
    more = sorted({key for turn in turns for key in turn} - {"role", "content"})
    if more or example.tools:
        raise DataError(
            f"{example.source}: {form} rows cannot store {', '.join(more or ['tools'])}. "
            "Use --to messages."
        )


def _text(example: Example) -> Row:
    return {"text": text_of(example.completion)}


WRITERS: dict[str, tuple[Kind, Callable[[Example], Row]]] = {
    "messages": ("sft", _messages),
    "prompt_completion": ("sft", _prompt_completion),
    "alpaca": ("sft", _alpaca),
    "sharegpt": ("sft", _sharegpt),
    "preference": ("preference", _preference),
    "unpaired": ("unpaired", _unpaired),
    "prompt": ("prompts", _prompt),
    "text": ("corpus", _text),
}
"""Formats that ``--to`` accepts: the kind of data each needs and the function that writes it."""


def convert_sides(
    specs: Sequence[DataSpec],
    out: Path,
    *,
    heldout: Path | None,
    heldout_frac: float,
    to: str,
    seed: int,
    columns: bool,
) -> list[dict[str, Any]]:
    """Convert as ``convert`` does; ``heldout`` writes each side of the split to its own file."""
    if heldout is None:
        return [convert(specs, out, to=to, seed=seed, columns=columns)]
    notes = []
    for side, path in (("train", out), ("heldout", heldout)):
        split = {"split": side, "heldout_frac": heldout_frac}
        sided = [spec.model_copy(update=split) for spec in specs]
        notes.append(convert(sided, path, to=to, seed=seed, columns=columns))
    return notes


def convert(
    specs: Sequence[DataSpec], out: Path, *, to: str, seed: int, columns: bool
) -> dict[str, Any]:
    """Load data as a stage would; write it to ``out`` and its record to ``<out>.provenance.json``.

    Args:
        specs: inputs, with their weights and the side of the split.
        out: a .jsonl, .jsonl.gz, .json, .csv, .tsv or .parquet file.
        to: a key of WRITERS.
        seed: random seed of the mixture.
        columns: keep the other fields of the rows.

    Returns:
        The provenance: inputs with their sha256 and number of rows, options, and the sha256 and
        number of rows of the output.

    Raises:
        DataError: rows are invalid, or the format cannot store them. Nothing is written.
    """
    if out.exists():
        raise DataError(f"{out}: the file already exists. Choose another name or remove it.")
    # Everything is converted before the first byte is written.
    kind, write = WRITERS[to]
    rows = []
    for example in load_examples(specs, kind=kind, seed=seed):
        kept = {k: v for k, v in example.columns.items() if columns}
        rows.append({**kept, **extra_fields(example), **write(example)})
    _write_whole(rows, out)
    note = {
        "to": to,
        "seed": seed,
        "columns": columns,
        "inputs": [_input_record(spec) for spec in specs],
        "output": {"path": str(out), "sha256": file_sha256(out), "rows": len(rows)},
        "version": metadata.version("align-suite"),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json_atomic(out.with_name(out.name + ".provenance.json"), note)
    return note


def _write_whole(rows: Sequence[Row], out: Path) -> None:
    """Write rows to a file that appears when it is complete.

    Raises:
        DataError: the file cannot be written, or its format cannot store the rows.
    """
    temporary = out.with_name(f".partial-{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _write(rows, temporary, suffix_of(out), packed=out.name.endswith(".gz"))
        temporary.rename(out)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror}. Use another name.") from error
    # pyarrow's errors are subclasses of these.
    except (TypeError, ValueError, NotImplementedError) as error:
        temporary.unlink(missing_ok=True)
        told = error if suffix_of(out) == ".parquet" else _place(rows) or error
        raise DataError(
            f"{out}: the rows have fields that such a file cannot store: {told}. "
            "Change or remove them with 'map', or leave all other fields out with --no-columns"
        ) from error


def _place(rows: Sequence[Row]) -> str | None:
    """Return the first field that cannot be written as JSON, with its value and the reason."""
    for row in rows:
        for name, value in row.items():
            try:
                json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
            except (TypeError, ValueError) as found:
                return f"{name}: {shown(value)}: {found}"
    return None


def _input_record(spec: DataSpec) -> dict[str, Any]:
    settings = spec.model_dump(mode="json", exclude_defaults=True)
    return {**settings, "files": data_fingerprint(source_of(spec)[0])}


def _write(rows: Sequence[Row], path: Path, suffix: str, *, packed: bool) -> None:
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        # By columns: from rows, pyarrow keeps only the fields of the first one.
        table = {}
        for name in _columns(rows):
            try:
                table[name] = pyarrow.array([row.get(name) for row in rows])
            except (TypeError, ValueError, NotImplementedError) as error:
                raise TypeError(f"{name}: {error}") from error
        pyarrow.parquet.write_table(pyarrow.table(table), path)
        return
    if suffix in (".csv", ".tsv"):
        text = _table(rows, "\t" if suffix == ".tsv" else ",", path)
    elif suffix == ".json":
        text = json.dumps(rows, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
    elif suffix == ".jsonl":
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
        text = "".join(f"{line}\n" for line in lines)
    else:
        raise DataError(
            f"{path.name.removeprefix('.partial-')}: this file type cannot be written. Use .jsonl."
        )
    content = text.encode("utf-8")
    # No time stamp: the same rows give the same bytes.
    path.write_bytes(gzip.compress(content, mtime=0) if packed else content)


def _table(rows: Sequence[Row], separator: str, path: Path) -> str:
    """Return rows with single turns as a table of plain text."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, _columns(rows), restval="", delimiter=separator)
    writer.writeheader()
    writer.writerows({name: _cell(value, path) for name, value in row.items()} for row in rows)
    return stream.getvalue()


def _columns(rows: Sequence[Row]) -> list[str]:
    """Return every field that a row has; rows of one file may have different fields."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _cell(value: object, path: Path) -> Any:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        value = value[0].get("content", value)
    if isinstance(value, list | Mapping):
        raise DataError(
            f"{path.name.removeprefix('.partial-')}: a table cannot store {value!r:.60}; use .jsonl"
        )
    return value
