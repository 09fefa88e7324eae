"""Convert examples to token rows; rendering prefixes shows which tokens are trained.

An assistant turn is the text that the template appends for it:
``render(turns[:i], add_generation_prompt=True)`` must be a prefix of ``render(turns[:i + 1])``.
The whole text is tokenized once, so the ids equal those of ``apply_chat_template(tokenize=True)``
for every tokenizer. The mask follows from the characters at which each turn begins and ends.
Token ids are never compared with the pad id.
"""

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

from align.core.errors import DataError, RecipeError
from align.core.types import Example, PairRow, PromptRow, Text, TokenRow, Turn
from align.data.render.content import (
    check_prefix,
    check_shape,
    check_tools,
    check_turns,
    is_tie,
    message_of,
    shape_of,
)
from align.data.render.rendering import DirectTemplate
from align.data.render.templates import (
    FAMILIES,
    NEEDED,
    family_of,
    needs,
    prefill_in,
    template_problems,
    template_text,
    with_stop,
)
from align.data.render.token_text import (
    TokenText,
    Written,
    believed,
    leading_bos,
    num_head,
    num_shared,
    token_texts,
    weighed_row,
)
from align.recipe.schema import TokenizerSpec
from reward_models.limits import LimitError, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
PLAIN_STRINGS = (
    "prompts and completions that are plain text are tokenized unchanged, without the model's "
    "chat template. Set strings: chat on the data source to render them as turns."
)
NO_STOP = "D115"
"""Code for a template that ends an assistant turn without a stop token."""
_PROBE: list[Turn] = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
]


class ChatFormat:
    """Render prompts, conversations and pairs with one tokenizer.

    Args:
        tokenizer: a transformers tokenizer; only conversations need a chat template.
        stop_token_ids: generation stops at each of these; None uses the tokenizer's eos. The first
            one is appended to plain-text responses.

    Raises:
        DataError: the tokenizer has no stop token.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        stop_token_ids: Sequence[int] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        if stop_token_ids is None:
            eos = tokenizer.eos_token_id
            stop_token_ids = (eos,) if isinstance(eos, int) else ()
        if not stop_token_ids:
            raise DataError(needs("stop_token"))
        self.stop_token_ids: tuple[int, ...] = tuple(stop_token_ids)
        self._stops = frozenset(self.stop_token_ids)
        self._bos = leading_bos(tokenizer)
        self._shapes: set[Hashable] = set()
        self._told = False
        self._endless = ""
        self._template = DirectTemplate(tokenizer)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def prompt_ids(
        self,
        prompt: Text,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the ids from which the model responds (with the generation prompt and one BOS).

        A plain string is tokenized unchanged, with the BOS that the tokenizer adds.

        Raises:
            DataError: a conversation, but the tokenizer has no chat template, or rendering fails
                or exceeds its limits.
        """
        if isinstance(prompt, str):
            ids = TokenText(self.tokenizer, prompt).ids
            return self._missing_bos(ids) + ids
        given = Example(prompt, source="prompt", tools=tools, template_kwargs=template_kwargs or {})
        return TokenText(self.tokenizer, self._prompt_text(list(prompt), given)).ids

    def prompt_row(self, example: Example) -> PromptRow:
        """Return the tokenized prompt of an example with its columns for the rewards."""
        prompt, prefill = example.prompt, ""
        if isinstance(prompt, str):
            ids = self.prompt_ids(prompt)
        else:
            text = self._prompt_text(list(prompt), example)
            ids = TokenText(self.tokenizer, text).ids
            prefill = self._prefill(list(prompt), text, example)
        return PromptRow(
            input_ids=tuple(ids),
            prompt=prompt,
            columns=example.columns,
            source=example.source,
            tools=example.tools,
            template_kwargs=example.template_kwargs,
            prefill=prefill,
        )

    def sft_row(self, example: Example) -> TokenRow:
        """Return the tokenized prompt and completion; the completion's assistant turns are trained.

        A plain-text row trains the completion and the stop token. With an empty prompt (corpus),
        the row is BOS (untrained), text and stop token.

        Raises:
            DataError: the template rewrites earlier turns, or there is nothing to train.
        """
        return believed(self._row(example, example.completion), example)

    def sft_rows(self, examples: Sequence[Example]) -> list[TokenRow]:
        """Return ``sft_row`` of each example, faster; an error may name any invalid example."""
        try:
            written = [self._written(e, e.completion) for e in examples]
        except DataError:
            self._endless = ""  # by which row a template has no end, ``sft_row`` finds out
            raise
        texts = token_texts(self.tokenizer, [x.text for x in written if x is not None])
        return [
            self.sft_row(e) if x is None else believed(self._marked(x, next(texts), e), e)
            for e, x in zip(examples, written, strict=True)
        ]

    def pair_row(self, example: Example) -> PairRow:
        """Return both responses tokenized after one shared prompt, with identical prompt ids.

        Both end with their stop token: a scorer reads the last token, and sampled responses end
        with it.

        Raises:
            DataError: both responses have the same ids, or the template cannot be split.
        """
        chosen = self._until_stop(example, example.completion)
        rejected = self._until_stop(example, example.rejected)
        if chosen.input_ids == rejected.input_ids:
            raise DataError(f"{example.source}: chosen and rejected have the same tokens")
        # Common tokens, but never a trained one: each response must train all of its tokens.
        shared = num_shared(chosen.input_ids, rejected.input_ids)
        prompt_end = min(shared, *(row.trained.index(True) for row in (chosen, rejected)))
        return PairRow(
            chosen=chosen,
            rejected=rejected,
            num_prompt_tokens=prompt_end,
            margin=example.margin or 0.0,
            source=example.source,
            tie=is_tie(example),
            label_prob=example.label_prob,
            num_head_tokens=num_head(chosen.input_ids[:prompt_end], self.tokenizer),
        )

    def _until_stop(self, example: Example, completion: Text | None) -> TokenRow:
        """Return a row without the text that the template writes after the last trained token."""
        row = self._row(example, completion)
        end = len(row.trained) - row.trained[::-1].index(True)
        return TokenRow(row.input_ids[:end], row.trained[:end], source=row.source)

    def _missing_bos(self, ids: list[int]) -> list[int]:
        """Return the BOS that the tokenizer adds, unless the text already begins with it."""
        return [] if ids[:1] == self._bos else self._bos

    def _row(self, example: Example, completion: Text | None) -> TokenRow:
        written = self._written(example, completion)
        if written is None:
            return self._plain_row(cast("str", example.prompt), cast("str", completion), example)
        return self._marked(written, TokenText(self.tokenizer, written.text), example)

    def _written(self, example: Example, completion: Text | None) -> Written | None:
        """Return the rendered conversation of an example; None if it is plain text."""
        prompt = example.prompt
        if not completion:
            raise DataError(f"{example.source}: there is no completion to train on")
        if isinstance(prompt, str) and isinstance(completion, str):
            return None
        if isinstance(completion, str):
            completion = [Turn(role="assistant", content=completion)]
        if isinstance(prompt, str):
            prompt = [Turn(role="user", content=prompt)] if prompt else []
        return self._conversation(list(prompt), list(completion), example)

    def _plain_row(self, prompt: str, completion: str, example: Example) -> TokenRow:
        if prompt and self.tokenizer.chat_template is not None and not self._told:
            logger.info(PLAIN_STRINGS)
            self._told = True
        head = self.prompt_ids(prompt)
        whole = TokenText(self.tokenizer, prompt + completion).ids
        whole = self._missing_bos(whole) + whole
        answer = whole[len(head) :]
        if whole[: len(head)] != head:
            # A token would span the boundary of prompt and response. Generation starts from the
            # prompt's tokens and could never produce it.
            answer = TokenText(self.tokenizer, completion).ids
        if not answer or answer[-1] not in self.stop_token_ids:
            answer.append(self.stop_token_ids[0])
        ids = head + answer
        return weighed_row(ids, [(len(head), len(ids), example.weight)], example.source)

    def _conversation(self, prompt: list[Turn], answer: list[Turn], example: Example) -> Written:
        turns = prompt + answer
        # Render up to each assistant turn to find the characters at which it begins and ends.
        ends: list[tuple[int, int, int]] = []
        done = ""
        for i, turn in enumerate(turns):
            if turn["role"] == "assistant":
                head, done = self._around(turns, i, example, done=done)
                ends.append((i, len(head), len(done)))
        return Written(turns, len(prompt), done, ends)

    def _marked(self, written: Written, text: TokenText, example: Example) -> TokenRow:
        """Return the row of a conversation whose whole text was tokenized, with its weights."""
        (turns, num_prompt, done, ends), source = written, example.source
        spans: list[tuple[int, int, float]] = []
        place, first = 0, 0
        for i, begin, end in ends:
            # Tokens between the two characters belong to the turn, up to and including its stop
            # token.
            start, stop = text.before(begin), text.before(end)
            stop = self._stop_in(text.ids[start:stop], done[begin:end], source=source) + start
            # Assistant turns in the prompt are context and are not trained.
            if i >= num_prompt:
                weight = turns[i].get("weight", 1.0) * example.weight
                spans.append((start, stop + 1, weight))
            # Everything before this turn, then the turn itself, must appear in the rendered text.
            check_turns(turns[first:i], done[:begin], first=first, source=source, begin=place)
            said = done[: text.end_of(stop)]
            check_turns([turns[i]], said, first=i, source=source, begin=begin)
            place, first = end, i + 1
        if not any(weight for _, _, weight in spans):
            raise DataError(f"{source}: there is no assistant turn to train on")
        self._check_shape(turns[:first], done, example)
        return weighed_row(text.ids, spans, source)

    def _check_shape(self, turns: Sequence[Turn], rendered: str, example: Example) -> None:
        """Check the tools, and once per conversation shape that every turn is rendered."""
        check_tools(example.tools, rendered, source=example.source)
        # Once per shape: whether a template renders a turn depends on roles and keys, not on the
        # text.
        shape = shape_of(turns, bool(example.tools), example.template_kwargs)
        if shape not in self._shapes:
            asks = turns[-1]["role"] != "assistant"
            render = partial(self._render, example=example, add_generation_prompt=asks)
            check_shape(turns, render, source=example.source)
            self._shapes.add(shape)

    def _around(self, turns: list[Turn], i: int, example: Example, *, done: str) -> tuple[str, str]:
        """Render before turn i (with the generation prompt) and after it; check both prefixes."""
        head = self._render(turns[:i], example=example, add_generation_prompt=True)
        full = self._render(turns[: i + 1], example=example, add_generation_prompt=False)
        check_prefix(done, head, source=example.source)
        check_prefix(head, full, source=example.source)
        return head, full

    def _stop_in(self, ids: Sequence[int], text: str, *, source: str) -> int:
        """Return the index of the only stop token in what the template writes for a turn."""
        stops = {token: num for token in self._stops if (num := ids.count(token))}
        if sum(stops.values()) > 1:
            stop = self.tokenizer.convert_ids_to_tokens(min(stops, key=ids.index))
            raise DataError(
                f"{source}: the response itself contains the stop token {stop!r}. Remove it, since "
                "the template writes it at the end of the turn"
            )
        if stops:
            return ids.index(*stops)
        names = self.tokenizer.convert_ids_to_tokens(list(self.stop_token_ids))
        raise DataError(
            f"{source}: the chat template ends the assistant's turn without a stop token: "
            f"{text[-40:]!r} contains none of {names}, so the model would never learn to stop. "
            "Choose a template that writes one (stages.<base>.tokenizer.chat_template: "
            f"{', '.join(FAMILIES)}), name the token that ends its turns (tokenizer.stop_token), "
            "or append the stop token (tokenizer.append_stop: true)",
            code=NO_STOP,
        )

    def _prompt_text(self, turns: list[Turn], example: Example) -> str:
        # A history must be valid as training data too: responses end and turns are only appended.
        turns = [cast(Turn, {k: v for k, v in t.items() if k != "weight"}) for t in turns]
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
        done = ""
        if last >= 0:
            history = replace(example, prompt=[], weight=1.0)
            self._row(history, turns[: last + 1])
            done = self._render(turns[: last + 1], example=example, add_generation_prompt=False)
        head = self._render(turns, example=example, add_generation_prompt=True)
        check_prefix(done, head, source=example.source)
        rest = turns[last + 1 :]
        check_turns(rest, head, first=last + 1, source=example.source, begin=len(done))
        self._check_shape(turns, head, example)
        return head

    def _prefill(self, turns: list[Turn], head: str, example: Example) -> str:
        """Return what the template writes at the beginning of the response after ``head``."""
        before = self._render(turns, example=example, add_generation_prompt=False)
        return prefill_in(head[len(before) :], self._special) if head.startswith(before) else ""

    @cached_property
    def _special(self) -> set[str]:
        return {str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special}

    def _render(
        self, turns: Sequence[Turn], *, example: Example, add_generation_prompt: bool
    ) -> str:
        if self.tokenizer.chat_template is None:
            raise DataError(f"{example.source}: a conversation, but {needs('chat_template')}")
        if self._endless:
            raise DataError(f"{example.source}: not rendered: {self._endless}")
        tools = {"tools": [dict(tool) for tool in example.tools]} if example.tools else {}
        try:
            return str(
                render_chat(
                    self._template,
                    [message_of(turn) for turn in turns],
                    add_generation_prompt=add_generation_prompt,
                    **tools,
                    **example.template_kwargs,
                )
            )
        except LimitError as error:
            # A template without an end has none for the other rows either.
            self._endless = f"{error} (row {example.source})"
            raise DataError(f"{example.source}: {error}") from error
        except Exception as error:  # raise_exception in a template can raise any type
            roles = [turn["role"] for turn in turns]
            raise DataError(
                f"{example.source}: the chat template rejects roles {roles}: "
                f"{error or type(error).__name__}"
            ) from error


def apply_tokenizer_spec(tokenizer: "PreTrainedTokenizerBase", spec: TokenizerSpec) -> list[str]:
    """Set the pad token, stop token and chat template of a tokenizer from a recipe.

    Args:
        tokenizer: changed in place.
        spec: settings of the recipe; a template family implies its markers and its stop token.

    Returns:
        Tokens that were added to the vocabulary. The caller resizes the embeddings for them.

    Raises:
        RecipeError: a pad token, stop token or chat template is missing in both (all are
            listed), or ``append_stop`` has no effect.
    """
    # Tokens that are new after this function need rows in the embeddings.
    known = set(tokenizer.get_vocab())
    family, stop = family_of(spec.chat_template), spec.stop_token
    if family.stop is not None:
        if stop not in (None, family.stop):
            raise RecipeError(
                f"tokenizer.stop_token: {stop!r} with chat_template {spec.chat_template}, whose "
                f"turns end in {family.stop!r}. Remove stop_token or use another template."
            )
        stop = family.stop
    given = {"eos_token": stop, "pad_token": spec.pad_token}
    special: dict[str, Any] = {name: token for name, token in given.items() if token is not None}
    if special:
        tokenizer.add_special_tokens(special)
    if family.markers:
        markers: dict[str, Any] = {"additional_special_tokens": list(family.markers)}
        tokenizer.add_special_tokens(markers, replace_extra_special_tokens=False)
    if spec.chat_template is not None:
        tokenizer.chat_template = template_text(spec.chat_template)
    _check_complete(tokenizer)
    if spec.append_stop:
        _append_stop(tokenizer)
    added = sorted(set(tokenizer.get_vocab()) - known, key=tokenizer.convert_tokens_to_ids)
    logger.info("tokenizer: added %s, stop token %r", added or "no tokens", tokenizer.eos_token)
    return added


def _check_complete(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise if the tokenizer still lacks a setting that neither it nor the recipe has."""
    has = {
        "pad_token": tokenizer.pad_token,
        "stop_token": tokenizer.eos_token,
        "chat_template": tokenizer.chat_template or None,
    }
    missing = [f"tokenizer.{key}: {needs(key)}" for key in NEEDED if has[key] is None]
    missing += template_problems(tokenizer.chat_template)
    if missing:
        raise RecipeError("\n".join(missing))


def _append_stop(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Change the tokenizer's template so that assistant turns end with the stop token.

    Raises:
        RecipeError: the template already does so.
    """
    try:
        ChatFormat(tokenizer).sft_row(Example(prompt=[], completion=_PROBE, source="append_stop"))
    except DataError as error:
        if error.code != NO_STOP:
            raise
        found: Any = tokenizer.chat_template
        # A tokenizer may have several, by name: one for tools, one for documents.
        tokenizer.chat_template = (
            {name: with_stop(text) for name, text in found.items()}
            if isinstance(found, dict)
            else with_stop(found)
        )
        return
    raise RecipeError(
        "tokenizer.append_stop has no effect: the chat template already ends assistant turns with "
        f"{tokenizer.eos_token!r}. Remove it."
    )
