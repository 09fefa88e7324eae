"""Faults that can stand between what a trainer sends and what an engine computes with.

They lie in the stream of tensors, in vLLM's loading and packing, in its adapters and in its cache.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

Named = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Setup:
    """An engine and the policy that it is given."""

    engine: str
    dtype: str
    tied: bool = True
    adapter: bool = False

    @property
    def title(self) -> str:
        """Return its name in the table."""
        head = "adapter" if self.adapter else "tied" if self.tied else "untied"
        return f"{self.engine} {'fp32' if self.dtype == 'float32' else 'bf16'} {head}"


SETUPS = (
    Setup("hf", "float32"),
    Setup("hf", "bfloat16"),
    Setup("vllm", "float32"),
    Setup("vllm", "bfloat16"),
    Setup("vllm", "float32", tied=False),
    Setup("vllm", "float32", adapter=True),
    Setup("vllm", "bfloat16", adapter=True),
)


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault: a change of the stream of tensors, or of the engine while it loads.

    Attributes:
        name: as the table has it.
        stream: (new tensors, old tensors) to what arrives instead; None where a part is lacking.
        engine: makes a context in which the engine is faulty, from the engine and old tensors.
        where: set-ups in which it can be planted.
    """

    name: str
    stream: Callable[[Named, Named], Named | list[tuple[str, Tensor]] | None] | None = None
    engine: Callable[[Any, Named], contextlib.AbstractContextManager[Any]] | None = None
    where: Callable[[Setup], bool] = lambda setup: not setup.adapter


def find(named: Named, part: str) -> str | None:
    """Return the last name that holds ``part``."""
    return next((name for name in reversed(named) if part in name), None)


def stale(*parts: str) -> Callable[[Named, Named], Named]:
    """Keep the old tensors of these names."""

    def change(new: Named, old: Named) -> Named:
        return new | {n: old[n] for n in new if any(p in n for p in parts)}

    return change


def dropped(part: str) -> Callable[[Named, Named], Named]:
    """Leave the tensors out."""

    def change(new: Named, _: Named) -> Named:
        return {n: x for n, x in new.items() if part not in n}

    return change


def altered(
    part: str, function: Callable[[Tensor], Tensor]
) -> Callable[[Named, Named], Named | None]:
    """Change one tensor on its way."""

    def change(new: Named, _: Named) -> Named | None:
        name = find(new, part)
        return None if name is None else new | {name: function(new[name].clone())}

    return change


def swapped(first: str, second: str) -> Callable[[Named, Named], Named | None]:
    """Exchange two tensors of one shape."""

    def change(new: Named, _: Named) -> Named | None:
        a, b = find(new, first), find(new, second)
        if a is None or b is None or new[a].shape != new[b].shape:
            return None
        return new | {a: new[b], b: new[a]}

    return change


def shifted(new: Named, _: Named) -> Named:
    """Exchange the names of two layers."""
    turn = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
    return {
        next((n.replace(k, v) for k, v in turn.items() if k in n), n): x for n, x in new.items()
    }


def overtaken(new: Named, old: Named) -> list[tuple[str, Tensor]] | None:
    """Send an old tensor once more behind the new ones."""
    name = find(new, "embed_tokens")
    return None if name is None else [*new.items(), (name, old[name])]


def part_old(new: Named, old: Named) -> Named:
    """Keep the first half of a tensor's rows old."""
    name = find(new, "down_proj")
    assert name is not None
    half = new[name].clone()
    half[: len(half) // 2] = old[name][: len(half) // 2]
    return new | {name: half}


def one_element(x: Tensor) -> Tensor:
    """Move a single number to its neighbour."""
    flat = x.view(-1)
    flat[3] = torch.nextafter(flat[3], torch.tensor(9.0, dtype=x.dtype))
    return flat.view(x.shape)


def transposed(x: Tensor) -> Tensor:
    """Transpose a square matrix."""
    return x.t().contiguous() if x.ndim == 2 and x.shape[0] == x.shape[1] else x


def worker_of(engine: Any) -> Any:
    """Return vLLM's worker in this process."""
    return engine._core_client.engine_core.model_executor.driver_worker.worker


@contextlib.contextmanager
def packing(engine: Any, wrong: Callable[[Any, Callable[[], None]], None], kind: str) -> Iterator:
    """Make vLLM pack the weights of one kind of layer wrongly."""
    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm
    names = {m: n for n, m in worker_of(engine).get_model().named_modules()}

    def dispatch(layer: Any, remove_weight: bool) -> None:
        if kind not in names.get(layer, "") or layer.weight.is_meta:
            pack(layer, remove_weight)
            return
        wrong(layer, lambda: pack(layer, remove_weight))

    with mock.patch.object(utils, "dispatch_cpu_unquantized_gemm", dispatch):
        yield


def kept_copy(kind: str) -> Callable[[Any, Named], contextlib.AbstractContextManager[Any]]:
    """Keep the packed copy of before, as vLLM does of a tied head."""

    def wrong(layer: Any, pack: Callable[[], None]) -> None:
        before = layer.cpu_linear
        pack()
        layer.cpu_linear = before

    return lambda engine, old: packing(engine, wrong, kind)


def packed_wrongly(
    kind: str, function: Callable[[Tensor], Tensor]
) -> Callable[[Any, Named], contextlib.AbstractContextManager[Any]]:
    """Pack something else than the weight, and leave the parameter right."""

    def wrong(layer: Any, pack: Callable[[], None]) -> None:
        weight = layer.weight
        layer.weight = nn.Parameter(function(weight.data.clone()), requires_grad=False)
        pack()
        if layer.weight.numel():
            layer.weight = weight

    return lambda engine, old: packing(engine, wrong, kind)


@contextlib.contextmanager
def after_reload(engine: Any, function: Callable[[Any], None]) -> Iterator[None]:
    """Change the worker's model behind the load."""
    runner = worker_of(engine).model_runner
    load = runner.reload_weights

    def reload(**kwargs: Any) -> None:
        load(**kwargs)
        with torch.no_grad():
            function(runner.get_model())

    with mock.patch.object(runner, "reload_weights", reload):
        yield


def rows_exchanged(leaf: str) -> Callable[[Any], None]:
    """Exchange the shards of a fused layer before they are packed."""

    def change(layer: Any) -> None:
        rows = layer.output_sizes
        first, second = layer.weight.data[: rows[-1]], layer.weight.data[-rows[-1] :]
        layer.weight.data = torch.cat(
            [second, layer.weight.data[rows[-1] : -rows[-1]], first]
        ).contiguous()

    return change


@contextlib.contextmanager
def shards_exchanged(engine: Any, kind: str) -> Iterator[None]:
    """Exchange the first and last shard of fused layers inside vLLM's loading."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    process = UnquantizedLinearMethod.process_weights_after_loading
    names = {m: n for n, m in worker_of(engine).get_model().named_modules()}

    def exchanged(self: Any, layer: Any) -> None:
        if kind in names.get(layer, ""):
            rows_exchanged(kind)(layer)
        process(self, layer)

    with mock.patch.object(UnquantizedLinearMethod, "process_weights_after_loading", exchanged):
        yield


@contextlib.contextmanager
def no_reset(engine: Any, answer: bool) -> Iterator[None]:
    """Leave the prefix cache as it is, and report ``answer``."""
    with mock.patch.object(engine._llm, "reset_prefix_cache", return_value=answer):
        yield


@contextlib.contextmanager
def ignored(engine: Any, old: Named) -> Iterator[None]:
    """Load the old tensors whatever is sent, but take all that is sent."""
    load = engine._load

    def lost(named: Any) -> Any:
        for _ in named:
            pass
        return load(old.items())

    with mock.patch.object(engine, "_load", lost):
        yield


@contextlib.contextmanager
def old_request(engine: Any, old: Named) -> Iterator[None]:
    """Ask for the adapter of the push before."""
    from align.sampling import vllm

    make = vllm.adapter_request
    with mock.patch.object(vllm, "adapter_request", lambda number: make(max(1, number - 1))):
        yield


@contextlib.contextmanager
def not_copied(engine: Any, old: Named) -> Iterator[None]:
    """Register the new adapter and leave the old one's numbers where they are."""
    manager = worker_of(engine).model_runner.lora_manager._adapter_manager

    def keep(number: int) -> bool:
        manager._active_adapters[number] = None
        manager.lora_index_to_id[0] = number
        return True

    with mock.patch.object(manager, "activate_adapter", keep):
        yield


def on_vllm(setup: Setup) -> bool:
    """Return whether whole weights go to vLLM."""
    return setup.engine == "vllm" and not setup.adapter


def on_adapter(setup: Setup) -> bool:
    """Return whether an adapter goes to vLLM."""
    return setup.adapter


def anywhere(setup: Setup) -> bool:
    """Return True: every set-up will do."""
    return True


def set_norm(model: Any) -> None:
    """Scale the last norm of the engine's model by one unit in the last place."""
    weight = model.model.norm.weight.data
    weight.copy_(weight * (1.0 + torch.finfo(weight.dtype).eps))


def set_table(model: Any) -> None:
    """Move one number of the engine's embedding."""
    one_element(model.model.embed_tokens.weight.data)


FAULTS = (
    Fault("everything old", lambda new, old: dict(old), where=anywhere),
    *(
        Fault(f"{part} old", stale(part))
        for part in ("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj")
    ),
    *(Fault(f"{part} old", stale(part)) for part in ("gate_proj", "up_proj", "down_proj")),
    Fault("untied head old", stale("lm_head"), where=lambda s: not (s.tied or s.adapter)),
    Fault("one layer old", stale("layers.1.")),
    Fault("attention old", stale("self_attn")),
    Fault("half of the rows old", part_old),
    Fault("old tensor sent behind the new", overtaken),
    Fault(
        "second half of the push lost",
        lambda new, old: dict(list(new.items())[: len(new) // 2]),
        where=anywhere,
    ),
    Fault("one layer dropped", dropped("layers.1."), where=anywhere),
    Fault("embedding dropped", dropped("embed_tokens")),
    Fault("one shard dropped (k_proj)", dropped("layers.0.self_attn.k_proj"), where=anywhere),
    Fault("one shard dropped (up_proj)", dropped("layers.1.mlp.up_proj"), where=anywhere),
    Fault("one norm dropped", dropped("layers.0.input_layernorm")),
    Fault("last norm dropped", dropped("model.norm.weight")),
    Fault("head dropped", dropped("lm_head"), where=lambda s: not (s.tied or s.adapter)),
    Fault("k_proj and v_proj swapped", swapped("0.self_attn.k_proj.w", "0.self_attn.v_proj.w")),
    Fault("gate_proj and up_proj swapped", swapped("1.mlp.gate_proj.w", "1.mlp.up_proj.w")),
    Fault("q_proj and o_proj swapped", swapped("0.self_attn.q_proj.w", "0.self_attn.o_proj.w")),
    Fault("two norms swapped", swapped("0.input_layernorm", "1.post_attention_layernorm")),
    Fault("biases swapped", swapped("0.self_attn.k_proj.bias", "1.self_attn.k_proj.bias")),
    Fault("two layers swapped", shifted, where=anywhere),
    Fault("one tensor scaled", altered("down_proj", lambda x: x * 1.01)),
    Fault("one norm scaled", altered("input_layernorm", lambda x: x * 1.01)),
    Fault("one bias scaled", altered("v_proj.bias", lambda x: x * 1.01)),
    Fault("one tensor negated", altered("up_proj", lambda x: -x)),
    Fault("one tensor zero", altered("o_proj", lambda x: 0.0 * x)),
    Fault("one matrix transposed", altered("o_proj", transposed)),
    Fault("rows moved by one", altered("embed_tokens", lambda x: x.roll(1, 0))),
    Fault("one number off by one unit", altered("gate_proj", one_element)),
    Fault("one number off by one unit in a norm", altered("model.norm.weight", one_element)),
    Fault("wrong format: float16", altered("q_proj.weight", lambda x: x.half())),
    Fault("wrong format: float8", altered("k_proj.weight", lambda x: x.to(torch.float8_e4m3fn))),
    Fault(
        "one number not finite",
        altered(
            "v_proj.weight",
            lambda x: x.view(-1).index_fill(0, torch.tensor([5]), float("nan")).view(x.shape),
        ),
    ),
    Fault("prefix cache not reset", engine=lambda e, old: no_reset(e, True), where=on_vllm),
    Fault("prefix cache refuses", engine=lambda e, old: no_reset(e, False), where=on_vllm),
    Fault("push taken and ignored", engine=ignored, where=lambda s: s.engine == "vllm"),
    Fault("packed copy of the head kept", engine=kept_copy("lm_head"), where=on_vllm),
    Fault("packed copy of qkv_proj kept", engine=kept_copy("0.self_attn.qkv_proj"), where=on_vllm),
    Fault("packed copy of down_proj kept", engine=kept_copy("1.mlp.down_proj"), where=on_vllm),
    Fault(
        "qkv_proj packed from another tensor",
        engine=packed_wrongly("qkv_proj", lambda w: w.roll(1, 0)),
        where=on_vllm,
    ),
    Fault(
        "head packed from another tensor",
        engine=packed_wrongly("lm_head", lambda w: 1.01 * w),
        where=on_vllm,
    ),
    Fault(
        "shards exchanged in loading (qkv_proj)",
        engine=lambda e, old: shards_exchanged(e, "qkv_proj"),
        where=on_vllm,
    ),
    Fault(
        "shards exchanged in loading (gate_up_proj)",
        engine=lambda e, old: shards_exchanged(e, "gate_up_proj"),
        where=on_vllm,
    ),
    Fault(
        "norm changed in the engine", engine=lambda e, old: after_reload(e, set_norm), where=on_vllm
    ),
    Fault(
        "embedding changed in the engine",
        engine=lambda e, old: after_reload(e, set_table),
        where=on_vllm,
    ),
    Fault("lora_A old", stale("lora_A"), where=on_adapter),
    Fault("lora_B old", stale("lora_B"), where=on_adapter),
    Fault("one adapter matrix old", stale("layers.0.self_attn.v_proj.lora_B"), where=on_adapter),
    Fault(
        "two adapter matrices swapped",
        swapped("0.self_attn.k_proj.lora_A", "1.self_attn.k_proj.lora_A"),
        where=on_adapter,
    ),
    Fault("adapter scaled twice", altered("o_proj.lora_B", lambda x: 2.0 * x), where=on_adapter),
    Fault("answers with the adapter before", engine=old_request, where=on_adapter),
    Fault("numbers of the adapter before", engine=not_copied, where=on_adapter),
)
