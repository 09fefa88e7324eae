"""Schema of the stages that compare models: evaluate and merge."""

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from align.recipe.schema.common import (
    Count,
    DataSpec,
    Fraction,
    Ref,
    SamplingSpec,
    Spec,
    distinct_names,
    refuse_answers,
)
from align.recipe.schema.dtype import Dtype
from align.recipe.schema.training import StageSpec
from reward_models.identity import Added
from reward_models.specs import EndpointSpec, PythonSpec, RewardSpec

MergeMethod = Literal["linear", "ties", "dare_ties", "dare_linear", "slerp"]


class MergeStage(StageSpec):
    """Interpolate between a model and its fine-tuned version (WiSE-FT, arXiv:2109.01903).

    Several alphas are scored on prompts like those of the fine-tuning and on shifted prompts, and
    the best one is merged. A single alpha is merged without scoring.
    """

    produces: ClassVar[str] = "policy"
    module: ClassVar[str] = "align.stages.merge"
    kind: Literal["merge"]
    base: Annotated[str, Ref("policy")]
    """The model before the fine-tuning."""
    tuned: Annotated[str, Ref("policy")]
    """The model after the fine-tuning."""
    others: Annotated[list[str], Ref("policy")] = []
    """Other models fine-tuned from ``base``, merged together with ``tuned`` by ties and dare."""
    method: MergeMethod = "linear"
    """How the weights are merged. All methods except linear need mergekit: pip install
    'align-suite[merge]'."""
    density: Fraction | None = None
    """Fraction of each task vector that ties and dare keep; None is 0.5."""
    alphas: list[Fraction] = Field(default=[0.0, 0.25, 0.5, 0.75, 1.0], min_length=1)
    """Weights of the fine-tuned model: 0 is ``base``, 1 is ``tuned``; with ties and dare, factors
    of the merged task vector."""
    prompts: list[DataSpec] = []
    """Held-out prompts like those of the fine-tuning."""
    shifted: list[DataSpec] = []
    """Held-out prompts of another kind, for abilities of ``base`` that should be preserved."""
    scores: list[RewardSpec] = []
    """Rewards whose weighted sum is the score of a response."""
    tolerance: Annotated[float, Field(ge=0.0)] = 0.01
    """The chosen alpha is the best on ``shifted`` among those whose score on ``prompts`` is at most
    this much below that of alpha 1 (in the unit of the score); the largest one if several tie."""
    samples: Count = 1
    """Responses to each prompt."""
    sampling: SamplingSpec = SamplingSpec(temperature=0.0)
    """How responses are sampled."""
    dtype: Dtype = "float32"
    """Data type of the engine while scoring, the recipe's ``dtype`` unless set; the saved model
    keeps that of ``tuned``."""
    max_length: Count = 1024
    """Maximum tokens of prompt and response."""
    max_lost_frac: Fraction = 0.0
    """Maximum fraction of prompts that may be dropped because of ``max_length``; more is an
    error."""

    @model_validator(mode="after")
    def _legal(self) -> "MergeStage":
        judged = {"prompts": self.prompts, "shifted": self.shifted, "scores": self.scores}
        if len(set(self.alphas)) != len(self.alphas):
            raise ValueError(f"alphas {self.alphas} contains a duplicate")
        if len(self.alphas) == 1:
            given = [key for key, value in judged.items() if value]
            if given:
                raise ValueError(f"a single alpha is not scored; remove {', '.join(given)}")
            return self
        missing = [key for key, value in judged.items() if not value]
        if missing:
            raise ValueError(f"several alphas are scored to choose one; give {', '.join(missing)}")
        if 1.0 not in self.alphas:
            raise ValueError("alphas must contain 1.0, the reference of 'tolerance'")
        refuse_answers([*self.prompts, *self.shifted], "merge")
        distinct_names(self.scores)
        return self


WIN_RATES = ("win_rate", "length_controlled_win_rate")
MEASURED = ("kl", "length", "repeats", "stop_rate", "perplexity")
_PASS = re.compile(r"pass@([1-9][0-9]*)")


class PairwiseSpec(Spec):
    """A judge of response pairs, in both orders: a language model or your own function."""

    endpoint: EndpointSpec | None = None
    """Language model that compares the two responses."""
    function: Annotated[PythonSpec | None, Added("0.2")] = None
    """The function that compares. It is called like a reward, and gets the other response to each
    prompt as ``others``; it returns 1 if its completion is better, 0.5 for a tie and 0 if the other
    is better, or a probability."""
    criteria: str = "Judge which answer helps the user more: correct, on the question, clear."
    """What the model is told to compare."""
    sequential: bool = True
    """Stop as soon as the verdict is clear; the interval is valid at any stopping time."""
    batch: Count = 32
    """Prompts that are judged between two checks of the verdict."""

    @model_validator(mode="after")
    def _one_judge(self) -> "PairwiseSpec":
        if (self.endpoint is None) == (self.function is None):
            found = "neither" if self.endpoint is None else "both"
            raise ValueError(f"give one of 'endpoint' and 'function'; found {found}")
        return self


class TaskSampling(Spec):
    """How the responses of a task are sampled."""

    max_new_tokens: Count = 128
    """Maximum tokens of a response."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """Divisor of the logits; 0 is greedy decoding."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sample from the most probable tokens with this total probability."""


class TaskSpec(Spec):
    """An evaluation task: held-out prompts, a grader, a judge and the metrics to report."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    """Name in tables and files."""
    description: str = ""
    """One-line description, shown in the report."""
    prompts: list[DataSpec] = Field(min_length=1)
    """Held-out prompts."""
    grader: list[RewardSpec] = []
    """Rewards that grade each response. Each becomes a metric under its name (default: its kind);
    higher is better."""
    judge: list[RewardSpec] = []
    """Rewards whose weighted sum decides each comparison. If empty, the stage's ``pairwise`` judge
    decides; without one, the weighted sum of the grader does."""
    metrics: list[str] = []
    """Metrics to report, the deciding one first; if empty, all that apply."""
    samples: Count = 1
    """Responses to each prompt; their mean score is avg@k."""
    sampling: TaskSampling = TaskSampling()
    """How responses are sampled."""
    max_length: Count = 1024
    """Maximum tokens of prompt and response."""
    max_lost_frac: Fraction = 0.0
    """Maximum fraction of prompts, and of responses, that may be dropped because of ``max_length``;
    more is an error."""
    answers: list[DataSpec] = []
    """Held-out responses for the metric ``perplexity``."""
    by: str | None = None
    """Column of the prompts; the deciding metric is also reported for each of its values."""

    @property
    def grades(self) -> list[str]:
        """Return the names of the grader's metrics."""
        return [reward.label for reward in self.grader]

    @property
    def reported(self) -> list[str]:
        """Return the names of the reported metrics, the deciding one first."""
        if self.metrics:
            return self.metrics
        measured = [m for m in MEASURED if m not in ("kl", "perplexity")]
        if self.sampling.temperature == 1.0:
            measured = ["kl", *measured]
        return [*WIN_RATES, *self.grades, *measured, *(["perplexity"] if self.answers else [])]

    @property
    def passes(self) -> list[int]:
        """Return the k of each reported metric ``pass@k``."""
        return [int(found[1]) for m in self.reported if (found := _PASS.fullmatch(m))]

    @model_validator(mode="after")
    def _legal(self) -> "TaskSpec":
        refuse_answers(self.prompts, "evaluate")
        distinct_names(self.grader)
        distinct_names(self.judge)
        taken = {*WIN_RATES, *MEASURED, "judge"} & set(self.grades)
        if taken:
            raise ValueError(
                f"grader: {', '.join(sorted(taken))}: the name of a metric; set another 'name'"
            )
        known = [*self.grades, *WIN_RATES, *MEASURED]
        for metric in self.metrics:
            if metric not in known and not _PASS.fullmatch(metric):
                raise ValueError(f"no metric '{metric}'; one of {', '.join(known)}, pass@k")
        if too_many := [k for k in self.passes if k > self.samples]:
            raise ValueError(f"pass@{too_many[0]} needs samples: {too_many[0]} or more")
        if self.passes and not self.grader:
            raise ValueError("pass@k needs a 'grader' that decides what is correct")
        drawn = (self.sampling.temperature, self.sampling.top_p)
        if "kl" in self.metrics and drawn != (1.0, 1.0):
            raise ValueError("the estimate of kl needs sampling.temperature: 1.0 and top_p: 1.0")
        if ("perplexity" in self.reported) != bool(self.answers):
            raise ValueError("the metric 'perplexity' and 'answers' need each other")
        return self


class HarnessSpec(Spec):
    """Tasks of lm-evaluation-harness, run in a separate environment."""

    python: str
    """Python interpreter of the environment in which lm-eval is installed."""
    tasks: list[str] = Field(min_length=1)
    """Names of tasks of lm-evaluation-harness."""
    backend: Literal["hf", "vllm"] = "hf"
    """Engine that the harness generates with."""
    include_path: str | None = None
    """Folder of custom task files."""
    limit: Count | None = None
    """Questions per task; None for all."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; None for the task's own number."""
    batch_size: Count = 8
    """Questions per batch."""
    chat_template: bool = False
    """Apply the model's chat template to the questions."""


OWN_TASK = "heldout"
"""Name of the task that consists of the stage's own prompts."""

LONGER = "longer"
"""A judge of `align calibrate` that prefers the longer response: the baseline of other judges."""


class EvaluateStage(StageSpec):
    """Compare checkpoints on held-out prompts."""

    produces: ClassVar[str] = "evaluation"
    module: ClassVar[str] = "align.stages.evaluate.stage"
    kind: Literal["evaluate"]
    models: Annotated[list[str], Ref("policy")] = Field(min_length=1)
    """Stages, folders or hub ids of the compared models."""
    labels: dict[str, str] = {}
    """Display names of ``models`` that are given by path."""
    baseline: str
    """The model, out of ``models``, that the others are compared with."""
    reference: Annotated[str | None, Ref("policy")] = None
    """Reference policy of the KL; None for the baseline."""
    tasks: list[TaskSpec] = []
    """Evaluation tasks: names of shipped tasks (align/evaluation/tasks/), paths of task files, or
    inline tasks."""
    pairwise: PairwiseSpec | None = None
    """Judge of pairs for tasks without their own ``judge``."""
    harness: HarnessSpec | None = None
    """Tasks of lm-evaluation-harness, run in a separate environment."""
    prompts: list[DataSpec] = []
    """Prompts of the stage's own task, with ``scores`` and ``judge``."""
    scores: list[RewardSpec] = []
    """Rewards to measure. Each becomes a column of the results, under its name (default: its
    kind)."""
    judge: list[RewardSpec] = []
    """Rewards whose weighted sum decides each comparison; equal sums are ties."""
    samples: Count = 1
    """Responses to each prompt."""
    sampling: SamplingSpec = SamplingSpec(temperature=0.0)
    """How responses to ``prompts`` are sampled."""
    dtype: Dtype = "float32"
    """Data type of the engines' weights; the recipe's ``dtype`` unless set."""
    max_length: Count = 1024
    """Maximum tokens of prompt and response."""
    reward_models: Annotated[list[str], Ref("reward_model")] = []
    """Reward models to measure on ``pairs``."""
    pairs: list[DataSpec] = []
    """Held-out pairs on which each reward model's card is measured."""
    sets: list[DataSpec] = []
    """Rows ``{prompt, chosen: [..], rejected: [..]}`` (RewardBench 2) for best-of-4 accuracy."""
    max_lost_frac: Fraction = 0.0
    """Maximum fraction of prompts, and of pairs, that may be dropped because of ``max_length``;
    more is an error."""
    expect: dict[str, tuple[float | None, float | None]] = {}
    """Expected ranges of numbers in summary.json, such as ``models/dpo/kl: [0, 20]`` or
    ``differences/grpo-sft/exact_match: [0.1, null]``; the report and the terminal check them."""

    def label(self, model: str) -> str:
        """Return the display name of a model."""
        return self.labels.get(model, model)

    @property
    def all_tasks(self) -> list[TaskSpec]:
        """Return the task of the stage's own prompts, if any, followed by the other tasks."""
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
        refuse_answers([*self.pairs, *self.sets], "evaluate")
        return self

    def _something_to_do(self) -> None:
        parts = {"prompts": self.prompts, "scores": self.scores, "judge": self.judge}
        if any(parts.values()) and not all(parts.values()):
            missing = [name for name, value in parts.items() if not value]
            raise ValueError(f"prompts, scores and judge belong together; {missing} missing")
        if not (self.prompts or self.tasks or self.harness):
            raise ValueError(
                "nothing to evaluate: give prompts, scores and judge, or tasks, or harness"
            )
        names = [task.name for task in self.all_tasks]
        if len(set(names)) < len(names):
            raise ValueError(
                f"two tasks have the same name: {names}; '{OWN_TASK}' is the stage's own prompts"
            )
        for task in self.tasks:
            if not (task.judge or task.grader or self.pairwise):
                raise ValueError(
                    f"task '{task.name}' has no grader, so it needs a judge: give 'pairwise'"
                )
