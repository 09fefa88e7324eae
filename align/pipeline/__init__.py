"""Recipe -> plan -> stage processes -> artifacts. Never imports torch."""

from align.pipeline.planning import PlannedStage, plan
from align.pipeline.running import run

__all__ = ["PlannedStage", "plan", "run"]
