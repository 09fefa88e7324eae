"""SIGTERM and SIGINT at random moments: exit code 75, and nothing is lost."""

import signal
from collections.abc import Iterator
from functools import partial

from tests.faults.campaign import recipe
from tests.faults.campaign.kills import begin, finish, prepare
from tests.faults.campaign.ledger import Failed, Fault, Place, no_traceback

PER_STAGE = 4


def faults(*, quick: bool) -> Iterator[Fault]:
    """Yield every signal."""
    for stage in ("sft",) if quick else recipe.KINDS:
        if stage == "ppo_vllm":
            continue
        for i in range(2 if quick else PER_STAGE):
            signum = (signal.SIGTERM, signal.SIGINT)[i % 2]
            stop = partial(_stop, stage, signum)
            name = signal.Signals(signum).name
            ranks = "two ranks" if stage in recipe.RANKS else "one rank"
            yield Fault(f"{name}, {ranks}", f"{stage} {i}", stop, 2.0)


def _stop(stage: str, signum: int, place: Place) -> None:
    """Signal all ranks, as `align run` does; the code is 75, or 0 if the work was done."""
    prepare(place, stage)
    run = begin(place, stage)
    # Before a stage takes signals there is nothing to save, and `align run` counts it as stopped.
    run.wait_until(place.rng.uniform(0.1, 1.0) * place.seconds[stage])
    run.kill(signum=signum)
    codes = run.wait()
    said = run.said()
    run.log.unlink()
    if not all(code in (0, 75, -signum) for code in codes):
        raise Failed(f"{codes} after the signal: {said[-900:]}")
    no_traceback(said)
    finish(place, stage)
