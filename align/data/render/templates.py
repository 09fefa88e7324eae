"""Chat templates that a recipe can name: plain text, ChatML, and one for each model family.

Masks come from rendering a conversation turn by turn (align.data.render.chat), so a template may
only append. The stock templates of some families do not: Qwen3 removes the reasoning from earlier
responses, and gpt-oss ends the last response with a different token than earlier ones. TRL ships
training versions of them, which are read from the installed package.
"""

import importlib.util
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from align.core.errors import RecipeError
from align.core.text import unexpanded

PLAIN = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant:\n' + message['content'] + eos_token + '\n' }}"
    "{% else %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] + '\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
CHATML = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"plain": PLAIN, "chatml": CHATML}
"""Built-in templates for base models without one."""


NEEDED = {"pad_token": "<pad>", "stop_token": "</s>", "chat_template": "plain"}
"""Settings without which no stage can train, each with an example."""


def needs(key: str) -> str:
    """Return what to do about a tokenizer that lacks one of ``NEEDED``."""
    what = key.replace("_", " ")
    return (
        f"the tokenizer has no {what}; name one in the recipe: stages.<base>.tokenizer.{key}: "
        f"{NEEDED[key]}"
    )


@dataclass(frozen=True, slots=True)
class Family:
    """Special tokens and source of a template.

    Attributes:
        markers: special tokens that it writes; each becomes one token of the vocabulary.
        stop: the marker that ends an assistant turn; None uses the tokenizer's eos.
        file: name among TRL's templates; None for a built-in one.
        changes: (old, new) texts that make TRL's file append only.
    """

    markers: tuple[str, ...] = ()
    stop: str | None = None
    file: str | None = None
    changes: tuple[tuple[str, str], ...] = ()


_CHATML_MARKERS = ("<|im_start|>", "<|im_end|>")
# Harmony ends earlier responses with <|end|> and only the last with <|return|>; it also writes the
# date.
_GPT_OSS_CHANGES = (
    (
        'message.content + "<|end|>" }}\n            {%- set last_tool_call.name = none %}',
        'message.content + "<|return|>" }}\n            {%- set last_tool_call.name = none %}',
    ),
    ('    {{- "Current date: " + strftime_now("%Y-%m-%d") + "\\n\\n" }}\n', ""),
)
FAMILIES = {
    "plain": Family(),
    "chatml": Family(_CHATML_MARKERS, "<|im_end|>"),
    "llama3": Family(
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>", "llama3_training"
    ),
    "qwen2_5": Family(_CHATML_MARKERS, "<|im_end|>", "qwen2_5_training"),
    "qwen3": Family(_CHATML_MARKERS, "<|im_end|>", "qwen3_training"),
    "qwen3_instruct": Family(_CHATML_MARKERS, "<|im_end|>", "qwen3_instruct_2507_training"),
    "gemma3": Family(("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", "gemma3_training"),
    "gpt_oss": Family(
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
        "<|return|>",
        "gptoss_training",
        _GPT_OSS_CHANGES,
    ),
}
"""Valid names for ``tokenizer.chat_template``."""


# Rewrites the turns before the template sees them, so that every user of the saved template (this
# suite, vLLM, transformers) renders the same text. Contents with parts are not changed.
_STOP_AFTER_ANSWERS = (
    "{%- set ns = namespace(turns=[]) -%}"
    "{%- for turn in messages -%}"
    "{%- if turn['role'] == 'assistant' and turn['content'] is string -%}"
    "{%- set ns.turns = ns.turns + [dict(turn, content=turn['content'] + eos_token)] -%}"
    "{%- else -%}{%- set ns.turns = ns.turns + [turn] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = ns.turns -%}"
)


def with_stop(template: str) -> str:
    """Return a template that writes the stop token after the content of every assistant turn."""
    return _STOP_AFTER_ANSWERS + template


def prefill_in(generation_prompt: str, special: Collection[str]) -> str:
    """Return the part of a generation prompt that belongs to the response.

    It begins with the first tag that is not a special token, such as ``<think>``; what comes before
    names the role. Without such a tag there is none.
    """
    for tag in re.finditer(r"<[A-Za-z][\w-]*>", generation_prompt):
        if tag[0] not in special:
            return generation_prompt[tag.start() :]
    return ""


def template_problems(found: object) -> list[str]:
    """Return why a tokenizer's template cannot be used: one of several by name, or no text."""
    if isinstance(found, dict) and "default" not in found:
        return [
            f"the tokenizer has the chat templates {', '.join(map(repr, found))}, and none is "
            "named 'default'. Choose one as a file: tokenizer: {chat_template: FILE.jinja}"
        ]
    if found and not isinstance(found, str | dict):
        return [f"the tokenizer's chat_template is {found!r}; expected a Jinja text"]
    return []


def family_of(name: str | None) -> Family:
    """Return the family of a named template; a file or None has no markers or stop token."""
    return FAMILIES.get(name or "", Family())


def template_text(name: str) -> str:
    """Return the Jinja text of a named template or of a file.

    Raises:
        RecipeError: neither the name nor the file exists, or TRL no longer has the template.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    family = FAMILIES.get(name)
    if family is not None and family.file is not None:
        return _changed(_trl_text(family.file), family, name)
    path = Path(name)
    if not path.is_file():
        raise RecipeError(
            f"tokenizer.chat_template: {name!r} is neither one of {', '.join(FAMILIES)} nor a file"
            f"{unexpanded(name)}"
        )
    return path.read_text(encoding="utf-8").removeprefix("\ufeff")


def _trl_text(file: str) -> str:
    # Read, not imported: importing TRL's module takes seconds.
    found = importlib.util.find_spec("trl")
    path = Path(found.origin or "").parent / "chat_templates" / f"{file}.jinja" if found else None
    if path is None or not path.is_file():
        raise RecipeError(
            f"tokenizer.chat_template: trl has no template {file}.jinja. Install trl 1.16, or use "
            "your own Jinja file."
        )
    return path.read_text(encoding="utf-8")


def _changed(text: str, family: Family, name: str) -> str:
    for old, new in family.changes:
        if old not in text:
            raise RecipeError(
                f"tokenizer.chat_template: {name} was written for trl 1.16, and this version's "
                f"template lacks {old[:40]!r}. Install trl 1.16, or use your own Jinja file."
            )
        text = text.replace(old, new)
    return text
