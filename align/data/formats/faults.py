"""Find what makes an example unfit for training, for the stages and ``align data check``."""

from collections.abc import Iterator, Sequence

from align.core.errors import DataError
from align.core.types import Example, Text, Turn
from align.data.formats.missing import is_blank, is_missing, may_be_missing

Fault = tuple[str, str]
"""Code (an entry of align/data/check/codes.yaml) and what was found."""


def check_example(example: Example, *, kind: str) -> None:
    """Check that an example can be trained on.

    Raises:
        DataError: the first fault of the example.
    """
    for code, found in faults(example, kind=kind):
        raise DataError(f"{example.source}: {found}", code=code)


def faults(example: Example, *, kind: str) -> Iterator[Fault]:
    """Yield all faults of an example, those of its texts first.

    Faults are empty or damaged text, no assistant turn, a response before any question, a prompt
    that does not end with the user, and equal chosen and rejected responses.
    """
    prompt, completion, rejected = example.prompt, example.completion, example.rejected
    yield from _missing_question(example)
    if prompt:
        yield from _content_faults(prompt, "prompt")
    elif kind in ("preference", "prompts"):
        yield "D054", "prompt is empty"
    for name, text in (("completion", completion), ("rejected", rejected)):
        if text:
            yield from _content_faults(text, name)
        elif text is not None:
            yield "D054", f"{name} is empty"
    if kind in ("sft", "preference", "unpaired"):
        for answer in (completion, rejected):
            if answer and not isinstance(answer, str):
                yield from _answer_faults(prompt, answer)
                yield from _weight_faults(answer, kind)
    if kind != "corpus" and prompt and not isinstance(prompt, str):
        # A response follows what a user or a tool said.
        last = prompt[-1]["role"]
        if last not in ("user", "tool"):
            yield "D062", f"the prompt ends with a turn of role {last}, expected user"
    if rejected is not None and completion == rejected:
        yield "D070", "chosen and rejected are the same"


def _missing_question(example: Example) -> Iterator[Fault]:
    """Yield the fault of a first question that is a word for a missing value, such as None."""
    asked, name = example.prompt, "prompt"
    if not isinstance(asked, str) or not asked:
        sides = (example.prompt, example.completion)
        turns = [turn for side in sides if side and not isinstance(side, str) for turn in side]
        asked = next((turn["content"] for turn in turns if turn["role"] == "user"), "")
        name = "the first question"
    if may_be_missing(asked):
        yield "D054", f"{name} is {asked!r}, a missing value written as text"


def _content_faults(text: Text, name: str) -> Iterator[Fault]:
    if isinstance(text, str):
        yield from _unsaid(text, name)
        yield from _damage(text, name)
        return
    for i, turn in enumerate(text):
        content = turn["content"]
        if _is_usual(content) and "reasoning_content" not in turn:
            continue
        # A tool may return nothing, and a turn may consist of tool calls alone.
        may_be_empty = turn["role"] == "tool" or "tool_calls" in turn
        if not may_be_empty:
            yield from _unsaid(content, f"{name}[{i}]: the content of the {turn['role']}")
        for said in (content, turn.get("reasoning_content", "")):
            yield from _damage(said, f"{name}[{i}]")


def _is_usual(text: str) -> bool:
    """Return whether a text is like most in a language of ASCII: without any fault below."""
    return len(text) >= 32 and text.isascii() and text[0].isalnum() and "\0" not in text


def _unsaid(text: str, name: str) -> Iterator[Fault]:
    if is_blank(text):
        seen = f" but for {text[:20]!r}, which shows nothing" if text.strip() else ""
        yield "D054", f"{name} is empty{seen}"
    elif is_missing(text):
        yield "D054", f"{name} is {text.strip()!r}, a missing value written as text"


def _damage(text: str, name: str) -> Iterator[Fault]:
    """Yield characters that no tokenizer can encode or that do not occur in text."""
    if "\0" in text:
        yield "D022", f"{name}: a NUL character at {text.index(chr(0))}"
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            yield "D023", f"{name}: half of a surrogate pair, {half}, at character {error.start}"


def _weight_faults(answer: Sequence[Turn], kind: str) -> Iterator[Fault]:
    weights = [turn.get("weight", 1.0) for turn in answer if turn["role"] == "assistant"]
    if weights and not any(weights):
        yield "D058", "every assistant turn has weight 0, so nothing is trained"
    elif odd := [weight for weight in weights if kind != "sft" and weight not in (0.0, 1.0)]:
        yield "D058", f"a turn of weight {odd[0]:g} has an effect in sft only, not in {kind} data"


def _answer_faults(prompt: Text, answer: Text) -> Iterator[Fault]:
    assert not isinstance(answer, str)
    said = [turn["role"] for turn in answer]
    roles = said if isinstance(prompt, str) else [*(turn["role"] for turn in prompt), *said]
    if "assistant" not in said:
        yield "D060", f"no assistant turn in {roles}"
    elif "user" not in roles[: roles.index("assistant")]:
        yield "D061", f"an assistant turn before any user turn in {roles}"
