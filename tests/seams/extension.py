"""One of each kind from outside the package, two places each: ALIGN_EXTENSIONS=extension.

Nothing here imports torch or peft at the top: the module is loaded wherever a recipe is read.
"""

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from align.recipe.algorithms import ALGORITHMS, Algorithm
from align.recipe.schema import DataSpec, DataStage, Ref, RewardSpec, SamplingSpec, TuningSpec
from align.recipe.schema.formats import FORMATS, Format

# An algorithm, place 1: its entry, which names an advantage and an objective.
ALGORITHMS["above_greedy"] = Algorithm(
    f"{__name__}:above_greedy",
    needs_greedy=True,
    compares_group=False,
    scales=("none",),
    scale="none",
    objective=f"{__name__}:reinforce",
    aggregation="sequence_sum",
    options={"group_size": 3},
)


# An algorithm, place 2: its functions.
def above_greedy(scores: Any, greedy_scores: Any) -> Any:
    """Return how much better than the greedy response each response is; 0 if it is not."""
    return (scores - greedy_scores).clamp(min=0.0)


def reinforce(
    logprobs: Any,
    old_logprobs: Any,
    advantages: Any,
    mask: Any,
    *,
    clip_low: float,
    clip_high: float,
) -> Any:
    """Return -A log p of each token: its gradient is that of the ratio where the ratio is 1."""
    from align.losses.policy import PerToken

    ratio = (logprobs - old_logprobs).exp().detach()
    return PerToken(loss=-advantages * logprobs, ratio=ratio, clipped=mask & ~mask)


# A reward, place 1: its class.
class VowelsSpec(RewardSpec):
    """Score the fraction of the response's letters that are vowels."""

    builder: ClassVar[str] = f"{__name__}:vowels"
    kind: Literal["vowels"]
    letters: str = "aeiou"


# A reward, place 2: its builder.
def vowels(spec: VowelsSpec) -> Any:
    from reward_models.base import rule_from_spec

    def score(text: str, _: Any) -> float:
        letters = [letter for letter in text.lower() if letter.isalpha()]
        return sum(letter in spec.letters for letter in letters) / max(1, len(letters))

    return rule_from_spec(spec, score)


# A data format, place 1: its entry.
FORMATS["german"] = Format((("frage", "antwort"),), ("sft",), f"{__name__}:from_german")


# A data format, place 2: its importer.
def from_german(row: dict[str, Any], source: str) -> list[Any]:
    from align.core.types import Example, Turn

    asked = [Turn(role="user", content=row["frage"])]
    return [Example(asked, [Turn(role="assistant", content=row["antwort"])], source=source)]


# A tuning method, place 1: its class.
class LohaTuning(TuningSpec):
    """Add the elementwise product of two low-rank updates (LoHa, arXiv:2108.06098)."""

    builder: ClassVar[str | None] = f"{__name__}:loha"
    method: Literal["loha"]
    rank: int = 2
    alpha: float = 4.0


# A tuning method, place 2: peft's configuration.
def loha(model: Any, tuning: LohaTuning) -> Any:
    import peft

    return peft.LoHaConfig(
        r=tuning.rank,
        alpha=tuning.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=["q_proj", "down_proj"],
    )


# A stage, place 1: its class.
class BestOfNStage(DataStage):
    """Sample several responses to each prompt, and write the one with the highest score."""

    module: ClassVar[str] = __name__
    kind: Literal["best_of_n"]
    init: Annotated[str, Ref("policy")]
    prompts: list[DataSpec] = Field(min_length=1)
    rewards: list[RewardSpec] = Field(min_length=1, max_length=1)
    n: int = 4
    sampling: SamplingSpec = SamplingSpec()
    dtype: Literal["float32"] = "float32"
    max_length: int = 128
    max_lost_frac: float = 0.0


# A stage, place 2: ``prepare`` in its module.
def prepare(spec: BestOfNStage, context: Any) -> Any:
    from align.stages.base import Prepared, chat_format
    from align.stages.rollouts import build_rewards, prompt_rows, start_engine

    source = context.artifact(spec.init, "policy")
    chat = chat_format(source.model_dir)
    prompts = prompt_rows(spec, chat, context)
    engine = start_engine(spec, source.model_dir, chat, context=context)  # pyright: ignore
    context.resources.enter_context(closing(engine))
    (reward,) = build_rewards(spec.rewards, context)
    return Prepared(partial(_best_of_n, spec, context, prompts, chat, engine=engine, reward=reward))


def _best_of_n(
    spec: BestOfNStage, context: Any, prompts: Sequence[Any], chat: Any, *, engine: Any, reward: Any
) -> Any:
    from align.data.load import fingerprints
    from align.sampling.rollout import sample_groups
    from align.stages.base import StageResult
    from align.stages.data.rows import Ledger, write_data

    with engine.awake():
        groups = sample_groups(
            engine,
            prompts,
            n=spec.n,
            step=0,
            seed=context.seed,
            sampling=spec.sampling,
            stop_token_ids=chat.stop_token_ids,
        )
    rows = []
    for row, group in zip(prompts, groups, strict=True):
        texts = [completion.text for completion in group]
        scores = reward(prompts=[row.prompt] * spec.n, completions=texts)
        best = texts[scores.index(max(scores))]
        rows.append({"prompt": row.prompt, "completion": best, "sampled": texts, "scores": scores})
    count = write_data(context, rows, Ledger())
    return StageResult({"rows/kept": float(count)}, fingerprints(spec.prompts))
