"""Log-probabilities of given tokens, computed in chunks so that (B, T, V) never exists.

The one-token shift of language models happens only here (and in the reward model): the result at
index t is the log-probability of token t given the tokens before it.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from align.core import distributed
from align.core.errors import TrainingError
from align.core.groups import sharing
from align.models.attention import Segments, segments_from_positions
from align.models.decoder import (
    check_rotary,
    decoder_of,
    form_of,
    padded_states,
    plain_table,
    soft_cap,
    wide,
)
from align.models.fused_head import head_logprobs
from align.models.ulysses import lengthened, part_of, summed

CHUNK_ELEMENTS = 2**24
"""Largest number of logits in memory (64 MiB in float32) if the head is not one plain matrix."""


class TokenLogprobs(NamedTuple):
    """``logprobs`` (nats) and, if requested, ``entropy`` (nats), both shaped like input_ids."""

    logprobs: Tensor
    entropy: Tensor | None


def token_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    mask: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> TokenLogprobs:
    """Return log p(token t | tokens before t) for every token.

    Args:
        model: a causal language model of transformers (or its peft wrapper).
        input_ids: (B, T); rows may be padded on either side or packed.
        attention_mask: (B, T), 1 on real tokens; None means that all are real.
        position_ids: (B, T), as in align.models.attention: 0 where a packed sequence begins, p
            where a response continues the first p tokens of the previous sequence. None means that
            each row is one sequence.
        temperature: divides the logits first, as in the sampler.
        entropy: also compute the entropy of each distribution, without gradient.
        mask: (B, T) bool, where a value is needed; None means everywhere. The head runs only there.
        label_smoothing: e returns (1 - e) log p(token t) + e times the mean of log p over the
            vocabulary: minus the cross-entropy with a smoothed target (arXiv:1512.00567 section 7).

    Returns:
        float32 tensors (B, T), or float64 for a float64 model. They are 0 on padding, outside
        ``mask``, and on the first token of each sequence, which no distribution predicts.
    """
    real = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool()
    segments = _layout(real, position_ids, mask)
    flat_ids, group = input_ids[real], segments.group
    num = segments.positions.numel()  # more where ranks can share the row only if it is longer
    flat_ids = nn.functional.pad(flat_ids, (0, num - flat_ids.numel()))
    part = part_of(num, group)  # this rank's tokens: all N without other ranks
    hidden = hidden_states(model, flat_ids, segments)  # (N, H)
    at = _predicted(segments, part)  # (n,)
    # Every rank must use the backbone in its graph, even if it trains no tokens here.
    zero = wide(hidden).sum() * 0.0 if at.numel() == 0 else 0.0
    # The state of the preceding token predicts token t: this is the one-token shift.
    states = hidden.index_select(0, segments.previous[at] - part.start)  # (n, H)
    values, entropies = _head(model, states, flat_ids[at], temperature, entropy, label_smoothing)
    index = real.flatten().nonzero().squeeze(1)[at]
    logprobs = _scatter(values, index, real.shape) + zero
    spread = _scatter(entropies, index, real.shape) if entropy else None
    if group.size > 1:
        logprobs = summed(logprobs, group)
        spread = spread if spread is None else summed(spread, group)
    return TokenLogprobs(logprobs, spread)


@torch.no_grad()
def next_logits(model: nn.Module, input_ids: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor:
    """Return the logits (n, V) from which the n masked tokens of a packed row (1, N) were drawn."""
    segments = replace(segments_from_positions(position_ids[0]), answers=mask[0])
    hidden = hidden_states(model, input_ids[0], segments)  # (N, H)
    return token_logits(model, hidden[segments.previous[mask[0].nonzero().squeeze(1)]])


def _predicted(segments: Segments, part: slice) -> Tensor:
    """Return the packed positions, (n,), of the tokens that this rank's states must predict.

    The first token of a sequence follows nothing; the head runs only where a value is needed, and
    on the rank that has the state of the preceding token.
    """
    wanted = (segments.positions > 0) & (segments.previous >= part.start)
    wanted &= segments.previous < part.stop
    if segments.answers is not None:
        wanted &= segments.answers
    return wanted.nonzero().squeeze(1)


def _layout(real: Tensor, position_ids: Tensor | None, mask: Tensor | None) -> Segments:
    """Return the layout of the real tokens of (B, T) as one packed row."""
    # Padding on either side is cut away, so positions count real tokens.
    positions = real.cumsum(1) - 1 if position_ids is None else position_ids
    flat, group = positions[real], sharing()
    segments = replace(segments_from_positions(lengthened(flat, group)), group=group)
    answers = torch.ones_like(real) if mask is None else mask
    if mask is None and group.size == 1:
        return segments
    more = segments.positions.numel() - flat.numel()
    return replace(segments, answers=nn.functional.pad(answers[real].bool(), (0, more)))


def _scatter(values: Tensor, index: Tensor, shape: torch.Size) -> Tensor:
    """Return zeros (B, T) with the values (n,) at their places in the flattened tensor."""
    return values.new_zeros(shape.numel()).index_put((index,), values).view(shape)


class LogprobModel(nn.Module):
    """A causal language model whose forward returns log-probabilities instead of logits."""

    model: Any
    """The causal language model of transformers, or its peft wrapper."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        mask: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> TokenLogprobs:
        """Return ``token_logprobs`` of the wrapped model."""
        return token_logprobs(
            self.model,
            input_ids,
            position_ids=position_ids,
            temperature=temperature,
            entropy=entropy,
            mask=mask,
            label_smoothing=label_smoothing,
        )


def hidden_states(model: Any, flat_ids: Tensor, segments: Segments) -> Tensor:
    """Return the decoder's last states (N, H) for one packed row of token ids (N,).

    Ranks that share the row get those of their tokens.
    """
    lm = causal_lm(model)
    decoder = decoder_of(lm)
    # Virtual tokens precede every sequence of the row, as a filled cache.
    cache = model.virtual_cache() if hasattr(model, "virtual_cache") else None
    num_virtual = 0 if cache is None else cache.get_seq_length()
    check_rotary(decoder, segments.positions + num_virtual)
    if not form_of(lm).packs:
        if segments.group.size > 1:
            raise TrainingError(
                f"parallel.sequence: {type(lm).__name__} does not take packed rows, and no other "
                "rows can be shared by ranks; remove the key"
            )
        return padded_states(decoder, flat_ids, segments)
    part = part_of(flat_ids.numel(), segments.group)
    out = decoder(
        input_ids=flat_ids[part].unsqueeze(0),
        position_ids=segments.positions[part].unsqueeze(0) + num_virtual,
        past_key_values=cache,
        use_cache=False,
        segments=segments,
    )
    return out.last_hidden_state[0]


def causal_lm(model: Any) -> Any:
    """Return the transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def token_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Return the model's logits (n, V) from last states (n, H): scaled, soft-capped, float32."""
    lm = causal_lm(model)
    logits = wide(lm.get_output_embeddings()(hidden)) * form_of(lm).scale
    cap = soft_cap(lm)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _head(
    model: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    temperature: float,
    entropy: bool,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    head = causal_lm(model).get_output_embeddings()
    # peft may train single rows; the weight of such a head is a matrix with these rows in place.
    table = plain_table(head)
    # One plain matrix: the fused function, with the logit scale folded into the temperature.
    if not label_smoothing and _is_plain(model, table):
        divisor = temperature / form_of(causal_lm(model)).scale
        return head_logprobs(hidden, head.weight, labels, temperature=divisor, entropy=entropy)

    def chunk(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = token_logits(model, h) / temperature
        # log p(y) = logit_y - logsumexp(logits), all (n,).
        norm = torch.logsumexp(logits, -1)
        chosen = logits.gather(-1, y.unsqueeze(-1)).squeeze(-1) - norm
        if label_smoothing:
            chosen = torch.lerp(chosen, logits.mean(-1) - norm, label_smoothing)
        if not entropy:
            return chosen, chosen.detach()
        with torch.no_grad():
            # H = log Z - sum p * logit
            spread = norm - (torch.softmax(logits, -1) * logits).sum(-1)
        return chosen, spread

    size = max(1, CHUNK_ELEMENTS // table.weight.shape[0] if table.weight.ndim == 2 else 1024)
    parts = list(zip(hidden.split(size), labels.split(size), strict=True))
    if hasattr(table.weight, "ds_id"):
        # ZeRO-3 gathers the head for each chunk, so every rank must run equally many.
        missing = int(distributed.global_max(len(parts))) - len(parts)
        parts += [(hidden[:0], labels[:0])] * missing
    if len(parts) <= 1:
        return chunk(hidden, labels)
    # With several chunks, recompute their logits in the backward pass.
    results = [checkpoint(chunk, h, y, use_reentrant=False) for h, y in parts]
    return torch.cat([r[0] for r in results]), torch.cat([r[1] for r in results])


def _is_plain(model: nn.Module, head: nn.Module | None) -> bool:
    """Return whether the head is a single plain matrix."""
    whole = type(head) is nn.Linear and head.bias is None and not hasattr(head.weight, "ds_id")
    return whole and soft_cap(causal_lm(model)) is None
