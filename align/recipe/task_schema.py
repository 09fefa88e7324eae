"""Schema of evaluation tasks: prompts, how answers are graded, and what is reported of them."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.recipe.endpoint_schema import EndpointSpec
from align.recipe.parts import Count, DataSpec, Fraction, Spec, refuse_answers
from align.recipe.reward_schema import RewardSpec, distinct_names

WIN_RATES = ("win_rate", "length_controlled_win_rate")
MEASURED = ("kl", "length", "repeats", "stop_rate", "perplexity")
_PASS = re.compile(r"pass@([1-9][0-9]*)")


class PairwiseSpec(Spec):
    """Let a language model say which of two answers is better, in both orders."""

    endpoint: EndpointSpec
    criteria: str = "Judge which answer helps the user more: correct, on the question, clear."
    sequential: bool = True
    """Stop as soon as the verdict is clear; the interval then holds at every moment together."""
    batch: Count = 32
    """Prompts that are judged between two looks at the verdict."""


class TaskSampling(Spec):
    """Say how the answers of a task are drawn."""

    max_new_tokens: Count = 128
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0


class TaskSpec(Spec):
    """Ask held-out prompts, grade the answers, and say which metrics are reported."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    description: str = ""
    prompts: list[DataSpec] = Field(min_length=1)
    grader: list[RewardSpec] = []
    """Each becomes a metric under its name (default: its kind); higher is better."""
    judge: list[RewardSpec] = []
    """The weighted sum decides each comparison; none takes the stage's ``pairwise`` judge, or
    without one the weighted sum of the grader."""
    metrics: list[str] = []
    """What is reported, the deciding metric first; none reports all that apply."""
    samples: Count = 1
    """Answers to each prompt: the mean over them is avg@k."""
    sampling: TaskSampling = TaskSampling()
    max_length: Count = 1024
    max_lost_frac: Fraction = 0.0
    """Share of the prompts, and of the answers, that may be lost to ``max_length``."""
    answers: list[DataSpec] = []
    """Held-out answers for the metric ``perplexity``."""
    by: str | None = None
    """Column of the prompts by whose values the deciding metric is also reported."""

    @property
    def grades(self) -> list[str]:
        """Name the metrics of the grader."""
        return [reward.name or reward.kind for reward in self.grader]

    @property
    def reported(self) -> list[str]:
        """Name the metrics that are reported, the deciding one first."""
        if self.metrics:
            return self.metrics
        measured = [m for m in MEASURED if m not in ("kl", "perplexity")]
        if self.sampling.temperature == 1.0:
            measured = ["kl", *measured]
        return [*WIN_RATES, *self.grades, *measured, *(["perplexity"] if self.answers else [])]

    @property
    def passes(self) -> list[int]:
        """Give the k of each metric ``pass@k``."""
        return [int(found[1]) for m in self.reported if (found := _PASS.fullmatch(m))]

    @model_validator(mode="after")
    def _legal(self) -> "TaskSpec":
        refuse_answers(self.prompts, "evaluate")
        distinct_names(self.grader)
        distinct_names(self.judge)
        taken = {*WIN_RATES, *MEASURED, "judge"} & set(self.grades)
        if taken:
            raise ValueError(f"grader: the names {sorted(taken)} are taken; give another 'name'")
        known = [*self.grades, *WIN_RATES, *MEASURED]
        for metric in self.metrics:
            if metric not in known and not _PASS.fullmatch(metric):
                raise ValueError(f"no metric '{metric}'; one of {', '.join(known)}, pass@k")
        if too_many := [k for k in self.passes if k > self.samples]:
            raise ValueError(f"pass@{too_many[0]} needs samples: {too_many[0]} or more")
        if self.passes and not self.grader:
            raise ValueError("pass@k needs a 'grader' that says what is right")
        if "kl" in self.metrics and self.sampling.temperature != 1.0:
            raise ValueError("the estimate of kl needs sampling.temperature: 1.0")
        if ("perplexity" in self.reported) != bool(self.answers):
            raise ValueError("the metric 'perplexity' and 'answers' need each other")
        return self


class HarnessSpec(Spec):
    """Run tasks of lm-evaluation-harness in an environment of its own."""

    python: str
    """Python of the environment in which lm-eval is installed."""
    tasks: list[str] = Field(min_length=1)
    backend: Literal["hf", "vllm"] = "hf"
    include_path: str | None = None
    """Folder of own task files."""
    limit: Count | None = None
    """Questions of each task; None asks all."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    batch_size: Count = 8
    chat_template: bool = False
    """Ask through the model's chat template."""
