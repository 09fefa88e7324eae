"""Schema of the stages that produce data: self_instruct, curate and weak_label."""

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
    refuse_prefill,
)
from align.recipe.schema.dtype import Dtype
from align.recipe.schema.training import StageSpec
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
    """Base of the stages that write data.jsonl; they run as one process."""

    produces: ClassVar[str] = "data"

    @model_validator(mode="after")
    def _one_rank(self) -> "DataStage":
        if self.ranks != 1:
            raise ValueError("a stage that produces data runs as one process; remove 'ranks'")
        return self


class WordingSpec(Spec):
    """Prompt format of the tasks for a model that continues a list."""

    head: str = "Tasks, each of another kind:\n\n"
    """Text before the list."""
    item: str = "Task {number}: {instruction}\n"
    """One item of the list. The new instruction is what the model writes after ``Task 9: `` up to
    the text that follows {instruction} here (a line break)."""
    solved: str = "Task: {instruction}\nAnswer: {answer}\n\n"
    """One solved task, shown before the new one with ``answer: few_shot``."""

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
    """Generate instructions from a few examples with a model (Self-Instruct, arXiv:2212.10560)."""

    module: ClassVar[str] = "align.stages.data.self_instruct"
    kind: Literal["self_instruct"]
    init: Annotated[str, Ref("policy")]
    """Policy that writes instructions and responses."""
    seeds: list[DataSpec] = Field(min_length=1)
    """Rows of instruction and response, usually written by people."""
    target: Count
    """Number of new rows to keep."""
    max_rounds: Count = 50
    """Rounds after which the stage ends with fewer rows than ``target``."""
    prompts_per_round: Count = 32
    """Instructions that are sampled in one round."""
    examples: Annotated[int, Field(ge=1)] = 8
    """Number of example instructions in the prompt for each new one."""
    grown_examples: Annotated[int, Field(ge=0)] = 2
    """Maximum number of generated examples among them; the others are seeds."""
    novelty: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7
    """A new instruction is rejected if its ROUGE-L (F) with a kept one is at least this."""
    min_words: Count = 3
    """Minimum number of words of an instruction."""
    max_words: Count = 150
    """Maximum number of words of an instruction."""
    refuse_words: list[str] = list(NOT_TEXT)
    """Instructions with one of these words are rejected."""
    answer: Literal["few_shot", "chat"] = "few_shot"
    """Generate responses by continuing solved tasks (base models) or by the chat template."""
    answer_examples: Count = 3
    """Number of solved tasks before the new one."""
    wording: WordingSpec = WordingSpec()
    """Text around tasks and answers."""
    sampling: SamplingSpec = SamplingSpec(temperature=0.7, top_p=0.9)
    """How instructions and responses are sampled."""
    dtype: Dtype = "float32"
    """Data type of the engine's weights; the recipe's ``dtype`` unless set."""
    max_length: Count = 1024
    """Maximum tokens of prompt and response."""

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
    """Limits of the length of responses, in words."""

    min: Annotated[int, Field(ge=0)] = 1
    """Minimum number of words."""
    max: Count | None = None
    """Maximum number of words; None for no limit."""

    @model_validator(mode="after")
    def _order(self) -> "WordsSpec":
        if self.max is not None and self.min > self.max:
            raise ValueError("words.min is more than words.max")
        return self


class DiversitySpec(Spec):
    """Selection of the best rows that differ from each other (arXiv:2312.15685, section 3)."""

    rows: Count
    """Maximum number of rows to select."""
    min_distance: Fraction = 0.1
    """Smallest cosine distance (of TF-IDF word vectors) to the nearest selected row."""


class CurateStage(DataStage):
    """Select few, good and diverse rows (LIMA, arXiv:2305.11206); a ledger lists dropped rows."""

    module: ClassVar[str] = "align.stages.data.curate"
    kind: Literal["curate"]
    data: list[DataSpec] = Field(min_length=1)
    """Rows to select from."""
    of: Literal["sft", "preference"] = "sft"
    """Kind of rows."""
    words: WordsSpec | None = None
    """Limits of the length of responses."""
    quality: list[RewardSpec] = []
    """Scores of the (chosen) responses; their weighted sum is the quality of a row."""
    min_quality: float | None = None
    """Rows of lower quality are dropped."""
    keep_frac: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Fraction of the rows to keep, by quality."""
    near_duplicates: Annotated[float, Field(gt=0.0, le=1.0)] | None = 0.8
    """Jaccard similarity of word triples from which the later of two rows is dropped as a near
    duplicate; null keeps both."""
    diversity: DiversitySpec | None = None
    """Selection of rows that differ from each other."""

    @model_validator(mode="after")
    def _legal(self) -> "CurateStage":
        distinct_names(self.quality)
        refuse_prefill(self.quality, "curate")
        if self.of != "sft":
            refuse_answers(self.data, "curate (of: preference)")
        steps = (self.words, self.near_duplicates, self.diversity)
        chosen = self.min_quality is not None or self.keep_frac is not None
        if all(step is None for step in steps) and not chosen:
            raise ValueError("no row would be dropped: give words, min_quality, keep_frac, ...")
        return self


class LabelFunction(Spec):
    """A score as a weak label.

    An sft row is good from ``good_from`` on and bad below ``bad_below``. In a pair the response
    that scores higher by more than ``min_gap`` is preferred. Otherwise there is no vote.
    """

    by: RewardSpec
    """Reward whose score becomes the vote."""
    good_from: float | None = None
    """Score from which the vote is that the response is good."""
    bad_below: float | None = None
    """Score below which the vote is that the response is bad."""
    min_gap: Annotated[float, Field(ge=0.0)] | None = None
    """Score difference up to which a pair gets no vote; None is 0."""

    @property
    def name(self) -> str:
        """Return the name of the score."""
        return self.by.label


class WeakLabelStage(DataStage):
    """Label rows by several weak judges, weighted by their agreement (Dawid and Skene, 1979)."""

    module: ClassVar[str] = "align.stages.data.weak_label"
    kind: Literal["weak_label"]
    data: list[DataSpec] = Field(min_length=1)
    """Rows to label."""
    of: Literal["sft", "preference"]
    """What is voted on: ``sft``, whether a response is good; ``preference``, which of two is
    better."""
    functions: list[LabelFunction] = Field(min_length=1)
    """The judges, each with one vote per row."""
    use_given: bool | None = None
    """With ``of: preference``, count the order in the data as another vote; None means true."""
    min_confidence: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Drop rows whose label is less probable than this (listed in the ledger)."""

    @model_validator(mode="after")
    def _legal(self) -> "WeakLabelStage":
        distinct_names([function.by for function in self.functions])
        refuse_prefill([function.by for function in self.functions], "weak_label")
        sft = self.of == "sft"
        if not sft:
            refuse_answers(self.data, "weak_label (of: preference)")
        for function in self.functions:
            bounds = (function.good_from, function.bad_below)
            if sft and (function.min_gap is not None or bounds == (None, None)):
                raise ValueError(
                    f"{function.name}: of: sft needs good_from or bad_below, no min_gap"
                )
            if sft and None not in bounds and bounds[0] < bounds[1]:  # type: ignore[operator]
                raise ValueError(
                    f"{function.name}: good_from is below bad_below: it votes for both"
                )
            if not sft and bounds != (None, None):
                raise ValueError(f"{function.name}: good_from and bad_below are for of: sft only")
        voters = len(self.functions) + (not sft and self.use_given is not False)
        if voters < 3:
            raise ValueError(
                f"{voters} voters: estimating their accuracy needs at least three; add functions"
            )
        return self
