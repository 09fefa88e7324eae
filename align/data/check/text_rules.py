"""Find text that should not be trained on: control tokens, secrets, addresses."""

import re
from collections.abc import Iterator

from align.data.formats.faults import Fault

_HINTS = (
    "@",
    "<|",
    "[INST]",
    "[/INST]",
    "_of_turn>",
    "<<SYS>>",
    "sk-",
    "AKIA",
    "gh",
    "hf_",
    "xox",
    "AIza",
    "PRIVATE KEY",
    "eyJ",
    "{{",
)
"""Text with none of these and no bidirectional controls is not checked further."""

_CONTROL_TOKENS = re.compile(
    r"<\|(?:endoftext|im_start|im_end|eot_id|eom_id|start_header_id|end_header_id|begin_of_text"
    r"|end_of_text|user|assistant|system|end|start|message|return|call)\|>"
    r"|\[/?INST\]|<(?:start|end)_of_turn>|<<SYS>>"
)
_SECRETS = re.compile(
    r"\b(?:AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{40,}|hf_[A-Za-z0-9]{30,}"
    r"|sk-(?:proj-|ant-)?[A-Za-z0-9_-]{24,}|xox[abprs]-[A-Za-z0-9-]{20,}|AIza[\w-]{35}"
    r"|eyJ[\w-]{12,}\.eyJ[\w-]{12,}\.[\w-]{12,})"
    r"|-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----\s*[A-Za-z0-9+/=]{16}"
)
_MIN_DISTINCT = 10
"""Distinct characters of a real key; invented keys repeat a few (xxxx, 0000, EXAMPLE)."""
_EMAIL = re.compile(r"(?<![\w.+/:-])[A-Za-z0-9][\w.+-]*@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,}\b")
_MADE_UP = re.compile(
    r"@(?:[\w-]+\.)*(?:example|test|invalid|localhost|domain|email|mail|company|your\w*|my\w*|site"
    r"|website|sample|abc|xyz|foo|bar|demo|acme)\.\w+$"
    r"|\.(?:example|test|invalid)$|^(?:your|user|name|you|john|jane|jdoe|foo|test|someone)[\w.]*@",
    re.IGNORECASE,
)
_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")
_PLACEHOLDER = re.compile(r"\{\{\s*[A-Za-z_]+\s*\}\}")


def text_faults(text: str, *, special: re.Pattern[str] | None) -> Iterator[Fault]:
    """Yield unwanted content in a text, at most one finding of each code.

    Args:
        text: all texts of a row.
        special: pattern of the tokenizer's special tokens; None looks for the control tokens of
            well-known chat formats.
    """
    # With a tokenizer, exactly its special tokens matter.
    if special is not None:
        if found := special.search(text):
            yield "D112", f"the tokenizer's special token {found.group()!r}"
    # Most rows contain none of the hints and skip the slower patterns.
    elif not any(hint in text for hint in _HINTS):
        if not text.isascii():
            yield from _bidi_faults(text)
        return
    elif found := _CONTROL_TOKENS.search(text):
        yield "D112", f"{found.group()!r}, a control token of well-known chat formats"
    yield from _bidi_faults(text)
    for found in _SECRETS.finditer(text):
        key = found.group()
        if len(set(key)) >= _MIN_DISTINCT and "EXAMPLE" not in key.upper():
            yield "D120", f"{key[:8]}... of {len(key)} characters, in the form of a key"
            break
    for found in _EMAIL.finditer(text):
        if not _MADE_UP.search(found.group()):
            yield "D121", f"{found.group()}"
            break
    if found := _PLACEHOLDER.search(text):
        yield "D122", f"{found.group()}"


def _bidi_faults(text: str) -> Iterator[Fault]:
    if found := _BIDI.search(text):
        yield "D024", f"U+{ord(found.group()):04X} after {text[: found.start()][-20:]!r}"
