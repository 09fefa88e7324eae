"""Data types that cross layers; standard library only.

Worked example. The row ``{"prompt": "2+2?", "completion": "4"}`` at line 7 of a.jsonl becomes
``Example(prompt="2+2?", completion="4", source="a.jsonl:7")``; its tokens
``TokenRow(input_ids=(1, 20, 21, 22, 30, 2), trained=(F, F, F, F, T, T))``: the answer and the stop
token are trained, the prompt is not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict


class Turn(TypedDict):
    """One turn of a conversation.

    ``weight`` multiplies the loss of an assistant turn (absent is 1, 0 leaves it untrained); each
    entry of ``tool_calls`` is ``{"type": "function", "function": {"name", "arguments"}}``.
    """

    role: str
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    weight: NotRequired[float]


Text = str | Sequence[Turn]
"""Plain text (no chat template is applied) or a conversation (the template is)."""


@dataclass(frozen=True, slots=True)
class Example:
    """Hold one row of any data format in canonical form.

    sft: ``prompt`` and ``completion``; a row of messages has an empty prompt and all turns as
    completion, and every assistant turn of the completion is trained.
    preference: ``prompt``, ``completion`` (the chosen answer) and ``rejected``.
    unpaired: ``prompt``, ``completion``, ``label``. prompts: ``prompt`` only.
    ``columns`` keeps every other field of the row (``answer``, ``label`` ...) for the rewards.
    """

    prompt: Text
    completion: Text | None = None
    rejected: Text | None = None
    label: bool | None = None
    margin: float | None = None
    label_prob: float = 1.0
    """Probability that the answer is good (sft) or the chosen one the better (preference)."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    tools: Sequence[Mapping[str, Any]] = ()
    """Schemas of the tools that the template shows the model."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template, such as ``enable_thinking``."""
    weight: float = 1.0
    """Multiplies the loss of the row (sft)."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Hold one tokenised sequence; ``trained[t]`` says whether token t enters the loss.

    ``weights[t]`` multiplies the loss of token t; empty is 1 for every token.
    """

    input_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    source: str = ""
    label_prob: float = 1.0
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class PairRow:
    """Hold one tokenised preference pair: both rows begin with the same prompt token ids.

    ``tie`` says that the two answers were judged equally good; ``shared`` that the prompt may be
    computed once for both, and be cut from the left. For an encoder, whose prompt also sees the
    answer, it is False.
    """

    chosen: TokenRow
    rejected: TokenRow
    num_prompt_tokens: int
    margin: float = 0.0
    source: str = ""
    tie: bool = False
    label_prob: float = 1.0
    shared: bool = True


@dataclass(frozen=True, slots=True)
class PromptRow:
    """Hold one tokenised prompt together with what the rewards need to judge an answer to it."""

    input_ids: tuple[int, ...]
    prompt: Text
    columns: Mapping[str, Any]
    source: str = ""
    tools: Sequence[Mapping[str, Any]] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completion:
    """Hold one sampled answer as the rollout engine gives it back.

    Attributes:
        token_ids: sampled tokens, the stop token included when one was sampled.
        logprobs: natural log-probability of each sampled token under the sampling distribution.
        finish_reason: ``"stop"`` (a stop token was sampled) or ``"length"`` (cut at the limit).
        text: decoded answer without special tokens.
        weights_version: version number of the weights that produced it.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    text: str
    weights_version: int
