"""Chat templates rendered directly, without what transformers does around each call."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template
    from transformers import PreTrainedTokenizerBase

_OF_LOOP = frozenset(("first", "last", "index", "index0", "revindex", "revindex0", "length"))
_METHODS = ("apply_chat_template", "get_chat_template")


class DirectTemplate:
    """A tokenizer's ``apply_chat_template`` for text, at half of its cost.

    Attributes:
        name_or_path: of the tokenizer, for messages.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self.name_or_path = tokenizer.name_or_path

    def apply_chat_template(self, turns: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Return the text that the tokenizer's method returns.

        Args:
            turns: a conversation.
            options: ``add_generation_prompt``; anything else is left to the tokenizer.
        """
        text = self._tokenizer.chat_template
        is_plain = options.keys() == {"add_generation_prompt"} and bool(turns)
        if not is_plain or not isinstance(text, str) or not _is_usual(self._tokenizer):
            given: Any = list(turns)
            return str(self._tokenizer.apply_chat_template(given, tokenize=False, **options))
        template, special = _compiled(text), self._tokenizer.special_tokens_map
        given = {"messages": turns, "tools": None, "documents": None, **options, **special}
        # As ``template.render`` does, which only copies this, and shortens the trace of an error.
        return "".join(template.root_render_func(template.new_context(given)))


def _is_usual(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether a tokenizer renders as transformers' base class does."""
    return not any(name in vars(tokenizer) for name in _METHODS) and _usual_kind(type(tokenizer))


@lru_cache(maxsize=16)
def _usual_kind(kind: type) -> bool:
    from transformers import PreTrainedTokenizerBase as Base

    return all(getattr(kind, name) is getattr(Base, name) for name in _METHODS)


@lru_cache(maxsize=16)
def _compiled(text: str) -> "Template":
    """Return the template as transformers compiles it."""
    from jinja2.runtime import LoopContext
    from transformers.utils import chat_template_utils

    template: Any = chat_template_utils._compile_jinja_template(text)  # pyright: ignore
    # A plain dictionary: each rendering copies the globals, and a chain of dictionaries is slow.
    template.globals = dict(template.globals)
    is_safe = template.environment.is_safe_attribute
    # The sandbox takes a third of the time of a short template to find that ``loop.first`` is safe.
    template.environment.is_safe_attribute = lambda obj, name, value: (
        (type(obj) is LoopContext and name in _OF_LOOP) or is_safe(obj, name, value)
    )
    return template
