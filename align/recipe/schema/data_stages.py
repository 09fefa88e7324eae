"""Schema of the stages that make data: self_instruct, curate and weak_label."""

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
from align.recipe.schema.offline import StageSpec
from reward_models.specs import RewardSpec

NOT_TEXT = (
    "image",
    "images",
    "picture",
    "pictures",
    "photo",
    "video",
    "graph",
    "graphs",
    "map",
    "draw",
    "plot",
    "file",
    "files",
    "website",
    "url",
)
"""Words of instructions that a text model cannot follow (after arXiv:2212.10560 section 3.1)."""


class DataStage(StageSpec):
    """Hold what the stages that write data.jsonl share; they run as one process."""

    produces: ClassVar[str] = "data"

    @model_validator(mode="after")
    def _one_rank(self) -> "DataStage":
        if self.ranks != 1:
            raise ValueError("a stage that makes data runs as one process; remove 'ranks'")
        return self


class WordingSpec(Spec):
    """Say how tasks are laid out for a model that goes on with a list."""

    head: str = "Tasks, each of another kind:\n\n"
    item: str = "Task {number}: {instruction}\n"
    """One item of the list; what the model writes after ``Task 9: `` and before what follows
    {instruction} here, a line break, is the new instruction."""
    solved: str = "Task: {instruction}\nAnswer: {answer}\n\n"
    """One solved task, shown before the new one where ``answer: few_shot``."""

    @model_validator(mode="after")
    def _slots(self) -> "WordingSpec":
        if self.item.count("{instruction}") != 1 or not self.item.partition("{instruction}")[2]:
            raise ValueError(
                "wording.item: expected {instruction} once, and something after it that ends it"
            )
        if self.solved.count("{instruction}") != 1 or self.solved.count("{answer}") != 1:
            raise ValueError("wording.solved: expected {instruction} and {answer} once each")
        if self.solved.index("{answer}") < self.solved.index("{instruction}"):
            raise ValueError("wording.solved: expected {answer} after {instruction}")
        if not self.solved.split("{answer}")[1]:
            raise ValueError("wording.solved: expected something after {answer} that ends it")
        return self


class SelfInstructStage(DataStage):
    """Grow a set of instructions from a few by a model (Self-Instruct, arXiv:2212.10560)."""

    module: ClassVar[str] = "data.self_instruct"
    kind: Literal["self_instruct"]
    init: Annotated[str, Ref("policy")]
    seeds: list[DataSpec] = Field(min_length=1)
    """Rows of instruction and answer, usually written by people."""
    target: Count
    """New rows to keep."""
    max_rounds: Count = 50
    prompts_per_round: Count = 32
    examples: Annotated[int, Field(ge=1)] = 8
    """Instructions shown for each new one."""
    grown_examples: Annotated[int, Field(ge=0)] = 2
    """At most so many of them are grown ones; the rest are seeds."""
    novelty: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7
    """ROUGE-L (F) with any kept instruction from which a new one is refused."""
    min_words: Count = 3
    max_words: Count = 150
    refuse_words: list[str] = list(NOT_TEXT)
    answer: Literal["few_shot", "chat"] = "few_shot"
    """Answers by going on with solved tasks (base models) or by the chat template."""
    answer_examples: Count = 3
    wording: WordingSpec = WordingSpec()
    sampling: SamplingSpec = SamplingSpec(temperature=0.7, top_p=0.9)
    dtype: Dtype = "float32"
    max_length: Count = 1024

    @model_validator(mode="after")
    def _legal(self) -> "SelfInstructStage":
        refuse_answers(self.seeds, "self_instruct")
        if self.grown_examples >= self.examples:
            raise ValueError("grown_examples: at least one of the examples must be a seed")
        if self.min_words > self.max_words:
            raise ValueError("min_words is more than max_words")
        if self.sampling.temperature == 0.0:
            raise ValueError("sampling.temperature is 0: the same list gives the same instruction")
        if self.max_length <= self.sampling.max_new_tokens:
            raise ValueError("max_length must leave room for a prompt before max_new_tokens")
        return self


class WordsSpec(Spec):
    """Bound the length of answers, in words."""

    min: Annotated[int, Field(ge=0)] = 1
    max: Count | None = None

    @model_validator(mode="after")
    def _order(self) -> "WordsSpec":
        if self.max is not None and self.min > self.max:
            raise ValueError("words.min is more than words.max")
        return self


class DiversitySpec(Spec):
    """Take the best rows that are not too like those taken before (arXiv:2312.15685, section 3)."""

    rows: Count
    """Rows to take at most."""
    min_distance: Fraction = 0.1
    """Cosine distance (of TF-IDF word vectors) to the nearest row taken below which one is left."""


class CurateStage(DataStage):
    """Keep few, good and different rows (LIMA, arXiv:2305.11206), with a ledger of what left."""

    module: ClassVar[str] = "data.curate"
    kind: Literal["curate"]
    data: list[DataSpec] = Field(min_length=1)
    of: Literal["sft", "preference"] = "sft"
    words: WordsSpec | None = None
    quality: list[RewardSpec] = []
    """Scores of the (chosen) answers; their weighted sum is a row's quality."""
    min_quality: float | None = None
    keep_frac: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share of the rows that is kept, by quality."""
    near_duplicates: Annotated[float, Field(gt=0.0, le=1.0)] | None = 0.8
    """Jaccard similarity of the rows' word triples from which the later row leaves; null: off."""
    diversity: DiversitySpec | None = None

    @model_validator(mode="after")
    def _legal(self) -> "CurateStage":
        distinct_names(self.quality)
        if self.of != "sft":
            refuse_answers(self.data, "curate (of: preference)")
        if not self.quality and (self.min_quality is not None or self.keep_frac is not None):
            raise ValueError("'min_quality' and 'keep_frac' have no effect without 'quality'")
        steps = (self.words, self.near_duplicates, self.diversity)
        chosen = self.min_quality is not None or self.keep_frac is not None
        if all(step is None for step in steps) and not chosen:
            raise ValueError("nothing would leave: give words, min_quality, keep_frac, ...")
        return self


class LabelFunction(Spec):
    """Let a score vote. sft rows: good from ``good_from`` on, bad below ``bad_below``, else no
    vote. Pairs: for the answer that scores higher by more than ``min_gap``, else no vote."""

    by: RewardSpec
    good_from: float | None = None
    bad_below: float | None = None
    min_gap: Annotated[float, Field(ge=0.0)] | None = None

    @property
    def name(self) -> str:
        """Give the name of the score."""
        return self.by.name or self.by.kind


class WeakLabelStage(DataStage):
    """Label rows by several weak judges, weighed by how well they agree (Dawid and Skene, 1979)."""

    module: ClassVar[str] = "data.weak_label"
    kind: Literal["weak_label"]
    data: list[DataSpec] = Field(min_length=1)
    of: Literal["sft", "preference"]
    """sft: is the answer good? preference: which answer is better?"""
    functions: list[LabelFunction] = Field(min_length=1)
    use_given: bool | None = None
    """preference: the order in the data is one more voter (default: true)."""
    min_confidence: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Rows whose label is less probable than this leave (counted in the ledger)."""

    @model_validator(mode="after")
    def _legal(self) -> "WeakLabelStage":
        distinct_names([function.by for function in self.functions])
        sft = self.of == "sft"
        if not sft:
            refuse_answers(self.data, "weak_label (of: preference)")
        if sft and self.use_given is not None:
            raise ValueError("'use_given' has no effect on sft rows, which say nothing; remove it")
        for function in self.functions:
            bounds = (function.good_from, function.bad_below)
            if sft and (function.min_gap is not None or bounds == (None, None)):
                raise ValueError(
                    f"{function.name}: of: sft needs good_from or bad_below, no min_gap"
                )
            if sft and None not in bounds and bounds[0] < bounds[1]:  # type: ignore[operator]
                raise ValueError(
                    f"{function.name}: good_from lies below bad_below: it votes for both"
                )
            if not sft and bounds != (None, None):
                raise ValueError(f"{function.name}: good_from and bad_below are for of: sft only")
        voters = len(self.functions) + (not sft and self.use_given is not False)
        if voters < 3:
            raise ValueError(
                f"{voters} voters: agreement says how good each is from three on; add functions"
            )
        return self
