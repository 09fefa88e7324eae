"""Recognize the tool that a configuration is written for."""

from collections.abc import Mapping
from typing import Any


def recognize(data: Mapping[str, Any]) -> str | None:
    """Return the tool that a configuration is written for, None if it is of none."""
    if "stages" in data:
        return None
    if "base_model" in data and ("datasets" in data or "pretraining_dataset" in data):
        return "axolotl"
    if "model_name_or_path" in data or "sft_model_path" in data:
        own = ("finetuning_type", "cutoff_len", "template", "dataset_dir", "do_train")
        return "llamafactory" if any(name in data for name in own) else "trl"
    return None
