"""A GPU that is not there: tensors remember a device that a CPU build does not have.

Code under ``two_devices`` computes on the CPU. Each storage is noted as on the CPU or on the GPU,
by the device that the code asked for, ``x.device`` answers so, and an operation between the two is
an error, as CUDA makes it one. So every branch for GPUs runs, and a tensor that was made on the
wrong device is found on a machine without one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from align.core import distributed

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
BETWEEN = ("aten::copy_", "aten::_to_copy", "aten::set_", "aten::index", "aten::index_put_")
"""Operations that CUDA allows between devices; of indexing, only the indices may be on the CPU."""


class WrongDevice(AssertionError):
    """An operation on tensors of two devices."""


class _Notes:
    """The storages on the GPU. They are kept, so that none of their addresses is used again."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._emptied: dict[int, torch.UntypedStorage] = {}

    def device(self, x: Tensor) -> torch.device:
        """Return where a tensor is; one without data is where it says."""
        if x.is_meta:
            return x.device
        storage = x.untyped_storage()
        is_there = storage.data_ptr() in self._storages or storage._cdata in self._emptied
        return GPU if is_there else CPU

    def put(self, x: Tensor) -> None:
        """Note a tensor as on the GPU; an empty one has no address and is on any device."""
        storage = x.untyped_storage()
        if storage.data_ptr():
            self._storages[storage.data_ptr()] = storage

    def resize(self, storage: torch.UntypedStorage, size: int, resize: Callable[..., Any]) -> None:
        """Resize a storage, which stays on its device; an empty one is noted without an address."""
        was_there = self._storages.pop(storage.data_ptr(), None) is not None
        was_there |= self._emptied.pop(storage._cdata, None) is not None
        resize(storage, size)
        if was_there and size:
            self._storages[storage.data_ptr()] = storage
        elif was_there:
            self._emptied[storage._cdata] = storage

    def copied(self, x: Tensor, where: torch.device) -> Tensor:
        """Return a copy on a device."""
        there = x.detach().clone()
        if where.type == GPU.type:
            self.put(there)
        else:  # the copy of a tensor on the GPU was noted as there too
            self._storages.pop(there.untyped_storage().data_ptr(), None)
        return there


class _Operations(TorchDispatchMode):
    """Compares the devices of an operation's tensors; its results are where they are."""

    def __init__(self, notes: _Notes) -> None:
        super().__init__()
        self._notes = notes

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func._schema.name
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.numel()]
        if any(not x.is_meta and not x.untyped_storage().nbytes() for x in given):
            raise WrongDevice(f"{name}: the memory of a tensor was given back")
        out = func(*args, **(kwargs or {}))
        # A number may come from the CPU.
        found = {self._notes.device(x) for x in given if x.dim()}
        found |= {GPU for x in given if self._notes.device(x) == GPU}
        if name in BETWEEN:
            found = {self._notes.device(given[0])} if given else set()
        if len(found) > 1:
            shapes = [(tuple(x.shape), self._notes.device(x).type) for x in given]
            raise WrongDevice(f"{name}: {shapes}")
        if GPU in found:
            for x in tree_leaves(out):
                if isinstance(x, Tensor):
                    self._notes.put(x)
        return out


class _Requests(TorchFunctionMode):
    """Answers for a tensor's device, and makes tensors where they are asked for."""

    def __init__(self, notes: _Notes) -> None:
        super().__init__()
        self._notes = notes

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        # Attributes are functions too, made anew at each look.
        attribute: Any = Tensor
        if func == attribute.device.__get__:
            return self._notes.device(args[0])
        if func == attribute.is_cuda.__get__:
            return self._notes.device(args[0]) == GPU
        if func is Tensor.numpy and self._notes.device(args[0]) == GPU:
            raise WrongDevice("numpy reads tensors of the CPU only")
        if func is Tensor.cpu:
            return self._moved(args[0], CPU)
        if func is Tensor.to:
            return self._to(args, kwargs)
        if func is torch.nn.functional.one_hot and self._notes.device(args[0]) == GPU:
            # It makes its result in C++, by the device that the tensor really has.
            out = func(self._notes.copied(args[0], CPU), *args[1:], **kwargs)
            self._notes.put(out)
            return out
        wanted = kwargs.get("device")
        if func is Tensor.new_tensor and wanted is None:  # it is made like its first argument
            wanted = self._notes.device(args[0])
        on_gpu = wanted is not None and torch.device(wanted).type == GPU.type
        out = func(*args, **(kwargs | {"device": CPU} if on_gpu else kwargs))
        if on_gpu:
            self._notes.put(out)
        return out

    def _to(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x, *rest = args
        where = kwargs.pop("device", None)
        for i, value in enumerate(rest):
            if isinstance(value, str | torch.device):
                where = rest.pop(i)
                break
            if isinstance(value, Tensor):
                rest[i], where = value.dtype, self._notes.device(value)
                break
        # Of the others only a dtype matters: non_blocking and copy come after it.
        rest = [value for value in rest if isinstance(value, torch.dtype)]
        where = self._notes.device(x) if where is None else torch.device(where)
        if "meta" in (where.type, x.device.type):
            return x.to(where, *rest, **kwargs)
        return self._moved(x.to(*rest, **kwargs) if rest or kwargs else x, where)

    def _moved(self, x: Tensor, where: torch.device) -> Any:
        if self._notes.device(x).type == where.type:
            return x
        return _Move.apply(x, self._notes, where)


class _Move(torch.autograd.Function):
    """A copy on the other device, whose gradient is copied back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, notes: _Notes, where: torch.device) -> Tensor:
        ctx.notes, ctx.back = notes, notes.device(x)
        return notes.copied(x, where)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.notes.copied(grads[0], ctx.back), None, None


@contextmanager
def two_devices() -> Iterator[None]:
    """Run a block with a GPU that is not there, on which ``align`` trains.

    Raises:
        WrongDevice: in the block, where CUDA would refuse an operation.
    """
    notes = _Notes()
    with pytest.MonkeyPatch.context() as patch, _Requests(notes), _Operations(notes):
        patch.setattr(distributed, "device", lambda: GPU)
        resize = torch.UntypedStorage.resize_
        patch.setattr(
            torch.UntypedStorage, "resize_", lambda storage, n: notes.resize(storage, n, resize)
        )
        yield
