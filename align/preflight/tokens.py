"""Checks on token rows: what is trained, where it stops, what the template wrote, the BOS.

They read the rows as they enter the loss and the files of the model, and render whole conversations
at once, so that they do not repeat how align.data.render.chat makes rows.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from align.core.types import Example, PromptRow, TokenRow, Turn
from align.data.render.chat import ChatFormat
from align.data.render.content import message_of
from align.data.render.token_text import num_shared
from align.preflight.checks import Check, Finding, spread

NUM_RENDERED = 16
"""Conversations that are rendered whole."""
PROBE_ANSWER: Turn = {"role": "assistant", "content": "Yes."}


def row_checks(
    chat: ChatFormat, rows: Sequence[TokenRow], examples: Sequence[Example], *, model_dir: Path
) -> list[Check]:
    """Give the checks on rows that are trained.

    Args:
        chat: what rendered the rows. rows: all of them, as they enter the loss.
        examples: what the rows were made from. model_dir: the saved model they train.
    """
    stops = saved_stops(model_dir)
    few = [chat_turns(e.prompt, e.completion) for e in examples if not is_text(e)]
    return [
        ("trained tokens", partial(trained_tokens, rows)),
        ("stop tokens", partial(stop_tokens, chat, rows, stops)),
        ("template", partial(template, chat, spread(few, NUM_RENDERED))),
        ("first token", partial(first_token, chat, [row.input_ids for row in rows])),
        ("vocabulary", partial(vocabulary, chat, [row.input_ids for row in rows], model_dir)),
    ]


def prompt_checks(
    chat: ChatFormat, prompts: Sequence[PromptRow], *, model_dir: Path
) -> list[Check]:
    """Give the checks on prompts that are answered; a response is made up to render them whole."""
    few = [
        [*row.prompt, PROBE_ANSWER]
        for row in spread([r for r in prompts if not isinstance(r.prompt, str)], NUM_RENDERED)
    ]
    ids = [row.input_ids for row in prompts]
    return [
        ("stop tokens", partial(generation_stops, chat, saved_stops(model_dir))),
        ("template", partial(template, chat, few)),
        ("first token", partial(first_token, chat, ids)),
        ("vocabulary", partial(vocabulary, chat, ids, model_dir)),
    ]


def is_text(example: Example) -> bool:
    """Say whether an example is plain text, to which no template is applied."""
    return isinstance(example.prompt, str) and isinstance(example.completion, str)


def chat_turns(prompt: Any, completion: Any) -> list[Turn]:
    """Join prompt and completion as one conversation."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return [*prompt, *completion]


def saved_stops(model_dir: Path) -> frozenset[int]:
    """Read what stops generation by default: eos_token_id of the saved generation configuration."""
    for name in ("generation_config.json", "config.json"):
        path = model_dir / name
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            if found is not None:
                return frozenset(found if isinstance(found, list) else [found])
    return frozenset()


def trained_tokens(rows: Sequence[TokenRow]) -> Finding:
    """Count the trained tokens; every row has some, none at position 0, which nothing predicts."""
    total = sum(len(row.trained) for row in rows)
    counts = [sum(row.trained) for row in rows]
    value = f"{sum(counts):,} of {total:,} tokens in {len(rows):,} rows, {min(counts)} at least"
    bound = "more than 0 in every row"
    bad = [row for row, n in zip(rows, counts, strict=True) if n == 0 or row.trained[0]]
    if bad:
        places = ", ".join(row.source for row in bad[:5])
        what = f"{len(bad)} rows train nothing, or their first token: {places}"
        return Finding(value, bound, "fail", f"{what}; look at them, or raise max_length")
    return Finding(value, bound)


def stop_tokens(chat: ChatFormat, rows: Sequence[TokenRow], stops: frozenset[int]) -> Finding:
    """See that each run of trained tokens ends in a token that generation stops on."""
    ends = [(row.input_ids[t], row.source) for row in rows for t in _ends(row)]
    names = chat.tokenizer.convert_ids_to_tokens(sorted({token for token, _ in ends}))
    value = f"{len(ends):,} turns end in {', '.join(map(repr, names[:4]))}"
    bound = f"eos_token_id {sorted(stops)} of the saved model"
    wrong = [source for token, source in ends if token not in stops]
    if wrong:
        return Finding(
            value,
            bound,
            "fail",
            f"{len(wrong)} turns ({', '.join(wrong[:3])}) end in a token that generation does not "
            "stop on; name it in stages.<base>.tokenizer.stop_token",
        )
    return Finding(value, bound)


def _ends(row: TokenRow) -> Iterator[int]:
    for t, trained in enumerate(row.trained):
        if trained and (t + 1 == len(row.trained) or not row.trained[t + 1]):
            yield t


def generation_stops(chat: ChatFormat, stops: frozenset[int]) -> Finding:
    """See that the sampler is told to stop where the saved model stops."""
    told = sorted(chat.stop_token_ids)
    names = chat.tokenizer.convert_ids_to_tokens(told)
    verdict = "ok" if set(told) == stops and told else "fail"
    return Finding(
        f"the sampler stops on {', '.join(map(repr, names))}",
        f"eos_token_id {sorted(stops)} of the saved model",
        verdict,
        "name the stop token in stages.<base>.tokenizer.stop_token and run the base stage again",
    )


def template(chat: ChatFormat, conversations: Sequence[Sequence[Turn]]) -> Finding:
    """Compare rows with the ids that ``apply_chat_template`` returns for the whole conversation."""
    if not conversations:
        return Finding("no conversation among the rows: no template is applied")
    tokenizer: Any = chat.tokenizer
    value = f"{len(conversations)} conversations have the ids of apply_chat_template"
    for turns in conversations:
        row = chat.sft_row(Example(prompt=[], completion=list(turns), source="a conversation"))
        said = [message_of(turn) for turn in turns]
        found = tokenizer.apply_chat_template(said, tokenize=True, return_dict=False)
        # No row holds what is said after the last response.
        whole = found if turns[-1]["role"] == "assistant" else found[: len(row.input_ids)]
        at = num_shared(whole, row.input_ids)
        if at < max(len(whole), len(row.input_ids)):
            one, other = (
                tokenizer.decode(list(ids)[at : at + 8]) for ids in (whole, row.input_ids)
            )
            return Finding(
                f"token {at}: whole {one!r}, as trained {other!r}",
                "the same ids",
                "fail",
                "the template writes a conversation otherwise than it grows; choose one that only "
                "appends: stages.<base>.tokenizer.chat_template: plain, chatml or a family's",
            )
    if "strftime_now" in str(tokenizer.chat_template):
        return Finding(
            value,
            "the same text every day",
            "warn",
            "the template writes today's date into every prompt, so another day's run sees other "
            "tokens; choose a family's template with tokenizer.chat_template",
        )
    return Finding(value, "the same ids")


def unknown_id(chat: ChatFormat) -> int:
    """Give the token that stands for what the tokenizer cannot write; -1 where it has none.

    Some tokenizers call their stop token or their BOS so, having no other use for the name.
    """
    found: Any = chat.tokenizer.unk_token_id
    used = (*chat.stop_token_ids, chat.tokenizer.bos_token_id)
    return -1 if found is None or found in used else int(found)


def first_token(chat: ChatFormat, rows: Sequence[Sequence[int]]) -> Finding:
    """Count the beginnings: one BOS where the tokenizer has the habit of writing one, never two."""
    bos = chat.tokenizer.bos_token_id
    if bos is None:
        return Finding("the tokenizer has no BOS", "never two")
    double = sum(list(ids[:2]) == [bos, bos] for ids in rows)
    single = sum(list(ids[:1]) == [bos] for ids in rows) - double
    value = f"{single:,} of {len(rows):,} rows begin with one {chat.tokenizer.bos_token!r}"
    if double:
        return Finding(
            f"{value}, {double:,} with two",
            "never two",
            "fail",
            "the template writes a BOS and the tokenizer adds one; take it out of the template",
        )
    writes = list(chat.tokenizer("a")["input_ids"])[:1] == [bos]
    if writes and single < len(rows):
        return Finding(
            value,
            "all: the tokenizer writes one",
            "warn",
            "these rows begin without the BOS that the model was trained with: the template leaves "
            "it out, or prompts were cut from the left",
        )
    return Finding(value, "never two")


def vocabulary(chat: ChatFormat, rows: Sequence[Sequence[int]], model_dir: Path) -> Finding:
    """See that the model has an embedding for every token and positions for every row."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    embeddings, positions = config["vocab_size"], config.get("max_position_embeddings")
    largest, longest = max(max(ids) for ids in rows), max(len(ids) for ids in rows)
    unknown = unknown_id(chat)
    lost = sum(list(ids).count(unknown) for ids in rows)
    value = f"largest token {largest:,} of {embeddings:,}, longest row {longest:,} of {positions}"
    if largest >= embeddings:
        remedy = "the tokenizer has more tokens than the model; bring both in with a base stage"
        return Finding(value, "smaller", "fail", remedy)
    if positions is not None and longest > positions:
        remedy = f"rows reach past the positions the model was trained on; max_length: {positions}"
        return Finding(value, "smaller", "warn", remedy)
    if lost:
        remedy = "the tokenizer cannot write these rows; look at their characters, or change it"
        return Finding(f"{value}, {lost:,} unknown tokens", "none unknown", "warn", remedy)
    return Finding(value, "smaller")
