"""Token rows: prefix rendering, stop tokens, BOS, shared prompts, tokenizer specs."""

import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))
from small_tokenizers import byte_tokenizer

from align.core.errors import DataError, RecipeError
from align.core.types import Example
from align.data.fit import fit_row
from align.data.render.chat import ChatFormat, apply_tokenizer_spec
from align.data.render.templates import TEMPLATES
from align.recipe.schema import TokenizerSpec

# ChatML with transformers' own mark of what the assistant says, stop token included.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Shortens every answer but the last, as templates that hide earlier reasoning do.
REWRITES = (
    "{% for m in messages %}{{ m['role'] + ':' }}"
    "{{ m['content'] if loop.last or m['role'] != 'assistant' else m['content'][:1] }}{{ '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
NO_STOP = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def make_tokenizer(template: str | None, *, bos: bool = False) -> PreTrainedTokenizerFast:
    return byte_tokenizer(template, bos=bos, eos="<|im_end|>" if template == MARKED else "</s>")


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def spoken(tokenizer: PreTrainedTokenizerFast, ids: tuple, keep: tuple) -> str:
    return tokenizer.decode([i for i, k in zip(ids, keep, strict=True) if k])


def test_assistant_mask_agrees_with_transformers_generation_mask() -> None:
    tokenizer = make_tokenizer(MARKED)
    chat = ChatFormat(tokenizer)
    conversations = [
        [turn("user", "hi"), turn("assistant", "hello there")],
        [
            turn("system", "be brief"),
            turn("user", "a\nb"),
            turn("assistant", " 1\n"),
            turn("user", "more"),
            turn("assistant", "ünï\n\ncode 漢"),
        ],
    ]
    for turns in conversations:
        row = chat.sft_row(Example(prompt=[], completion=turns))
        theirs = tokenizer.apply_chat_template(
            turns, return_dict=True, return_assistant_tokens_mask=True
        )
        assert list(row.input_ids) == theirs["input_ids"]
        assert [int(t) for t in row.trained] == theirs["assistant_masks"]


def test_prompt_and_completion_train_only_the_completion() -> None:
    tokenizer = make_tokenizer(TEMPLATES["chatml"].replace("{{ bos_token or '' }}", ""))
    tokenizer.eos_token = "<|im_end|>"
    chat = ChatFormat(tokenizer)
    before = [turn("user", "q"), turn("assistant", "old"), turn("user", "r")]
    row = chat.sft_row(Example(prompt=before, completion=[turn("assistant", "new")]))
    assert spoken(tokenizer, row.input_ids, row.trained) == "new<|im_end|>"
    assert tokenizer.decode(row.input_ids) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nold<|im_end|>\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nnew<|im_end|>\n"
    )
    prompt = chat.prompt_ids(before)
    assert tuple(prompt) == row.input_ids[: len(prompt)]
    assert row.trained[len(prompt)]
    assert not row.trained[len(prompt) - 1]


TURNS = [
    turn("user", "q"),
    turn("assistant", "one"),
    turn("user", "r"),
    turn("assistant", "two"),
]


def test_template_without_a_stop_is_refused_with_the_row_and_the_remedy() -> None:
    chat = ChatFormat(make_tokenizer(NO_STOP))
    said = (
        r"a.jsonl:3: .*without a stop token: 'one\\n' contains none of \['</s>'\]"
        r".*append_stop: true"
    )
    with pytest.raises(DataError, match=said) as caught:
        chat.sft_row(Example(prompt=[], completion=TURNS, source="a.jsonl:3"))
    assert caught.value.code == "D115"
    # A history is rendered as it was trained, so it is refused as well; a bare question is not.
    with pytest.raises(DataError, match="without a stop token"):
        chat.prompt_ids(TURNS[:3])
    assert chat.decode(chat.prompt_ids(TURNS[:1])) == "user:q\nassistant:"


def test_stop_token_is_added_and_trained_where_the_recipe_says_so(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(NO_STOP)
    apply_tokenizer_spec(tokenizer, TokenizerSpec(append_stop=True))
    # It is kept by the template, so whoever loads the artifact renders the same.
    tokenizer.save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    chat = ChatFormat(tokenizer)
    whole = "user:q\nassistant:one</s>\nuser:r\nassistant:two</s>\n"
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == whole
    row = chat.sft_row(Example(prompt=[], completion=TURNS))
    assert tokenizer.decode(row.input_ids) == whole
    assert spoken(tokenizer, row.input_ids, row.trained) == "one</s>two</s>"
    # The history that generation starts from is the one that was trained on.
    head = chat.prompt_ids(TURNS[:3])
    assert tuple(head) == row.input_ids[: len(head)]
    # A tokenizer may have several templates by name; each of them writes the stop token.
    tokenizer.chat_template = {"default": NO_STOP, "tool_use": NO_STOP + "{# with tools #}"}
    apply_tokenizer_spec(tokenizer, TokenizerSpec(append_stop=True))
    for name in ("default", "tool_use"):
        found = tokenizer.apply_chat_template(TURNS, tokenize=False, chat_template=name)
        assert found == whole


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_append_stop_without_effect_is_refused(template: str) -> None:
    spec = TokenizerSpec(append_stop=True, chat_template=template)
    with pytest.raises(RecipeError, match=r"append_stop has no effect: .* already .*Remove it"):
        apply_tokenizer_spec(make_tokenizer(None), spec)


def test_template_that_rewrites_earlier_turns_is_refused_with_the_place() -> None:
    chat = ChatFormat(make_tokenizer(REWRITES))
    turns = [
        turn("user", "q"),
        turn("assistant", "one"),
        turn("user", "r"),
        turn("assistant", "two"),
    ]
    # "user:q</s>assistant:o" are 21 characters; there the answer is cut.
    with pytest.raises(DataError, match=r"a.jsonl:3: .*character 21: 'ne</s>' becomes '</s>user:r"):
        chat.sft_row(Example(prompt=[], completion=turns, source="a.jsonl:3"))


def test_stop_token_inside_an_answer_is_refused() -> None:
    chat = ChatFormat(make_tokenizer(MARKED))
    turns = [turn("user", "q"), turn("assistant", "a<|im_end|>b")]
    with pytest.raises(DataError, match="contains the stop token"):
        chat.sft_row(Example(prompt=[], completion=turns, source="a:1"))


@pytest.mark.parametrize("bos", [False, True])
def test_plain_strings_get_one_bos_and_a_trained_stop(bos: bool) -> None:
    tokenizer = make_tokenizer(None, bos=bos)
    chat = ChatFormat(tokenizer)
    row = chat.sft_row(Example(prompt="ab", completion=" c"))
    assert tokenizer.decode(row.input_ids) == ("<s>" if bos else "") + "ab c</s>"
    assert spoken(tokenizer, row.input_ids, row.trained) == " c</s>"
    assert chat.prompt_ids("ab") == list(row.input_ids[: 3 if bos else 2])
    if bos:
        assert chat.prompt_ids("<s>ab") == chat.prompt_ids("ab")
    corpus = chat.sft_row(Example(prompt="", completion="abc"))
    assert spoken(tokenizer, corpus.input_ids, corpus.trained) == "abc</s>"
    assert tokenizer.decode(corpus.input_ids) == ("<s>" if bos else "") + "abc</s>"


def test_template_with_bos_gives_one_bos() -> None:
    tokenizer = make_tokenizer(TEMPLATES["plain"], bos=True)
    row = ChatFormat(tokenizer).sft_row(
        Example(prompt=[turn("user", "q")], completion=[turn("assistant", "a")])
    )
    assert tokenizer.decode(row.input_ids) == "<s>User: q\nAssistant:\na</s>\n"
    assert list(row.input_ids).count(tokenizer.bos_token_id) == 1


def test_padding_equal_to_stop_does_not_hide_the_stop() -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.pad_token = tokenizer.eos_token
    row = ChatFormat(tokenizer).sft_row(Example(prompt="a", completion="b"))
    assert row.input_ids[-1] == tokenizer.pad_token_id
    assert row.trained == (False, True, True)


def test_pair_shares_the_prompt_ids() -> None:
    tokenizer = make_tokenizer(TEMPLATES["plain"], bos=True)
    chat = ChatFormat(tokenizer)
    example = Example(
        prompt=[turn("user", "q")],
        completion=[turn("assistant", "yes")],
        rejected=[turn("assistant", "yet no")],
        margin=1.5,
    )
    pair = chat.pair_row(example)
    n = pair.num_prompt_tokens
    assert pair.chosen.input_ids[:n] == pair.rejected.input_ids[:n]
    assert list(pair.chosen.input_ids[:n]) == chat.prompt_ids(example.prompt)
    assert spoken(tokenizer, pair.chosen.input_ids, pair.chosen.trained) == "yes</s>"
    assert spoken(tokenizer, pair.rejected.input_ids, pair.rejected.trained) == "yet no</s>"
    assert not any(pair.chosen.trained[:n])
    assert pair.margin == 1.5


@pytest.mark.parametrize("template", [None, "plain"])
@pytest.mark.parametrize("bos", [True, False])
def test_a_pair_that_is_cut_keeps_its_bos(template, bos) -> None:
    tokenizer = make_tokenizer(template and TEMPLATES[template], bos=bos)
    prompt = "a long question" if template is None else [turn("user", "a long question")]
    pair = ChatFormat(tokenizer).pair_row(Example(prompt, completion="yes", rejected="no way"))
    long = len(pair.rejected.input_ids)
    cut = fit_row(pair, max_length=long - 5)
    assert cut is not None
    for before, after in ((pair.chosen, cut.chosen), (pair.rejected, cut.rejected)):
        kept = before.input_ids[:1] if bos else ()
        assert after.input_ids == kept + before.input_ids[len(kept) + 5 :]
        assert spoken(tokenizer, after.input_ids, after.trained) == spoken(
            tokenizer, before.input_ids, before.trained
        )
    assert (pair.chosen.input_ids[0] == tokenizer.bos_token_id) is bos
    # At least one token of the prompt itself stays.
    shortest = long - pair.num_prompt_tokens + bos + 1
    assert fit_row(pair, max_length=shortest) is not None
    assert fit_row(pair, max_length=shortest - 1) is None


def test_a_token_that_begins_every_turn_is_no_bos_to_keep() -> None:
    tokenizer = make_tokenizer(MARKED)
    tokenizer.bos_token = "<|im_start|>"
    example = Example([turn("user", "a question")], completion="yes", rejected="no")
    pair = ChatFormat(tokenizer).pair_row(example)
    assert pair.chosen.input_ids[0] == tokenizer.bos_token_id
    assert pair.num_head_tokens == 0


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_pair_ends_with_the_stop_token_as_sampled_answers_do(template: str) -> None:
    # Both templates write a newline after the stop; a scorer trained at that newline would be
    # asked at the stop token, with which generation ends.
    tokenizer = make_tokenizer(None)
    apply_tokenizer_spec(tokenizer, TokenizerSpec(chat_template=template))
    example = Example(
        prompt=[turn("user", "q")],
        completion=[turn("assistant", "yes")],
        rejected=[turn("assistant", "no")],
    )
    pair = ChatFormat(tokenizer).pair_row(example)
    for row in (pair.chosen, pair.rejected):
        assert row.input_ids[-1] == tokenizer.eos_token_id
        assert row.trained[-1]
        assert len(row.trained) == len(row.input_ids)


def test_pair_with_equal_tokens_is_refused() -> None:
    # The stop marker in the text and the appended one come to the same ids.
    chat = ChatFormat(make_tokenizer(None))
    with pytest.raises(DataError, match="a:1: chosen and rejected have the same tokens"):
        chat.pair_row(Example(prompt="q", completion="a", rejected="a</s>", source="a:1"))


def test_conversation_without_template_names_the_remedy() -> None:
    chat = ChatFormat(make_tokenizer(None))
    with pytest.raises(DataError, match="chat_template: plain"):
        chat.prompt_ids([turn("user", "q")])


def bare_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(None)
    core = tokenizer.backend_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_tokenizer_spec_reports_all_that_is_missing() -> None:
    with pytest.raises(RecipeError) as caught:
        apply_tokenizer_spec(bare_tokenizer(), TokenizerSpec())
    assert [line.split(";")[0] for line in str(caught.value).splitlines()] == [
        "tokenizer.pad_token: the tokenizer has no pad token",
        "tokenizer.stop_token: the tokenizer has no stop token",
        "tokenizer.chat_template: the tokenizer has no chat template",
    ]
    with pytest.raises(RecipeError, match="turns end in"):
        apply_tokenizer_spec(
            bare_tokenizer(), TokenizerSpec(stop_token="</s>", chat_template="chatml")
        )
    with pytest.raises(RecipeError, match="nor a file"):
        apply_tokenizer_spec(
            bare_tokenizer(),
            TokenizerSpec(pad_token="<pad>", stop_token="</s>", chat_template="nothing.jinja"),
        )


def test_tokenizer_spec_adds_only_what_is_new_and_survives_saving(tmp_path: Path) -> None:
    tokenizer = bare_tokenizer()
    spec = TokenizerSpec(pad_token="<none>", stop_token="</s>", chat_template="plain")
    assert apply_tokenizer_spec(tokenizer, spec) == ["<none>"]
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    example = Example(prompt=[turn("user", "q")], completion=[turn("assistant", "a")])
    assert ChatFormat(again).sft_row(example) == ChatFormat(tokenizer).sft_row(example)
    assert again.pad_token == "<none>"


def test_chatml_markers_are_single_special_tokens() -> None:
    tokenizer = bare_tokenizer()
    apply_tokenizer_spec(tokenizer, TokenizerSpec(pad_token="<pad>", chat_template="chatml"))
    chat = ChatFormat(tokenizer)
    ids = chat.prompt_ids([turn("user", "q")])
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    assert chat.stop_token_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    assert chat.decode(ids) == "user\nq\nassistant\n"
