"""Plant causes for which a run does not learn, and count those named and the false alarms.

    python -m benchmarks.not_learning                 # the tables of docs/not-learning.md
    python -m benchmarks.not_learning --only grpo     # cases whose name contains the text
    python -m benchmarks.not_learning --short         # the cases that the tests run

Every case is a stage on a model of hidden size 32, trained in this process. A cause counts as named
if it is the first alarm of the run, or the error that ended it.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import yaml

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import torch

from align.core import distributed
from align.core.artifacts import write_manifest
from align.core.errors import AlignError
from align.core.log import ALARMS_FILE, METRICS_FILE, setup_logging
from align.recipe.load import load_recipe
from align.stages.base import StageContext, prepare_and_train
from benchmarks.not_learning_cases import (
    CAUSES,
    HEALTHY,
    MODELS,
    SHORT,
    Case,
    write_data,
    write_model,
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run showed.

    Attributes:
        alarms: (step, name, reason) in the order of their steps.
        error: the error that ended the run; empty if none did.
        before, after: first and last value of the case's measure.
    """

    case: Case
    alarms: list[tuple[int, str, str]]
    error: str
    before: float
    after: float
    seconds: float

    @property
    def named(self) -> bool:
        """Whether the planted cause is the first that was named."""
        if self.error:
            return self.case.cause in self.error
        return bool(self.alarms) and self.alarms[0][1] == self.case.cause


class Workshop:
    """A folder with the tiny model and data that all cases share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in MODELS:
            write_model(folder / name / "model", name)
            write_manifest(folder / name, {"kind": "policy", "spec_hash": ""})
        write_data(folder)

    def run(self, case: Case) -> Outcome:
        """Train a case and return what it showed."""
        began, error = time.monotonic(), ""
        stage = case.stage(self.folder)
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump({"name": "case", "stages": {"case": stage}}))
        out = self.folder / "runs" / "case"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        with ExitStack() as stack:
            for plant in case.plants:
                stack.enter_context(plant())
            try:
                recipe = load_recipe(path)
                distributed.seed_everything(recipe.seed_of("case"))
                context = StageContext(recipe, "case", out.parent, recipe.seed_of("case"))
                prepare_and_train(recipe.stages["case"], context)
            except AlignError as failure:
                error = " ".join(str(failure).replace(f"{self.folder}/", "").split())
        rows = _rows(out / METRICS_FILE)
        alarms = [(row["step"], row["name"], row["reason"]) for row in _rows(out / ALARMS_FILE)]
        values = [row[case.measure] for row in rows if case.measure in row] or [0.0]
        ends = values[0], sum(values[-3:]) / len(values[-3:])
        return Outcome(case, alarms, error, *ends, time.monotonic() - began)


def _rows(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def outcomes(cases: Sequence[Case]) -> Iterator[Outcome]:
    """Yield the outcome of each case; the process must be a world of its own."""
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        for case in cases:
            yield workshop.run(case)


def cause_table(cases: Sequence[Case]) -> Iterator[str]:
    """Yield the lines of the table of planted causes."""
    yield "| planted | stage | named | at step | evidence |"
    yield "|---|---|---|---|---|"
    named = 0
    for found in outcomes(cases):
        named += found.named
        step, name, reason = found.alarms[0] if found.alarms else ("", "", found.error)
        shown = f"`{name or found.case.cause}`" if found.named else f"**no** {name}"
        yield f"| {found.case.title} | {found.case.kind} | {shown} | {step} | {reason} |"
    yield f"\n{named} of {len(cases)} planted causes named\n"


def healthy_table(cases: Sequence[Case]) -> Iterator[str]:
    """Yield the lines of the table of healthy runs."""
    yield "| run | stage | measure | first | last | alarms |"
    yield "|---|---|---|---|---|---|"
    alarms = 0
    for found in outcomes(cases):
        alarms += bool(found.alarms or found.error)
        told = "; ".join(f"{name}: {reason}" for _, name, reason in found.alarms) or found.error
        numbers = f"{found.before:.3g} | {found.after:.3g}"
        case = found.case
        yield f"| {case.title} | {case.kind} | {case.measure} | {numbers} | {told or 'none'} |"
    yield f"\n{alarms} of {len(cases)} healthy runs with an alarm\n"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument("--short", action="store_true", help="only the cases of the tests")
    args = parser.parse_args()
    torch.set_num_threads(1)
    distributed.init_process_group()
    setup_logging(1)
    for cases, table in ((CAUSES, cause_table), (HEALTHY, healthy_table)):
        chosen = [case for case in cases if args.only in case.name]
        chosen = [case for case in chosen if not args.short or case.name in SHORT]
        for line in table(chosen):
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
    distributed.end_process(0)


if __name__ == "__main__":
    main()
