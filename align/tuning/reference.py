"""The reference of a stage: its policy as it was before the first step.

With the adapter off the policy is what the stage began from, but for three cases: without an
adapter there is nothing to switch off, PiSSA takes a part of the weights into its adapter, and an
adapter that is continued was part of the policy from the start. They need a frozen copy.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from align.recipe.schema.tuning import TuningSpec
from align.tuning.files import unmerged_adapter


def off_is_start(tuning: TuningSpec, model_dir: Path) -> bool:
    """Say whether the policy with its adapter off is the policy that the stage began from.

    Args:
        tuning: the stage's block. model_dir: what it began from.
    """
    return tuning.method not in ("full", "pissa") and unmerged_adapter(model_dir) is None


def start_policy(model: Any, tuning: TuningSpec, model_dir: Path) -> AbstractContextManager[None]:
    """Make an untrained policy answer as the one it began from, inside the block.

    Most adapters change nothing before their first step; virtual tokens do.
    """
    return model.disable_adapter() if off_is_start(tuning, model_dir) else nullcontext()
