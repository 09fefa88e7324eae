"""Load a checkpoint into another number of ranks, or into another ZeRO stage.

DeepSpeed's universal checkpoint has one folder per parameter with its weight and Adam's moments in
float32. Rank 0 makes it of the ranks' shards, and every rank reads its own parts of it. The values
are the saved ones; later steps add them up in another order, so they are equal up to rounding.
"""

import io
import shutil
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from align.core import distributed
from align.core.errors import ArtifactError
from align.core.storage import write_patiently

WEIGHT, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")
_WHOLE = "mp_rank_00_model_states.pt"
_SHARDS = "*_optim_states.pt"


class States(Protocol):
    """The states of each parameter in a checkpoint.

    Attributes:
        step: number of steps that Adam has taken.
    """

    step: float

    def read(self, name: str, number: int, key: str) -> Tensor:
        """Return a whole state in float32 of a parameter, the ``number``-th that is trained."""
        ...


def saved_stage(folder: Path) -> int:
    """Return the ZeRO stage of an engine's saved states."""
    files = sorted(folder.glob(_SHARDS))
    if not files:
        return 0
    # DeepSpeed's own objects are in it; the file's hash has been compared.
    found = torch.load(files[0], map_location="cpu", mmap=True, weights_only=False)
    return int(found["optimizer_state_dict"].get("zero_stage", 1))


def load_resharded(folder: Path, engine: Any) -> None:
    """Fill an engine with the states that another number of ranks or another stage has saved.

    Every rank must call this. Weights that are not trained stay as they are.

    Raises:
        ArtifactError: the saved states cannot be read, or are those of other parameters.
    """
    with _states_of(folder) as states:
        try:
            _fill(engine, states)
        except (FileNotFoundError, KeyError, RuntimeError) as error:
            told = " ".join(str(error).split())[:300]
            raise ArtifactError(
                f"{folder}: its states do not fit the model ({type(error).__name__}: {told}). "
                "Start as many ranks as before with the same zero.stage, or use --force"
            ) from error


@contextmanager
def _states_of(folder: Path) -> Iterator[States]:
    """Yield the states of a checkpoint; ZeRO's are converted into a folder, removed after it."""
    if saved_stage(folder) == 0:
        yield _Whole(folder)
        return
    # Under a name that is removed if this process is killed.
    step = folder.parent
    scratch = step.with_name(f"{step.name}-{folder.name}.tmp")
    distributed.on_first_rank(lambda: _convert_patiently(folder, scratch))
    try:
        yield _Universal(scratch / "universal")
    finally:
        distributed.barrier()
        if distributed.rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def _convert_patiently(folder: Path, scratch: Path) -> None:
    # The states, and their pieces before they are put together.
    needed = 2 * sum(file.stat().st_size for file in folder.glob(_SHARDS))
    write_patiently(
        lambda: _convert(folder, scratch),
        folder=folder,
        needed=needed,
        stop=distributed.was_asked,
    )


def _convert(folder: Path, scratch: Path) -> None:
    """Write DeepSpeed's universal checkpoint of saved states."""
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    options = Namespace(
        input_folder=str(folder),
        # It writes a further file beside this folder.
        output_folder=str(scratch / "universal"),
        # One: more would be forked, and this process has threads.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            ds_to_universal.main(options)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    except Exception as error:  # whatever it raises about shards that it cannot put together
        shutil.rmtree(scratch, ignore_errors=True)
        told = " ".join(str(error).split())[:300]
        raise ArtifactError(
            f"{folder}: DeepSpeed cannot convert it ({type(error).__name__}: {told}). Start as "
            "many ranks as before with the same zero.stage, or use --force"
        ) from error


class _Universal:
    """States in a universal checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "zero"
        common = torch.load(self._folder / "optimizer_state.pt", weights_only=False)
        steps = sorted(self._folder.glob("*/step.pt"))
        if steps:  # ZeRO 1 and 2: of each parameter
            self.step = float(torch.load(steps[0], weights_only=True))
        else:
            self.step = float(common["optimizer_state_dict"]["state"][0]["step"])

    def read(self, name: str, number: int, key: str) -> Tensor:
        path = self._folder / name / f"{key}.pt"
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        # Shards of ZeRO-3 are converted to plain tensors, which are flat.
        return found["param"] if isinstance(found, dict) else found


class _Whole:
    """States saved without ZeRO: the model's, and those of Adam by number."""

    def __init__(self, folder: Path) -> None:
        found = torch.load(folder / _WHOLE, map_location="cpu", mmap=True, weights_only=False)
        self._weights, self._moments = found["module"], found["optimizer"]["state"]
        self.step = float(self._moments[0]["step"])

    def read(self, name: str, number: int, key: str) -> Tensor:
        return self._weights[name] if key == WEIGHT else self._moments[number][key]


@torch.no_grad()
def _fill(engine: Any, states: States) -> None:
    optimizer, names = engine.optimizer, {id(p): n for n, p in engine.module.named_parameters()}
    # ZeRO wraps the optimizer; plain training has only the inner one.
    inner, number = getattr(optimizer, "optimizer", optimizer), 0
    if engine._optimizer_has_ckpt_event_prologue():
        optimizer.checkpoint_event_prologue()
    for params, flat in _groups(engine):
        offset = 0  # of ZeRO-3's parts, which lie one after the other
        for parameter in params:
            owner = parameter if flat is None else flat
            state = _state(inner, owner, states.step)
            for key in (WEIGHT, *MOMENTS):
                target = owner.data if key == WEIGHT else state[key]
                whole = states.read(names[id(parameter)], number, key)
                if flat is None:
                    target.copy_(whole.reshape(target.shape))
                    continue
                start, place, size = _part(parameter, offset)
                values = whole.reshape(-1).narrow(0, start, size)
                target.narrow(0, place, size).copy_(values)
            if flat is not None and hasattr(parameter, "ds_id"):
                size = parameter.partition_numel()
                parameter.ds_tensor.data.copy_(flat.narrow(0, offset, size))
                offset += size
            number += 1
    if engine.zero_optimization_stage() in (1, 2):
        optimizer.update_lp_params()
    if engine._optimizer_has_ckpt_event_epilogue():
        optimizer.checkpoint_event_epilogue()


def _part(parameter: Any, offset: int) -> tuple[int, int, int]:
    """Return where this rank's part begins in the parameter and in the flat tensor, and its size.

    Args:
        parameter: under ZeRO 1 to 3. offset: of its part in the flat tensor under ZeRO-3.
    """
    if hasattr(parameter, "ds_id"):
        size = parameter.partition_numel()
        # The last part is padded, and a small parameter may end before this rank's begins.
        start = min(distributed.rank() * size, parameter.ds_numel)
        return start, offset, min(size, parameter.ds_numel - start)
    mapping = parameter._hp_mapping
    if mapping is None:
        return 0, 0, 0
    own = mapping.lp_fragment_address
    return own.start, mapping.hp_fragment_address.start, own.numel


def _groups(engine: Any) -> Iterator[tuple[Sequence[Any], Any]]:
    """Yield parameters in the order of the optimizer, and the flat tensor with this rank's part."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        for group in optimizer.param_groups:
            yield group["params"], None
    elif stage == 3:
        yield from zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    elif hasattr(optimizer, "bf16_groups"):
        yield from zip(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, strict=True)
    else:
        parts = optimizer.single_partition_of_fp32_groups
        yield from zip(optimizer.bit16_groups, parts, strict=True)


def _state(inner: Any, owner: Tensor, step: float) -> dict[str, Any]:
    """Return Adam's state of a tensor with its step count; a new one if it has none yet."""
    state = inner.state[owner]
    for key in MOMENTS:
        if key not in state:
            state[key] = torch.zeros_like(owner)
    if isinstance(inner, torch.optim.AdamW):
        fused = bool(inner.defaults.get("fused"))
        state["step"] = torch.tensor(step, device=owner.device if fused else "cpu")
    else:  # DeepSpeed's own, on the CPU
        state["step"] = int(step)
    return state
