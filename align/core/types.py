"""Data types shared by all layers; standard library only.

Worked example: the row ``{"prompt": "2+2?", "completion": "4"}`` at line 7 of a.jsonl becomes
``Example(prompt="2+2?", completion="4", source="a.jsonl:7")``. Its tokens are
``TokenRow(input_ids=(1, 20, 21, 22, 30, 2), trained=(F, F, F, F, T, T))``: the response and the
stop token are trained, the prompt is not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, NamedTuple, NotRequired, TypedDict, TypeVar

C = TypeVar("C")


def _quickly_pickled(kind: type[C]) -> type[C]:
    """Return a frozen data class with slots that is pickled to the same bytes in half of the time.

    What ``dataclass`` writes for this looks up the fields of the class for each object.
    """
    names = [entry.name for entry in fields(kind)]  # pyright: ignore[reportArgumentType]
    values, slots = attrgetter(*names), [getattr(kind, name) for name in names]

    def getstate(self: C) -> list[Any]:
        return list(values(self))

    def setstate(self: C, state: Sequence[Any]) -> None:
        for slot, value in zip(slots, state, strict=True):
            slot.__set__(self, value)

    kind.__getstate__, kind.__setstate__ = getstate, setstate  # pyright: ignore
    return kind


class Turn(TypedDict):
    """One turn of a conversation.

    ``weight`` multiplies the loss of an assistant turn (default 1; 0 leaves it untrained). Each
    entry of ``tool_calls`` is ``{"type": "function", "function": {"name", "arguments"}}``.
    """

    role: str
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    weight: NotRequired[float]


NO_DIFFERENCE = "no significant difference"
"""Verdict of a comparison whose 95 % interval includes "no difference"."""

Text = str | Sequence[Turn]
"""Plain text (rendered without a chat template) or a conversation (rendered with it)."""


@_quickly_pickled
@dataclass(frozen=True, slots=True)
class Example:
    """One row of any data format in canonical form.

    sft: ``prompt`` and ``completion``. A row of messages has an empty prompt and all turns as
    completion, and every assistant turn of the completion is trained.
    preference: ``prompt``, ``completion`` (the chosen response) and ``rejected``.
    unpaired: ``prompt``, ``completion``, ``label``. prompts: only ``prompt``.
    ``columns`` keeps every other field of the row (``answer``, ``label`` ...) for the rewards.
    """

    prompt: Text
    completion: Text | None = None
    rejected: Text | None = None
    label: bool | None = None
    margin: float | None = None
    label_prob: float = 1.0
    """Probability that the response is good (sft) or that the chosen one is better (preference)."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    tools: Sequence[Mapping[str, Any]] = ()
    """Schemas of the tools that the template presents to the model."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template, such as ``enable_thinking``."""
    weight: float = 1.0
    """Multiplies the loss of the row (sft)."""


@_quickly_pickled
@dataclass(frozen=True, slots=True)
class TokenRow:
    """One tokenized sequence; ``trained[t]`` is True if token t enters the loss.

    ``weights[t]`` multiplies the loss of token t; an empty tuple means 1 for every token.
    """

    input_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    source: str = ""
    label_prob: float = 1.0
    weights: tuple[float, ...] = ()


@_quickly_pickled
@dataclass(frozen=True, slots=True)
class PairRow:
    """One tokenized preference pair; both rows begin with the same prompt token ids.

    ``tie`` means that both responses were rated equally good. ``shared`` means that the prompt may
    be computed once for both and cut from the left. It is False for an encoder, whose prompt also
    attends to the response. A cut keeps the first ``num_head_tokens`` tokens (BOS).
    """

    chosen: TokenRow
    rejected: TokenRow
    num_prompt_tokens: int
    margin: float = 0.0
    source: str = ""
    tie: bool = False
    label_prob: float = 1.0
    shared: bool = True
    num_head_tokens: int = 0


@_quickly_pickled
@dataclass(frozen=True, slots=True)
class PromptRow:
    """One tokenized prompt with the columns that the rewards need.

    Attributes:
        prefill: text that the chat template writes at the beginning of every response, such as
            ``<think>``; it is part of the prompt's tokens.
    """

    input_ids: tuple[int, ...]
    prompt: Text
    columns: Mapping[str, Any]
    source: str = ""
    tools: Sequence[Mapping[str, Any]] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    prefill: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled response, as returned by the rollout engine.

    Attributes:
        token_ids: sampled tokens, including the stop token if one was sampled.
        logprobs: natural log-probability of each token under the sampling distribution.
        finish_reason: ``"stop"`` (a stop token was sampled) or ``"length"`` (limit reached).
        text: decoded response without its stop token.
        weights_version: version of the weights that produced it.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    text: str
    weights_version: int


class Alarm(NamedTuple):
    """A problem that a running stage noticed: its name, the evidence, and what to do."""

    name: str
    reason: str
    remedy: str
