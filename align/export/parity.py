"""Compare an exported model with its original: greedy responses and per-token KL divergence."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.core.errors import ArtifactError
from align.core.readers import Reading
from align.core.types import Text
from align.data.render.chat import ChatFormat
from align.models.loading import load_tokenizer, num_positions, stop_token_ids

PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Compute 17 * 23 and explain each step.",
    "def fibonacci(n):\n    ",
    "Übersetze ins Englische: Wo ist der Bahnhof?",
    "请用一句话介绍你自己。",
    "Once upon a time",
    "List three colors:  red,\n- ",
)
"""Default prompts: several languages, code, digits, line breaks and repeated blanks."""
MAX_PROMPTS = 64
"""Prompts of a user that are compared."""
NUM_RANDOM, RANDOM_TOKENS = 4, 48
NEW_TOKENS = 24
KERNELS = 1e-3
"""KL divergence, in nats, by which the kernels of another program may differ in float32."""


@dataclass(frozen=True, slots=True)
class Bound:
    """Largest differences that the rounding of a format explains.

    Attributes:
        kl: per-token KL divergence of the original and the export, in nats.
        tie: greedy responses may differ at a token where the original's best two log-probabilities
            are this close, in nats.
        row: relative error of a row of a weight matrix; 0 compares bits.
    """

    kl: float
    tie: float
    row: float


# About twice the largest differences of stories260K and of random models with large logits, whose
# per-token KL is at most 0.025 in q8_0, 0.003 in bfloat16 and 0.00003 in float16.
BOUNDS = {
    "float32": Bound(kl=1e-6, tie=1e-3, row=0.0),
    "float16": Bound(kl=1e-3, tie=0.05, row=0.0),
    "bfloat16": Bound(kl=2e-2, tie=0.2, row=0.0),
    "f16": Bound(kl=1e-3, tie=0.05, row=1e-3),
    "q8_0": Bound(kl=5e-2, tie=0.3, row=1.5e-2),
    "q4_k_m": Bound(kl=0.5, tie=1.0, row=0.2),
}


@dataclass(frozen=True, slots=True)
class Probe:
    """Token rows on which two models are compared, and the tokens that end a response.

    Attributes:
        prompts: token ids of the prompts. rows: rows of random tokens.
        stop_token_ids: tokens that end a response. pad_token_id: the padding.
        notes: prompts that are not compared, one line for each reason.
    """

    prompts: Sequence[Sequence[int]]
    rows: Sequence[Sequence[int]]
    stop_token_ids: Sequence[int]
    pad_token_id: int
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Behavior:
    """Greedy responses of a model, and its log-probabilities on prompts with these responses.

    Attributes:
        responses: greedy token ids of each prompt.
        logprobs: (T, V) float32 of each prompt with the original's response, and each random row.
    """

    responses: Sequence[Sequence[int]]
    logprobs: Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class Parity:
    """Differences of two models.

    Attributes:
        kl_max: largest per-token KL divergence, in nats. kl_mean: the mean over tokens.
        same_text: number of prompts with the same greedy response. prompts: number of prompts.
    """

    kl_max: float
    kl_mean: float
    same_text: int
    prompts: int

    def line(self) -> str:
        """Return the result as one line for the terminal."""
        return (
            f"{self.same_text} of {self.prompts} greedy responses are equal, per-token KL at most "
            f"{self.kl_max:.2g} nats (mean {self.kl_mean:.2g})"
        )


def probe_of(model_dir: Path, prompts: Sequence[Text] = ()) -> Probe:
    """Return the token rows for comparing models with this folder's tokenizer.

    Random token rows follow the prompts, so that embeddings of rare tokens are compared too.

    Args:
        model_dir: the model's folder.
        prompts: prompts of the user, of which the first 64 are compared; default: a fixed list.

    Raises:
        ArtifactError: no prompt fits the model.
    """
    chat = ChatFormat(load_tokenizer(model_dir), stop_token_ids=stop_token_ids(model_dir))
    room = (num_positions(model_dir) or 2048) - NEW_TOKENS
    asked = list(prompts)[:MAX_PROMPTS] or [_asked(text, chat) for text in PROMPTS]
    rows = [chat.prompt_ids(prompt) for prompt in asked]
    kept = [row for row in rows if 0 < len(row) <= room]
    why = f"empty, or longer than {room} tokens ({NEW_TOKENS} are left for the response)"
    if not kept:
        raise ArtifactError(
            f"{model_dir}: none of {len(rows)} prompts can be compared: each is {why}. Give others "
            "with --prompts FILE"
        )
    notes = [f"not compared: {len(rows) - len(kept)} of {len(rows)} prompts: {why}"]
    notes = notes if len(kept) < len(rows) else []
    if len(prompts) > MAX_PROMPTS:
        notes.append(f"compared: the first {MAX_PROMPTS} of {len(prompts)} prompts")
    generator = torch.Generator().manual_seed(0)
    length = min(RANDOM_TOKENS, room)
    words = len(chat.tokenizer)
    # Random tokens also reach rows of the table that no prompt does.
    drawn = torch.randint(words, (NUM_RANDOM, length), generator=generator).tolist()
    pad: Any = chat.tokenizer.pad_token_id
    return Probe(
        kept,
        drawn,
        chat.stop_token_ids,
        chat.stop_token_ids[0] if pad is None else pad,
        notes,
    )


def _asked(text: str, chat: ChatFormat) -> Text:
    """Return a prompt as a conversation if the tokenizer has a chat template."""
    if chat.tokenizer.chat_template is None:
        return text
    return [{"role": "user", "content": text}]


@torch.inference_mode()
def behavior(model: Any, probe: Probe, responses: Sequence[Sequence[int]] = ()) -> Behavior:
    """Return a model's greedy responses and log-probabilities.

    Args:
        model: a causal language model in eval mode.
        probe: prompts and random rows.
        responses: responses on which log-probabilities are computed; default: the model's own.
    """
    own = [_greedy(model, prompt, probe) for prompt in probe.prompts]
    whole = [[*p, *r] for p, r in zip(probe.prompts, responses or own, strict=True)]
    found = []
    for row in [*whole, *probe.rows]:
        logits = model(torch.tensor([row], device=model.device)).logits[0, -len(row) :]
        found.append(logits.float().log_softmax(-1).cpu())
    return Behavior(own, found)


def _greedy(model: Any, prompt: Sequence[int], probe: Probe) -> list[int]:
    ids = torch.tensor([list(prompt)], device=model.device)
    # Everything that a saved generation configuration could change is set.
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        eos_token_id=list(probe.stop_token_ids),
        pad_token_id=probe.pad_token_id,
    )
    return output[0, len(prompt) :].tolist()


def compare(original: Behavior, exported: Behavior, probe: Probe) -> Parity:
    """Return the differences of two models' behavior."""
    found = [_kl(a, b) for a, b in zip(original.logprobs, exported.logprobs, strict=True)]
    every = torch.cat(found)
    pairs = zip(original.responses, exported.responses, strict=True)
    same = sum(list(a) == list(b) for a, b in pairs)
    return Parity(float(every.max()), float(every.mean()), same, len(probe.prompts))


def _kl(original: Tensor, exported: Tensor) -> Tensor:
    """Return KL(original || exported) of each token, (T,) in nats; infinite instead of NaN."""
    if original.shape != exported.shape:
        return torch.full((1,), torch.inf)
    kl = (original.exp() * (original - exported)).sum(-1)
    return torch.where(kl.isfinite(), kl.clamp(min=0.0), torch.inf)


def parity_problems(
    original: Behavior, exported: Behavior, probe: Probe, *, bound: Bound
) -> Iterator[str]:
    """Yield one line for each difference that exceeds the bound."""
    parity = compare(original, exported, probe)
    if not parity.kl_max <= bound.kl:
        yield f"per-token KL is up to {parity.kl_max:.3g} nats, expected at most {bound.kl:g}"
    yield from _text_problems(original, exported.responses, probe, bound=bound)


def compare_reading(
    original: Behavior, readings: Sequence[Reading], probe: Probe, *, bound: Bound
) -> tuple[Parity, list[str]]:
    """Return how another program's greedy responses differ, and what exceeds the bound.

    Its log-probabilities are those of its likeliest tokens, so the KL divergence counts all other
    tokens as one, which is never more than the whole divergence. Tokens after the first difference
    are not compared: they follow another text.

    Args:
        original: the source's behavior. readings: tokens and log-probabilities of each prompt.
        probe: the prompts. bound: what the rounding of the format explains.
    """
    found = []
    for prompt, ours, logprobs, (theirs, tops) in zip(
        probe.prompts, original.responses, original.logprobs, readings, strict=False
    ):
        for k, (token, top) in enumerate(zip(theirs, tops, strict=True)):
            found.append(_coarse_kl(logprobs[len(prompt) - 1 + k].double(), top))
            # Behind the first other token the texts differ, and the distributions with them.
            if k >= len(ours) or token != ours[k]:
                break
    responses = [tokens for tokens, _ in readings]
    pairs = zip(original.responses, responses, strict=True)
    same = sum(list(a) == list(b) for a, b in pairs)
    problems = list(_text_problems(original, responses, probe, bound=bound))
    if not found:
        problems.insert(0, "all responses are empty, so no log-probability could be compared")
        return Parity(math.inf, math.inf, same, len(probe.prompts)), problems
    parity = Parity(max(found), sum(found) / len(found), same, len(probe.prompts))
    limit = bound.kl + KERNELS
    if not parity.kl_max <= limit:
        told = f"per-token KL is up to {parity.kl_max:.3g} nats, expected at most {limit:g}"
        problems.insert(0, told)
    return parity, problems


def _coarse_kl(ours: Tensor, theirs: Mapping[int, float]) -> float:
    """Return the KL divergence, in nats, over the named tokens and all others as one."""
    tokens = torch.tensor(list(theirs))
    p, q = ours[tokens].exp(), torch.tensor(list(theirs.values()), dtype=torch.float64).exp()
    rest_p, rest_q = (float((1.0 - x.sum()).clamp(min=1e-12)) for x in (p, q))
    whole = float((p * (p / q).log()).sum()) + rest_p * math.log(rest_p / rest_q)
    return max(whole, 0.0) if math.isfinite(whole) else math.inf


def _text_problems(
    original: Behavior, responses: Sequence[Sequence[int]], probe: Probe, *, bound: Bound
) -> Iterator[str]:
    """Yield one line for each greedy response that differs and is not a tie."""
    ends = zip(original.responses, responses, original.logprobs, strict=False)
    for i, (ours, theirs, logprobs) in enumerate(ends):
        if list(ours) == list(theirs):
            continue
        at = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        # One response is the beginning of the other: they differ in where they stop.
        if at is None:
            yield f"prompt {i + 1}: the response has {len(theirs)} tokens, expected {len(ours)}"
            continue
        # The state before token ``at`` of the response is the prompt's last state plus ``at``.
        place = len(probe.prompts[i]) - 1 + at
        gap = float(logprobs[place, ours[at]] - logprobs[place, theirs[at]])
        if gap > bound.tie:
            yield (
                f"prompt {i + 1}: the greedy responses differ at token {at + 1}, where the "
                f"original prefers its token by {gap:.2g} nats (ties are below {bound.tie:g})"
            )
