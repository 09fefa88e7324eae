"""The reward that calls a learned scorer: rendering, normalisation, heads combined."""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from reward_models.base import Text, check_rows, column_values, completion_text
from reward_models.ensemble import combiner, spread
from reward_models.paired import pair_ids
from reward_models.scalar import RewardModel, score_heads
from reward_models.specs import ProcessSpec, ScalarSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class ScalarReward:
    """Score answers with a trained reward model.

    With the columns ``prompt_ids`` and ``completion_ids`` (token ids of this scorer's vocabulary)
    exactly those ids are scored: the suite passes what was sampled. Without ``prompt_ids``, as
    inside a TRL trainer, or with ids of another vocabulary (see `meet`), the texts are rendered
    with the tokenizer. A scorer that is an encoder always reads the texts, as a pair (see
    `reward_models.paired`). What is longer than the scorer's positions is invalid.

    A scorer of several heads is an ensemble: each head's score is normalised by its own mean and
    std, and ``combine`` makes one score of them. A score that is not finite is invalid.

    Attributes:
        takes_ids: whether given token ids are scored; False where it reads the texts.
        disagreement: of the last call, as in `EnsembleReward`; NaN for a single head.
    """

    def __init__(
        self,
        model: RewardModel,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        normalise: bool = True,
        combine: str = "mean",
        kappa: float = 1.0,
        name: str = "scalar",
        weight: float = 1.0,
        micro_tokens: int = 16384,
    ) -> None:
        if combine != "mean" and model.num_heads == 1:
            raise ValueError(
                f"reward '{name}': combine '{combine}' has no effect on a scorer with one head; "
                "train it with 'heads: 3', or leave combine out"
            )
        if tokenizer.eos_token_id is None and model.reads == "last":
            raise ValueError(f"reward '{name}': its tokenizer has no eos token to end an answer")
        self.model = model
        self.tokenizer = tokenizer
        self.normalise = normalise
        self.combine = combiner(combine, kappa=kappa, reward=name)
        self.name = name
        self.__name__ = name
        self.weight = weight
        self.micro_tokens = micro_tokens
        self.invalid: Counter[str] = Counter()
        self.disagreement = math.nan
        self.takes_ids = model.reads == "last"
        self._limit = model.max_tokens

    def shares_vocabulary(self, tokenizer: "PreTrainedTokenizerBase") -> bool:
        """Tell whether token ids of another tokenizer mean the same to this scorer."""
        return self.tokenizer.get_vocab() == tokenizer.get_vocab()

    def meet(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Learn whose token ids will be given: those of another vocabulary are not read."""
        if self.takes_ids and not self.shares_vocabulary(tokenizer):
            logger.info("reward %s: another vocabulary than the policy's, reads texts", self.name)
            self.takes_ids = False

    def __call__(
        self, *, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> list[float | None]:
        """Score each answer; (score - mean) / std of each head where the reward normalises."""
        check_rows(prompts, completions, reward=self.name)
        rows = self.rows(prompts, completions, columns)
        fits = [self._limit is None or len(row) <= self._limit for row in rows]
        short = [row for row, fit in zip(rows, fits, strict=True) if fit]
        raw = iter(score_heads(self.model, short, micro_tokens=self.micro_tokens))
        mean, std = self.model.mean.view(-1).tolist(), self.model.std.view(-1).tolist()
        if not self.normalise:
            mean, std = [0.0] * len(mean), [1.0] * len(std)
        found: list[float | None] = []
        spreads: list[float] = []
        for fit in fits:
            if not fit:
                self.invalid[f"longer than the {self._limit} positions of the scorer"] += 1
                found.append(None)
                continue
            scores = next(raw)
            if not all(map(math.isfinite, scores)):
                self.invalid["score is not finite"] += 1
                found.append(None)
                continue
            heads = [(x - m) / s for x, m, s in zip(scores, mean, std, strict=True)]
            spreads.append(spread(heads))
            found.append(self.combine(heads))
        if self.model.num_heads > 1:
            self.disagreement = sum(spreads) / len(spreads) if spreads else math.nan
        return found

    def rows(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        columns: Mapping[str, Any],
    ) -> list[list[int]]:
        """Give the token ids of prompt and answer that are scored."""
        if "prompt_ids" not in columns or not self.takes_ids:
            pairs = zip(prompts, completions, strict=True)
            return [self._render(prompt, completion) for prompt, completion in pairs]
        heads, answers = (
            column_values(columns, column, reward=self.name, num_rows=len(completions))
            for column in ("prompt_ids", "completion_ids")
        )
        rows = [[*head, *answer] for head, answer in zip(heads, answers, strict=True)]
        highest = max((max(row, default=-1) for row in rows), default=-1)
        vocab_size = self.model.config.get_text_config().vocab_size
        if highest >= vocab_size:
            raise ValueError(
                f"reward '{self.name}': token id {highest} but the scorer knows {vocab_size}; the "
                "ids come from another tokenizer"
            )
        return rows

    def num_prompt_tokens(self, prompt: Text, completion: Text) -> int:
        """Count the tokens of a rendered prompt."""
        return len(self._parts(prompt, completion)[0])

    def _render(self, prompt: Text, completion: Text) -> list[int]:
        """Return the ids of prompt and answer, the answer up to and with its stop token."""
        if self.model.reads == "first":
            return pair_ids(self.tokenizer, prompt, completion)[0]
        head, answer = self._parts(prompt, completion)
        return [*head, *answer]

    def _parts(self, prompt: Text, completion: Text) -> tuple[list[int], list[int]]:
        if isinstance(prompt, str) and isinstance(completion, str):
            head, answer = self._split(prompt, completion)
            bos: Any = self.tokenizer.bos_token_id
            if bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos] != head[:1]:
                head = [bos, *head]
        else:
            head, answer = self._render_turns(prompt, completion)
        eos: Any = self.tokenizer.eos_token_id
        cut = answer.index(eos) if eos in answer else len(answer)
        return head, [*answer[:cut], eos]

    def _render_turns(self, prompt: Text, completion: Text) -> tuple[list[int], list[int]]:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        answer = [{"role": "assistant", "content": completion_text(completion)}]
        tokenizer: Any = self.tokenizer
        before: str = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        full: str = tokenizer.apply_chat_template(turns + answer, tokenize=False)
        if not full.startswith(before):
            raise ValueError(
                f"reward '{self.name}': the chat template rewrites earlier turns; use a template "
                "that only appends"
            )
        return self._split(before, full[len(before) :].rstrip())

    def _split(self, before: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokenize prompt and answer as one text, as the scorer's training rows were.

        Where a token would reach from one into the other, they are tokenized apart.
        """
        head, whole = self._ids(before), self._ids(before + answer)
        same = whole[: len(head)] == head
        return head, whole[len(head) :] if same else self._ids(answer)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def build_scalar(spec: ScalarSpec) -> ScalarReward:
    """Load the scorer of a spec's ``model`` folder onto the accelerator if there is one.

    Raises:
        ValueError: the scorer was taught by steps.
    """
    found = load_scalar(spec, combine=spec.combine, kappa=spec.kappa, normalise=spec.normalise)
    if found.model.extra.get("supervision") == "steps":
        raise ValueError(
            f"reward '{spec.label}': {spec.model} was taught by steps; use kind: process"
        )
    return found


def load_scalar(spec: ScalarSpec | ProcessSpec, **options: Any) -> ScalarReward:
    """Load the scorer in ``spec.model`` as a reward with further ``options`` of its class."""
    from transformers import AutoTokenizer

    model = RewardModel.load(spec.model, getattr(torch, spec.dtype))
    return ScalarReward(
        model.to("cuda" if torch.cuda.is_available() else "cpu"),
        AutoTokenizer.from_pretrained(spec.model, trust_remote_code=False),
        name=spec.label,
        weight=spec.weight,
        **options,
    )
