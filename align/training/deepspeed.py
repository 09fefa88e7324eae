"""Translate the ZeRO and optimizer specs into a DeepSpeed configuration."""

from typing import Any

from align.core import distributed, extensions
from align.recipe.schema import OptimSpec, TrainingStage, ZeroSpec

ON_CPU = {
    "reduce_bucket_size": 2 * 10**7,
    "sub_group_size": 10**7,
    "stage3_max_live_parameters": 2 * 10**7,
    "stage3_max_reuse_distance": 2 * 10**7,
    "stage3_prefetch_bucket_size": 10**7,
}
"""Elements of ZeRO-3's buffers in a rank without a GPU: DeepSpeed's own numbers, which are 2 GiB
and more, would be the whole of a small model."""


def deepspeed_config(zero: ZeroSpec, optim: OptimSpec, *, dtype: str) -> dict[str, Any]:
    """Return the configuration dict for ``deepspeed.initialize``.

    Batch sizes are nominal: the Learner decides how many micro-batches an optimizer step has and
    normalizes the loss itself (``managed_gradient_accumulation: false``). ``gradient_clipping`` is
    always written because DeepSpeed clips at 1.0 when the key is absent.
    """
    half = dtype == "bfloat16"
    zero_config: dict[str, Any] = {"stage": effective_stage(zero, dtype=dtype)}
    if zero.stage == 3 and distributed.device().type == "cpu":
        zero_config |= ON_CPU
    # Without it, a saved ZeRO-3 checkpoint would contain no whole weights.
    if zero.stage == 3:
        zero_config["stage3_gather_16bit_weights_on_model_save"] = True
    if zero.offload == "cpu":
        zero_config["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if zero.stage == 3:
            zero_config["offload_param"] = {"device": "cpu", "pin_memory": True}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": optim.max_grad_norm,
        "bf16": {"enabled": half},
        "zero_optimization": zero_config,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # The project has its own metrics log; DeepSpeed's step lines would only repeat it.
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if half:
        # Summed in bfloat16, the gradient of 64 micro-batches is off by 0.9 %.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def with_cpu_adam(config: dict[str, Any], optim: OptimSpec) -> dict[str, Any]:
    """Return the configuration with DeepSpeed's own CPU Adam, which offloading needs.

    DeepSpeed compiles it when it is first used; this waits for processes that already do.
    """
    extensions.wait_for_builds()
    extensions.announce_build("cpu_adam")
    params = {"lr": optim.learning_rate, "betas": list(optim.betas), "eps": optim.eps}
    return {**config, "optimizer": {"type": "AdamW", "params": params}}


def config_of_shards(spec: TrainingStage) -> dict[str, Any] | None:
    """Return DeepSpeed's configuration if a model is loaded in shards, None if it is loaded whole.

    New adapters are made from whole weights, and the Fisher information needs gradients before
    DeepSpeed wraps the model.
    """
    if spec.zero.stage < 3 or spec.tuning.method != "full" or spec.keep.ewc is not None:
        return None
    return deepspeed_config(spec.zero, spec.optim, dtype=spec.dtype)


def effective_stage(zero: ZeroSpec, *, dtype: str) -> int:
    """Return the ZeRO stage that DeepSpeed is given.

    In bfloat16 stage 0 runs as stage 1: the same training, but stage 0 cannot accumulate gradients
    in float32 and takes more memory.
    """
    return 1 if dtype == "bfloat16" and zero.stage == 0 else zero.stage
