"""Losses and advantages of the user, which a recipe names and the training process calls."""

from collections.abc import Callable
from functools import cache
from typing import Any

from align.core.errors import TrainingError
from reward_models.own_process import load


@cache
def named_function(what: str, place: str) -> Callable[..., Any]:
    """Return the function that ``FILE.py:NAME`` or ``MODULE:NAME`` names.

    Args:
        what: its part in the training, for the message.
        place: the name.

    Raises:
        TrainingError: it cannot be imported.
    """
    try:
        return load(place, {})
    # Importing it runs the user's module, which may raise anything.
    except Exception as error:
        raise TrainingError(f"{what} '{place}' cannot be imported: {error}") from error
