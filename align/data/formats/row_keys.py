"""Keys that a row of any format may have besides its own fields; none of them is dropped silently.

A key is either used by the row's format or by this module, or it is a column that is passed to the
rewards. If it contains text or loss settings that nothing would use, the row is rejected.
"""

import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import isfinite, isnan
from typing import Any

from align.core.errors import DataError
from align.core.types import Example, Text, Turn
from align.data.formats.fields import fields_inside, is_about_loss, outer_of
from align.data.formats.left_over import QUESTION_TEXTS, SYSTEM
from align.data.formats.pairs import as_turns
from align.data.formats.tools import parsed, schemas_of
from align.data.formats.turns import (
    guess,
    is_nothing,
    plain_name,
    refuse_missing,
    refuse_switch,
    shown,
    text_of_parts,
)

Row = dict[str, Any]

TOOLS = ("tools", "functions")
REASONING = ("reasoning_content", "thinking", "reasoning")
WEIGHTS = ("weight", "loss_weight", "sample_weight")
TEMPLATE = "chat_template_kwargs"
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_PLACES = (*_MEDIA, "url", "urls", "path", "paths", "file", "files", "bytes", "data", "base64")
_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"ID3", b"OggS", b"fLaC")
"""First bytes of PNG, JPEG, GIF, WebP and WAV (both RIFF), MP3, Ogg and FLAC files."""
_TURNS = ("history", "tool_calls", "function_call", "enable_thinking")
_LOSS = ("loss", "loss_mask", "train", "training", "trainable")
_THOUGHTS = ("cot", "chain_of_thought", "rationale", "thought", "thoughts", "reasoning_trace")
_THOUGHTS += ("complex_cot", "thinking_process", "thought_process", "scratchpad")
"""Other names for the text before an answer; a row does not say how its author rendered it."""
_NUMBERS = ("margin", "label_prob", "score_chosen", "score_rejected")
_INDEX = re.compile(r"|Unnamed: \d+(\.\d+)*|__index_level_\d+__")
"""Names that pandas gives to the numbers of rows, and its readers to columns without a name."""
_OWN_ARGUMENTS = ("messages", "conversation", "tools", "tokenize", "add_generation_prompt")


@dataclass(frozen=True, slots=True)
class Extras:
    """Settings of a row besides the fields of its format.

    ``chat`` is True if the row has any conversation key, even an empty one. This makes sure that
    all rows of a file are rendered alike.
    """

    chat: bool = False
    system: str = ""
    reasoning: str = ""
    tools: Sequence[Mapping[str, Any]] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0


_NO_EXTRAS = Extras()


def without_index(row: Row, *, source: str) -> Row:
    """Return the row without the row numbers that pandas has written beside the columns.

    Raises:
        DataError: a column without a name contains something else.
    """
    found = [key for key in row if _is_index(key)]
    for key in found:
        value = str("" if row[key] is None else row[key]).strip()
        if value and re.fullmatch(r"\d+(\.0)?", value) is None:
            raise DataError(
                f"{source}: a column without a name (read as {key!r}) contains {shown(row[key])}, "
                "which would be dropped; name it in the first line of the file, or remove it",
                code="D045",
            )
    return {key: value for key, value in row.items() if key not in found} if found else row


@cache
def _is_index(key: str) -> bool:
    return _INDEX.fullmatch(key) is not None


def take_extras(row: Row, *, kind: str, used: Collection[str], source: str) -> tuple[Row, Extras]:
    """Return the row without the keys that every format shares, and their values.

    Args:
        row: fields of the row.
        kind: what the stage needs.
        used: keys that the row's format reads.
        source: ``file:line`` for messages.

    Raises:
        DataError: a key with text or loss settings would be dropped, or a key is misspelled.
    """
    if row.keys() <= frozenset(used):
        return row, _NO_EXTRAS
    # Empty fields lose nothing, so they may have any name.
    given = {k: v for k, v in row.items() if k not in used and not is_nothing(v)}
    shared = [*SYSTEM, *TOOLS, TEMPLATE, *(WEIGHTS if kind == "sft" else ())]
    shared += REASONING if kind == "sft" else ()
    _refuse(given, kind=kind, shared=shared, source=source)
    taken = {key: given[key] for key in shared if key in given}
    for key in REASONING:
        refuse_switch(taken.get(key), where=f"{source}: {key}")
    rest = {k: v for k, v in row.items() if k in used or (k not in taken and k not in shared)}
    extras = Extras(
        chat=any(key in row and key not in (*used, *WEIGHTS) for key in shared),
        system=_one_text(taken, SYSTEM, source),
        reasoning=_one_text(taken, REASONING, source),
        tools=_tools(taken, source),
        template_kwargs=_template_kwargs(taken.get(TEMPLATE), source),
        weight=_weight(taken, source),
    )
    return rest, extras


def _refuse(given: Row, *, kind: str, shared: Sequence[str], source: str) -> None:
    away = "or rename it to pass it to the rewards as a column (rename: {{{0}: {0}_column}})"
    for key in given:
        if _is_media(key, given[key]):
            raise DataError(
                f"{source}: {key}: images, video and audio cannot be trained on; remove the row, "
                f"{away.format(key)}",
                code="D056",
            )
        if key in (*_TURNS, *_LOSS) or (
            kind not in ("prompts", "classes")
            and key not in (*shared, *_NUMBERS)
            and (
                key in (*REASONING, *WEIGHTS)
                or plain_name(key) in _THOUGHTS
                or is_about_loss(key, given[key])
                or _is_token_mask(key, given[key])
            )
        ):
            use = "write it into the turns it belongs to"
            if plain_name(key) in _THOUGHTS and kind == "sft":
                use = f"train it as reasoning (rename: {{{key}: reasoning_content}})"
            raise DataError(
                f"{source}: {key}: {shown(given[key])} would be dropped, since {kind} rows of this "
                f"format have no place for it; {use}, {away.format(key)}",
                code="D045",
            )
    if kind not in ("prompts", "classes"):
        columns = {k: v for k, v in given.items() if k not in shared}
        _refuse_inside(columns, given, weighs=kind == "sft", source=source)
    known = (*SYSTEM, *TOOLS, TEMPLATE, *_MEDIA, *_NUMBERS, *WEIGHTS, *_TURNS, *QUESTION_TEXTS)
    known += () if kind == "prompts" else REASONING
    for key in given:
        # A misspelled key would silently become a column that nobody reads.
        near = "" if key in known else guess(key.lower(), known, cutoff=0.85)
        if near:
            raise DataError(
                f"{source}: unknown key '{key}', {shown(given[key])}, would be left out{near} "
                "Rename it if it is another thing",
                code="D041",
            )


def _refuse_inside(columns: Row, given: Row, *, weighs: bool, source: str) -> None:
    """Raise if an object in a column says what is trained, unless ``rename`` reads it.

    Args:
        columns: of the row. given: all its keys that the format does not read.
        weighs: whether a row of this kind may have a weight. source: ``file:line``.
    """
    read = [given[key] for key in WEIGHTS if key in given]
    for key, value in fields_inside(columns):
        if is_about_loss(key.rpartition(".")[2], value) and value not in read:
            outer = outer_of(key)
            # A rename reads a field of an object, but none of a list.
            alone = "[" not in key and not isinstance(value, list)
            use = f"use it as the weight of the row (rename: {{{key}: weight}}), or "
            raise DataError(
                f"{source}: {key}: {shown(value)} would be dropped; "
                f"{use if weighs and alone else ''}set the column aside "
                f"(rename: {{{outer}: {outer}_column}})",
                code="D045",
            )


def _is_media(key: str, value: object) -> bool:
    """Return whether a column is an image or the like, or says where one is (``image_url``)."""
    words = plain_name(key).split("_")
    if key not in _MEDIA and not (words[0] in _MEDIA and words[-1] in _PLACES):
        return isinstance(value, bytes) and value.startswith(_SIGNATURES)
    return not isinstance(value, bool | int | float)


def _is_token_mask(key: str, value: object) -> bool:
    """Return whether a column masks tokens, as ``labels`` of tokenized rows do by -100."""
    return key == "labels" and isinstance(value, list) and -100 in value


def _one_text(taken: Row, names: Sequence[str], source: str) -> str:
    found = [name for name in names if name in taken]
    texts = [text_of_parts(taken[name], where=f"{source}: {name}") for name in found]
    for name, text in zip(found, texts, strict=True):
        refuse_missing(text, where=f"{source}: {name}")
    if len(set(texts)) > 1:
        raise DataError(f"{source}: {' and '.join(found)} differ; keep one", code="D042")
    return texts[0] if texts else ""


def _tools(taken: Row, source: str) -> tuple[Mapping[str, Any], ...]:
    found = [name for name in TOOLS if name in taken]
    if len(found) > 1:
        raise DataError(f"{source}: {' and '.join(found)}: keep one", code="D042")
    return schemas_of(taken[found[0]], where=f"{source}: {found[0]}") if found else ()


def _template_kwargs(value: object, source: str) -> Mapping[str, Any]:
    found = parsed(value)
    if found is None:
        return {}
    own = [key for key in _OWN_ARGUMENTS if isinstance(found, dict) and key in found]
    if not isinstance(found, dict) or own:
        raise DataError(
            f"{source}: {TEMPLATE}: expected an object of arguments of the chat template other "
            f"than {', '.join(_OWN_ARGUMENTS)}, found {shown(found)}",
            code="D045",
        )
    return {key: item for key, item in found.items() if item is not None}


def _weight(taken: Row, source: str) -> float:
    found = [name for name in WEIGHTS if name in taken]
    if len(found) > 1:
        raise DataError(f"{source}: {' and '.join(found)}: keep one", code="D042")
    if not found:
        return 1.0
    value = parsed(taken[found[0]])  # CSV files contain only text
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise DataError(
            f"{source}: {found[0]}: expected a number, found {shown(value)}", code="D058"
        )
    if value < 0:
        raise DataError(f"{source}: {found[0]}: expected at least 0, found {value}", code="D058")
    return float(value)


def apply_extras(example: Example, extras: Extras) -> Example:
    """Return the example with the system turn, tools, reasoning and weight of its row.

    Raises:
        DataError: the conversation begins with a different system turn, or cannot represent them.
    """
    if extras is _NO_EXTRAS or extras == _NO_EXTRAS:
        return example if example.weight == 1.0 else replace(example, weight=1.0)
    says = extras.system or extras.tools or extras.template_kwargs or extras.reasoning
    text_alone = isinstance(example.completion, str) and not example.prompt
    if not extras.chat or (text_alone and not says):
        return replace(example, weight=extras.weight)
    if text_alone:
        raise DataError(
            f"{example.source}: system, tools, reasoning and {TEMPLATE} belong to conversations, "
            "but the row is plain text; remove them, or use rows of messages",
            code="D045",
        )
    prompt: Text = as_turns(example.prompt, "user") if example.prompt else []
    completion = None if example.completion is None else as_turns(example.completion, "assistant")
    rejected = None if example.rejected is None else as_turns(example.rejected, "assistant")
    if extras.system:
        # A whole conversation is in the completion, where its system turn comes first.
        if prompt or completion is None:
            prompt = _with_system(prompt, extras.system, example.source)
        else:
            completion = _with_system(completion, extras.system, example.source)
    if extras.reasoning:
        completion = _with_reasoning(completion or [], extras.reasoning, example.source)
    return replace(
        example,
        prompt=prompt,
        completion=completion,
        rejected=rejected,
        tools=extras.tools or example.tools,
        template_kwargs=extras.template_kwargs,
        weight=extras.weight,
    )


def _with_system(turns: Sequence[Turn], system: str, source: str) -> list[Turn]:
    first = turns[0] if turns else None
    if first is not None and first["role"] in ("system", "developer"):
        if first["content"] == system:
            return list(turns)
        raise DataError(
            f"{source}: the row has one system prompt in a column and a different one as its first "
            "turn. Keep one.",
            code="D042",
        )
    return [Turn(role="system", content=system), *turns]


def _with_reasoning(turns: Sequence[Turn], reasoning: str, source: str) -> list[Turn]:
    said = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if len(said) != 1 or "reasoning_content" in turns[said[0]]:
        raise DataError(
            f"{source}: reasoning in a column, but {len(said)} assistant turns, or one that has "
            "its own reasoning. Write it into the turn (reasoning_content).",
            code="D045",
        )
    found = list(turns)
    found[said[0]] = {**found[said[0]], "reasoning_content": reasoning}
    return found


def clean_columns(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns in the form in which rewards compare them with the text of a response.

    Tables write whole numbers as floats if a column has empty cells, so 4.0 becomes 4 and NaN
    becomes null. Texts are composed (NFC), as models write them.
    """
    return {key: _clean(value) for key, value in columns.items()}


def _clean(value: object) -> Any:
    if isinstance(value, str):
        return value if value.isascii() else unicodedata.normalize("NFC", value)
    if isinstance(value, float):
        if isnan(value):
            return None
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    return value
