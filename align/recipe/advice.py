"""Warnings on a right recipe: settings outside of what is known to work. Never an error."""

import json
from pathlib import Path
from typing import Any

from align.recipe.schema import Recipe, RewardStage, SftStage

SMALL_WIDTH = 512
"""Hidden size below which published rates say nothing: such models take larger ones."""

RATES: dict[str, tuple[float, float, str]] = {
    "full": (
        1e-5, 5e-5,
        "full fine-tuning: 2e-5 to 5e-5 for BERT (arXiv:1810.04805 appendix A.3), 2e-5 for "
        "Llama 2 (arXiv:2307.09288 section 3.1)",
    ),
    "lora": (
        1e-4, 3e-4,
        "low-rank updates: 1e-4 to 2e-4 from 7B to 65B (arXiv:2305.14314 appendix B), 2e-4 for "
        "GPT-3 (arXiv:2106.09685 appendix D)",
    ),
}  # fmt: skip
"""Method to lowest and highest rate of sft, and where they come from."""

FAMILY = {"full": "full", **dict.fromkeys(("lora", "rslora", "dora", "qlora"), "lora")}


def warnings(recipe: Recipe) -> list[str]:
    """Give one line per setting of a valid recipe that deserves a second look."""
    found = []
    for name, spec in recipe.stages.items():
        if isinstance(spec, SftStage | RewardStage) and not _is_small(recipe, spec.init):
            found += _rate(name, spec)
    return found


def _rate(name: str, spec: SftStage | RewardStage) -> list[str]:
    family = FAMILY.get(spec.tuning.method)
    if family is None:
        return []
    low, high, source = RATES[family]
    rate = spec.optim.learning_rate
    if low <= rate <= high:
        return []
    return [
        f"stages.{name}.optim.learning_rate: {rate:g} is outside of {low:g} to {high:g}, with "
        f"which {spec.tuning.method} is known to work; {source}"
    ]


def _is_small(recipe: Recipe, init: str) -> bool:
    """Follow ``init`` back to the model; one that cannot be looked at counts as large."""
    seen: set[str] = set()
    while init in recipe.stages and init not in seen:
        seen.add(init)
        spec: Any = recipe.stages[init]
        if spec.kind != "base":
            init = getattr(spec, "init", "")
        elif spec.build is not None:
            return spec.build.hidden_size < SMALL_WIDTH
        else:
            init = spec.path
    for folder in (Path(init), Path(init) / "model"):
        if (folder / "config.json").is_file():
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return int(config.get("hidden_size", SMALL_WIDTH)) < SMALL_WIDTH
    return False
