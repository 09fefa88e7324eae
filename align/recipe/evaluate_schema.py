"""Schema of the evaluate stage."""

from typing import Literal

from pydantic import Field, model_validator

from align.recipe.offline_schema import StageSpec
from align.recipe.parts import Count, DataSpec, Fraction, SamplingSpec, refuse_answers
from align.recipe.reward_schema import RewardSpec
from align.recipe.task_schema import HarnessSpec, PairwiseSpec, TaskSampling, TaskSpec

OWN_TASK = "heldout"
"""Name of the task that the stage's own prompts make."""

LONGER = "longer"
"""The judge of `align calibrate` for whom the longer answer wins: what a judge must beat."""


class EvaluateStage(StageSpec):
    """Compare checkpoints on held-out prompts."""

    kind: Literal["evaluate"]
    models: list[str] = Field(min_length=1)
    labels: dict[str, str] = {}
    """Names in tables for ``models`` that are given by path."""
    baseline: str
    reference: str | None = None
    """Policy the KL is measured against; None is the baseline."""
    tasks: list[TaskSpec] = []
    """Each by name (align/evaluation/tasks/), by the path of a file, or written out."""
    pairwise: PairwiseSpec | None = None
    """Judge behind an endpoint, for tasks without a ``judge`` of their own."""
    harness: HarnessSpec | None = None
    """Tasks of lm-evaluation-harness, in an environment of its own."""
    prompts: list[DataSpec] = []
    """A task of the stage's own, with ``scores`` and ``judge``."""
    scores: list[RewardSpec] = []
    """Each becomes a column of the table under its name (default: its kind)."""
    judge: list[RewardSpec] = []
    """The weighted sum decides each comparison; equal sums are ties."""
    samples: Count = 1
    sampling: SamplingSpec = SamplingSpec(temperature=0.0)
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_length: Count = 1024
    reward_models: list[str] = []
    pairs: list[DataSpec] = []
    """Held-out pairs on which each reward model's card is measured."""
    sets: list[DataSpec] = []
    """Rows ``{prompt, chosen: [..], rejected: [..]}`` (RewardBench 2) for best-of-4 accuracy."""
    max_lost_frac: Fraction = 0.0
    """Share of the prompts, and of the pairs, that may be lost to ``max_length``."""
    expect: dict[str, tuple[float | None, float | None]] = {}
    """Bands such as ``models/dpo/kl: [0, 20]`` or ``differences/grpo-sft/exact_match: [0.1, null]``
    on summary.json; the report and the terminal say which hold."""

    def label(self, model: str) -> str:
        """Give the name of a model in tables."""
        return self.labels.get(model, model)

    @property
    def all_tasks(self) -> list[TaskSpec]:
        """Give the task of the stage's own prompts, if it has any, then the others."""
        return [self._own_task(), *self.tasks] if self.prompts else list(self.tasks)

    def _own_task(self) -> TaskSpec:
        sampling = self.sampling.model_dump(include=set(TaskSampling.model_fields))
        return TaskSpec(
            name=OWN_TASK,
            prompts=self.prompts,
            grader=self.scores,
            judge=self.judge,
            samples=self.samples,
            sampling=TaskSampling(**sampling),
            max_length=self.max_length,
            max_lost_frac=self.max_lost_frac,
        )

    @model_validator(mode="after")
    def _legal(self) -> "EvaluateStage":
        if self.baseline not in self.models:
            raise ValueError(f"baseline '{self.baseline}' is not among models {self.models}")
        shown = [self.label(model) for model in self.models]
        if unknown := sorted(set(self.labels) - set(self.models)):
            raise ValueError(f"labels: {unknown} are not among models {self.models}")
        if len(set(shown)) < len(shown):
            raise ValueError(f"two models have the same name in tables: {shown}; set 'labels'")
        self._something_to_do()
        if self.reward_models and not self.pairs:
            raise ValueError("'reward_models' needs 'pairs' to measure them on")
        if self.sets and not self.reward_models:
            raise ValueError("'sets' has no effect without 'reward_models'; remove it")
        refuse_answers([*self.pairs, *self.sets], "evaluate")
        return self

    def _something_to_do(self) -> None:
        parts = {"prompts": self.prompts, "scores": self.scores, "judge": self.judge}
        if any(parts.values()) and not all(parts.values()):
            missing = [name for name, value in parts.items() if not value]
            raise ValueError(f"prompts, scores and judge belong together; {missing} missing")
        if not (self.prompts or self.tasks or self.harness):
            raise ValueError("nothing to ask: give prompts, scores and judge, or tasks, or harness")
        names = [task.name for task in self.all_tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"two tasks have the same name: {names}; '{OWN_TASK}' are the prompts")
        for task in self.tasks:
            if not (task.judge or task.grader or self.pairwise):
                raise ValueError(
                    f"task '{task.name}' has no grader, so it needs a judge: give 'pairwise'"
                )
        if self.pairwise and all(task.judge for task in self.all_tasks):
            raise ValueError("'pairwise' has no effect: every task has a 'judge' of its own")
