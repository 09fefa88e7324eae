"""Rows have the ids of ``apply_chat_template`` with every tokenizer, and train what is said."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from jinja2.exceptions import SecurityError
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))
from small_tokenizers import byte_tokenizer

from align.core.errors import DataError
from align.core.types import Example
from align.data.render import token_text
from align.data.render.chat import ChatFormat
from align.data.render.rendering import DirectTemplate
from align.data.render.templates import TEMPLATES
from align.data.render.token_text import TokenText
from align.preflight import tokens

TEXTS = [
    "Hi there, what color is the sky?",
    "The sky is blue. It is blue by day and dark by night.",
    "  two  spaces\n\nand a line, café 漢",
    "User: Assistant: [INST] user assistant <|user|> 1 + 1 = 2",
    "Tell me more about it! He said hello, so I said hello.",
]
SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def wrapped(core: Tokenizer, *, eos: str = "</s>") -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token=eos,
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def byte_bpe(*, prefix: bool = False, trim: bool = True) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    core.post_processor = processors.ByteLevel(trim_offsets=trim)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=SPECIAL, initial_alphabet=ALPHABET, show_progress=False
        ),
    )
    return wrapped(core)


def pieces_bpe(scheme: str, *, split: bool = True) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    core.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    )
    return wrapped(core)


def llama_like() -> PreTrainedTokenizerFast:
    """Make a tokenizer as of Llama 2: a space before the text, and no cut into words."""
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    )
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return wrapped(core)


def unigram(*, split: bool, scheme: str = "always") -> PreTrainedTokenizerFast:
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    core.train_from_iterator(
        TEXTS * 3,
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        ),
    )
    return wrapped(core)


def word_piece() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.train_from_iterator(
        TEXTS,
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False),
    )
    return wrapped(core)


def word_level() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.train_from_iterator(
        TEXTS,
        trainers.WordLevelTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False),
    )
    return wrapped(core)


def with_added() -> PreTrainedTokenizerFast:
    """Make a tokenizer with added tokens that swallow the white space around them."""
    tokenizer = byte_bpe()
    added = [AddedToken("sky", lstrip=True), AddedToken("said", rstrip=True, single_word=True)]
    tokenizer.add_tokens(added)
    return tokenizer


def without_offsets() -> ByT5Tokenizer:
    """Make a tokenizer in Python, which knows no characters of its tokens."""
    tokenizer = ByT5Tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


MADE: dict[str, Callable[[], object]] = {
    "bytes": lambda: byte_tokenizer(None),
    "byte BPE": byte_bpe,
    "byte BPE, whole offsets": lambda: byte_bpe(trim=False),
    "byte BPE, prefix space": lambda: byte_bpe(prefix=True),
    "SentencePiece BPE, prefix space": lambda: pieces_bpe("always"),
    "SentencePiece BPE, first prefix space": lambda: pieces_bpe("first"),
    "SentencePiece BPE, no prefix space": lambda: pieces_bpe("never"),
    "SentencePiece BPE, not split": lambda: pieces_bpe("first", split=False),
    "Llama 2": llama_like,
    "Unigram": lambda: unigram(split=True),
    "Unigram, not split": lambda: unigram(split=False),
    "Unigram, no prefix space": lambda: unigram(split=True, scheme="never"),
    "WordPiece": word_piece,
    "WordLevel": word_level,
    "added tokens": with_added,
    "no offsets": without_offsets,
}
BOS_IF_ANY = "{{ bos_token or '' }}"
# The template, and what it writes between the generation prompt and the words of an answer.
SHAPES = {
    "plain": (TEMPLATES["plain"], ""),
    "chatml": (TEMPLATES["chatml"].replace("<|im_end|>", "</s>"), ""),
    "mistral": (
        BOS_IF_ANY + "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ ' ' + m['content'] + eos_token }}{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% endif %}{% endfor %}",
        " ",
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "",
    ),
    "bare": (
        "{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}",
        "",
    ),
}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CONVERSATIONS = [
    [turn("user", "Hi there"), turn("assistant", "The sky")],
    [
        turn("system", "Be brief."),
        turn("user", "Hi there"),
        turn("assistant", "The sky is blue"),
        turn("user", "More "),
        turn("assistant", " it said, café\n\n漢"),
        turn("user", "said"),
        turn("assistant", "sky"),
    ],
]


def expected_mask(tokenizer: PreTrainedTokenizerFast, text: str, said: list[str]) -> list[bool]:
    """Return which tokens hold a character of an answer or its stop, by their offsets."""
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    held = [False] * len(text)
    at = 0
    for answer in said:
        at = text.index(answer, at)
        held[at : at + len(answer)] = [True] * len(answer)
        at += len(answer)
    return [any(held[start:end]) for start, end in spans]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MADE)
def test_ids_are_those_of_apply_chat_template_and_the_mask_is_what_is_said(
    name: str, shape: str
) -> None:
    tokenizer = MADE[name]()
    tokenizer.chat_template, between = SHAPES[shape]
    chat = ChatFormat(tokenizer)
    for turns in CONVERSATIONS:
        row = chat.sft_row(Example(prompt=[], completion=turns))
        theirs = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        assert list(row.input_ids) == theirs
        said = [f"{between}{t['content']}</s>" for t in turns if t["role"] == "assistant"]
        if tokenizer.is_fast:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            wide = [a < b for a, b in spans["offset_mapping"]]
            mask = expected_mask(tokenizer, text, said)
            # A token without characters may stand on either side.
            assert [t for t, w in zip(row.trained, wide, strict=True) if w] == [
                m for m, w in zip(mask, wide, strict=True) if w
            ]
        else:
            spoken = [i for i, t in zip(row.input_ids, row.trained, strict=True) if t]
            assert tokenizer.decode(spoken) == "".join(said)
        assert row.trained.count(True) > 0
        # What a server sends for each turn that the model answers.
        for i, answered in enumerate(turns):
            if answered["role"] == "assistant":
                served = tokenizer.apply_chat_template(
                    turns[:i], tokenize=True, add_generation_prompt=True, return_dict=False
                )
                assert chat.prompt_ids(turns[:i]) == served


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MADE)
def test_rows_made_together_are_those_made_one_by_one(
    name: str, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_text, "_TOGETHER", 60)
    tokenizer = MADE[name]()
    tokenizer.chat_template = SHAPES[shape][0]
    chat = ChatFormat(tokenizer)
    examples = [
        Example(prompt=[], completion=CONVERSATIONS[0], source="a:1", weight=0.5),
        Example(prompt="Hi th", completion="ere", source="a:2"),
        Example(prompt=CONVERSATIONS[1][:-1], completion=CONVERSATIONS[1][-1:], label_prob=0.25),
        Example(prompt=[], completion=CONVERSATIONS[0], source="a:4"),
    ]
    rows = chat.sft_rows(examples)
    assert rows == [ChatFormat(tokenizer).sft_row(example) for example in examples]
    assert [row.label_prob for row in rows] == [1.0, 1.0, 0.25, 1.0]
    with pytest.raises(DataError, match="a:5"):
        chat.sft_rows([*examples, Example(prompt=[], completion=[], source="a:5")])
    assert chat.sft_rows(examples) == rows
    assert chat.sft_rows([]) == []


@pytest.mark.parametrize("shape", SHAPES)
def test_a_template_is_rendered_as_the_tokenizer_renders_it(shape: str) -> None:
    tokenizer = byte_bpe()
    tokenizer.chat_template = SHAPES[shape][0] + "{% if tools %}{{ tools }}{% endif %}{{ more }}"
    direct = DirectTemplate(tokenizer)
    for turns in CONVERSATIONS:
        for options in (
            {"add_generation_prompt": True},
            {"add_generation_prompt": False},
            {"add_generation_prompt": False, "tools": [{"name": "f"}]},
            {"add_generation_prompt": False, "more": "<s>"},
        ):
            theirs = tokenizer.apply_chat_template(turns, tokenize=False, **options)
            assert direct.apply_chat_template(turns, **options) == theirs
    with pytest.raises(ValueError, match="empty conversation"):
        direct.apply_chat_template([], add_generation_prompt=True)
    # Other templates and special tokens, and several templates, from now on.
    tokenizer.chat_template = {"default": "{{ eos_token }}", "tool_use": "tools"}
    assert direct.apply_chat_template(CONVERSATIONS[0], add_generation_prompt=True) == "</s>"
    tokenizer.chat_template = "{{ eos_token }}{{ messages | length }}"
    tokenizer.eos_token = "<|im_end|>"
    said = direct.apply_chat_template(CONVERSATIONS[0], add_generation_prompt=True)
    assert said == "<|im_end|>2"


LOOP = "{% for m in messages %}" + "".join(
    f"{{{{ loop.{name} }}}}"
    for name in ("first", "last", "index", "index0", "revindex", "revindex0", "length", "depth")
)
LOOP += "{{ loop.cycle('a', 'b') }}{{ loop.previtem.role if loop.previtem }}{% endfor %}"


def test_loops_of_a_template_are_those_of_the_tokenizer_and_the_sandbox_stays_closed() -> None:
    tokenizer = byte_bpe()
    tokenizer.chat_template = LOOP
    direct = DirectTemplate(tokenizer)
    for turns in CONVERSATIONS:
        theirs = tokenizer.apply_chat_template(turns, tokenize=False)
        assert direct.apply_chat_template(turns, add_generation_prompt=False) == theirs
    for unsafe in ("messages.append(1)", "loop.__class__.mro", "loop.__init__()", "m.clear()"):
        tokenizer.chat_template = f"{{% for m in messages %}}{{{{ {unsafe} }}}}{{% endfor %}}"
        with pytest.raises(SecurityError):
            direct.apply_chat_template(CONVERSATIONS[0], add_generation_prompt=True)


def test_a_tokenizer_that_renders_by_itself_is_asked() -> None:
    class Own(PreTrainedTokenizerFast):
        def apply_chat_template(self, *_: object, **__: object) -> str:
            return "mine"

    tokenizer = byte_bpe()
    tokenizer.chat_template = "theirs"
    own = Own(tokenizer_object=tokenizer.backend_tokenizer, chat_template="theirs")
    for asked, expected in ((tokenizer, "theirs"), (own, "mine")):
        found = DirectTemplate(asked).apply_chat_template(
            CONVERSATIONS[0], add_generation_prompt=False
        )
        assert found == expected


@pytest.mark.parametrize("name", MADE)
def test_tokens_before_a_character_are_those_of_the_tokenizers_own_offsets(name: str) -> None:
    tokenizer = MADE[name]()
    for text in [*TEXTS, " ".join(TEXTS) + "</s>\n", "👩\u200d🚀 e\u0301ﬁ 한국어 \n\t x", ""]:
        if not tokenizer.is_fast:
            continue
        found = TokenText(tokenizer, text)
        theirs = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = theirs["input_ids"], theirs["offset_mapping"]
        assert found.ids == ids
        assert [found.end_of(i) for i in range(len(ids))] == [end for _, end in spans]
        for cut in range(len(text) + 1):
            first = next((i for i, (_, end) in enumerate(spans) if end > cut), len(ids))
            # Tokens without characters may stand on either side of the cut.
            least = next(k for k in range(first, -1, -1) if not k or spans[k - 1] != (cut, cut))
            assert least <= TokenText(tokenizer, text).before(cut) <= first
            assert found.before(cut) == TokenText(tokenizer, text).before(cut)


def test_settings_left_in_a_tokenizer_cut_and_pad_no_row() -> None:
    tokenizer = byte_bpe()
    text = " ".join(TEXTS)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(whole) > 8
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=500)
    assert TokenText(tokenizer, text).ids == whole


ACROSS_WORDS = ("SentencePiece BPE, not split", "Llama 2", "Unigram, not split")
"""Trained on so little, and not cut into words, these have a token for a colon and a space."""


@pytest.mark.parametrize("name", MADE)
def test_pair_of_texts_starts_from_the_prompts_ids(name: str) -> None:
    tokenizer = MADE[name]()
    chat = ChatFormat(tokenizer)
    pair = chat.pair_row(Example(prompt="Hi there:", completion=" The sky", rejected="said"))
    shared = pair.num_prompt_tokens
    assert pair.chosen.input_ids[:shared] == pair.rejected.input_ids[:shared]
    head = chat.prompt_ids("Hi there:")
    assert list(pair.chosen.input_ids[: len(head)]) == head
    # The answer is continued in the prompt's text: no space is put before it.
    whole = tokenizer("Hi there: The sky", add_special_tokens=False)["input_ids"]
    if name not in ACROSS_WORDS:
        assert list(pair.chosen.input_ids[-len(whole) - 1 :]) == [*whole, tokenizer.eos_token_id]
    for row in (pair.chosen, pair.rejected):
        assert row.trained == (False,) * len(head) + (True,) * (len(row.trained) - len(head))


def test_texts_that_would_merge_at_the_seam_are_tokenized_apart() -> None:
    tokenizer = byte_bpe()
    row = ChatFormat(tokenizer).sft_row(Example(prompt="Hi th", completion="ere"))
    assert tokenizer("Hi there")["input_ids"] != [*row.input_ids[:-1]]
    parts = tokenizer("Hi th")["input_ids"], tokenizer("ere")["input_ids"]
    assert list(row.input_ids) == [*parts[0], *parts[1], tokenizer.eos_token_id]
    assert row.trained.index(True) == len(parts[0])


def test_preflight_compares_ids_and_not_text(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = pieces_bpe("always")
    tokenizer.chat_template = SHAPES["zephyr"][0]
    chat = ChatFormat(tokenizer)
    assert tokens.template(chat, CONVERSATIONS).verdict == "ok"
    # The same text with one space more, which a comparison without white space would not see.
    found = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer,
        "apply_chat_template",
        lambda turns, *, tokenize, **options: (
            tokenizer.encode("<|user|>\n Hi", add_special_tokens=False)
            if tokenize
            else found(turns, tokenize=False, **options)
        ),
    )
    assert tokens.template(chat, CONVERSATIONS).verdict == "fail"


@pytest.mark.parametrize("shape", ["bare", "chatml", "zephyr", "plain"])
@pytest.mark.parametrize("name", MADE)
def test_preflight_counts_prompts_that_end_inside_a_token(name: str, shape: str) -> None:
    tokenizer = MADE[name]()
    tokenizer.chat_template = SHAPES[shape][0]
    chat = ChatFormat(tokenizer)
    # The tokenizer itself says whether the text of a prompt ends inside a token of the whole.
    expected = 0
    for turns in CONVERSATIONS:
        whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        prompt = tokenizer.apply_chat_template(
            turns[:-1], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        expected += whole[: len(prompt)] != prompt
    found = tokens.template(chat, CONVERSATIONS)
    assert (found.verdict == "warn" and "spans the end" in found.remedy) == (expected > 0)
    assert expected == 0 or f"and {expected} of the prompts do not" in found.value


def test_some_tokenizers_have_such_a_token() -> None:
    """Else the test above would have nothing to count."""
    tokenizer = word_level()
    tokenizer.chat_template = SHAPES["bare"][0]
    assert tokens.template(ChatFormat(tokenizer), CONVERSATIONS).verdict == "warn"


@pytest.mark.skipif("ALIGN_REAL_DATA" not in os.environ, reason="needs ALIGN_REAL_DATA")
def test_ids_of_a_real_sentencepiece_tokenizer() -> None:
    folder = Path(os.environ["ALIGN_REAL_DATA"]) / "models/stories260K-hd32"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for template, _ in SHAPES.values():
        tokenizer.chat_template = template
        for turns in CONVERSATIONS:
            row = ChatFormat(tokenizer).sft_row(Example(prompt=[], completion=turns))
            theirs = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
            assert list(row.input_ids) == theirs
