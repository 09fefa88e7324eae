"""Checks on a model and its loss before the first step of sft, reward and dpo."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from align.core.artefacts import Artefact
from align.core.types import PairRow, TokenRow
from align.losses.preference import tail_weights
from align.models.logprobs import LogprobModel, causal_lm
from align.preflight.checks import Check, Finding, at_most, spread
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
from align.training.offline import OfflineTask
from align.tuning.export import checkpoint_name, gathered

NUM_ROWS = 4
NUM_TENSORS = 64
LN2 = math.log(2.0)
LONGEST = 256
"""Tokens of a row that are run through the model's own forward, with all its logits."""
OWN_BOUNDS = {"float32": (1e-4, 2e-3), "bfloat16": (0.05, 1.5)}
"""Median and largest difference of a token's log-probability, in nats, that rounding explains."""


def loss_checks(
    spec: OfflineStage, module: nn.Module, task: OfflineTask[Any], *, vocab_size: int
) -> list[Check]:
    """Give the checks of an offline stage on its own loss, before any step.

    Args:
        spec: the stage. module: what the Learner will train. task: rows, batches and loss.
        vocab_size: tokens the model can tell apart.
    """
    rows = few_rows(spec, task)
    checks: list[Check] = [
        ("first loss", partial(first_loss, spec, module, task, rows, vocab_size)),
        ("packing", partial(packing, spec, module, task, rows)),
    ]
    if isinstance(module, LogprobModel) and spec.tuning.method != "loreft":
        checks.append(("own forward", partial(own_forward, spec, module, rows)))
    if isinstance(spec, DpoStage) and not spec.reference_free:
        checks.append(("reference", partial(reference, spec, module, task, rows)))
    if isinstance(spec, RewardStage) and spec.use_margin:
        checks.append(("margins", partial(margins, task)))
    if isinstance(spec, KtoStage):
        checks.append(("balance", partial(balance, spec, [row.good for row in task.rows])))
    return checks


def balance(spec: KtoStage, good: Sequence[bool]) -> Finding:
    """Weigh the good responses against the bad ones.

    Reference: arXiv:2402.01306 section 4.2: weight times number of the good ones over that of the
    bad ones should lie between 1 and 4/3; up to twice as much either way is left alone here.
    """
    num_good, num_bad = sum(good), len(good) - sum(good)
    seen = f"{num_good:,} good answers, {num_bad:,} bad ones"
    if not num_good or not num_bad:
        return Finding(seen, "both", "warn", "one side alone only moves the policy away from it")
    ratio = spec.desirable_weight * num_good / (spec.undesirable_weight * num_bad)
    if 0.5 <= ratio <= 2.0:
        return Finding(seen, "weighted 1 : 2 at most")
    side = "desirable_weight" if ratio < 1.0 else "undesirable_weight"
    weight = getattr(spec, side) / (ratio if ratio < 1.0 else 1.0 / ratio)
    return Finding(
        f"{seen}, weighted {ratio:.2g} : 1",
        "weighted 1 : 2 at most",
        "warn",
        f"one side outweighs the other; '{side}: {weight:.3g}' balances them",
    )


def margins(task: OfflineTask[Any]) -> Finding:
    """Count the pairs that say by how much the chosen response is better."""
    known = sum(row.pair.margin != 0.0 for row in task.rows)
    return Finding(
        f"{known:,} of {len(task.rows):,} pairs have a margin",
        "more than 0",
        "ok" if known else "fail",
        "'use_margin' has no effect on these rows; remove it, or rename the column to 'margin'",
    )


def few_rows(spec: OfflineStage, task: OfflineTask[Any]) -> list[Any]:
    """Choose some rows that fit one forward pass together."""
    chosen: list[Any] = []
    for row in spread(task.rows, NUM_ROWS):
        if sum(map(task.length, [*chosen, row])) <= spec.micro_tokens or not chosen:
            chosen.append(row)
    return chosen


def sides_of(row: Any) -> list[TokenRow]:
    """Give the sequences of a row: of a pair both."""
    pair = row if isinstance(row, TokenRow | PairRow) else row.pair
    return [pair.chosen, pair.rejected] if isinstance(pair, PairRow) else [pair]


@torch.no_grad()
def loss_of(module: nn.Module, task: OfflineTask[Any], parts: Sequence[Sequence[Any]]) -> float:
    """Give the loss of a batch that is cut into ``parts``, as one optimizer step sums it up."""
    module.eval()
    batch = [row for part in parts for row in part]
    return sum(float(task.loss_fn(module, task.collate(part, batch))[0]) for part in parts)


def first_loss(
    spec: OfflineStage,
    module: nn.Module,
    task: OfflineTask[Any],
    rows: Sequence[Any],
    vocab_size: int,
) -> Finding:
    """Hold the loss before the first step to what it must be."""
    loss = loss_of(module, task, [rows])
    # Fresh virtual tokens change what the policy says; the reference is without them.
    virtual = spec.tuning.virtual
    if isinstance(spec, DpoStage) and (spec.reference_free or spec.nll_coef):
        return at_most(
            loss,
            open_dpo_limit(spec, vocab_size),
            unit="nats, for a model no worse than chance",
            remedy="the model predicts these answers worse than chance does: is it another model's "
            "tokenizer?",
            fails=not math.isfinite(loss),
        )
    if isinstance(spec, DpoStage | KtoStage):
        counts = task.collate(rows, rows).counts
        expected, what = (
            expected_kto_loss(spec, counts)
            if isinstance(spec, KtoStage)
            else expected_dpo_loss(spec)
        )
        limit = 2.0 * PUSH_TOLERANCE[spec.dtype] * max(1.0, expected)
        return Finding(
            f"{loss:.6f}",
            f"{what} = {expected:.6f}, within {limit:.1g}",
            "ok" if abs(loss - expected) <= limit else "warn" if virtual else "fail",
            "policy and reference differ before the first step"
            + (
                f", as {spec.tuning.method} tuning does"
                if virtual
                else "; the reference must be the model that the stage starts from"
            ),
        )
    if isinstance(spec, RewardStage):
        return at_most(
            loss,
            LN2 + 0.5,
            unit="nats, of ln 2 = 0.693 for a scorer that knows nothing",
            remedy="the fresh scorer is sure of what it cannot know; look at margins and "
            "center_coef",
            fails=not math.isfinite(loss),
        )
    return at_most(
        loss,
        math.log(vocab_size),
        unit="nats per trained token",
        remedy="the model predicts these answers worse than chance does: is it another model's "
        "tokenizer, or a model that was never pretrained?",
        fails=not math.isfinite(loss),
    )


@torch.no_grad()
def reference(
    spec: DpoStage, module: nn.Module, task: OfflineTask[Any], rows: Sequence[Any]
) -> Finding:
    """Compare the reference's log-probabilities with the policy's: their KL begins at 0."""
    batch = task.collate(rows, rows)
    module.eval()
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
        rounding = (means() - found).abs()
    gap = (found - batch.per_sequence["ref"] / lengths).abs()
    return at_most(
        excess(gap, rounding),
        ENGINE_LIMIT,
        unit=f"times the rounding of this model ({float(rounding.mean()):.2g} nats a token) "
        f"between policy and reference: {float(gap.mean()):.2g} nats a token, {len(gap)} answers",
        remedy="the reference is not the model that the stage starts from",
        fails=not spec.tuning.virtual,
    )


def expected_dpo_loss(spec: DpoStage) -> tuple[float, str]:
    """Give the loss where policy and reference are one model, and how it is written.

    With a log-ratio of 0: sigmoid and cDPO -log sigmoid(0); robust ((1 - e) - e) / (1 - 2 e) times
    that; hinge max(0, 1 - 0); ipo (0 - 1 / (2 beta))^2.
    """
    known: dict[str, tuple[float, str]] = dict.fromkeys(
        ("sigmoid", "sigmoid_norm", "robust"), (LN2, "ln 2")
    )
    known["hinge"] = (1.0, "1")
    return known.get(spec.loss, (1.0 / (4.0 * spec.beta**2), "1 / (4 beta^2)"))


def expected_kto_loss(spec: KtoStage, counts: Mapping[str, float]) -> tuple[float, str]:
    """Give the loss where policy and reference are one model: each weight by 1 - sigmoid(0)."""
    total = spec.desirable_weight * counts["good"] + spec.undesirable_weight * counts["bad"]
    return total / (2.0 * counts["rows"]), "half the mean weight"


def open_dpo_limit(spec: DpoStage, vocab_size: int) -> float:
    """Bound a first loss that depends on the model: its likelihood part by that of chance."""
    chance = math.log(vocab_size)
    if spec.loss == "orpo":
        return chance + spec.beta * chance
    if spec.loss == "simpo":
        gamma = spec.beta / 2 if spec.gamma is None else spec.gamma
        return LN2 + gamma + spec.beta * chance + spec.nll_coef * chance
    return expected_dpo_loss(spec)[0] + spec.nll_coef * chance


def packing(
    spec: OfflineStage, module: nn.Module, task: OfflineTask[Any], rows: Sequence[Any]
) -> Finding:
    """Compare the loss of rows packed into one with that of each row by itself."""
    together = loss_of(module, task, [rows])
    alone = loss_of(module, task, [[row] for row in rows])
    return at_most(
        abs(together - alone),
        PUSH_TOLERANCE[spec.dtype] * max(1.0, abs(alone)),
        unit=f"between {len(rows)} rows packed and alone",
        remedy="rows of one pack see each other; report it with the versions of 'align doctor'",
    )


@torch.no_grad()
def own_forward(
    spec: OfflineStage | OnlineStage, module: LogprobModel, rows: Sequence[Any]
) -> Finding:
    """Compare each token packed, alone, and by the model's own forward and logits.

    In 16 bits the model differs from itself by rounding: packed against alone is held to what alone
    differs from the model's own forward, and that to the size of rounding.
    """
    sides = [side.input_ids for row in rows for side in sides_of(row)]
    sequences = [torch.tensor([ids[:LONGEST]]) for ids in sides if len(ids) > 1][:NUM_ROWS]
    device = module.model.device
    at = torch.cat([torch.arange(x.shape[1]) for x in sequences]).unsqueeze(0)  # (1, N)
    module.eval()
    packed = module(torch.cat(sequences, 1).to(device), at.to(device)).logprobs[0].cpu()
    alone = torch.cat([module(x.to(device)).logprobs[0].cpu() for x in sequences])
    own = torch.cat([_own_logprobs(module.model, x.to(device)).cpu() for x in sequences])
    scored = at[0] > 0
    seams, self_gap = (packed - alone).abs()[scored], (alone - own).abs()[scored]
    bounds = OWN_BOUNDS[spec.dtype]
    (seam, self_) = ((float(x.median()), float(x.max())) for x in (seams, self_gap))
    held = all(x <= b for x, b in zip(self_, bounds, strict=True))
    apart = all(x <= max(b / 4, 4 * y) for x, y, b in zip(seam, self_, bounds, strict=True))
    remedy = (
        "the suite's log-probabilities are not the model's own"
        if not held
        else "rows of one pack see each other"
    )
    return Finding(
        f"own forward: median {self_[0]:.1g}, largest {self_[1]:.1g} nats a token; packed against "
        f"alone: {seam[0]:.1g}, {seam[1]:.1g}",
        f"at most {bounds[0]:g}, {bounds[1]:g}",
        "ok" if held and apart else "fail",
        f"{remedy}; use another model, and report it with the versions of 'align doctor'",
    )


def _own_logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    """Return log p of each token of (1, T) from the logits that the model itself gives."""
    logprobs = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    found = logprobs[:-1].gather(-1, ids[0, 1:, None])[:, 0]
    return torch.cat([found.new_zeros(1), found])


def start_checks(spec: TrainingStage, model: nn.Module, source: Artefact) -> list[Check]:
    """Give the check that a model is the artifact that the stage starts from.

    Args:
        spec: the stage. model: the transformers or peft model. source: what ``init`` names.
    """
    # PiSSA moves the leading part of each weight it adapts into the adapter.
    moved = spec.tuning.method == "pissa"
    return [("start", partial(same_weights, model, source, moved=moved))]


@torch.no_grad()
def same_weights(model: nn.Module, source: Artefact, *, moved: bool) -> Finding:
    """Compare weights in memory with those of the artifact, bit by bit, up to 64 tensors."""
    saved = _saved_names(source.model_dir)
    bare = causal_lm(model)
    prefix = getattr(bare, "base_model_prefix", "model")
    own = {
        name: tensor
        for raw, tensor in bare.named_parameters()
        if not (moved and ".base_layer." in raw)
        for name in (checkpoint_name(raw), f"{prefix}.{checkpoint_name(raw)}")
        if name in saved
    }
    chosen = spread(sorted(own), NUM_TENSORS)
    different = [n for n in chosen if not _equal(own[n], _saved_tensor(saved[n], n))]
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
        f"other weights than the artefact's: {', '.join(different[:3]) or 'no name in common'}; "
        "run the stage that wrote it again",
    )


def _saved_names(model_dir: Path) -> dict[str, Path]:
    names: dict[str, Path] = {}
    for file in sorted(model_dir.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names |= dict.fromkeys(tensors.keys(), file)
    return names


def _saved_tensor(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def _equal(own: Tensor, saved: Tensor) -> bool:
    """Say whether a weight is the saved one; one that is held in 4 bits cannot be compared."""
    is_quantised = own.dtype == torch.uint8
    with gathered([own]):
        return is_quantised or torch.equal(saved.to(own.dtype), own.detach().cpu())
