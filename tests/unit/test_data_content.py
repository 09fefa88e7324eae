"""All that a row holds is in the text that is trained on, or the row is refused by name."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from small_tokenizers import byte_tokenizer

from align.core.errors import DataError
from align.core.types import Example
from align.data.render.chat import ChatFormat, apply_tokenizer_spec
from align.data.render.content import check_plain
from align.data.render.templates import TEMPLATES
from align.losses.supervised import nll
from align.recipe.schema import TokenizerSpec
from align.stages.sft import collate

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Look up the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": 'A city, as "Oslo".'}},
        },
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
AGENT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it warm?"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "I must look.",
        "tool_calls": [CALL],
    },
    {"role": "tool", "content": '{"degrees": 21}', "tool_call_id": "1"},
    {"role": "assistant", "content": "Yes, 21 degrees.", "reasoning_content": "21 is warm."},
]


def chat_of(family: str) -> ChatFormat:
    tokenizer = byte_tokenizer(None, markers=())
    apply_tokenizer_spec(tokenizer, TokenizerSpec(chat_template=family))
    return ChatFormat(tokenizer)


def trained_text(chat: ChatFormat, example: Example) -> str:
    row = chat.sft_row(example)
    return chat.tokenizer.decode([i for i, t in zip(row.input_ids, row.trained, strict=True) if t])


def test_tools_calls_and_reasoning_are_rendered_and_tool_output_is_never_trained() -> None:
    chat = chat_of("qwen3")
    example = Example([], AGENT, tools=[WEATHER], source="a:1")
    row = chat.sft_row(example)
    theirs = chat.tokenizer.apply_chat_template(
        AGENT, tools=[WEATHER], tokenize=True, return_dict=False
    )
    assert list(row.input_ids) == theirs
    # By hand, from the template: what the model writes, and nothing else.
    assert trained_text(chat, example) == (
        "<think>\nI must look.\n</think>\n\n<tool_call>\n"
        '{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call><|im_end|>'
        "<think>\n21 is warm.\n</think>\n\nYes, 21 degrees.<|im_end|>"
    )
    prompt = chat.prompt_row(Example(AGENT[:4], tools=[WEATHER], source="a:1"))
    assert list(prompt.input_ids) == chat.tokenizer.apply_chat_template(
        AGENT[:4], tools=[WEATHER], tokenize=True, add_generation_prompt=True, return_dict=False
    )


def test_arguments_of_the_template_reach_it() -> None:
    chat = chat_of("qwen3")
    asked = [{"role": "user", "content": "Hi"}]
    thinks, not_thinks = (
        chat.decode(chat.prompt_row(Example(asked, template_kwargs=given)).input_ids)
        for given in ({}, {"enable_thinking": False})
    )
    assert not_thinks == thinks + "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tools": [WEATHER]}, "drops the tool 'weather'"),
        ({"completion": AGENT[:3]}, "drops turn 2: role assistant, its reasoning"),
        (
            {"completion": [*AGENT[:2], {**AGENT[2], "reasoning_content": ""}]},
            r"drops turn 2: role assistant, its tool call \('weather'\)",
        ),
    ],
)
@pytest.mark.parametrize("family", ["plain", "chatml", "llama3"])
def test_what_a_template_drops_is_refused_by_name(family: str, change: dict, message: str) -> None:
    plain = {"prompt": [], "completion": [AGENT[1], {"role": "assistant", "content": "Yes"}]}
    chat = chat_of(family)
    chat.sft_row(Example(**plain))
    with pytest.raises(DataError, match=rf"a:9: the chat template {message}") as caught:
        chat.sft_row(Example(**{**plain, **change}, source="a:9"))
    assert caught.value.code == "D116"


DROPS_STRANGERS = (
    "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}"
    "{{ m['role'] + ':' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.mark.parametrize("role", ["developer", "system", "tool"])
@pytest.mark.parametrize("content", ["Be brief.", "user", "a"])
def test_dropped_role_is_found_whatever_its_words(role: str, content: str) -> None:
    # "user" and "a" stand elsewhere in the text; the turn itself does not.
    chat = ChatFormat(byte_tokenizer(DROPS_STRANGERS))
    asked = [{"role": "user", "content": "Hi a user"}, {"role": role, "content": content}]
    answer = [{"role": "assistant", "content": "a user"}]
    with pytest.raises(DataError, match=f"a:1: the chat template drops turn 1: role {role}"):
        chat.sft_row(Example(asked, answer, source="a:1"))
    with pytest.raises(DataError, match=f"a:1: the chat template drops turn 1: role {role}"):
        chat.prompt_row(Example(asked, source="a:1"))


def test_weights_of_turns_and_rows_multiply_the_loss() -> None:
    chat = ChatFormat(byte_tokenizer(TEMPLATES["plain"]))
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "no", "weight": 0.0},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "x", "weight": 0.5},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "yes"},
    ]
    row = chat.sft_row(Example([], turns, weight=3.0))
    assert trained_text(chat, Example([], turns)) == "x</s>yes</s>"
    assert [w for w in row.weights if w] == [1.5] * 2 + [3.0] * 4
    # Every token costs 1 nat but those of "yes", which cost 2: (2 x 1.5 + 4 x 3 x 2) / (3 + 12).
    batch = collate([row], [row])
    costs = torch.ones(batch.mask.shape)
    costs[batch.per_token["weight"] == 3.0] = 2.0
    loss = nll(-costs, batch.mask, batch.counts["tokens"], weights=batch.per_token["weight"])
    assert loss.item() == pytest.approx(27 / 15)
    assert chat.sft_row(Example([], [turns[0], turns[5]])).weights == ()


def test_reader_of_contents_alone_refuses_the_rest() -> None:
    with pytest.raises(DataError, match=r"a:1: an encoder reads .* so reasoning_content would be"):
        check_plain(Example([], AGENT, source="a:1"), reader="an encoder")
    check_plain(Example([], [AGENT[0], AGENT[1], AGENT[3]]), reader="an encoder")


def test_pair_with_tools_shares_the_prompt_that_shows_them() -> None:
    chat = chat_of("qwen3")
    sides = ([{"role": "assistant", "content": text}] for text in ("Yes.", "Ask later."))
    chosen, rejected = sides
    pair = chat.pair_row(Example(AGENT[:2], chosen, rejected, tools=[WEATHER]))
    head = chat.prompt_row(Example(AGENT[:2], tools=[WEATHER])).input_ids
    assert pair.chosen.input_ids[: pair.num_prompt_tokens] == head
