"""Recognize the tool that a configuration is written for."""

from collections.abc import Mapping
from typing import Any

from align.core.errors import RecipeError

WITHOUT_IMPORT = {"verl": {"actor_rollout_ref"}, "OpenRLHF": {"pretrain", "prompt_data"}}
"""Keys, all of which a configuration of the tool has; ``align import`` cannot read these tools."""


def refuse_foreign(data: Mapping[str, Any], path: str) -> None:
    """Raise RecipeError, with what to do, if a file is another tool's configuration or no recipe.

    Without this, every key of such a file would be an error of its own.
    """
    if tool := recognize(data):
        told = f"this looks like a configuration of {tool}; convert it: align import {tool} {path}"
        raise RecipeError(f"{path}: {told}")
    if {"name", "stages", "extends"} & data.keys():
        return
    for tool, keys in WITHOUT_IMPORT.items():
        if keys <= data.keys():
            raise RecipeError(
                f"{path}: this looks like a configuration of {tool}. Write a recipe: "
                f"docs/migrate.md has a table of {tool}'s keys"
            )
    found = ", ".join(list(data)[:6]) + (", ..." if len(data) > 6 else "")
    raise RecipeError(
        f"{path}: not a recipe. Expected the keys 'name' and 'stages', found {found or 'no key'}. "
        "align init writes a recipe"
    )


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
