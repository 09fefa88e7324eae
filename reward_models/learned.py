"""Rewards from a learned scorer: rendering, normalization, combination of heads."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reward_models.base import Text, check_rows, column_values, completion_text
from reward_models.ensemble import combiner, spread
from reward_models.limits import render_chat
from reward_models.paired import pair_ids
from reward_models.scalar import STOPS, RewardModel, score_heads
from reward_models.specs import ProcessSpec, ScalarSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
Load = Callable[[Path, torch.dtype], RewardModel]
"""Loads the scorer of a folder in a dtype."""
_load: ContextVar[Load] = ContextVar("load", default=RewardModel.load)


class ScalarReward:
    """Score responses with a trained reward model.

    With the columns ``prompt_ids`` and ``completion_ids`` (token ids of this scorer's vocabulary),
    exactly those ids are scored: the suite passes the sampled ids. Without ``prompt_ids``, as in a
    TRL trainer, or with ids of another vocabulary (see `meet`), the texts are rendered with the
    tokenizer. An encoder always reads the texts, as a pair (see `reward_models.paired`). Rows
    longer than the scorer's positions are invalid.

    A scorer with several heads is an ensemble: each head's score is normalized by its own mean and
    std, and ``combine`` turns them into one score. A non-finite score is invalid.

    Attributes:
        takes_ids: True if given token ids are scored; False if it reads the texts.
        disagreement: as in `EnsembleReward`, for the last call; NaN for a single head.
    """

    def __init__(
        self,
        model: RewardModel,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        normalize: bool = True,
        combine: str = "mean",
        kappa: float = 1.0,
        name: str = "scalar",
        weight: float = 1.0,
        micro_tokens: int = 16384,
    ) -> None:
        if combine != "mean" and model.num_heads == 1:
            raise ValueError(
                f"reward '{name}': combine '{combine}' has no effect on a scorer with one head. "
                "Train it with 'heads: 3', or remove combine."
            )
        # A decoder's score is read at the stop token, which must exist. Templates may end turns
        # with another one than the tokenizer's eos.
        eos: Any = tokenizer.eos_token_id
        self._stops: Sequence[int] = model.extra.get(STOPS) or ([] if eos is None else [eos])
        if not self._stops and model.reads == "last":
            raise ValueError(f"reward '{name}': its tokenizer has no eos token to end a response")
        self.model = model
        self.tokenizer = tokenizer
        self.normalize = normalize
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
        """Return whether token ids of another tokenizer have the same meaning for this scorer."""
        return self.tokenizer.get_vocab() == tokenizer.get_vocab()

    def meet(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Set the tokenizer of the given token ids; ids of another vocabulary are not used."""
        if self.takes_ids and not self.shares_vocabulary(tokenizer):
            logger.info(
                "reward %s: its vocabulary differs from the policy's, so it reads texts", self.name
            )
            self.takes_ids = False

    def __call__(
        self, *, prompts: Sequence[Text], completions: Sequence[Text], **columns: Sequence[Any]
    ) -> list[float | None]:
        """Score each response; each head returns (score - mean) / std if the reward normalizes."""
        check_rows(prompts, completions, reward=self.name)
        rows = self.rows(prompts, completions, columns)
        fits = [self._limit is None or len(row) <= self._limit for row in rows]
        short = [row for row, fit in zip(rows, fits, strict=True) if fit]
        raw = iter(score_heads(self.model, short, micro_tokens=self.micro_tokens))
        # Normalize each head, then combine the heads of each row.
        mean, std = self.model.mean.view(-1).tolist(), self.model.std.view(-1).tolist()
        if not self.normalize:
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
        """Return the token ids of prompt and response that are scored."""
        if "prompt_ids" not in columns or not self.takes_ids:
            pairs = zip(prompts, completions, strict=True)
            return [self._render(prompt, completion) for prompt, completion in pairs]
        heads, answers = (
            column_values(columns, column, reward=self.name, num_rows=len(completions))
            for column in ("prompt_ids", "completion_ids")
        )
        rows = [[*head, *answer] for head, answer in zip(heads, answers, strict=True)]
        # An id beyond the vocabulary would read another row of the embeddings, or none.
        highest = max((max(row, default=-1) for row in rows), default=-1)
        vocab_size = self.model.config.get_text_config().vocab_size
        if highest >= vocab_size:
            raise ValueError(
                f"reward '{self.name}': token id {highest} but the scorer's vocabulary has "
                f"{vocab_size}; the ids come from another tokenizer"
            )
        return rows

    def num_prompt_tokens(self, prompt: Text, completion: Text) -> int:
        """Return the number of tokens of a rendered prompt."""
        return len(self._parts(prompt, completion)[0])

    def _render(self, prompt: Text, completion: Text) -> list[int]:
        """Return the ids of prompt and response, up to and including the stop token."""
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
        # Exactly one stop token ends the response, as in training.
        end = next((i for i, token in enumerate(answer) if token in self._stops), None)
        return head, [*answer, self._stops[0]] if end is None else answer[: end + 1]

    def _render_turns(self, prompt: Text, completion: Text) -> tuple[list[int], list[int]]:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        answer = [{"role": "assistant", "content": completion_text(completion)}]
        before: str = render_chat(self.tokenizer, turns, tokenize=False, add_generation_prompt=True)
        full: str = render_chat(self.tokenizer, turns + answer, tokenize=False)
        if not full.startswith(before):
            raise ValueError(
                f"reward '{self.name}': the chat template rewrites earlier turns. Use a template "
                "that only appends."
            )
        return self._split(before, full[len(before) :].rstrip())

    def _split(self, before: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokenize prompt and response as one text, as in the scorer's training rows.

        If a token would span the boundary, they are tokenized separately.
        """
        head, whole = self._ids(before), self._ids(before + answer)
        same = whole[: len(head)] == head
        return head, whole[len(head) :] if same else self._ids(answer)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


@contextmanager
def loading_with(load: Load) -> Iterator[None]:
    """Load the scorers of rewards that are built inside the block with another function."""
    token = _load.set(load)
    try:
        yield
    finally:
        _load.reset(token)


def build_scalar(spec: ScalarSpec) -> ScalarReward:
    """Load the scorer of a spec's ``model`` folder, onto the accelerator if there is one.

    Raises:
        ValueError: the scorer was trained with step supervision.
    """
    found = load_scalar(spec, combine=spec.combine, kappa=spec.kappa, normalize=spec.normalize)
    if found.model.extra.get("supervision") == "steps":
        raise ValueError(
            f"reward '{spec.label}': {spec.model} was trained with step supervision. "
            "Use kind: process."
        )
    return found


def load_scalar(spec: ScalarSpec | ProcessSpec, **options: Any) -> ScalarReward:
    """Load the scorer in ``spec.model`` as a reward, with further ``options`` of its class."""
    from transformers import AutoTokenizer

    model = _load.get()(Path(spec.model), getattr(torch, spec.dtype))
    return ScalarReward(
        model.to("cuda" if torch.cuda.is_available() else "cpu"),
        AutoTokenizer.from_pretrained(spec.model, trust_remote_code=False),
        name=spec.label,
        weight=spec.weight,
        **options,
    )
