"""Checks on the model and the loss of an offline stage before its first step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from align.core.artifacts import Artifact
from align.core.types import PairRow, TokenRow
from align.losses.preference import tail_weights
from align.models.loading import load_tokenizer
from align.models.logprobs import LogprobModel, causal_lm
from align.models.sharding import saved_names, saved_tensor
from align.preflight.checks import NUM_ROWS, Check, Finding, at_most, spread
from align.recipe.schema import (
    DpoStage,
    KtoStage,
    OfflineStage,
    OnlineStage,
    RewardStage,
    TrainingStage,
)
from align.sampling.push import PUSH_TOLERANCE
from align.sampling.rounding import ENGINE_LIMIT, excess, rounded_otherwise
from align.training.stops import stop_probabilities
from align.training.task import OfflineTask
from align.tuning.export import checkpoint_name, gathered
from align.tuning.rows import trained_rows

NUM_TENSORS = 64
NUM_SHUFFLES = 8
SHUFFLED_GAP = 0.5
"""Nats per token by which text of the model's own tokenizer is more likely than shuffled tokens."""
LN2 = math.log(2.0)
LONGEST = 256
"""Maximum tokens per row for the model's own forward pass, which returns all logits."""
OWN_BOUNDS = {"float32": (1e-4, 2e-3), "bfloat16": (0.05, 1.5)}
"""Bounds by rounding of the median and largest difference of token log-probabilities, in nats."""


def loss_checks(
    spec: OfflineStage, module: nn.Module, task: OfflineTask[Any], *, vocab_size: int
) -> list[Check]:
    """Return the checks on the loss of an offline stage.

    Args:
        spec: the stage. module: the module to train. task: rows, batches and loss.
        vocab_size: number of token embeddings.
    """
    rows = few_rows(spec, task)
    checks: list[Check] = [
        ("first loss", partial(first_loss, spec, module, task, rows=rows, vocab_size=vocab_size)),
        ("packing", partial(packing, spec, module, task, rows=rows)),
    ]
    if isinstance(module, LogprobModel) and spec.tuning.method != "loreft":
        checks.append(("own forward", partial(own_forward, spec, module, rows)))
    if isinstance(spec, DpoStage) and not spec.reference_free:
        checks.append(("reference", partial(reference, spec, module, task, rows=rows)))
    if isinstance(spec, RewardStage) and spec.use_margin:
        checks.append(("margins", partial(margins, task)))
    if isinstance(spec, KtoStage):
        checks.append(("balance", partial(balance, spec, [row.good for row in task.rows])))
    return checks


def balance(spec: KtoStage, good: Sequence[bool]) -> Finding:
    """Check the balance of good and bad responses.

    Reference: arXiv:2402.01306 section 4.2: the ratio of weight times number of the good and bad
    responses should be between 1 and 4/3; here a ratio between 1/2 and 2 is accepted.
    """
    num_good, num_bad = sum(good), len(good) - sum(good)
    seen = f"{num_good:,} good responses, {num_bad:,} bad ones"
    if not num_good or not num_bad:
        return Finding(
            seen,
            "both",
            "warn",
            "with one label only, the policy just moves toward or away from all responses",
        )
    # Numbers times weights: what each label contributes to the loss in total.
    ratio = spec.desirable_weight * num_good / (spec.undesirable_weight * num_bad)
    if 0.5 <= ratio <= 2.0:
        return Finding(seen, "weighted 1 : 2 at most")
    side = "desirable_weight" if ratio < 1.0 else "undesirable_weight"
    weight = getattr(spec, side) / (ratio if ratio < 1.0 else 1.0 / ratio)
    return Finding(
        f"{seen}, weighted {ratio:.2g} : 1",
        "weighted 1 : 2 at most",
        "warn",
        f"one side outweighs the other. Set '{side}: {weight:.3g}' to balance them",
    )


def margins(task: OfflineTask[Any]) -> Finding:
    """Check that some pairs have a margin."""
    known = sum(row.pair.margin != 0.0 for row in task.rows)
    return Finding(
        f"{known:,} of {len(task.rows):,} pairs have a margin",
        "more than 0",
        "ok" if known else "fail",
        "'use_margin' has no effect on these rows. Remove it, or rename the column to 'margin'",
    )


def few_rows(spec: OfflineStage, task: OfflineTask[Any]) -> list[Any]:
    """Return some rows that together fit one forward pass."""
    chosen: list[Any] = []
    for row in spread(task.rows, NUM_ROWS):
        if sum(map(task.length, [*chosen, row])) <= spec.micro_tokens or not chosen:
            chosen.append(row)
    return chosen


def sides_of(row: Any) -> list[TokenRow]:
    """Return the sequences of a row: both of a pair, otherwise the row itself."""
    pair = row if isinstance(row, TokenRow | PairRow) else row.pair
    return [pair.chosen, pair.rejected] if isinstance(pair, PairRow) else [pair]


@torch.no_grad()
def loss_of(module: nn.Module, task: OfflineTask[Any], parts: Sequence[Sequence[Any]]) -> float:
    """Return the loss of a batch split into ``parts``, summed as in an optimizer step."""
    module.eval()
    batch = [row for part in parts for row in part]
    return sum(float(task.loss_fn(module, task.collate(part, batch))[0]) for part in parts)


def first_loss(
    spec: OfflineStage,
    module: nn.Module,
    task: OfflineTask[Any],
    *,
    rows: Sequence[Any],
    vocab_size: int,
) -> Finding:
    """Check that the loss before the first step has its expected value or bound."""
    loss = loss_of(module, task, [rows])
    if spec.own_loss:
        return first_own_loss(spec.own_loss, loss)
    # Without a reference there is no known value at the start, only a bound for a useful model.
    if isinstance(spec, DpoStage) and (spec.reference_free or spec.nll_coef):
        return at_most(
            loss,
            open_dpo_limit(spec, vocab_size),
            unit="nats, for a model no worse than chance",
            remedy="the model predicts these responses worse than chance. Check that the tokenizer "
            "belongs to the model",
            fails=not math.isfinite(loss),
        )
    if isinstance(spec, DpoStage | KtoStage):
        return _loss_at_reference(spec, loss, task.collate(rows, rows).counts)
    if isinstance(spec, RewardStage):
        return at_most(
            loss,
            LN2 + 0.5,
            unit="nats; equal scores give ln 2 = 0.693",
            remedy="the untrained reward model is overconfident. Check margins and center_coef",
            fails=not math.isfinite(loss),
        )
    limit = math.log(vocab_size)
    if limit < loss < math.inf and all(isinstance(row, TokenRow) for row in rows):
        limit = max(limit, _shuffled_loss(module, task, rows, vocab_size=vocab_size) - SHUFFLED_GAP)
    return at_most(
        loss,
        limit,
        unit="nats per trained token",
        remedy="the model predicts these responses worse than chance, and no better than shuffled "
        "tokens. Check that the tokenizer belongs to the model and that the model is pretrained",
        fails=not math.isfinite(loss),
    )


def _shuffled_loss(
    module: nn.Module, task: OfflineTask[Any], rows: Sequence[TokenRow], *, vocab_size: int
) -> float:
    """Return the smallest loss of the rows under a few random permutations of the vocabulary.

    A confident model is worse than chance on text that it has not seen, such as its first chat
    turns. With a tokenizer of another model, its own ids are no better than permuted ones.
    """
    losses = []
    for seed in range(NUM_SHUFFLES):
        ids = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed)).tolist()
        shuffled = [replace(row, input_ids=tuple(ids[i] for i in row.input_ids)) for row in rows]
        losses.append(loss_of(module, task, [shuffled]))
    return min(losses)


def first_own_loss(function: str, loss: float) -> Finding:
    """Check that the user's loss of the first rows is finite; its value is not known."""
    return Finding(
        f"{loss:.6f}",
        f"a finite number from {function}",
        "ok" if math.isfinite(loss) else "fail",
        "the loss of the first rows is not finite. Check the function",
    )


def _loss_at_reference(
    spec: DpoStage | KtoStage, loss: float, counts: Mapping[str, float]
) -> Finding:
    """Compare the first loss with the one of a policy that is still its reference."""
    expected, what = (
        expected_kto_loss(spec, counts) if isinstance(spec, KtoStage) else expected_dpo_loss(spec)
    )
    limit = 2.0 * PUSH_TOLERANCE[spec.dtype] * max(1.0, expected)
    # New virtual tokens change the policy, but not the reference, which runs without them.
    virtual = spec.tuning.virtual
    return Finding(
        f"{loss:.6f}",
        f"{what} = {expected:.6f}, within {limit:.1g}",
        "ok" if abs(loss - expected) <= limit else "warn" if virtual else "fail",
        "policy and reference differ before the first step"
        + (
            f", as {spec.tuning.method} tuning does"
            if virtual
            else ". The reference must be the model that the stage starts from"
        ),
    )


@torch.no_grad()
def reference(
    spec: DpoStage, module: nn.Module, task: OfflineTask[Any], *, rows: Sequence[Any]
) -> Finding:
    """Compare log-probabilities of reference and policy: their KL must start at 0."""
    # The reference was computed before training, perhaps in other packs: allow for rounding.
    batch = task.collate(rows, rows)
    module.eval()
    # (2 pairs,): means a token, so that long and short responses have one scale.
    lengths = batch.segment_sums(batch.mask.float()).clamp(min=1.0)

    def means() -> Tensor:
        logprobs = module(batch.input_ids, batch.position_ids, mask=batch.mask).logprobs
        if spec.ld_alpha is not None:
            logprobs = logprobs * tail_weights(
                batch.mask[0], batch.segment_ids, batch.num, alpha=spec.ld_alpha
            )
        return batch.segment_sums(logprobs) / lengths

    found = means()
    with rounded_otherwise(module):
        # How far rounding alone moves these means on this model and machine.
        rounding = (means() - found).abs()
    gap = (found - batch.per_sequence["ref"] / lengths).abs()
    return at_most(
        excess(gap, rounding),
        ENGINE_LIMIT,
        unit=f"times the rounding of this model ({float(rounding.mean()):.2g} nats a token) "
        f"between policy and reference: {float(gap.mean()):.2g} nats a token, {len(gap)} responses",
        remedy="the reference is not the model that the stage starts from",
        fails=not spec.tuning.virtual,
    )


def expected_dpo_loss(spec: DpoStage) -> tuple[float, str]:
    """Return the loss when policy and reference are equal, and its formula.

    With a log-ratio of 0: sigmoid and cDPO -log sigmoid(0); robust ((1 - e) - e) / (1 - 2 e) times
    that; hinge max(0, 1 - 0); ipo (0 - 1 / (2 beta))^2.
    """
    known: dict[str, tuple[float, str]] = dict.fromkeys(
        ("sigmoid", "sigmoid_norm", "robust"), (LN2, "ln 2")
    )
    known["hinge"] = (1.0, "1")
    return known.get(spec.loss, (1.0 / (4.0 * spec.beta**2), "1 / (4 beta^2)"))


def expected_kto_loss(spec: KtoStage, counts: Mapping[str, float]) -> tuple[float, str]:
    """Return the loss when policy and reference are equal: weights times 1 - sigmoid(0)."""
    total = spec.desirable_weight * counts["good"] + spec.undesirable_weight * counts["bad"]
    return total / (2.0 * counts["rows"]), "half the mean weight"


def open_dpo_limit(spec: DpoStage, vocab_size: int) -> float:
    """Return the bound of a first loss with a likelihood term, which is at most that of chance."""
    chance = math.log(vocab_size)
    if spec.loss == "orpo":
        return chance + spec.beta * chance
    if spec.loss == "simpo":
        gamma = spec.beta / 2 if spec.gamma is None else spec.gamma
        return LN2 + gamma + spec.beta * chance + spec.nll_coef * chance
    return expected_dpo_loss(spec)[0] + spec.nll_coef * chance


def packing(
    spec: OfflineStage, module: nn.Module, task: OfflineTask[Any], *, rows: Sequence[Any]
) -> Finding:
    """Compare the loss of packed rows with that of each row alone."""
    # The global counts are those of all rows in both cases, so the sums must agree.
    together = loss_of(module, task, [rows])
    alone = loss_of(module, task, [[row] for row in rows])
    return at_most(
        abs(together - alone),
        PUSH_TOLERANCE[spec.dtype] * max(1.0, abs(alone)),
        unit=f"between {len(rows)} rows packed and alone",
        remedy="packed rows attend to each other. Report this with the versions of 'align doctor'",
    )


@torch.no_grad()
def own_forward(
    spec: OfflineStage | OnlineStage, module: LogprobModel, rows: Sequence[Any]
) -> Finding:
    """Compare each token packed, alone, and by the model's own forward and logits.

    In 16 bits, rounding makes even these differ. The difference between packed and alone may be as
    large as that between alone and the model's own forward, which may be as large as rounding.
    """
    # Short sequences only: the model's own forward pass returns logits for the whole vocabulary.
    sides = [side.input_ids for row in rows for side in sides_of(row)]
    sequences = [torch.tensor([ids[:LONGEST]]) for ids in sides if len(ids) > 1][:NUM_ROWS]
    device = module.model.device
    at = torch.cat([torch.arange(x.shape[1]) for x in sequences]).unsqueeze(0)  # (1, N)
    module.eval()
    packed = module(torch.cat(sequences, 1).to(device), at.to(device)).logprobs[0].cpu()
    alone = torch.cat([module(x.to(device)).logprobs[0].cpu() for x in sequences])
    own = torch.cat([_own_logprobs(module.model, x.to(device)).cpu() for x in sequences])
    # The first token of a sequence has no prediction.
    scored = at[0] > 0
    seams, self_gap = (packed - alone).abs()[scored], (alone - own).abs()[scored]
    bounds = OWN_BOUNDS[spec.dtype]
    (seam, self_) = ((float(x.median()), float(x.max())) for x in (seams, self_gap))
    # Two verdicts: alone against the model's own forward, then packed against alone.
    held = all(x <= b for x, b in zip(self_, bounds, strict=True))
    apart = all(x <= max(b / 4, 4 * y) for x, y, b in zip(seam, self_, bounds, strict=True))
    remedy = (
        "this suite's log-probabilities differ from the model's own"
        if not held
        else "packed rows attend to each other"
    )
    return Finding(
        f"own forward: median {self_[0]:.1g}, largest {self_[1]:.1g} nats a token; packed against "
        f"alone: {seam[0]:.1g}, {seam[1]:.1g}",
        f"at most {bounds[0]:g}, {bounds[1]:g}",
        "ok" if held and apart else "fail",
        f"{remedy}. Use another model, and report this with the versions of 'align doctor'",
    )


def _own_logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    """Return log p of each token of (1, T) from the model's own logits, shape (T,)."""
    # (1, T, V) -> (T, V); logits at t predict token t + 1.
    logprobs = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    found = logprobs[:-1].gather(-1, ids[0, 1:, None])[:, 0]
    return torch.cat([found.new_zeros(1), found])


def stop_check(module: LogprobModel, rows: Sequence[Any], stops: Sequence[int]) -> Check:
    """Return the check that measures how probable the stop token is, as information."""

    def stop() -> Finding:
        sides = [side for row in spread(rows, NUM_ROWS) for side in sides_of(row)]
        found = stop_probabilities(module, sides, stops)
        if not found:
            return Finding("no response ends with a stop token")
        return Finding(
            f"before training, its probability after {len(found)} responses is "
            f"{median(found):.2g} (median)"
        )

    return "stop token", stop


def start_checks(spec: TrainingStage, model: nn.Module, source: Artifact) -> list[Check]:
    """Return the checks on the weights that a stage starts from.

    Args:
        spec: the stage. model: the transformers or peft model. source: the artifact of ``init``.
    """
    # PiSSA moves the leading part of each weight it adapts into the adapter.
    moved = spec.tuning.method == "pissa"
    checks: list[Check] = [("start", partial(same_weights, model, source, moved=moved))]
    if rows := trained_rows(model):
        names = load_tokenizer(source.model_dir).convert_ids_to_tokens(rows)
        told = f"never trained: {', '.join(names)}; their rows are trained beside the adapter"
        checks.append(("new tokens", lambda: Finding(told)))
    return checks


@torch.no_grad()
def same_weights(model: nn.Module, source: Artifact, *, moved: bool) -> Finding:
    """Check that up to 64 tensors in memory are bit-identical to those of the artifact."""
    saved = saved_names(source.model_dir)
    bare = causal_lm(model)
    prefix = getattr(bare, "base_model_prefix", "model")
    # A head on a bare backbone has names without the prefix, a whole model has them with it.
    own = {
        name: tensor
        for raw, tensor in bare.named_parameters()
        if not (moved and ".base_layer." in raw)
        for name in (checkpoint_name(raw), f"{prefix}.{checkpoint_name(raw)}")
        if name in saved
    }
    chosen = spread(sorted(own), NUM_TENSORS)
    different = [n for n in chosen if not _equal(own[n], saved_tensor(saved[n], n))]
    sha = next(
        (
            f["sha256"][:12]
            for n, f in source.manifest["files"].items()
            if n.startswith("model/") and n.endswith(".safetensors")
        ),
        "",
    )
    name = source.path.name
    return Finding(
        f"{len(chosen) - len(different)} of {len(chosen)} tensors are those of {name} ({sha})",
        "all",
        "ok" if chosen and not different else "fail",
        f"weights differ from the artifact: {', '.join(different[:3]) or 'no name in common'}. "
        "Run the stage that wrote it again",
    )


def _equal(own: Tensor, saved: Tensor) -> bool:
    """Return whether a weight equals the saved one; 4-bit weights are not compared."""
    is_quantized = own.dtype == torch.uint8
    with gathered([own]):
        return is_quantized or torch.equal(saved.to(own.dtype), own.detach().cpu())
