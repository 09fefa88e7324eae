"""Ollama's Modelfile for a GGUF file: the chat template in Go's syntax, and the stop tokens."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from align.models.loading import load_tokenizer, stop_token_ids

MODELFILE = "Modelfile"
_CHECKED = (
    ("user",),
    ("user", "assistant", "user"),
    ("system", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)


@dataclass(frozen=True, slots=True)
class Turns:
    """A chat template as fixed texts.

    Attributes:
        around: text before and after a message of each role.
        default: text before a conversation without a system message.
        begin: generation prompt.
    """

    around: dict[str, tuple[str, str]]
    default: str
    begin: str

    def rendered(self, roles: Sequence[str]) -> str:
        """Return a conversation of marked messages with the generation prompt."""
        start = "" if roles[0] == "system" else self.default
        turns = enumerate(roles)
        body = "".join(f"{self.around[r][0]}{_mark(i)}{self.around[r][1]}" for i, r in turns)
        return start + body + self.begin

    def go_template(self) -> str | None:
        """Return the same in Go's syntax; None if a text would be read as syntax."""
        texts = [self.default, self.begin, *(t for pair in self.around.values() for t in pair)]
        if any("{{" in text or "}}" in text or '"""' in text for text in texts):
            return None
        first = '{{ if ne (index .Messages 0).Role "system" }}' + self.default + "{{ end }}"
        bodies = [
            f'{{{{ if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{ end }}}}'
            for role, (before, after) in self.around.items()
        ]
        messages = "{{ range .Messages }}" + "".join(bodies) + "{{ end }}"
        return (first if self.default else "") + messages + self.begin


def modelfile(model_dir: Path, file: str) -> str | None:
    """Return the Modelfile for a GGUF file beside it, or None if Ollama cannot render the template.

    Ollama's templates are written in Go. A chat template becomes one if it writes a fixed text
    before and after each message of a role; several conversations are rendered to prove that.
    """
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(model_dir)
    lines = [f"FROM ./{file}"]
    if tokenizer.chat_template is not None:
        turns = _fixed_turns(tokenizer)
        template = None if turns is None else turns.go_template()
        if template is None:
            return None
        lines.append(f'TEMPLATE """{template}"""')
    stops = tokenizer.convert_ids_to_tokens(list(stop_token_ids(model_dir)))
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join(lines) + "\n"


def _fixed_turns(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """Return a chat template as fixed texts around each message, or None if it is more."""
    dialog = _render(tokenizer, ("user", "assistant", "user"), generate=True)
    ends = [
        _render(tokenizer, roles, generate=False) for roles in (("user",), ("user", "assistant"))
    ]
    if dialog is None or None in ends:
        return None
    try:
        head, rest = dialog.split(_mark(0))
        first, rest = rest.split(_mark(1))
        second, last = rest.split(_mark(2))
        after_user, after_assistant = (str(e).split(_mark(i))[1] for i, e in enumerate(ends))
    except (ValueError, IndexError):  # a message appears twice, or not at all
        return None
    before_user = second.removeprefix(after_assistant)
    around = {
        "user": (before_user, after_user),
        "assistant": (first.removeprefix(after_user), after_assistant),
    }
    system = (_render(tokenizer, ("system", "user"), generate=False) or "").split(_mark(0))
    if len(system) == 2:
        after = system[1].removesuffix(before_user + _mark(1) + after_user)
        around["system"] = (system[0], after)
    found = Turns(around, head.removesuffix(before_user), last.removeprefix(after_user))
    return found if _reproduces(tokenizer, found) else None


def _reproduces(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> bool:
    possible = [roles for roles in _CHECKED if set(roles) <= turns.around.keys()]
    return all(_render(tokenizer, r, generate=True) == turns.rendered(r) for r in possible)


def _mark(i: int) -> str:
    return f"\x02{i}\x03"


def _render(
    tokenizer: PreTrainedTokenizerBase, roles: Sequence[str], *, generate: bool
) -> str | None:
    """Return a rendered conversation without the BOS that llama.cpp adds; None if refused."""
    turns = [{"role": role, "content": _mark(i)} for i, role in enumerate(roles)]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate)
    except (TemplateError, ValueError, TypeError):  # such as a template without a system role
        return None
    bos = tokenizer.bos_token
    if bos is None or tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return str(text)
    return str(text).removeprefix(str(bos))
