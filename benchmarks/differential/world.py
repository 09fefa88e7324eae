"""A tiny policy in three states, and random batches of uneven lengths with holes in the masks."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align.core.types import Completion, PairRow, PromptRow, TokenRow
from align.stages.kto import KtoRow, mismatch

VOCAB, PAD, STOP = 32, 0, 31
PAIRS, GROUPS, GROUP_SIZE, MAX_NEW_TOKENS = 6, 4, 3, 9
MAX_LENGTH = 64
Weights = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Rollout:
    """Sampled responses of ``GROUPS`` prompts, with their scores and the mask of the loss.

    Attributes:
        groups: the completions of each prompt.
        scores: of each response, in order; None for a response that no reward could score.
        trained: for each response, which of its tokens are trained; a tool wrote the others.
    """

    prompts: Sequence[PromptRow]
    groups: Sequence[Sequence[Completion]]
    scores: Sequence[float | None]
    trained: Sequence[Sequence[bool]]

    def flat(self) -> list[tuple[PromptRow, Completion]]:
        """Return every completion with its prompt, in order."""
        return [(p, c) for p, g in zip(self.prompts, self.groups, strict=True) for c in g]

    def changed(self, *, cut: int | None, unscored: int | None, holes: bool) -> "Rollout":
        """Return the rollout with one response cut off or unscored, and with or without holes.

        Args:
            cut: number of the response that ends without its stop token; None cuts none.
            unscored: number of the response that no reward could score; None scores all.
            holes: whether tools wrote some of the tokens.
        """
        numbers = range(len(self.scores))
        groups = [
            [
                replace(c, token_ids=(*c.token_ids[:-1], 1), finish_reason="length")
                if g * GROUP_SIZE + i == cut
                else c
                for i, c in enumerate(group)
            ]
            for g, group in enumerate(self.groups)
        ]
        scores = [None if i == unscored else self.scores[i] for i in numbers]
        trained = self.trained if holes else [[True] * len(row) for row in self.trained]
        return replace(self, groups=groups, scores=scores, trained=trained)


@dataclass(frozen=True, slots=True)
class World:
    """The same model and data for both sides.

    Attributes:
        folder: the policy at the start of the stage, as transformers saves it, with a tokenizer.
        start: its weights, which are the reference's. old: of the policy that sampled.
        now: of the policy whose loss and gradient are compared.
        score_head: (1, hidden) weights of the reward model's head.
    """

    folder: Path
    start: Weights
    old: Weights
    now: Weights
    score_head: Tensor
    rows: Sequence[TokenRow]
    pairs: Sequence[PairRow]
    judged: Sequence[KtoRow]
    rollout: Rollout


def config() -> LlamaConfig:
    """Return the configuration of a policy of two layers, without biases."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.25,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=STOP,
    )


@contextmanager
def new_world(seed: int) -> Iterator[World]:
    """Build a world in a temporary folder, which the block may use."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config())
    # Parameters only: rotary frequencies stay in float32, as in a model that was loaded.
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    old, now = (_moved(start, by) for by in (0.02, 0.04))
    draw = random.Random(seed)
    pairs = [_pair(draw, i) for i in range(PAIRS)]
    with TemporaryDirectory() as name:
        folder = Path(name) / "policy"
        model.save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
        yield World(
            folder=folder,
            start=start,
            old=old,
            now=now,
            score_head=torch.randn(1, 16).double(),
            rows=[*(pair.chosen for pair in pairs), _untrained(draw), pairs[0].rejected],
            pairs=pairs,
            judged=_judged(pairs),
            rollout=_rollout(draw),
        )


def _moved(weights: Weights, by: float) -> Weights:
    return {name: tensor + by * torch.randn_like(tensor) for name, tensor in weights.items()}


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCAB)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w1"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token=f"w{PAD}", eos_token=f"w{STOP}"
    )


def _tokens(draw: random.Random, least: int, most: int) -> tuple[int, ...]:
    return tuple(draw.randrange(1, STOP) for _ in range(draw.randint(least, most)))


def _holes(draw: random.Random, length: int) -> tuple[bool, ...]:
    """Return which tokens of a response are trained: three of four, and the last one."""
    return (*(draw.random() < 0.75 for _ in range(length - 1)), True)


def _pair(draw: random.Random, number: int) -> PairRow:
    prompt = _tokens(draw, 1, 5)

    def side() -> TokenRow:
        answer = (*_tokens(draw, 0, MAX_NEW_TOKENS - 1), STOP)
        return TokenRow(prompt + answer, (False,) * len(prompt) + _holes(draw, len(answer)))

    return PairRow(side(), side(), len(prompt), margin=0.25 * number)


def _untrained(draw: random.Random) -> TokenRow:
    """Return a row without a trained token: it must count nowhere."""
    ids = _tokens(draw, 3, 6)
    return TokenRow(ids, (False,) * len(ids))


def _judged(pairs: Sequence[PairRow]) -> list[KtoRow]:
    """Return all responses of the pairs as single ones, two of three of them good."""
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    rows = [KtoRow(s.input_ids, s.trained, good=i % 3 > 0) for i, s in enumerate(sides)]
    return mismatch(rows, max_length=MAX_LENGTH)


def _rollout(draw: random.Random) -> Rollout:
    prompts = [PromptRow(_tokens(draw, 1, 5), f"w{i + 1}", {}) for i in range(GROUPS)]
    groups, trained = [], []
    for _ in range(GROUPS):
        group = []
        for _ in range(GROUP_SIZE):
            ids = (*_tokens(draw, 0, MAX_NEW_TOKENS - 1), STOP)
            # Near log(1 / VOCAB), as a sampler with almost even probabilities would say.
            logprobs = tuple(-3.4 - 0.6 * draw.random() for _ in ids)
            group.append(Completion(ids, logprobs, "stop", "", 0))
            trained.append(_holes(draw, len(ids)))
        groups.append(group)
    # Eighths are exact in float32. The second group is dead: all of its scores are equal.
    scores = [draw.randrange(-8, 9) / 8 for _ in range(GROUPS * GROUP_SIZE)]
    scores[GROUP_SIZE : 2 * GROUP_SIZE] = [0.5] * GROUP_SIZE
    return Rollout(prompts, groups, scores, trained)
