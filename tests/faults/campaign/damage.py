"""Damaged files: of an interrupted stage, of a finished one, and of the run's folder."""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.faults.campaign import clean, damages, hooks, recipe
from tests.faults.campaign.align_run import align, run_stage
from tests.faults.campaign.kills import begin, prepare
from tests.faults.campaign.ledger import Failed, Fault, Place, Unclear, no_traceback, refused

INTERRUPTED = ("sft", "ppo", "trl", "self_instruct", "sft_z2")
FINISHED = ("base", "sft", "reward", "curate", "trl")
LAST = {"ppo": "step-00000004.tmp", "trl": "checkpoint-6", "self_instruct": "step-00000003.tmp"}
"""The checkpoint at which a stage is interrupted, where it is not that of step 6."""
READERS = {"base": "dpo", "sft": "merge"}
"""A stage that reads the artifact of another one."""
COMMANDS = ("run", "show", "verify", "report", "read")
LOGS = ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl", "ledger.jsonl")


def faults(*, quick: bool) -> Iterator[Fault]:
    """Yield every damage."""
    for stage in ("sft",) if quick else INTERRUPTED:
        for name in ("flip", "delete") if quick else damages.DAMAGES:
            for i in range(1):
                inject = partial(_interrupted, stage, name)
                yield Fault("a damaged file of an interrupted stage", f"{stage} {name} {i}", inject)
    for stage in ("sft",) if quick else FINISHED:
        for name in ("cut",) if quick else damages.DAMAGES:
            inject = partial(_finished, stage, name)
            yield Fault("a damaged file of a finished stage", f"{stage} {name}", inject, 1.5)
    for name in () if quick else damages.DAMAGES:
        for file in ("timings.json", "summary.json", ".lock", "report.html"):
            inject = partial(_run_file, file, name)
            yield Fault("a damaged file of the run's folder", f"{file} {name}", inject)


def interrupt(place: Place, stage: str) -> Path:
    """Kill a stage as it saves its last checkpoint; return its folder."""
    prepare(place, stage)
    run = begin(place, stage, hook=partial(hooks.kill_at_path, LAST.get(stage, "00000006.tmp")))
    codes = run.wait()
    run.log.unlink()
    if not any(codes):
        raise Failed(f"the stage was to be interrupted, but ended with {codes}")
    return place.folder / recipe.RUN / stage


def _interrupted(stage: str, name: str, place: Place) -> None:
    """Damage one file; the stage goes on from what is whole, or refuses it in one line."""
    folder = interrupt(place, stage)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "log.txt")
    path = place.rng.choice(files)
    damages.damage(name, path, place.rng)
    shown = path.relative_to(place.folder)
    run = begin(place, stage)
    codes, said = run.wait(), run.said()
    run.log.unlink()
    no_traceback(said)
    if any(codes):
        in_the_way = codes[0] == 1 and "found a folder in the place of a file" in said
        if set(codes) != {2} and not in_the_way:
            raise Failed(f"{name} of {shown}: exit codes {codes}: {said[-600:]}")
        return
    try:
        clean.same(place.clean, place.folder, stage, metrics=path.name not in LOGS)
    except Failed as e:
        if path.name not in LOGS or not str(e).startswith("other bytes in " + path.name):
            raise Failed(f"{name} of {shown}: {e}") from e


def _finished(stage: str, name: str, place: Place) -> None:
    """Damage one file of a finished stage, then give every command a look at it."""
    inputs = dict.fromkeys([*recipe.inputs_of(stage), stage])
    recipe.copy_workplace(place.clean, place.folder, list(inputs))
    folder = place.folder / recipe.RUN / stage
    manifest = json.loads((folder / "manifest.json").read_text())
    files = sorted(
        p for p in folder.rglob("*") if p.is_file() and "checkpoints" not in p.parts[-4:]
    )
    path = place.rng.choice(files)
    kept = path.relative_to(folder).as_posix() in [*manifest["files"], "manifest.json"]
    damages.damage(name, path, place.rng)
    shown = path.relative_to(place.folder).as_posix()
    # Without a manifest the stage is not finished, and `run` does it again.
    gone = not (folder / "manifest.json").exists()
    for command in COMMANDS:
        try:
            _look(command, place, stage, kept=kept, gone=gone)
        except (Failed, Unclear) as e:
            raise type(e)(f"{command} after {name} of {shown}: {e}") from e


def _look(command: str, place: Place, stage: str, *, kept: bool, gone: bool) -> None:
    if command == "read":
        if stage not in READERS:
            return
        if stage == "sft" and not (place.folder / recipe.RUN / "base").exists():
            return
        code, said = run_stage(place.folder, READERS[stage])
    elif command == "run":
        code, said = run_stage(place.folder, stage)
        if gone and code == 0:
            shutil.rmtree(place.folder / recipe.RUN / stage / "checkpoints", ignore_errors=True)
            clean.same(place.clean, place.folder, stage)
            return
    elif command == "show":
        code, said = align(place.folder, "show", "recipe.yaml", "--runs", ".")
    else:
        code, said = align(place.folder, command, recipe.RUN)
    no_traceback(said)
    must_refuse = kept and not gone and command in ("run", "verify", "read")
    if must_refuse and code == 0 and (place.folder / recipe.RUN / stage).exists():
        raise Failed(f"accepted: {said[-400:]}")
    if code not in (0, 2):
        raise Failed(f"exit code {code}: {said[-600:]}")
    if code == 2:
        refused(code, said, names=stage)


def _run_file(file: str, name: str, place: Place) -> None:
    """Damage a file that `align run` keeps for itself: the run goes on without it."""
    recipe.copy_workplace(place.clean, place.folder, ["curate"])
    path = place.folder / recipe.RUN / file
    text = (place.folder / "recipe.yaml").read_text()
    curate = text[text.index("  curate:") : text.index("  weak_label:")]
    (place.folder / "recipe.yaml").write_text(text.partition("stages:")[0] + "stages:\n" + curate)
    if not path.exists():
        code, said = align(place.folder, "run", "recipe.yaml", "--runs", ".")
        if code != 0:
            raise Failed(f"exit code {code}: {said[-600:]}")
    if not path.exists():
        path.write_text('{"curate": 1.0}')
    damages.damage(name, path, place.rng)
    for words in (("run", "recipe.yaml", "--runs", "."), ("report", recipe.RUN)):
        code, said = align(place.folder, *words)
        no_traceback(said)
        if code not in (0, 2) and "found a folder in the place of a file" not in said:
            raise Failed(f"{words[0]}: exit code {code}: {said[-600:]}")
