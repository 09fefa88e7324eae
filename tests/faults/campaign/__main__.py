"""Inject faults into real runs: ``python -m tests.faults.campaign [--seed N] [--quick]``.

Prints one row for each kind of fault: how many were tried, held, failed, and were refused without
a clear message. The exit code is 1 if any failed or was unclear. A fault is repeated by its seed
and its name: ``--seed N --only 'kill -9, sft/3'``. With ``--out`` each outcome is written at once,
and a second call with the same file tries what it lacks and what did not hold.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.faults.campaign import clean, forked, recipe
from tests.faults.campaign.catalogue import catalogue
from tests.faults.campaign.ledger import (
    Failed,
    Fault,
    Outcome,
    Place,
    Unclear,
    append,
    commit,
    left_to_try,
    read,
    table,
)

VLLM = "ppo_vllm"
"""The stage whose engine takes as long as all other faults of a stage together."""
QUICK = ("base", "sft", "grpo")
"""The stages of the quick part."""
_faults: list[Fault] = []
_work = Path()
_clean = Path()
_seed = 0
_commit = ""
_keep = False


def main() -> int:
    """Run the campaign and return its exit code."""
    args = _arguments()
    began = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="align-faults-"))
    try:
        outcomes = _campaign(args, work)
    finally:
        if not args.keep:
            shutil.rmtree(work, ignore_errors=True)
    for outcome in outcomes:
        if outcome.result != "held":
            _say(f"\n{outcome.result}: {outcome.kind}/{outcome.name}\n  {outcome.detail}")
    minutes = (time.monotonic() - began) / 60
    commits = ", ".join(f"{n} on {c}" for c, n in Counter(o.commit for o in outcomes).items())
    _say(f"\n{table(outcomes)}\n\nseed {args.seed}, {commits}, {minutes:.1f} minutes")
    return int(any(outcome.result != "held" for outcome in outcomes))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.campaign", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="draws the moments and the damages")
    parser.add_argument("--quick", action="store_true", help="a small part, as in 'make test'")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="only those")
    parser.add_argument("--without", action="append", default=[], metavar="TEXT", help="not those")
    parser.add_argument("--list", action="store_true", help="print the names of the faults")
    parser.add_argument("--jobs", type=int, default=2, help="faults at the same time")
    parser.add_argument("--clean", type=Path, metavar="DIR", help="keep and reuse the clean run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="outcomes; goes on with them")
    parser.add_argument("--keep", action="store_true", help="keep the folders of the faults")
    return parser.parse_args()


def _campaign(args: argparse.Namespace, work: Path) -> list[Outcome]:
    global _faults, _work, _clean, _seed, _commit, _keep
    _commit = commit()
    _work, _clean, _seed, _keep = work, args.clean or work / "clean", args.seed, args.keep
    chosen = [f for f in catalogue(quick=args.quick) if _named(args, f)]
    if args.list:
        _say("\n".join(fault.key for fault in chosen))
        return []
    vllm = any(VLLM in fault.key for fault in chosen)
    forked.preload(vllm=vllm)
    stages = QUICK if args.quick else [s for s in recipe.KINDS if vllm or s != VLLM]
    if not _clean.exists():
        clean.make(_clean, stages, jobs=args.jobs)
    _faults = chosen
    before = read(args.out, args.seed) if args.out else {}
    found = {f.key: before[f.key] for f in chosen if f.key in before}
    left = left_to_try(chosen, found)
    for outcome in _outcomes(sorted(left, key=lambda i: -chosen[i].cost), args.jobs):
        found[outcome.key] = outcome
        if args.out:
            append(outcome, args.out)
        if outcome.result != "held":
            _say(f"{outcome.result}: {outcome.kind}/{outcome.name}: {outcome.detail[-400:]}")
        if len(found) % 50 == 0:
            _say(f"{len(found)} of {len(chosen)}")
    return [found[fault.key] for fault in chosen]


def _named(args: argparse.Namespace, fault: Fault) -> bool:
    wanted = not args.only or any(text in fault.key for text in args.only)
    return wanted and not any(text in fault.key for text in args.without)


def _outcomes(order: Sequence[int], jobs: int) -> Iterator[Outcome]:
    """Yield the outcome of each fault; the workers are forks, which need no imports."""
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap_unordered(_inject, order)


def _inject(number: int) -> Outcome:
    fault = _faults[number]
    folder = _work / f"{number:05d}"
    seconds = json.loads((_clean / clean.SECONDS).read_text())
    rng = random.Random(f"{_seed}/{fault.key}")
    began, result, detail = time.monotonic(), "held", ""
    try:
        fault.inject(Place(folder, _clean, seconds, rng))
    except Unclear as e:
        result, detail = "unclear", str(e)
    except Failed as e:
        result, detail = "failed", str(e)
    except Exception:
        result, detail = "failed", "the campaign itself: " + traceback.format_exc()[-1500:]
    if result == "held" or not _keep:
        shutil.rmtree(folder, ignore_errors=True)
    taken = round(time.monotonic() - began, 2)
    return Outcome(fault.kind, fault.name, result, detail, taken, _seed, _commit)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Not sys.exit: after gc.freeze a library reports what it takes for leaks.
    os._exit(code)
