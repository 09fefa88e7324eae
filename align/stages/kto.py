"""Stage kto: train on single responses labeled good or bad, without pairs.

The loss compares each response's log-ratio to the reference with a reference point: the KL of the
policy to the reference. The KL is estimated on mismatched responses (the prompt of one row with the
response of the next row that has another prompt) over the batch of all ranks. It is at least 0 and
has no gradient.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from align.core import distributed
from align.core.errors import DataError
from align.core.types import Example, TokenRow
from align.data.batching import plan_micro_batches
from align.data.render.chat import ChatFormat
from align.losses.preference import kto_loss
from align.recipe.schema import KtoStage
from align.stages.base import Prepared, StageContext, chat_format
from align.stages.offline import build_policy, load_init, offline_rows, prepare_policy
from align.stages.reference import reference_file, rows_needed
from align.training.batch import PackedBatch, pack, trim_after_last_trained
from align.training.infer import map_rows
from align.training.learner import infer
from align.training.own_code import own_losses
from align.training.results import ResultFile
from align.training.task import OfflineTask
from align.tuning.reference import start_policy


@dataclass(frozen=True, slots=True)
class KtoRow(TokenRow):
    """A labeled response, and its prompt with another row's response.

    Attributes:
        good: label of the response.
        mismatched: this prompt with the other response.
        ref, ref_mismatched: the reference's log-probability of each (nats, token sums); NaN for a
            row that no step draws.
    """

    good: bool = True
    mismatched: TokenRow | None = None
    ref: float = 0.0
    ref_mismatched: float = 0.0


def prepare(spec: KtoStage, context: StageContext) -> Prepared:
    """Load the responses, build the policy and compute reference log-probabilities with it."""
    source = load_init(spec, context)
    chat = chat_format(source.model_dir)
    data = offline_rows(spec, context, render=partial(labeled_row, chat))
    training, heldout = (
        mismatch(rows, max_length=spec.max_length) for rows in (data.training, data.heldout)
    )
    module = build_policy(spec, source.model_dir, seed=context.seed)
    needed = rows_needed(spec, context, num_training=len(training), num_heldout=len(heldout))
    # Before the first step the policy is the reference, unless a new adapter changes it.
    with start_policy(module.model, spec.tuning, source.model_dir):
        rows = reference_rows(
            module,
            [*training, *heldout],
            micro_tokens=spec.micro_tokens,
            needed=needed,
            store=reference_file(context, needed),
        )
    task = OfflineTask(
        rows[: len(training)],
        rows[len(training) :],
        lambda row: len(row.input_ids),
        collate,
        partial(labeled_loss, spec),
        measure=partial(mismatched_kl, spec),
    )
    return prepare_policy(
        spec, context, data=data, module=module, task=task, source=source, chat=chat
    )


def labeled_row(chat: ChatFormat, example: Example) -> KtoRow:
    """Return a tokenized labeled response, without template text after the stop token."""
    row = trim_after_last_trained(chat.sft_row(example))
    return KtoRow(row.input_ids, row.trained, row.source, good=bool(example.label))


def mismatch(rows: Sequence[KtoRow], *, max_length: int) -> list[KtoRow]:
    """Return the rows, each with the response of the next row that has another prompt.

    Args:
        rows: labeled responses. max_length: the mismatched row is truncated to this many tokens.

    Raises:
        DataError: all rows have one prompt.
    """
    # A prompt ends where the first trained token begins.
    starts = [row.trained.index(True) for row in rows]
    prompts = [row.input_ids[:start] for row, start in zip(rows, starts, strict=True)]
    if len(set(prompts)) < 2 and rows:
        raise DataError(
            f"kto: all {len(rows)} rows have the same prompt, expected at least two prompts. Add "
            "rows: the reference point is measured on responses to other prompts"
        )
    found = []
    for i, row in enumerate(rows):
        # The next row with another prompt, around the end of the list.
        j = next(
            k % len(rows)
            for k in range(i + 1, i + len(rows))
            if prompts[k % len(rows)] != prompts[i]
        )
        answer = rows[j].input_ids[starts[j] :]
        ids = (prompts[i] + answer)[:max_length]
        trained = tuple(t >= starts[i] for t in range(len(ids)))
        found.append(replace(row, mismatched=TokenRow(ids, trained, rows[j].source)))
    return found


def other(row: KtoRow) -> TokenRow:
    """Return a row's mismatched response, which ``mismatch`` has set."""
    assert row.mismatched is not None, row.source
    return row.mismatched


def reference_rows(
    module: nn.Module,
    rows: Sequence[KtoRow],
    *,
    micro_tokens: int,
    needed: Sequence[int] | None = None,
    store: ResultFile | None = None,
) -> list[KtoRow]:
    """Return the rows with reference log-probabilities; the work is split across ranks.

    Args:
        module: the reference. rows: all rows. micro_tokens: token budget of one pass.
        needed: places of the rows to compute, None for all; the others get NaN.
        store: keeps the results for a resumed stage.
    """
    places = range(len(rows)) if needed is None else needed
    found = map_rows(
        module,
        [side for i in places for side in (rows[i], other(rows[i]))],
        lambda model, batch: _sums(model, batch).tolist(),
        length=lambda row: len(row.input_ids),
        collate=pack,
        micro_tokens=micro_tokens,
        store=store,
    )
    # A row's own response is followed by the mismatched one.
    known = dict(zip(places, zip(found[0::2], found[1::2], strict=True), strict=True))
    unknown = (math.nan, math.nan)
    values = [known.get(i, unknown) for i in range(len(rows))]
    return [
        replace(row, ref=own, ref_mismatched=mismatched)
        for row, (own, mismatched) in zip(rows, values, strict=True)
    ]


def _sums(model: nn.Module, batch: PackedBatch) -> Tensor:
    logprobs = model(batch.input_ids, batch.position_ids, mask=batch.mask).logprobs
    # (1, N) -> (num,), in nats.
    return batch.segment_sums(logprobs)


def collate(rows: Sequence[KtoRow], batch: Sequence[KtoRow]) -> PackedBatch:
    """Pack responses; the global counts are all responses of the batch, and the good ones."""
    num_good = sum(row.good for row in batch)
    return pack(
        rows,
        counts={
            "rows": float(len(batch)),
            "good": float(num_good),
            "bad": float(len(batch) - num_good),
        },
        per_sequence={"ref": [row.ref for row in rows], "good": [row.good for row in rows]},
    )


def mismatched_kl(spec: KtoStage, model: nn.Module, batch: Sequence[KtoRow]) -> Mapping[str, float]:
    """Return the KL to the reference (nats), estimated on a batch's mismatched responses."""
    plan = plan_micro_batches(
        [len(other(row).input_ids) for row in batch],
        micro_tokens=spec.micro_tokens,
        ranks=distributed.world_size(),
    )[distributed.rank()]
    packs = [
        pack(
            [other(batch[i]) for i in micro],
            per_sequence={"ref": [batch[i].ref_mismatched for i in micro]},
        )
        for micro in plan
    ]
    # k1 at mismatched responses; the placeholder of an empty rank adds nothing.
    found = infer(model, packs, lambda m, b: float((_sums(m, b) - b.per_sequence["ref"]).sum()))
    # One reference point for the batch of all ranks, at least 0.
    return {"kl": max(distributed.global_sum(sum(found)) / len(batch), 0.0)}


def labeled_loss(
    spec: KtoStage, model: nn.Module, batch: PackedBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return this micro-batch's part of the mean loss per response and of the logged metrics."""
    logprobs = model(batch.input_ids, batch.position_ids, mask=batch.mask).logprobs
    sums = batch.segment_sums(logprobs)
    # (num,): log-ratio of each response to the reference, in nats.
    ratio = sums - batch.per_sequence["ref"]
    good = batch.per_sequence["good"] > 0.5
    kl = batch.counts.get("kl", 0.0)
    options = {
        "kl": kl,
        "beta": spec.beta,
        "desirable_weight": spec.desirable_weight,
        "undesirable_weight": spec.undesirable_weight,
    }
    if spec.own_loss:
        sides = (sums, batch.per_sequence["ref"], good)
        loss = own_losses(spec.own_loss, *sides, each="responses", options=options)
    else:
        loss = kto_loss(ratio, torch.zeros_like(ratio), good, **options)
    rewards = spec.beta * ratio.detach()
    share = 1.0 / batch.counts["rows"]
    stats = {
        # Weighted by rows, so that the parts of all micro-batches sum to the KL itself.
        "kl": kl * share * torch.tensor(float(batch.num)),
        "good_reward": rewards[good].sum() / max(batch.counts["good"], 1.0),
        "bad_reward": rewards[~good].sum() / max(batch.counts["bad"], 1.0),
    }
    return loss.sum() * share + 0.0 * logprobs.sum(), stats
