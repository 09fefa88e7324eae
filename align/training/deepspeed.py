"""Translate the ZeRO and optimizer specs into a DeepSpeed configuration."""

from typing import Any

from align.recipe.schema import OptimSpec, ZeroSpec


def deepspeed_config(zero: ZeroSpec, optim: OptimSpec, *, dtype: str) -> dict[str, Any]:
    """Return the configuration dict for ``deepspeed.initialize``.

    Batch sizes are nominal: the Learner decides how many micro-batches an optimizer step has and
    normalizes the loss itself (``managed_gradient_accumulation: false``). ``gradient_clipping`` is
    always written because DeepSpeed clips at 1.0 when the key is absent.
    """
    zero_config: dict[str, Any] = {"stage": zero.stage}
    if zero.stage == 3:
        zero_config["stage3_gather_16bit_weights_on_model_save"] = True
    if zero.offload == "cpu":
        zero_config["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if zero.stage == 3:
            zero_config["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": optim.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": zero_config,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # The project has its own metrics log; DeepSpeed's step lines would only repeat it.
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
