"""Shared parts of all rewards: the call convention, invalid scores, columns, response text."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from reward_models.specs import RewardSpec

logger = logging.getLogger(__name__)

Text = str | Sequence[Mapping[str, Any]]
"""Plain text or a conversation of ``{"role": ..., "content": ...}`` turns."""


class RewardFunction(Protocol):
    """Score completions with TRL's convention, so that a reward also works in a TRL trainer.

    Attributes:
        name: column name in tables and metrics.
        weight: factor of this reward in a weighted sum; the reward itself does not apply it.
        prefill: True if it expects what the chat template writes at the beginning of a response,
            which the caller puts before each completion.
        invalid: number of missing scores by reason, since the reward was built.
    """

    name: str
    weight: float
    prefill: bool
    invalid: Counter[str]

    def __call__(
        self, *, prompts: Sequence[Text], completions: Sequence[Text], **columns: Sequence[Any]
    ) -> list[float | None]:
        """Return one score per completion; None if the reward cannot score it."""
        ...


class MissingColumnError(KeyError):
    """A reward needs a column that the data do not have."""

    def __str__(self) -> str:
        return str(self.args[0])


class InvalidScoreError(Exception):
    """Raised in a rule that cannot score a row; the message is the counted reason."""


def a_type(value: object) -> str:
    """Return the type of a value with its article, for messages: "an int", "a dict"."""
    name = type(value).__name__
    # Names in u are said with a consonant: a UserDict, a UUID.
    return f"{'an' if name[0].lower() in 'aeio' else 'a'} {name}"


def finite_score(value: object) -> float | None:
    """Return a score from external code as a float, or None unless it is a finite number.

    Booleans, texts, lists and numbers beyond the range of floats are not scores.
    """
    # bool is a subclass of int, and True is more likely a mistake than a score of 1.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        score = float(value)
    except OverflowError:
        return None
    return score if math.isfinite(score) else None


def completion_text(completion: Text) -> str:
    """Return the response's text: the string itself or the content of the last assistant turn.

    Raises:
        InvalidScoreError: the conversation has no assistant turn with text.
    """
    if isinstance(completion, str):
        return completion
    # Tool turns may follow an assistant turn; the last thing that the model said counts.
    for turn in reversed(completion):
        if turn["role"] == "assistant":
            return _turn_text(turn)
    raise InvalidScoreError("no assistant turn")


def _turn_text(turn: Mapping[str, Any]) -> str:
    """Return the text of one turn, whose content may also be a list of parts.

    Raises:
        InvalidScoreError: the turn has no text.
    """
    content = turn.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "".join(part.get("text", "") for part in content)
    raise InvalidScoreError(f"{turn['role']} turn without text")


def plain_text(text: Text) -> str:
    """Return a conversation as text: one turn's content, or ``role: content`` lines of several.

    Plain text is returned unchanged.

    Raises:
        InvalidScoreError: a turn has no text.
    """
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return _turn_text(text[0])
    return "\n".join(f"{turn['role']}: {_turn_text(turn)}" for turn in text)


def response_to(prompt: Text, text: str) -> Text:
    """Return a response in the form of its prompt: the response to turns is an assistant turn."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def column_values(
    columns: Mapping[str, Any], column: str, *, reward: str, num_rows: int
) -> Sequence[Any]:
    """Return the values of a data column, one per completion.

    Raises:
        MissingColumnError: the data have no such column.
        ValueError: the column does not have one value per completion.
    """
    if column not in columns:
        raise MissingColumnError(
            f"reward '{reward}': column '{column}' is missing; the data have "
            f"{sorted(columns) or 'no columns'}. Rename a column or set 'column' of the reward."
        )
    values = columns[column]
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != num_rows:
        raise ValueError(
            f"reward '{reward}': column '{column}' must be a list of {num_rows} values, one per "
            f"completion; found {type(values).__name__}"
        )
    return values


def check_rows(prompts: Sequence[Text], completions: Sequence[Text], *, reward: str) -> None:
    """Raise unless there are equally many prompts and completions.

    Raises:
        ValueError: the two lengths differ.
    """
    if len(prompts) != len(completions):
        raise ValueError(
            f"reward '{reward}': {len(prompts)} prompts but {len(completions)} completions. "
            "Repeat each prompt once per completion."
        )


class Rule:
    """Apply a function of (response text, column value) to each row and count failures.

    A row for which the function raises gets None, and its reason is counted in ``invalid``. An
    exception is not evidence about the response, so it never becomes a score of 0.
    """

    def __init__(
        self,
        function: Callable[[str, Any], float],
        *,
        name: str,
        weight: float = 1.0,
        column: str | None = None,
    ) -> None:
        self.function = function
        self.name = name
        self.__name__ = name
        self.weight = weight
        self.column = column
        self.invalid: Counter[str] = Counter()

    def __call__(
        self, *, prompts: Sequence[Text], completions: Sequence[Text], **columns: Sequence[Any]
    ) -> list[float | None]:
        """Score each completion.

        Raises:
            MissingColumnError: the rule needs a missing column.
        """
        check_rows(prompts, completions, reward=self.name)
        values: Sequence[Any] = [None] * len(completions)
        if self.column is not None:
            values = column_values(
                columns, self.column, reward=self.name, num_rows=len(completions)
            )
        return [self._row(c, v) for c, v in zip(completions, values, strict=True)]

    def _row(self, completion: Text, value: object) -> float | None:
        try:
            if self.column is not None and value is None:
                raise InvalidScoreError(f"column '{self.column}' is empty")
            score = float(self.function(completion_text(completion), value))
            if not math.isfinite(score):
                raise InvalidScoreError("score is not finite")
            return score
        except InvalidScoreError as error:
            reason = str(error)
        # A rule may fail in any way on generated text; the row is reported, not lost.
        except Exception as error:
            reason = type(error).__name__
            if reason not in self.invalid:
                logger.warning("reward %s: %s on %.200r", self.name, error, completion)
        self.invalid[reason] += 1
        return None


def rule_from_spec(
    spec: RewardSpec, function: Callable[[str, Any], float], *, column: str | None = None
) -> Rule:
    """Return a row function as the reward that ``spec`` describes."""
    return Rule(function, name=spec.label, weight=spec.weight, column=column)
