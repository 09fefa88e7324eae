"""The reference policy of a stage: its policy before the first step.

With its adapter disabled, the policy usually equals the start of the stage. There are three
exceptions that need a frozen copy: there is no adapter, PiSSA moves a part of the weights into its
adapter, or a continued adapter was part of the policy from the start.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from align.recipe.schema.tuning import TuningSpec
from align.tuning.files import unmerged_adapter


def off_is_start(tuning: TuningSpec, model_dir: Path) -> bool:
    """Return whether the policy with its adapter disabled equals the start of the stage.

    Args:
        tuning: the stage's tuning block.
        model_dir: the model from which the stage started.
    """
    return tuning.method not in ("full", "pissa") and unmerged_adapter(model_dir) is None


def start_policy(model: Any, tuning: TuningSpec, model_dir: Path) -> AbstractContextManager[None]:
    """Make an untrained policy respond as it did at the start of the stage, inside the block.

    Most adapters change nothing before their first step, but virtual tokens do.
    """
    return model.disable_adapter() if off_is_start(tuning, model_dir) else nullcontext()
