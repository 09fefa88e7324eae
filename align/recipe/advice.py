"""Warnings on a right recipe: settings outside of what is known to work. Never an error."""

import json
from pathlib import Path
from typing import Any

from align.recipe.schema import ClassifyStage, Recipe, RewardStage, SftStage

SMALL_WIDTH = 512
"""Hidden size below which published rates say nothing: such models take larger ones."""

_LORA = (
    1e-4, 3e-4,
    "1e-4 to 2e-4 from 7B to 65B (arXiv:2305.14314 appendix B), 2e-4 for GPT-3 (arXiv:2106.09685 "
    "appendix D)",
)  # fmt: skip
_PEFT = "peft's comparison of methods on Llama-3.2-3B (method_comparison/MetaMathQA)"
RATES: dict[str, tuple[float, float, str]] = {
    "full": (
        1e-5, 5e-5,
        "2e-5 to 5e-5 for BERT (arXiv:1810.04805 appendix A.3), 2e-5 for Llama 2 "
        "(arXiv:2307.09288 section 3.1)",
    ),
    "head": (
        1e-4, 1e-2,
        "Adam's own 1e-3 (arXiv:1412.6980 algorithm 1) for a layer alone; a factor of 10 either "
        "way is our choice",
    ),
    "lora": _LORA,
    "rslora": _LORA,
    "dora": _LORA,
    "qlora": _LORA,
    "pissa": (
        1e-5, 5e-5,
        "2e-5 in its authors' scripts for Llama 2 (arXiv:2404.02948): it trains the leading part "
        "of the weights themselves",
    ),
    "ia3": (
        1e-3, 1e-2,
        f"3e-3 in its authors' configuration of T0 (arXiv:2205.05638, Adafactor), 5e-3 in {_PEFT}",
    ),
    "oft": (3e-5, 3e-4, f"1e-4 in {_PEFT}; a factor of 3 either way is our choice"),
    "vera": (1e-4, 1e-2, f"1e-4 in {_PEFT}; the upper end, as of ia3's vectors, is our choice"),
    "bottleneck": (
        3e-5, 3e-3,
        "3e-4 in its authors' example for BERT, the middle of the rates that they tried "
        "(arXiv:1902.00751 section 3)",
    ),
    "prefix": (
        5e-5, 5e-3,
        f"5e-5 in its authors' runs of GPT-2 (arXiv:2101.00190), 1e-3 and 5e-3 in {_PEFT}",
    ),
    "prompt": (
        1e-3, 3e-1,
        f"0.3 for T5 (arXiv:2104.08691 section 3, Adafactor), 1e-3 with AdamW in {_PEFT}",
    ),
    "ptuning": (3e-5, 3e-4, f"1e-4 in {_PEFT}; a factor of 3 either way is our choice"),
    "loreft": (
        3e-4, 3e-3,
        "9e-4 in its authors' commands for Llama (arXiv:2404.03592); a factor of 3 either way is "
        "our choice",
    ),
}  # fmt: skip
"""Method to lowest and highest rate of supervised stages, and where they come from."""


def warnings(recipe: Recipe) -> list[str]:
    """Give one line per setting of a valid recipe that deserves a second look."""
    found = []
    for name, spec in recipe.stages.items():
        supervised = isinstance(spec, SftStage | RewardStage | ClassifyStage)
        if supervised and not _is_small(recipe, spec.init):
            found += _rate(name, spec)
    return found


def _rate(name: str, spec: SftStage | RewardStage | ClassifyStage) -> list[str]:
    low, high, source = RATES[spec.tuning.method]
    rate = spec.optim.learning_rate
    if low <= rate <= high:
        return []
    return [
        f"stages.{name}.optim.learning_rate: {rate:g} is outside of {low:g} to {high:g}, with "
        f"which {spec.tuning.method} is known to work: {source}"
    ]


def _is_small(recipe: Recipe, init: str) -> bool:
    """Follow ``init`` back to the model; one that cannot be looked at counts as large."""
    seen: set[str] = set()
    while init in recipe.stages and init not in seen:
        seen.add(init)
        spec: Any = recipe.stages[init]
        if spec.kind not in ("base", "encoder"):
            init = getattr(spec, "init", "")
        elif getattr(spec, "build", None) is not None:
            return spec.build.hidden_size < SMALL_WIDTH
        else:
            init = spec.path
    for folder in (Path(init), Path(init) / "model"):
        if (folder / "config.json").is_file():
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return int(config.get("hidden_size", SMALL_WIDTH)) < SMALL_WIDTH
    return False
