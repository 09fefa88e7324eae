"""Losses and advantages of the user, which a recipe names and the training process calls."""

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from align.core.errors import RecipeError, TrainingError
from align.recipe.rules import idle_loss_options
from align.recipe.schema.offline import OfflineStage
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


def check_loss_options(spec: OfflineStage) -> None:
    """Refuse options of the suite's losses that the user's loss does not get.

    A recipe is checked without importing the function, so that the parameters of an object, of a
    ``partial`` or of an imported function are known only here.

    Raises:
        RecipeError: such an option is set.
        TrainingError: the function cannot be imported.
    """
    if not (place := spec.own_loss):
        return
    taken = parameter_names(named_function("loss", place))
    idle = idle_loss_options(spec, [] if taken is None else taken)
    if idle:
        why = (
            "whose parameters are not known (a compiled function?)"
            if taken is None
            else f"which takes {', '.join(taken)}"
        )
        raise RecipeError(
            f"{', '.join(idle)}: no effect with loss {place}, {why}; remove it, or write a "
            "function that takes it"
        )


def _taken(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the options that a function has as parameters; ``**options`` takes all."""
    names = parameter_names(function) or []
    return {name: value for name, value in options.items() if name in names or "**" in names}


def parameter_names(function: Callable[..., Any]) -> list[str] | None:
    """Return the names of a function's parameters; ``**`` is the last if it takes any option."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # compiled, such as torch.nn.functional.softplus
        return None
    return ["**" if p.kind is inspect.Parameter.VAR_KEYWORD else p.name for p in parameters]
