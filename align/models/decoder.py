"""Choose how a causal model runs on a packed row: packed, padded, or rejected with a reason.

Packing is correct only if every layer that mixes tokens attends through align.models.attention. For
the architectures in ``PACKS``, the tests compare it with the model's own forward pass, token by
token (tests/numeric/test_architectures.py). All others run on padded rows through their own layers.
In addition, each model is probed with a few tokens before its first use, because an option of its
configuration may need unsupported attention or scale the logits.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from align.core import distributed
from align.core.errors import ArtifactError, TrainingError
from align.models.attention import PACKED, Segments, segments_from_positions
from reward_models.scalar import exact_attention

log = logging.getLogger(__name__)

_PROVEN = """
afmoe apertus arcee aria_text biogpt bitnet cohere cohere2 cohere2_moe ctrl cwm deepseek_v2
deepseek_v3 diffllama dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo gemma gemma2
gemma3_text gemma4_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neox gpt_oss granite
granite_swa granitemoe granitemoe_swa granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe
hy_v3 hyperclovax jais2 jetmoe laguna llama longcat_flash mellum mimo_v2_flash minicpm3 minimax_m2
ministral ministral3 mistral mixtral nanochat olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe
qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open starcoder2 vaultgemma youtu
"""
PACKS = frozenset(_PROVEN.split())
"""Model types for which packed rows give the same results as separate sequences."""

SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Configuration keys of a bound c on the logits: c tanh(logits / c)."""

PROBE_TOKENS = 12
EXACT, ROUNDED = 1e-3, 0.1
"""Largest relative difference that the probe accepts as rounding, in float32 and in 16 bits."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a model is run.

    Attributes:
        packs: True if a packed row is one forward pass; False if its sequences are padded.
        scale: factor between the output head's product and the model's own logits.
        why: the reason if a model is not packed.
    """

    packs: bool
    scale: float
    why: str = ""


_forms: WeakKeyDictionary[nn.Module, Form] = WeakKeyDictionary()


def form_of(lm: PreTrainedModel) -> Form:
    """Return how a causal language model is run; the first call probes it.

    Raises:
        ArtifactError: the model attends to later tokens, or its logits are not a scaled product.
    """
    if lm not in _forms:
        with _as_loaded(lm):
            _forms[lm] = _try_out(lm)
        _say(type(lm).__name__, _forms[lm].why, _router_coef(lm))
    return _forms[lm]


def packs(decoder: PreTrainedModel) -> bool:
    """Return whether a decoder takes packed rows; for a language model, call ``form_of`` first."""
    return decoder.config._attn_implementation == PACKED


def attention_for(config: PreTrainedConfig) -> str | None:
    """Return the attention for training a model; None leaves the choice to transformers."""
    return PACKED if config.get_text_config().model_type in PACKS else exact_attention(config)


def decoder_of(lm: PreTrainedModel) -> Any:
    """Return the decoder below the head of a causal language model.

    Raises:
        ArtifactError: the model has no decoder.
    """
    # Architectures differ in which of the three gives the decoder.
    for found in (lm.get_decoder(), lm.base_model, getattr(lm, "model", None)):
        if isinstance(found, PreTrainedModel) and found is not lm:
            return found
    raise ArtifactError(f"{type(lm).__name__} has no decoder below its head. Use another model.")


def soft_cap(lm: PreTrainedModel) -> float | None:
    """Return the bound on the logits, if the configuration has one."""
    config = lm.config.get_text_config()
    return next((cap for n in SOFT_CAPS if (cap := getattr(config, n, None)) is not None), None)


def rotary_limit(config: PreTrainedConfig) -> int | None:
    """Return the length up to which a row's rotary factors are its own, or None without a limit.

    Beyond it, transformers' ``longrope`` and ``dynamic`` choose one set of factors for the whole
    batch by its longest row, so a row would get other log-probabilities beside a longer one.
    """
    config = config.get_text_config()
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found, *(kind for kind in found.values() if isinstance(kind, dict))]
    limits = [
        kind.get("original_max_position_embeddings") or config.max_position_embeddings
        for kind in kinds
        if kind.get("rope_type") == "longrope" or "dynamic" in str(kind.get("rope_type"))
    ]
    return min(limits, default=None)


def check_rotary(decoder: PreTrainedModel, positions: Tensor) -> None:
    """Refuse a forward pass in which the rotary factors of a row depend on the others.

    Raises:
        TrainingError: a position lies beyond the limit.
    """
    limit = rotary_limit(decoder.config)
    if limit is not None and int(positions.max()) >= limit:
        raise TrainingError(
            f"{type(decoder).__name__}: a row has {int(positions.max()) + 1} tokens. "
            + SWITCHES.format(limit=limit)
        )


SWITCHES = (
    "Beyond {limit} tokens this model's rotary factors follow the longest row of a batch, so the "
    "log-probabilities of a row would depend on its neighbors. Set max_length to {limit} or less"
)


def padded_states(decoder: PreTrainedModel, flat_ids: Tensor, segments: Segments) -> Tensor:
    """Run a decoder on the sequences of a packed row (N,) as padded rows; return states (N, H).

    Sequences of similar length share a batch, each response after its prompt. Padding is on the
    right, where real tokens of a causal model never attend to it.
    """
    batches = [(flat_ids[x.index].view(x.num, x.max_length), x.mask) for x in segments.layouts]
    if any(hasattr(p, "ds_id") for p in decoder.parameters()):
        # ZeRO-3 gathers weights in each forward pass, so every rank must run equally many.
        missing = int(distributed.global_max(len(batches))) - len(batches)
        batches += [(flat_ids[:1].view(1, 1), torch.ones_like(flat_ids[:1]).view(1, 1))] * missing
    parts = [
        decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        for ids, mask in batches
    ]
    return torch.cat([x.flatten(0, 1) for x in parts]).index_select(0, segments.unpad_index)


def settle_decoder(decoder: PreTrainedModel) -> None:
    """Probe packed rows on a decoder without its head; restore its own attention on failure."""
    with _as_loaded(decoder):
        first, _ = _probe_ids(decoder)
        with _attention(decoder, "eager"):
            alone = decoder(input_ids=first.unsqueeze(0), use_cache=False).last_hidden_state[0]
        why = _settle(decoder, decoder, alone)
    _say(type(decoder).__name__, why, None)


@torch.no_grad()
def _try_out(lm: PreTrainedModel) -> Form:
    decoder, states = decoder_of(lm), []
    # Run the model alone, and again with other tokens in the second half.
    first, other = _probe_ids(lm)
    hook = decoder.register_forward_hook(
        lambda _, __, out: states.append(getattr(out, "last_hidden_state", None))
    )
    try:
        # Eager attention is the plain definition, so it is the reference for both comparisons.
        with _attention(lm, "eager"):
            logits = lm(input_ids=first.unsqueeze(0), use_cache=False).logits[0]
            # A causal model computes the same logits for the first half whatever follows it.
            changed = torch.cat([first[: PROBE_TOKENS // 2], other[PROBE_TOKENS // 2 :]])
            later = lm(input_ids=changed.unsqueeze(0), use_cache=False).logits[0]
    finally:
        hook.remove()
    half = slice(0, PROBE_TOKENS // 2)
    if not _alike(later[half], logits[half]):
        raise ArtifactError(
            f"{type(lm).__name__}: predictions for a token depend on later tokens (difference "
            f"{_distance(later[half], logits[half]):.2g}), so it is not a causal language model. "
            "Use a decoder, or an encoder stage for a classifier or scorer."
        )
    if not states or states[0] is None:
        raise ArtifactError(f"{type(lm).__name__} does not run its own decoder. Use another model.")
    why = _settle(lm, decoder, states[0][0])
    return Form(why == "", _scale(lm, states[0][0], logits), why)


def _settle(model: PreTrainedModel, decoder: PreTrainedModel, alone: Tensor) -> str:
    """Return why the model cannot be packed, and restore its own attention; "" if it can.
    Args:
        model: the model that contains the decoder.
        decoder: the decoder below its head.
        alone: (PROBE_TOKENS, H) states of the first probe.
    """
    if not packs(decoder):
        return _not_known(decoder)
    try:
        why = "" if decoder.config.model_type in PACKS else _not_known(decoder)
        why = why or _seen_through(decoder, alone)
    except TrainingError as error:
        why = str(error)
    if why:
        sdpa = decoder._supports_sdpa and not getattr(
            decoder.config, "attn_logit_softcapping", None
        )
        model.set_attn_implementation("sdpa" if sdpa else "eager")
    return why


def _not_known(decoder: PreTrainedModel) -> str:
    return f"sequences in packed rows of {decoder.config.model_type} models attend to each other"


def _seen_through(decoder: PreTrainedModel, alone: Tensor) -> str:
    """Compare the states of the second sequence in a packed row with its states alone."""
    first, other = _probe_ids(decoder)
    at = torch.arange(PROBE_TOKENS, device=first.device).repeat(2)
    packed = decoder(
        input_ids=torch.cat([other, first]).unsqueeze(0),
        position_ids=at.unsqueeze(0),
        use_cache=False,
        segments=segments_from_positions(at),
    ).last_hidden_state[0, PROBE_TOKENS:]
    if _alike(packed, alone):
        return ""
    return f"packed states differ from unpacked ones by a relative {_distance(packed, alone):.2g}"


def _scale(lm: PreTrainedModel, states: Tensor, logits: Tensor) -> float:
    """Return the factor between the head's product and the model's own logits."""
    # Training computes logits as scale * head(states), which must equal the model's own logits.
    head, cap, config = lm.get_output_embeddings(), soft_cap(lm), lm.config.get_text_config()
    # Candidate factors from the configuration; 1.0 is tried last.
    known: list[float] = [getattr(config, n, None) or 1.0 for n in ("logit_scale",)]
    known += [getattr(config, "lm_head_multiplier", None) or 1.0]
    divisor = getattr(config, "logits_scaling", None) or 1.0
    known += [1.0 / divisor, divisor]
    if getattr(config, "dim_model_base", None):
        known.append(config.dim_model_base / config.hidden_size)
    product = None if head is None else _product(head, states)
    for scale in dict.fromkeys([*(x for x in known if x != 1.0), 1.0]):
        if product is not None:
            tried = scale * product
            tried = tried if cap is None else torch.tanh(tried / cap) * cap
            if tried.shape == logits.shape and _alike(tried, logits.to(tried.dtype)):
                return float(scale)
    raise ArtifactError(
        f"{type(lm).__name__}: its logits are not its output head's product scaled as its "
        "configuration specifies. Training would use other probabilities than the model's own."
    )


def _product(head: nn.Module, states: Tensor) -> Tensor | None:
    try:
        return wide(head(states))
    except RuntimeError:  # the head expects states of another size
        return None


def plain_table(table: Any) -> Any:
    """Return the embedding or head of which peft trains single rows, or ``table`` itself."""
    return table.token_adapter.base_layer if hasattr(table, "token_adapter") else table


def wide(x: Tensor) -> Tensor:
    """Return a tensor in float32, or unchanged if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def _probe_ids(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return two token sequences without the padding token."""
    config = model.config.get_text_config()
    table = cast("nn.Embedding", model.get_input_embeddings()).weight
    pad = getattr(config, "pad_token_id", None)
    rows = min(config.vocab_size, table.shape[0]) if table.ndim == 2 else config.vocab_size
    # Fixed ids, so that the verdict does not depend on a tokenizer or on chance.
    ids = [i for i in range(min(rows, 4 * PROBE_TOKENS)) if i != pad]
    found = [[ids[(start + 5 * i) % len(ids)] for i in range(PROBE_TOKENS)] for start in (3, 11)]
    first, other = torch.tensor(found, device=model.device)
    return first, other


def _distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the root mean square of ``b``."""
    size = wide(b).pow(2).mean().sqrt().clamp(min=1e-12)
    return float((wide(a) - wide(b)).abs().max() / size)


def _alike(a: Tensor, b: Tensor) -> bool:
    exact = b.dtype in (torch.float32, torch.float64)
    return _distance(a, b) <= (EXACT if exact else ROUNDED)


@contextmanager
def _as_loaded(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradient, and restore every module's mode afterwards."""
    # Per module: parts of a model may be in different modes.
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Use another attention for a packed model inside the block."""
    if not packs(model):
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(PACKED)


def _router_coef(lm: PreTrainedModel) -> float | None:
    """Return the weight of the router's balance loss if the configuration asks for that loss."""
    config = lm.config.get_text_config()
    asked = getattr(config, "output_router_logits", False)
    return getattr(config, "router_aux_loss_coef", None) if asked else None


@cache
def _say(name: str, why: str, router_coef: float | None) -> None:
    """Log once how a model is run if the user should know."""
    if why:
        log.warning("%s runs on padded rows, which is correct but slower: %s", name, why)
    if router_coef:
        log.warning(
            "%s: its configuration asks for the balance loss of the router (output_router_logits: "
            "true, router_aux_loss_coef: %g), which is not added. The stage's loss alone trains "
            "router and experts. Set output_router_logits: false in its config.json to confirm",
            name,
            router_coef,
        )
