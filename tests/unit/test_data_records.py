"""Rows and examples are pickled to the bytes that Python's own data classes are pickled to."""

import pickle
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pytest

from align.core.types import Example, PairRow, PromptRow, TokenRow
from align.data.store.columns import record, value_of
from align.data.store.layout import pack_rows

ROW = TokenRow((1, 2, 3), (False, True, True), "a.jsonl:7", 0.5, (0.0, 1.0, 0.25))
OBJECTS = [
    Example("2+2?", "4", columns={"answer": 4}, source="a.jsonl:7", weight=0.5),
    ROW,
    PairRow(ROW, ROW, 1, margin=0.5, tie=True, num_head_tokens=1),
    PromptRow((1, 2), [{"role": "user", "content": "ä"}], {"answer": [1.5, None]}, prefill="<"),
]


@pytest.mark.parametrize("value", OBJECTS)
def test_the_state_of_an_object_is_the_list_of_its_fields(value: Any) -> None:
    assert value.__getstate__() == [getattr(value, field.name) for field in fields(value)]
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(value, protocol)) == value
    assert value_of(record(value)) == value
    with pytest.raises(ValueError, match="shorter"):
        value.__setstate__([1])


def shell(packed: Mapping[str, bytes]) -> bytes:
    assert int.from_bytes(packed["shell_sizes"], "little") == len(packed["shells"])
    return packed["shells"]


@pytest.mark.parametrize("letter", ["a", "-", "\n", "ä", "🚀", "\ud800"])
def test_the_rest_of_a_plain_row_is_what_pickle_writes(letter: str) -> None:
    """Pickle writes texts below and from 256 bytes, and from 64 KiB, in different ways."""
    sizes = [*range(300), 2**16 - 1, 2**16, 2**16 + 9]
    for size in sizes:
        source = letter * size
        plain = TokenRow((1, 2), (False, True), source)
        assert shell(pack_rows([plain])) == pickle.dumps(TokenRow((), (), source), 5)
