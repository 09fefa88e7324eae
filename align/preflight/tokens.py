"""Checks on token rows: trained tokens, stop tokens, the chat template, the BOS, the vocabulary.

They read the rows as they enter the loss and the files of the model, and render whole conversations
at once. They are therefore independent of how align.data.render.chat builds rows.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.core.types import Example, PromptRow, Text, TokenRow, Turn
from align.data.render.chat import ChatFormat
from align.data.render.content import message_of
from align.data.render.token_text import num_shared
from align.data.store.facts import Places, RowFacts, row_facts
from align.data.store.rows import StoredRows
from align.models.loading import num_positions
from align.preflight.checks import Check, Finding, Verdict, spread
from reward_models.limits import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_RENDERED = 16
"""Number of conversations that are rendered as a whole."""
PROBE_ANSWER: Turn = {"role": "assistant", "content": "Yes."}


def row_checks(
    chat: ChatFormat,
    rows: Sequence[TokenRow],
    examples: Sequence[Example],
    *,
    model_dir: Path,
) -> list[Check]:
    """Return the checks on training rows.

    Args:
        chat: row format. rows: all rows, as they enter the loss.
        examples: examples behind the rows. model_dir: the saved model.
    """
    stops = saved_stops(model_dir)
    few = [chat_turns(e.prompt, e.completion) for e in examples if not is_text(e)]
    if isinstance(rows, StoredRows):
        return _stored_checks(chat, rows, few, model_dir=model_dir)
    return [
        ("trained tokens", partial(trained_tokens, rows)),
        ("stop tokens", partial(stop_tokens, chat, rows, stops)),
        ("template", partial(template, chat, spread(few, NUM_RENDERED))),
        ("first token", partial(first_token, chat, [row.input_ids for row in rows])),
        ("vocabulary", partial(vocabulary, chat, [row.input_ids for row in rows], model_dir)),
    ]


def _stored_checks(
    chat: ChatFormat, rows: StoredRows, few: Sequence[Sequence[Turn]], *, model_dir: Path
) -> list[Check]:
    """Return the same checks, for which the rows of stores are read once."""
    stops = saved_stops(model_dir)
    # One pass over the files answers all checks, at the first of them that runs.
    facts = _facts_of(chat, rows, stops)
    return [
        ("trained tokens", lambda: _trained(facts().trained, facts().untrained)),
        ("stop tokens", lambda: _ended(chat, facts().ends, facts().wrong_ends, stops=stops)),
        ("template", partial(template, chat, spread(few, NUM_RENDERED))),
        ("first token", lambda: _begun(chat, facts().begins)),
        ("vocabulary", lambda: _known_tokens(facts(), model_dir)),
    ]


def _facts_of(chat: ChatFormat, rows: StoredRows, stops: frozenset[int]) -> Callable[[], RowFacts]:
    """Return a function that reads the rows of stores once, when it is first called."""
    bos: Any = chat.tokenizer.bos_token_id
    return cache(partial(row_facts, rows, stops=stops, bos=bos, unknown=_unknown_id(chat)))


def _known_tokens(facts: RowFacts, model_dir: Path) -> Finding:
    """Return the finding of ``vocabulary`` for the rows of stores."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    return _fits(
        (facts.largest, facts.longest, facts.num_unknown),
        embeddings=config.get("text_config", config)["vocab_size"],
        positions=num_positions(model_dir),
        too_long="warn",
    )


def prompt_checks(
    chat: ChatFormat, prompts: Sequence[PromptRow], *, model_dir: Path
) -> list[Check]:
    """Return the checks on prompts; they are rendered with a fixed probe response."""
    # Places, since millions of prompts may be on disk.
    chats = [i for i, row in enumerate(prompts) if not isinstance(row.prompt, str)]
    few = [[*prompts[i].prompt, PROBE_ANSWER] for i in spread(chats, NUM_RENDERED)]
    stops = saved_stops(model_dir)
    begin: list[Check] = [
        ("stop tokens", partial(generation_stops, chat, stops)),
        ("template", partial(template, chat, few)),
    ]
    if isinstance(prompts, StoredRows):
        facts = _facts_of(chat, prompts, stops)
        return [
            *begin,
            ("first token", lambda: _begun(chat, facts().begins)),
            ("vocabulary", lambda: _known_tokens(facts(), model_dir)),
        ]
    ids = [row.input_ids for row in prompts]
    return [
        *begin,
        ("first token", partial(first_token, chat, ids)),
        ("vocabulary", partial(vocabulary, chat, ids, model_dir)),
    ]


def is_text(example: Example) -> bool:
    """Return whether an example is plain text, to which no template is applied."""
    return isinstance(example.prompt, str) and isinstance(example.completion, str)


def chat_turns(prompt: Text, completion: Text | None) -> list[Turn]:
    """Return prompt and completion as one conversation."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return [*prompt, *(completion or [])]


def saved_stops(model_dir: Path) -> frozenset[int]:
    """Return the saved model's default stop tokens: eos_token_id of its configuration."""
    # In the order in which transformers looks for stop tokens.
    for name in ("generation_config.json", "config.json"):
        path = model_dir / name
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            if found is not None:
                return frozenset(found if isinstance(found, list) else [found])
    return frozenset()


def trained_tokens(rows: Sequence[TokenRow]) -> Finding:
    """Check that every row has trained tokens, none at position 0, which nothing predicts."""
    total = sum(len(row.trained) for row in rows)
    counts = [sum(row.trained) for row in rows]
    bad = [row.source for row, n in zip(rows, counts, strict=True) if n == 0 or row.trained[0]]
    return _trained((sum(counts), total, len(rows), min(counts)), Places(len(bad), bad))


def _trained(numbers: tuple[int, int, int, int], bad: Places) -> Finding:
    """Return the finding for trained and all tokens, rows, and the fewest trained of a row."""
    num_trained, total, num_rows, least = numbers
    value = f"{num_trained:,} of {total:,} tokens in {num_rows:,} rows, at least {least} per row"
    bound = "more than 0 in every row"
    if bad.num:
        places = ", ".join(bad.first[:5])
        what = f"{bad.num} rows train nothing, or their first token: {places}"
        return Finding(value, bound, "fail", f"{what}. Check these rows, or raise max_length")
    return Finding(value, bound)


def stop_tokens(chat: ChatFormat, rows: Sequence[TokenRow], stops: frozenset[int]) -> Finding:
    """Check that each run of trained tokens ends in a token that generation stops on."""
    ends = [(row.input_ids[t], row.source) for row in rows for t in _ends(row)]
    wrong = [source for token, source in ends if token not in stops]
    counts = Counter(token for token, _ in ends)
    return _ended(chat, counts, Places(len(wrong), wrong), stops=stops)


def _ended(
    chat: ChatFormat, ends: Mapping[int, int], wrong: Places, *, stops: frozenset[int]
) -> Finding:
    """Return the finding for how often each token ends a turn."""
    names = chat.tokenizer.convert_ids_to_tokens(sorted(ends))
    value = f"{sum(ends.values()):,} turns end in {', '.join(map(repr, names[:4]))}"
    bound = f"eos_token_id {sorted(stops)} of the saved model"
    if wrong.num:
        return Finding(
            value,
            bound,
            "fail",
            f"{wrong.num} turns ({', '.join(wrong.first[:3])}) end in a token that generation does "
            "not stop on. Set it in stages.<base>.tokenizer.stop_token",
        )
    return Finding(value, bound)


def _ends(row: TokenRow) -> Iterator[int]:
    for t, trained in enumerate(row.trained):
        if trained and (t + 1 == len(row.trained) or not row.trained[t + 1]):
            yield t


def generation_stops(chat: ChatFormat, stops: frozenset[int]) -> Finding:
    """Check that the sampler has the stop tokens of the saved model."""
    told = sorted(chat.stop_token_ids)
    names = chat.tokenizer.convert_ids_to_tokens(told)
    verdict = "ok" if set(told) == stops and told else "fail"
    return Finding(
        f"the sampler stops on {', '.join(map(repr, names))}",
        f"eos_token_id {sorted(stops)} of the saved model",
        verdict,
        "set the stop token in stages.<base>.tokenizer.stop_token and run the base stage again",
    )


def _difference(chat: ChatFormat, turns: Sequence[Turn]) -> str:
    """Return where a conversation's row leaves the ids of apply_chat_template, or ""."""
    tokenizer: Any = chat.tokenizer
    row = chat.sft_row(Example(prompt=[], completion=list(turns), source="a conversation"))
    said = [message_of(turn) for turn in turns]
    found = render_chat(tokenizer, said, tokenize=True, return_dict=False)
    # A row ends with the last response; turns after it are not compared.
    whole = found if turns[-1]["role"] == "assistant" else found[: len(row.input_ids)]
    # Number of leading ids in common; less than both lengths means a difference.
    at = num_shared(whole, row.input_ids)
    if at == max(len(whole), len(row.input_ids)):
        return ""
    one, other = (tokenizer.decode(list(ids)[at : at + 8]) for ids in (whole, row.input_ids))
    return f"token {at}: whole {one!r}, as trained {other!r}"


def template(chat: ChatFormat, conversations: Sequence[Sequence[Turn]]) -> Finding:
    """Compare rows with the ids that ``apply_chat_template`` returns for the whole conversation."""
    if not conversations:
        return Finding("no conversation among the rows: no template is applied")
    tokenizer: Any = chat.tokenizer
    value = f"{len(conversations)} conversations have the ids of apply_chat_template"
    if difference := next(filter(None, (_difference(chat, c) for c in conversations)), ""):
        return Finding(
            difference,
            "the same ids",
            "fail",
            "earlier turns are rendered differently as a conversation grows. Use one that only "
            "appends: stages.<base>.tokenizer.chat_template: plain, chatml or a family's",
        )
    if apart := sum(_has_seam(chat, turns) for turns in conversations):
        return Finding(
            f"{value}, and {apart} of the prompts do not",
            "rows that begin with the ids of their prompt",
            "warn",
            "a token spans the end of the prompt and the beginning of the response: training sees "
            "it, but a response is sampled after other tokens. Let the template end the generation "
            "prompt in a special token or a line break",
        )
    if header := next(filter(None, (_unprompted(tokenizer, c) for c in conversations)), ""):
        return Finding(
            value,
            "a generation prompt",
            "warn",
            f"the template writes {header!r} before a response, but no generation prompt, so the "
            "model has to write it itself, and rewards see it. Let the template write it for "
            "add_generation_prompt, or choose a family's with tokenizer.chat_template",
        )
    if "strftime_now" in str(tokenizer.chat_template):
        return Finding(
            value,
            "the same text every day",
            "warn",
            "the template writes today's date into every prompt: a run on another day sees other "
            "tokens. Choose a family's template with tokenizer.chat_template",
        )
    return Finding(value, "the same ids")


def _has_seam(chat: ChatFormat, turns: Sequence[Turn]) -> bool:
    """Return whether a row begins with the text of its last prompt, but not with its ids."""
    place = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    if place == 0:
        return False
    row = chat.sft_row(Example(prompt=[], completion=list(turns[: place + 1]), source="a row"))
    ids = chat.prompt_ids(list(turns[:place]))
    if list(row.input_ids[: len(ids)]) == ids:
        return False
    said = [message_of(turn) for turn in turns[: place + 1]]
    whole = str(render_chat(chat.tokenizer, said, tokenize=False))
    asked = {"tokenize": False, "add_generation_prompt": True}
    return whole.startswith(str(render_chat(chat.tokenizer, said[:-1], **asked)))


def _unprompted(tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn]) -> str:
    """Return what a template without a generation prompt writes before the last response."""
    said = [message_of(turn) for turn in turns]
    before, asked = (
        str(render_chat(tokenizer, said[:-1], tokenize=False, add_generation_prompt=ask))
        for ask in (False, True)
    )
    if asked != before or turns[-1]["role"] != "assistant":
        return ""
    rest = str(render_chat(tokenizer, said, tokenize=False))[len(before) :]
    return rest[: max(0, rest.find(turns[-1]["content"].strip()))].strip()


def _unknown_id(chat: ChatFormat) -> int:
    """Return the id of the tokenizer's unknown token, or -1 if it has none.

    Some tokenizers use their stop token or BOS as the unknown token; that does not count.
    """
    found: Any = chat.tokenizer.unk_token_id
    used = (*chat.stop_token_ids, chat.tokenizer.bos_token_id)
    return -1 if found is None or found in used else int(found)


def first_token(chat: ChatFormat, rows: Sequence[Sequence[int]]) -> Finding:
    """Check that rows start with one BOS if the tokenizer adds one, and never with two."""
    bos = chat.tokenizer.bos_token_id
    if bos is None:
        return _begun(chat, (0, 0, 0))
    double = sum(list(ids[:2]) == [bos, bos] for ids in rows)
    single = sum(list(ids[:1]) == [bos] for ids in rows) - double
    return _begun(chat, (single, double, len(rows)))


def _begun(chat: ChatFormat, numbers: tuple[int, int, int]) -> Finding:
    """Return the finding for the rows with one BOS, with two, and all."""
    bos: Any = chat.tokenizer.bos_token_id
    if bos is None:
        return Finding("the tokenizer has no BOS", "never two")
    single, double, num_rows = numbers
    value = f"{single:,} of {num_rows:,} rows begin with one {chat.tokenizer.bos_token!r}"
    if double:
        return Finding(
            f"{value}, {double:,} with two",
            "never two",
            "fail",
            "the template writes a BOS and the tokenizer adds another. Remove it from the template",
        )
    # Only a tokenizer that adds a BOS itself was trained with one on every row.
    writes = list(chat.tokenizer("a")["input_ids"])[:1] == [bos]
    if writes and single < num_rows:
        return Finding(
            value,
            "all: the tokenizer writes one",
            "warn",
            "these rows start without the BOS that the model was trained with: the template leaves "
            "it out, or prompts were cut from the left",
        )
    return Finding(value, "never two")


def vocabulary(chat: ChatFormat, rows: Sequence[Sequence[int]], model_dir: Path) -> Finding:
    """Check that the model has an embedding for every token and positions for every row."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    return fitting(
        rows,
        embeddings=config.get("text_config", config)["vocab_size"],
        positions=num_positions(model_dir),
        unknown=_unknown_id(chat),
        too_long="warn",
    )


def fitting(
    rows: Sequence[Sequence[int]],
    *,
    embeddings: int,
    positions: int | None,
    unknown: int | None = None,
    too_long: Verdict = "fail",
) -> Finding:
    """Check that there is an embedding for every token and a position for every token of a row.

    Args:
        rows: token ids. embeddings: number of tokens that the model knows.
        positions: number of tokens in its longest text; None has no limit.
        unknown: id of the tokenizer's unknown token. too_long: verdict on a longer row.
    """
    largest, longest = max(max(ids) for ids in rows), max(len(ids) for ids in rows)
    lost = sum(list(ids).count(unknown) for ids in rows) if unknown is not None else 0
    numbers = (largest, longest, lost)
    return _fits(numbers, embeddings=embeddings, positions=positions, too_long=too_long)


def _fits(
    numbers: tuple[int, int, int], *, embeddings: int, positions: int | None, too_long: Verdict
) -> Finding:
    """Return the finding for the largest token, the longest row, and unknown tokens."""
    largest, longest, lost = numbers
    value = f"largest token {largest:,} of {embeddings:,}, longest row {longest:,} of {positions}"
    if largest >= embeddings:
        remedy = "the tokenizer has more tokens than the model. Use the one it was trained with"
        return Finding(value, "smaller", "fail", remedy)
    if positions is not None and longest > positions:
        remedy = f"set max_length: {positions} to drop such rows"
        return Finding(value, "smaller", too_long, remedy)
    if lost:
        remedy = "the tokenizer cannot encode these rows. Check their characters, or change it"
        return Finding(f"{value}, {lost:,} unknown tokens", "none unknown", "warn", remedy)
    return Finding(value, "smaller")
