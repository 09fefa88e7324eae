"""Load new weights or a new adapter into a running vLLM engine; these functions run on its worker.

Each function returns the names that found no place, and checksums of what the worker has
afterwards. On CPU, vLLM packs the weights of linear layers for its GEMM and empties the parameters.
There, the checksum is taken of the whole parameter at the moment of packing. The packed copy must
be a new one and must multiply like the parameter from which it was made.

Every push of an adapter uses a new number. vLLM looks up requests, adapters and cached prefixes by
it, so that no response can use an earlier adapter: if this number is not loaded, vLLM looks for
nonexistent files and fails.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from align.recipe.schema.tuning import LoraTuning
from align.sampling.checksums import Share, checksum

TRANSPOSED = {"gpt2": ("c_attn", "c_proj", "c_fc")}
"""Layers, by model type, whose weights are saved transposed (transformers' Conv1D)."""

PACKED_COLUMNS = 4
"""Number of inputs with which a packed copy is multiplied after a push."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Result of a load in the worker.

    Attributes:
        missing: names that got no weight, or found no place.
        stale: layers that use a packed copy of older weights.
        held: checksum of the data in each place, by the name of the saved tensor.
    """

    missing: set[str]
    stale: set[str] = field(default_factory=set)
    held: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a saved tensor: rows of a parameter (None for all), or its transpose.

    ``share`` is the part of the saved tensor that is there; None for all of it.
    """

    name: str
    leaf: str
    start: int
    rows: int | None
    turned: bool
    share: Share | None = None

    def checksum(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the checksum of this place, in the order and dtype of the saved tensor."""
        part = parameter
        if self.rows is not None:
            part = parameter[self.start : self.start + self.rows]
        return checksum((part.t() if self.turned else part).to(dtype))


Places = dict[nn.Module, list[Place]]


def places(model: Any) -> Places:
    """Return, for each module of vLLM's model, the saved tensors that its parameters contain.

    Fused layers (``qkv_proj``, ``gate_up_proj``) stack several tensors. Vocabulary tables have
    empty rows at their end. With several ranks for a model, each has a part of most tensors.
    """
    fused = getattr(model, "packed_modules_mapping", {})
    # Fused layers list their parts in packed_modules_mapping, in the order of their sizes.
    turned = TRANSPOSED.get(model.config.model_type, ())
    found: Places = {}
    for path, module in model.named_modules():
        parent, _, last = path.rpartition(".")
        pieces = _pieces(module, fused.get(last, [last]))
        for leaf, _ in module.named_parameters(recurse=False):
            # Parts of a fused parameter follow each other in its rows.
            start = 0
            for part, rows, share in pieces:
                name = ".".join(filter(None, (parent, part, leaf)))
                turn = leaf == "weight" and last in turned
                if share is not None:
                    # A bias has no columns: every rank has all of it if the columns are divided.
                    by_rows = share.dim == 0
                    share = replace(share, dim=1 - share.dim) if turn else share
                    share = share if leaf == "weight" or by_rows else None
                found.setdefault(module, []).append(Place(name, leaf, start, rows, turn, share))
                start += rows or 0
    return found


Piece = tuple[str, int | None, Share | None]
"""Name of a saved layer, its rows in the parameter (None for all), and what they are of it."""


def _pieces(module: Any, parts: Sequence[str]) -> list[Piece]:
    """Return the saved layers that a layer of vLLM has, or parts of them."""
    divided = getattr(module, "tp_size", 1) > 1
    by_rows = divided and hasattr(module, "gather_output")  # vLLM's ColumnParallelLinear

    def part_of(length: int, dim: int) -> Share:
        return Share(dim, module.tp_rank * length, length)

    table = getattr(module, "shard_indices", None)
    if table is not None:  # an embedding or a head
        first, rows = table.org_vocab_start_index, table.num_org_elements
        return [(parts[0], rows, Share(0, first, rows) if divided else None)]
    sizes: Sequence[int] = getattr(module, "output_partition_sizes", ())
    if len(sizes) == len(parts) > 1:
        return [
            (part, n, part_of(n, 0) if by_rows else None)
            for part, n in zip(parts, sizes, strict=True)
        ]
    if by_rows and len(sizes) > 1:
        return []  # saved as one tensor, of which this rank has several parts
    if by_rows:
        return [(parts[0], None, part_of(module.output_size_per_partition, 0))]
    if divided and hasattr(module, "input_is_parallel"):  # vLLM's RowParallelLinear
        return [(parts[0], None, part_of(module.input_size_per_partition, 1))]
    return [(parts[0], None, None)]


def shares(worker: Any) -> dict[str, Share]:
    """Return the parts of saved tensors that this worker's model has, by the tensors' names."""
    here = places(worker.get_model()).values()
    return {p.name: p.share for in_module in here for p in in_module if p.share is not None}


def load_packed(worker: Any, named_tensors: Iterable[tuple[str, Tensor]]) -> Loaded:
    """Load on CPU, where the first load packed the weights for its GEMM and emptied them."""
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    model, dtype = worker.get_model(), worker.model_config.dtype
    # Names, packed copies and places before the reload, to compare with those after it.
    expected = {name for name, _ in model.named_parameters()}
    before = {m: m.cpu_linear for m in model.modules() if hasattr(m, "cpu_linear")}
    here = places(model)
    with _recorded(model) as loaded, _packing(here, dtype) as packing:
        worker.model_runner.reload_weights(weights_iterator=named_tensors)
        # The reload does not repack the head; a tied head would keep the old weights.
        for module in model.modules():
            if isinstance(module, ParallelLMHead):
                utils.dispatch_cpu_unquantized_gemm(module, remove_weight=False)
    # Parameters that were not packed, such as norms and embeddings, still hold their data.
    held = _held(here, dtype, except_for=packing.rearranged)
    stale = {m for m, old in before.items() if not packing.renewed(m, old)}
    return Loaded(
        expected - loaded if loaded else set(),
        {path for path, module in model.named_modules() if module in stale},
        packing.held | held,
    )


def load_in_place(worker: Any, named_tensors: Iterable[tuple[str, Tensor]]) -> Loaded:
    """Load on an accelerator, where the engine computes directly with the parameters."""
    model = worker.get_model()
    loaded = model.load_weights(named_tensors)
    missing = {name for name, _ in model.named_parameters()} - loaded if loaded else set()
    return Loaded(missing, held=_held(places(model), worker.model_config.dtype))


def _held(
    here: Places, dtype: torch.dtype, *, except_for: Collection[str] = ()
) -> dict[str, Tensor]:
    """Return the checksums of the current parameters, except of empty ones."""
    return {
        place.name: place.checksum(parameter, dtype)
        for module, in_module in here.items()
        for place in in_module
        if (parameter := getattr(module, place.leaf)).numel() and place.name not in except_for
    }


class _Packing:
    """Records of the weights that vLLM packs during a load on CPU."""

    def __init__(self, here: Places, dtype: torch.dtype) -> None:
        self.held: dict[str, Tensor] = {}
        self.rearranged: set[str] = set()
        self._here, self._dtype = here, dtype
        self._columns: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # one-hot rows, their products

    def note(self, layer: Any) -> None:
        """Record checksums of a whole weight, and some of its columns, before packing."""
        weight = layer.weight
        if weight.is_meta:
            return
        for place in self._here.get(layer, ()):
            if place.leaf == "weight":
                self.held[place.name] = place.checksum(weight, self._dtype)
                # Rearranged in place, as experts are, so its later checksum would differ.
                if weight.ndim != 2:
                    self.rearranged.add(place.name)
        if weight.ndim == 2:
            width = weight.shape[1]
            # A few columns spread over the width: one-hot inputs read exactly these weights.
            columns = torch.arange(min(PACKED_COLUMNS, width)) * width // PACKED_COLUMNS
            one_hot = nn.functional.one_hot(columns, width).to(weight.dtype)
            self._columns[layer] = one_hot, weight.detach()[:, columns].t().clone()

    def renewed(self, layer: Any, before: Callable[..., Tensor]) -> bool:
        """Return whether the packed copy is new and multiplies like its weight."""
        if layer.cpu_linear is nn.functional.linear:
            return True  # it uses the parameter itself
        if layer.cpu_linear is before or layer not in self._columns:
            return False
        one_hot, wanted = self._columns[layer]
        return torch.equal(layer.cpu_linear(one_hot, layer.weight, None), wanted)


@contextlib.contextmanager
def _packing(here: Places, dtype: torch.dtype) -> Iterator[_Packing]:
    """Record the weights that vLLM packs inside the block."""
    from vllm.model_executor.layers import utils

    packing, pack = _Packing(here, dtype), utils.dispatch_cpu_unquantized_gemm

    def noted(layer: Any, remove_weight: bool) -> None:
        packing.note(layer)
        pack(layer, remove_weight)

    # vLLM calls it through the module, so replacing the attribute records every call.
    utils.dispatch_cpu_unquantized_gemm = noted
    try:
        yield packing
    finally:
        utils.dispatch_cpu_unquantized_gemm = pack


@contextlib.contextmanager
def _recorded(model: Any) -> Iterator[set[str]]:
    """Record which parameters ``model.load_weights`` fills; vLLM's reload only logs the rest."""
    loaded: set[str] = set()
    load: Callable[..., set[str] | None] = model.load_weights

    def recording(weights: Iterable[tuple[str, Tensor]]) -> set[str] | None:
        names = load(weights)
        loaded.update(names or ())
        return names

    # On the instance: deleting it shows the method of the class again.
    model.load_weights = recording
    try:
        yield loaded
    finally:
        del model.load_weights


def adapter_options(tuning: LoraTuning) -> dict[str, Any]:
    """Return the options of an engine that serves one adapter of this tuning."""
    # vLLM accepts only certain maximum ranks: the smallest that fits.
    rank = min(r for r in tuning.served_ranks if r >= tuning.rank)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}


def adapter_request(number: int) -> Any:
    """Return the request option that selects the adapter with this number."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"policy-{number}", number, "pushed, not read from disk")


def load_adapter(
    worker: Any, number: int, named_tensors: Iterable[tuple[str, Tensor]], *, tuning: LoraTuning
) -> Loaded:
    """Replace all adapters with one new adapter on the engine's worker.

    Args:
        worker: vLLM's worker.
        number: a new number for each push, from 1.
        named_tensors: tensors under peft's names, with the scale multiplied in.
        tuning: the tuning block that created them.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    # With a scale of rank / rank = 1, vLLM multiplies nothing in and stores exactly what was sent.
    config = PEFTHelper(r=tuning.rank, lora_alpha=tuning.rank, target_modules=tuning.targets)
    loras = worker.model_runner.lora_manager
    loras.remove_all_adapters()
    adapter = LoRAModel.from_lora_tensors(
        number,
        {name.replace(".default.", "."): tensor.clone() for name, tensor in named_tensors},
        config,
        device="cpu",
        dtype=loras.lora_config.lora_dtype,
    )
    wanted = set(adapter.loras)  # before the manager fuses q_proj, k_proj ... into qkv_proj
    manager = loras._adapter_manager
    manager.add_adapter(adapter)
    manager.activate_adapter(number)
    slot = manager.lora_index_to_id.index(number)
    # Checksum the stacked tensors that the adapter's slot actually serves.
    served: dict[str, tuple[Any, int]] = {}
    for name, module in manager.modules.items():
        parent, _, last = name.rpartition(".")
        for i, part in enumerate(manager.packed_modules_mapping.get(last, [last])):
            served[f"{parent}.{part}"] = module, i
    held: dict[str, Tensor] = {}
    for name, (module, i) in served.items():
        ours = f"base_model.model.{name}.lora_"
        first, second = (x[i][slot, 0] for x in (module.lora_a_stacked, module.lora_b_stacked))
        held[f"{ours}A.default.weight"] = checksum(first[: tuning.rank])
        held[f"{ours}B.default.weight"] = checksum(second[:, : tuning.rank])
    return Loaded(wanted - served.keys(), held=held)
