"""Optimizer states that are in CPU memory while no step is taken."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def optimizer_tensors(optimizer: Any, module: nn.Module) -> list[Tensor]:
    """Return the moments of an optimizer and its own copies of the weights, not the weights.

    Args:
        optimizer: of torch, or DeepSpeed's around one of torch.
        module: the model that it trains.
    """
    # ZeRO wraps the optimizer; under ZeRO-3 that has no parameters until its first step.
    inner = getattr(optimizer, "optimizer", optimizer)
    masters = [p for group in inner.param_groups for p in group["params"]]
    masters += getattr(optimizer, "fp32_partitioned_groups_flat", [])
    moments = [x for state in inner.state.values() for x in state.values()]
    # A rank's shard of a weight under ZeRO-3 is no parameter.
    weights = [x for p in module.parameters() for x in (p, getattr(p, "ds_tensor", p))]
    own = {x.untyped_storage()._cdata for x in (*weights, *module.buffers())}
    found: dict[int, Tensor] = {}
    for x in (*masters, *moments):
        if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in own:
            found.setdefault(key, x)
    return list(found.values())


class Parking:
    """CPU memory for the tensors of one optimizer; it is kept, since allocating it takes time."""

    def __init__(self) -> None:
        self._kept: dict[int, torch.UntypedStorage] = {}

    @contextmanager
    def parked(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Free the memory of tensors inside the block, in which nothing may use them.

        Their storages are emptied and filled again, so that all views of them, such as those of
        DeepSpeed, stay valid. The tensors must not share storages.
        """
        storages = [x.untyped_storage() for x in tensors]
        kept = {}
        for storage in storages:
            size, key = storage.nbytes(), storage._cdata
            host = self._kept.get(key)
            if host is None or host.nbytes() != size:
                host = torch.UntypedStorage(size)
            kept[key] = host.copy_(storage)
            storage.resize_(0)
        self._kept = kept
        try:
            yield
        finally:
            for storage in storages:
                host = kept[storage._cdata]
                storage.resize_(host.nbytes())
                storage.copy_(host)
