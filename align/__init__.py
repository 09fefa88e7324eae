"""align: make language models follow instructions and preferences (SFT, RLHF, DPO, GRPO).

``import align`` imports nothing else; every name below is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from align import losses, rewards
    from align.api.result import Run
    from align.api.running import load_recipe, run
    from align.api.stages import dpo, evaluate, grpo, kto, ppo, reward, sft
    from align.core.errors import AlignError, RunError

__all__ = [
    "AlignError",
    "Run",
    "RunError",
    "__version__",
    "dpo",
    "evaluate",
    "grpo",
    "kto",
    "load_recipe",
    "losses",
    "ppo",
    "reward",
    "rewards",
    "run",
    "sft",
]

_HOMES = {
    "AlignError": "align.core.errors",
    "Run": "align.api.result",
    "RunError": "align.core.errors",
    "load_recipe": "align.api.running",
    "run": "align.api.running",
    **dict.fromkeys(("sft", "dpo", "kto", "reward", "grpo", "ppo", "evaluate"), "align.api.stages"),
}


if not TYPE_CHECKING:  # With it, a type checker would accept every name.

    def __getattr__(name: str) -> Any:
        if name in ("losses", "rewards"):
            return import_module(f"align.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module 'align' has no attribute '{name}'")
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
