"""Stage weak_label: combine the votes of several weak judges into a probabilistic label per row.

In pairs, the response that is more probably the better one becomes the chosen one. SFT rows are all
kept. Each row gets ``label_prob``, the probability that its label is correct, which weights it in
the loss.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.core.errors import DataError
from align.core.types import Example
from align.data.load import fingerprints, load_examples
from align.data.split import hash_fraction
from align.data.text.label_model import ABSTAIN, LabelModel, dawid_skene
from align.preflight.checks import spread
from align.recipe.schema import LabelFunction, WeakLabelStage
from align.stages.base import Prepared, StageContext, StageResult
from align.stages.data.checks import NUM_SCORED, row_check, vote_checks
from align.stages.data.rows import Ledger, score_rows, to_row, write_data

log = logging.getLogger(__name__)
GIVEN = "given"
"""Name of the voter that always votes for the order in the data."""


def prepare(spec: WeakLabelStage, context: StageContext) -> Prepared:
    """Load the rows of ``spec.data`` and collect votes on a few."""
    examples = load_examples(spec.data, kind=spec.of, seed=context.seed)
    first = _collect_votes(spread(examples, NUM_SCORED), spec, context)
    return Prepared(
        train=partial(label, spec, context, examples),
        checks=[row_check(examples), *vote_checks(*first)],
    )


def label(spec: WeakLabelStage, context: StageContext, examples: Sequence[Example]) -> StageResult:
    """Write the rows with probabilistic labels."""
    names, votes = _collect_votes(examples, spec, context)
    if not (votes != ABSTAIN).any():
        raise DataError(f"{context.name}: no function gave any vote. Check their bounds")
    model, probabilities = agreed(examples, votes, of=spec.of)
    ledger = Ledger()
    rows = []
    for example, own, prob in zip(examples, votes, probabilities, strict=True):
        labeled, sure = _with_label(example, float(prob), of=spec.of)
        voted = {n: None if v == ABSTAIN else int(v) for n, v in zip(names, own, strict=True)}
        if sure < spec.min_confidence:
            ledger.add(example.source, "unsure", confidence=round(sure, 4), votes=voted)
            continue
        rows.append({**to_row(labeled), "label_prob": labeled.label_prob, "votes": voted})
    count = write_data(context, rows, ledger)
    found = {"rows/in": float(len(examples)), "rows/kept": float(count)}
    found |= summarize(names, votes, model)
    log.info("%s: %s", context.name, ", ".join(f"{k} {v:.3g}" for k, v in found.items()))
    metrics = context.metrics(1)
    metrics.log(1, found)
    metrics.close()
    return StageResult(found, fingerprints(spec.data))


def agreed(
    examples: Sequence[Example], votes: NDArray[np.int64], *, of: str
) -> tuple[LabelModel, NDArray[np.float64]]:
    """Fit the label model and return it with each row's probability of label 1.

    In the data the chosen response always comes first, so a voter that follows this order votes 1
    on every row, which carries no information. The order of each pair is therefore randomized by a
    hash of its source before the fit, and reversed afterwards.
    """
    if of == "sft":
        model = dawid_skene(votes)
        return model, model.probabilities
    # Randomize the order of the pairs, fit, and restore it.
    turned = np.array([hash_fraction(example.source) < 0.5 for example in examples])
    # Turning a pair around exchanges votes 0 and 1; abstentions stay.
    shown = np.where((votes != ABSTAIN) & turned[:, None], 1 - votes, votes)
    model = dawid_skene(shown)
    return model, np.where(turned, 1.0 - model.probabilities, model.probabilities)


def _collect_votes(
    examples: Sequence[Example], spec: WeakLabelStage, context: StageContext
) -> tuple[list[str], NDArray[np.int64]]:
    """Return the voters' names and their votes: (rows, voters) of 0, 1 or ABSTAIN."""
    chosen = _scores(examples, "completion", spec=spec, context=context)
    names = [function.name for function in spec.functions]
    if spec.of == "sft":
        columns = [
            [_verdict(function, score) for score in chosen[function.name]]
            for function in spec.functions
        ]
        return names, np.array(columns, dtype=np.int64).T
    rejected = _scores(examples, "rejected", spec=spec, context=context)
    columns = [
        [
            _preference(function, a, b)
            for a, b in zip(chosen[function.name], rejected[function.name], strict=True)
        ]
        for function in spec.functions
    ]
    # The order in the data is one more voter, with an accuracy that is estimated like the others'.
    if spec.use_given is not False:
        names, columns = [*names, GIVEN], [*columns, [1] * len(examples)]
    return names, np.array(columns, dtype=np.int64).T


def _scores(
    examples: Sequence[Example], side: str, *, spec: WeakLabelStage, context: StageContext
) -> dict[str, list[float | None]]:
    answers: list[Any] = [getattr(example, side) for example in examples]
    specs = [function.by for function in spec.functions]
    return score_rows(examples, answers, specs=specs, context=context)


def _verdict(function: LabelFunction, score: float | None) -> int:
    # Scores between the two bounds do not tell, so the function abstains.
    if score is not None and function.good_from is not None and score >= function.good_from:
        return 1
    if score is not None and function.bad_below is not None and score < function.bad_below:
        return 0
    return ABSTAIN


def _preference(function: LabelFunction, chosen: float | None, rejected: float | None) -> int:
    if chosen is None or rejected is None or abs(chosen - rejected) <= (function.min_gap or 0.0):
        return ABSTAIN
    return int(chosen > rejected)


def _with_label(example: Example, prob: float, *, of: str) -> tuple[Example, float]:
    """Return the row with its more probable label, and the probability of that label.

    Args:
        example: a row. prob: probability that its response is good (sft) or the better one.
        of: ``sft`` always keeps the response; ``preference`` may swap the pair.
    """
    if of == "sft":
        return replace(example, label_prob=prob), max(prob, 1.0 - prob)
    if prob >= 0.5:
        return replace(example, label_prob=prob), prob
    # The margin belongs to the original order and has no meaning for the swapped pair.
    turned = replace(
        example,
        completion=example.rejected,
        rejected=example.completion,
        margin=None,
        label_prob=1.0 - prob,
    )
    return turned, 1.0 - prob


def summarize(
    names: Sequence[str], votes: NDArray[np.int64], model: LabelModel
) -> dict[str, float]:
    """Return each voter's coverage and estimated accuracy, and the label model's prior."""
    found = {"label/prior": model.prior}
    found["label/confidence"] = float(
        np.maximum(model.probabilities, 1 - model.probabilities).mean()
    )
    for j, name in enumerate(names):
        found[f"{name}/coverage"] = float((votes[:, j] != ABSTAIN).mean())
        found[f"{name}/accuracy"] = model.accuracy(j)
    return found
