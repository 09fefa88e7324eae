"""Checks on a classifier before its first step: classes, tokens, loss."""

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from align.core.artifacts import Artifact
from align.preflight.checks import Check, Finding, at_most
from align.preflight.offline import few_rows, first_own_loss, loss_of, packing, start_checks
from align.preflight.tokens import fitting
from align.recipe.schema import ClassifyStage
from align.training.task import OfflineTask
from reward_models.scalar import max_tokens


def class_checks(
    spec: ClassifyStage,
    module: nn.Module,
    *,
    backbone: nn.Module,
    task: OfflineTask[Any],
    classes: Sequence[str],
    source: Artifact,
) -> list[Check]:
    """Return the checks of a classify stage.

    Args:
        spec: the stage. module: the module to train. backbone: the model below the head.
        task: rows, batches and loss. classes: class names. source: the artifact of ``init``.
    """
    rows = few_rows(spec, task)
    return [
        ("classes", partial(balance, task, classes)),
        ("tokens", partial(tokens, task, backbone)),
        *start_checks(spec, backbone, source),
        (
            "first loss",
            partial(first_loss, spec, module, task, rows=rows, num_classes=len(classes)),
        ),
        ("packing", partial(packing, spec, module, task, rows=rows)),
    ]


def balance(task: OfflineTask[Any], classes: Sequence[str]) -> Finding:
    """Report the rows per class; warn if a class has no held-out rows."""
    trained = Counter(row.label for row in task.rows)
    watched = Counter(row.label for row in task.heldout)
    few = min(classes, key=lambda name: trained[name])
    most = max(trained.values())
    value = f"{len(classes)} classes of {trained[few]} ({few!r}) to {most} rows"
    absent = [name for name in classes if task.heldout and not watched[name]]
    if absent:
        return Finding(
            value,
            "each class among the held-out rows",
            "warn",
            f"no held-out row has class {', '.join(absent[:5])}, so macro-F1 does not cover it",
        )
    return Finding(value, "each class among the held-out rows")


def tokens(task: OfflineTask[Any], backbone: Any) -> Finding:
    """Check that the model has an embedding for every token and positions for every row."""
    return fitting(
        [row.input_ids for row in (*task.rows, *task.heldout)],
        embeddings=backbone.get_input_embeddings().num_embeddings,
        positions=max_tokens(backbone),
    )


def first_loss(
    spec: ClassifyStage,
    module: nn.Module,
    task: OfflineTask[Any],
    *,
    rows: Sequence[Any],
    num_classes: int,
) -> Finding:
    """Check that the loss of the new head is near that of uniform predictions."""
    # A new head predicts nearly uniformly: -log(1 / C) = log C.
    loss = loss_of(module, task, [rows])
    if spec.own_loss:
        return first_own_loss(spec.own_loss, loss)
    return at_most(
        loss,
        math.log(num_classes) + 0.5,
        unit=f"nats; uniform predictions give ln {num_classes} = {math.log(num_classes):.3f}",
        remedy="the untrained head is overconfident: the hidden states below it are very large",
        fails=not math.isfinite(loss),
    )
