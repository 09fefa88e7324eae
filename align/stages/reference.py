"""The reference pass of dpo and kto: which rows need it, and where its results are kept."""

import logging

from align.core import distributed
from align.core.checkpoints import identity
from align.data.sampler import batch_indices
from align.preflight.checks import NUM_ROWS, spread
from align.recipe.schema import OfflineStage
from align.stages.base import StageContext
from align.training.offline import num_steps
from align.training.results import ResultFile

log = logging.getLogger(__name__)


def rows_needed(
    spec: OfflineStage, context: StageContext, *, num_training: int, num_heldout: int
) -> list[int]:
    """Return the places, in training and then held-out rows, whose reference values are used.

    These are the rows of all steps, the few rows of the preflight, and all held-out rows.
    """
    steps = num_steps(
        num_training, batch_size=spec.batch_size, epochs=spec.epochs, steps=spec.steps
    )
    drawn = set(spread(range(num_training), NUM_ROWS))
    if steps * spec.batch_size >= num_training:
        drawn = set(range(num_training))  # at least one whole epoch
    else:
        seed = distributed.derive_seed(context.seed, "batches")
        for step in range(steps):
            drawn.update(batch_indices(num_training, spec.batch_size, seed=seed, step=step))
    if len(drawn) < num_training:
        log.info(
            "reference log-probabilities: for the %s of %s training rows that the %s steps draw",
            f"{len(drawn):,}",
            f"{num_training:,}",
            f"{steps:,}",
        )
    return sorted(drawn) + list(range(num_training, num_training + num_heldout))


def reference_file(context: StageContext, needed: list[int]) -> ResultFile | None:
    """Return the file that keeps this rank's reference values; None if nothing is trained."""
    if context.check_only:
        return None
    rank, ranks = distributed.rank(), distributed.world_size()
    key = {"identity": identity(), "ranks": ranks, "rows": needed}
    path = context.out / "checkpoints" / "reference" / f"{rank}.jsonl"
    return ResultFile(path, key=key, what="reference log-probabilities")
