"""What every reward shares: the call convention, invalid scores, columns, the text of an answer."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from reward_models.specs import RewardBase

logger = logging.getLogger(__name__)

Text = str | Sequence[Mapping[str, Any]]
"""Plain text or a conversation of ``{"role": ..., "content": ...}`` turns."""


class RewardFunction(Protocol):
    """Score completions; the convention is TRL's, so a reward also runs inside a TRL trainer.

    Attributes:
        name: column name in tables and metrics.
        weight: factor of this reward in a weighted sum; the reward itself does not apply it.
        invalid: how often a score could not be given, by reason, since the reward was built.
    """

    name: str
    weight: float
    invalid: Counter[str]

    def __call__(
        self, *, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> list[float | None]:
        """Give one score per completion; None where the reward cannot tell."""
        ...


class MissingColumnError(KeyError):
    """Report a reward that needs a column which the data do not have."""

    def __str__(self) -> str:
        return str(self.args[0])


class InvalidScoreError(Exception):
    """Raise inside a rule when it cannot judge a row; the message is the counted reason."""


def finite_score(value: Any) -> float | None:
    """Return what someone else gave as a score as a float, None unless it is a finite number.

    A truth value, a text, a list and a number beyond floats are no scores.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        score = float(value)
    except OverflowError:
        return None
    return score if math.isfinite(score) else None


def completion_text(completion: Text) -> str:
    """Give the answer's text: the string itself or the content of the last assistant turn.

    Raises:
        InvalidScoreError: if a conversation holds no assistant turn with text.
    """
    if isinstance(completion, str):
        return completion
    for turn in reversed(completion):
        if turn["role"] == "assistant":
            return turn_text(turn)
    raise InvalidScoreError("no assistant turn")


def turn_text(turn: Mapping[str, Any]) -> str:
    """Give the text of one turn, whose content may also be a list of parts.

    Raises:
        InvalidScoreError: it has none.
    """
    content = turn.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "".join(part.get("text", "") for part in content)
    raise InvalidScoreError(f"{turn['role']} turn without text")


def column_values(
    columns: Mapping[str, Any], column: str, *, reward: str, num_rows: int
) -> Sequence[Any]:
    """Give one value per completion of a data column.

    Raises:
        MissingColumnError: if the data have no such column.
        ValueError: if the column does not hold one value per completion.
    """
    if column not in columns:
        raise MissingColumnError(
            f"reward '{reward}': column '{column}' is missing; the data have "
            f"{sorted(columns) or 'no columns'}; rename a column or set 'column' of the reward"
        )
    values = columns[column]
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != num_rows:
        raise ValueError(
            f"reward '{reward}': column '{column}' must be a list of {num_rows} values, one per "
            f"completion; found {type(values).__name__}"
        )
    return values


def check_rows(prompts: Sequence[Text], completions: Sequence[Text], *, reward: str) -> None:
    """Refuse prompts and completions of different number.

    Raises:
        ValueError: if the two lengths differ.
    """
    if len(prompts) != len(completions):
        raise ValueError(
            f"reward '{reward}': {len(prompts)} prompts but {len(completions)} completions; "
            "repeat each prompt once per completion"
        )


class Rule:
    """Apply a function of (answer text, column value) to each row and count what fails.

    A row whose function raises gets None and its reason is counted in ``invalid``: an exception
    says nothing about the answer, so it is never turned into a score of 0.
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
        self, *, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> list[float | None]:
        """Score each completion.

        Raises:
            MissingColumnError: if the rule needs a column that is not there.
        """
        check_rows(prompts, completions, reward=self.name)
        values: Sequence[Any] = [None] * len(completions)
        if self.column is not None:
            values = column_values(
                columns, self.column, reward=self.name, num_rows=len(completions)
            )
        return [self._row(c, v) for c, v in zip(completions, values, strict=True)]

    def _row(self, completion: Text, value: Any) -> float | None:
        try:
            if self.column is not None and value is None:
                raise InvalidScoreError(f"column '{self.column}' is empty")
            score = float(self.function(completion_text(completion), value))
            if not math.isfinite(score):
                raise InvalidScoreError("score is not finite")
            return score
        except InvalidScoreError as error:
            reason = str(error)
        # A rule may fail in any way on text that a model made up; the row is reported, not lost.
        except Exception as error:
            reason = type(error).__name__
            if reason not in self.invalid:
                logger.warning("reward %s: %s on %.200r", self.name, error, completion)
        self.invalid[reason] += 1
        return None


def rule_from_spec(
    spec: RewardBase, function: Callable[[str, Any], float], *, column: str | None = None
) -> Rule:
    """Wrap a row function as the reward that ``spec`` names."""
    return Rule(function, name=spec.label, weight=spec.weight, column=column)
