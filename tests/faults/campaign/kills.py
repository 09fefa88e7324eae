"""kill -9 at random moments and at every kind of file operation; resumed to the same bytes."""

import signal
from collections.abc import Iterator
from functools import partial

from tests.faults.campaign import clean, forked, hooks, recipe
from tests.faults.campaign.ledger import Failed, Fault, Place, no_traceback

RANDOM = {"ppo_vllm": 2, "sft_z2": 4, "sft_z3": 4, "grpo_r2": 4}
"""Kills at random moments of each stage, where not ``USUAL``; as many at file operations."""
USUAL = 9
LAUNCHER_S = 30.0
"""Seconds that a launcher gives the other rank, and gives it again after a signal."""
QUICK = {"base": 1, "sft": 3, "grpo": 2}


def faults(*, quick: bool) -> Iterator[Fault]:
    """Yield every kill."""
    for stage in QUICK if quick else recipe.KINDS:
        number = QUICK[stage] if quick else RANDOM.get(stage, USUAL)
        cost = 20.0 if stage == "ppo_vllm" else 2.0 * recipe.RANKS.get(stage, 1)
        for i in range(number):
            when = partial(_at_random, stage)
            yield Fault(f"kill -9 at a random moment, {stage}", str(i), when, cost)
            where = partial(_at_operation, stage)
            yield Fault(f"kill -9 in a file operation, {stage}", str(i), where, cost)
        if stage in recipe.RANKS:
            for i in range(number // 2):
                one = partial(_one_rank, stage)
                yield Fault(f"kill -9 of one rank of two, {stage}", str(i), one, cost)


def prepare(place: Place, stage: str) -> None:
    """Make a workplace in which only the inputs of a stage are done."""
    recipe.copy_workplace(place.clean, place.folder, recipe.inputs_of(stage))


def begin(place: Place, stage: str, **options) -> forked.Run:
    """Start a stage in a workplace."""
    ranks = recipe.RANKS.get(stage, 1)
    return forked.start_stage(place.folder, stage, recipe.kind_of(stage), ranks=ranks, **options)


def finish(place: Place, stage: str, *, metrics: bool = True) -> str:
    """Start a stage again; it must end with the bytes of the clean run. Return what it said."""
    run = begin(place, stage)
    codes = run.wait()
    said = run.said()
    run.log.unlink()
    if any(codes):
        raise Failed(f"starting it again ended with {codes}: {said[-900:]}")
    clean.same(place.clean, place.folder, stage, metrics=metrics)
    return said


def _moment(place: Place, stage: str) -> float:
    return place.rng.uniform(0.02, 1.0) * place.seconds[stage]


def _at_random(stage: str, place: Place) -> None:
    """Kill every rank, sometimes the resumed run too, and finish."""
    prepare(place, stage)
    for _ in range(place.rng.choice((1, 1, 1, 2, 3))):
        run = begin(place, stage)
        run.wait_until(_moment(place, stage))
        run.kill()
        _killed_or_done(run.wait())
    finish(place, stage)


def _killed_or_done(codes: list[int]) -> None:
    if any(code not in (0, -signal.SIGKILL) for code in codes):
        raise Failed(f"ended with {codes} before the kill")


def _at_operation(stage: str, place: Place) -> None:
    """Kill rank 0 just before one of its file operations, then the other rank."""
    prepare(place, stage)
    number = place.rng.randint(1, clean.num_writes(place.clean, stage))
    run = begin(place, stage, hook=partial(hooks.kill_at, number))
    forked.wait_for(run.pids[0])
    if len(run.pids) > 1:
        run.kill(ranks=range(1, len(run.pids)))
    codes = run.wait()
    if codes[0] != -signal.SIGKILL:
        raise Failed(f"ended with {codes} instead of at operation {number}: {run.said()[-600:]}")
    finish(place, stage)


def _one_rank(stage: str, place: Place) -> None:
    """Kill one rank; the other one ends by itself, or as the launcher ends it."""
    prepare(place, stage)
    run = begin(place, stage)
    run.wait_until(_moment(place, stage))
    victim = place.rng.randrange(len(run.pids))
    joined = (place.folder / recipe.RUN / stage / "begun.json").exists()
    run.kill(ranks=[victim])
    # A rank that waits for one that never joined sits in a system call. DeepSpeed's launcher ends
    # it by SIGTERM, then by SIGKILL.
    other = 1 - victim
    for signum in (signal.SIGTERM, signal.SIGKILL):
        if not forked.wait_for(run.pids[other], LAUNCHER_S):
            run.kill(ranks=[other], signum=signum)
    codes = run.wait()
    if joined and codes[other] == -signal.SIGKILL:
        raise Failed("the other rank hangs")
    no_traceback(run.said())
    finish(place, stage)
