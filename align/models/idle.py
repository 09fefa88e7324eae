"""Frozen models that stay in CPU memory while nobody runs them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from align.core import distributed

_kept: WeakKeyDictionary[nn.Module, list[tuple[Tensor, Tensor]]] = WeakKeyDictionary()
"""Tensors of each such model, with their copies in CPU memory."""


def keep_on_cpu(model: nn.Module) -> bool:
    """Move a frozen model to CPU memory until ``in_use`` runs it; return whether it was moved.

    A model whose weights are divided among the ranks stays where it is, and so does one on the CPU.
    """
    tensors = [*model.parameters(), *model.buffers()]
    is_there = all(x.device.type == "cpu" for x in tensors)
    if is_there or any(hasattr(x, "ds_id") for x in tensors):
        return False
    assert not any(p.requires_grad for p in model.parameters()), "a trained model changes"
    _kept[model] = [(x, x.data.to("cpu")) for x in tensors]
    _put_away(model)
    return True


@contextmanager
def in_use(*models: nn.Module | None) -> Iterator[None]:
    """Move models to this rank's device for the block; those of ``keep_on_cpu`` return after it.

    Nothing is copied back: a frozen model is in CPU memory as it was.
    """
    with ExitStack() as stack:
        for model in models:
            if model is not None and model in _kept:
                stack.callback(_put_away, model)
                for tensor, kept in _kept[model]:
                    tensor.data = kept.to(distributed.device())
        yield


def _put_away(model: nn.Module) -> None:
    for tensor, kept in _kept[model]:
        tensor.data = kept


def models_in(reward: object) -> list[nn.Module]:
    """Return the models that a reward runs, of an ensemble those of its members."""
    found = getattr(reward, "model", None)
    own = [found] if isinstance(found, nn.Module) else []
    return own + [model for member in getattr(reward, "members", ()) for model in models_in(member)]
