"""New weights, or a new adapter, for a running vLLM engine: functions that run on its worker.

Every push of an adapter makes one under a new number. vLLM finds requests, adapters and cached
prefixes by it, so that no answer can be made with an earlier one: where this number is not loaded,
vLLM looks for files that are not there and fails.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from align.recipe.schema.tuning import LoraTuning


def adapter_options(tuning: LoraTuning) -> dict[str, Any]:
    """Give the options of an engine that serves one adapter of this tuning."""
    rank = min(r for r in tuning.served_ranks if r >= tuning.rank)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}


def adapter_request(number: int) -> Any:
    """Give what a request says to be answered with the adapter of this number."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"policy-{number}", number, "pushed, not read from disk")


def load_adapter(
    worker: Any, number: int, named_tensors: Iterator[tuple[str, Tensor]], tuning: LoraTuning
) -> set[str]:
    """Put an adapter in the place of all others, on the engine's worker.

    Args:
        worker: vLLM's. number: a new one for each push, from 1.
        named_tensors: by peft's names. tuning: the block that made them.

    Returns:
        The modules that the adapter speaks of and the model has not.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    config = PEFTHelper(
        r=tuning.rank,
        lora_alpha=tuning.alpha,  # pyright: ignore[reportArgumentType] a float divides as well
        target_modules=tuning.targets,
        use_rslora=tuning.method == "rslora",
    )
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
    parts = manager.packed_modules_mapping
    held = {
        f"{name.rpartition('.')[0]}.{part}"
        for name in manager.modules
        for part in parts.get(name.rpartition(".")[2], [name.rpartition(".")[2]])
    }
    return wanted - held


def load_packed(worker: Any, named_tensors: Iterator[tuple[str, Tensor]]) -> set[str]:
    """Load on CPU, where the first load packed the weights for its GEMM and emptied them.

    Returns:
        Names of the parameters that got no weight.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    model = worker.get_model()
    expected = {name for name, _ in model.named_parameters()}
    with _recorded(model) as loaded:
        worker.model_runner.reload_weights(weights_iterator=named_tensors)
    # The reload does not repack the head: a tied one would go on with the old weights, silently.
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
    return expected - loaded if loaded else set()


def load_in_place(worker: Any, named_tensors: Iterator[tuple[str, Tensor]]) -> set[str]:
    """Load on an accelerator; returns the names of the parameters that got no weight."""
    model = worker.get_model()
    loaded = model.load_weights(named_tensors)
    return {name for name, _ in model.named_parameters()} - loaded if loaded else set()


@contextlib.contextmanager
def _recorded(model: Any) -> Iterator[set[str]]:
    """Note which parameters ``model.load_weights`` fills: vLLM's reload only logs the rest."""
    loaded: set[str] = set()
    load: Callable[..., set[str] | None] = model.load_weights

    def recording(weights: Iterator[tuple[str, Tensor]]) -> set[str] | None:
        names = load(weights)
        loaded.update(names or ())
        return names

    model.load_weights = recording
    try:
        yield loaded
    finally:
        del model.load_weights
