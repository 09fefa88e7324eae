"""Losses and advantages of the user, which a recipe names and the training process calls."""

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

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


def own_losses(
    place: str, *tensors: Tensor, each: str, options: Mapping[str, Any] | None = None
) -> Tensor:
    """Return the losses of the user's function: one for each element of the last tensor.

    Args:
        place: its name, ``FILE.py:NAME`` or ``MODULE:NAME``.
        tensors: its positional arguments; the first is what the model has computed.
        each: what has a loss of its own, for the message.
        options: keyword arguments, of which the function gets those that it names.

    Raises:
        TrainingError: it returns something else, or what no gradient of the model can reach.
    """
    loss, shape = named_function("loss", place), tensors[-1].shape
    # A rank may have no row in a micro-batch, which the function need not expect.
    if not tensors[-1].numel():
        return tensors[0].new_zeros(shape)
    found = loss(*tensors, **_taken(loss, options or {}))
    if not isinstance(found, Tensor) or found.shape != shape or not found.is_floating_point():
        kind = f"{found.dtype} of shape " if isinstance(found, Tensor) else ""
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise TrainingError(
            f"loss '{place}' returned {kind}{what}; expected a tensor with one loss for each of "
            f"the {tensors[-1].numel()} {each}, of shape {tuple(shape)}"
        )
    if torch.is_grad_enabled() and tensors[0].requires_grad and not found.requires_grad:
        raise TrainingError(
            f"loss '{place}' returned a tensor without a gradient, so nothing would be trained; "
            "compute it from its first argument, without detach, item or numpy"
        )
    return found


def _taken(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the options that a function has as parameters; ``**options`` takes all."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # compiled, such as torch.nn.functional.softplus: its names are not known
        return {}
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(options)
    return {name: value for name, value in options.items() if name in parameters}
