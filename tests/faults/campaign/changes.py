"""What a stage was made from changes: between kill and resume, after its end, while it reads."""

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.faults.campaign import clean, recipe
from tests.faults.campaign.align_run import run_stage
from tests.faults.campaign.damage import interrupt
from tests.faults.campaign.ledger import Failed, Fault, Place, no_traceback, refused

Change = Callable[[Path], None]
DATA = {
    **{"sft": "messages", "kto": "unpaired", "reward": "pairs", "dpo": "pairs"},
    **{"classify": "classes", "trl": "unpaired", "ppo": "prompts", "grpo": "prompts"},
    **{"self_instruct": "messages", "base": "texts", "curate": "messages", "weak_label": "pairs"},
}
INTERRUPTED = ("sft", "kto", "reward", "classify", "trl", "ppo", "self_instruct")
FINISHED = ("base", "sft", "dpo", "classify", "trl", "grpo", "curate", "weak_label")


def faults(*, quick: bool) -> Iterator[Fault]:
    """Yield every change."""
    if quick:
        yield Fault("changed between kill and resume", "sft row", partial(_resumed, "sft", "row"))
        return
    for stage in INTERRUPTED:
        for name in CHANGES:
            inject = partial(_resumed, stage, name)
            yield Fault("changed between kill and resume", f"{stage} {name}", inject)
        for name in HARMLESS:
            inject = partial(_harmless, stage, name)
            yield Fault("changed without effect", f"{stage} {name}", inject)
    for stage in FINISHED:
        for name in CHANGES:
            inject = partial(_finished, stage, name)
            yield Fault("changed after the end", f"{stage} {name}", inject)


def _data(stage: str) -> Path:
    return Path("data") / f"{DATA[stage]}.jsonl"


def _row(folder: Path, stage: str) -> None:
    path = folder / _data(stage)
    times = path.stat()
    text = path.read_text()
    path.write_text(text.replace("red", "hot", 1) if "red" in text else text.swapcase())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))


def _more(folder: Path, stage: str) -> None:
    path = folder / _data(stage)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[0].replace("item 0", "item 99")]))


def _fewer(folder: Path, stage: str) -> None:
    path = folder / _data(stage)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def _order(folder: Path, stage: str) -> None:
    path = folder / _data(stage)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[::-1]))


def _gone(folder: Path, stage: str) -> None:
    (folder / _data(stage)).unlink()


def _replace(folder: Path, stage: str, old: str, new: str) -> None:
    path = folder / "recipe.yaml"
    head, mark, rest = path.read_text().partition(f"\n  {stage}:\n")
    assert old in rest, (stage, old)
    path.write_text(head + mark + rest.replace(old, new, 1))


def _settings(folder: Path, stage: str) -> None:
    changed = {"curate": ("max: 12", "max: 11"), "weak_label": ("target: 4", "target: 5")}
    changed |= {"self_instruct": ("target: 500", "target: 499")}
    old, new = changed.get(stage, ("learning_rate: ", "weight_decay: 0.02, learning_rate: "))
    _replace(folder, stage, old, new)


def _seed(folder: Path, _stage: str) -> None:
    path = folder / "recipe.yaml"
    path.write_text(path.read_text().replace("seed: 3", "seed: 4", 1))


def _rate(folder: Path, stage: str) -> None:
    old = {"base": "3.0e-3", "curate": "0.2", "weak_label": "limit: 14", "self_instruct": "24"}
    new = {"base": "2.0e-3", "curate": "0.3", "weak_label": "limit: 15", "self_instruct": "23"}
    _replace(folder, stage, old.get(stage, "1.0e-3"), new.get(stage, "2.0e-3"))


CHANGES: dict[str, Callable[[Path, str], None]] = {
    "row": _row,
    "one row more": _more,
    "one row fewer": _fewer,
    "order": _order,
    "file gone": _gone,
    "settings": _settings,
    "rate": _rate,
    "seed": _seed,
}


def _touch(folder: Path, stage: str) -> None:
    os.utime(folder / _data(stage))


def _copied(folder: Path, stage: str) -> None:
    path = folder / _data(stage)
    copy = path.with_suffix(".copy")
    shutil.copyfile(path, copy)
    copy.replace(path)


def _comment(folder: Path, _stage: str) -> None:
    path = folder / "recipe.yaml"
    path.write_text("# a word on it\n" + path.read_text())


def _other_stage(folder: Path, stage: str) -> None:
    other = "dpo" if stage != "dpo" else "sft"
    _replace(folder, other, "steps: 6", "steps: 5")


HARMLESS = {
    "touched": _touch,
    "written anew": _copied,
    "comment": _comment,
    "another stage": _other_stage,
}


def _resumed(stage: str, name: str, place: Place) -> None:
    """Change something after the kill: refused by name, and undone it goes on to the same bytes."""
    interrupt(place, stage)
    before = place.folder.with_name(place.folder.name + ".before")
    shutil.copytree(place.folder, before)
    try:
        CHANGES[name](place.folder, stage)
        code, said = run_stage(place.folder, stage)
        refused(code, said, names=stage)
        shutil.rmtree(place.folder)
        before.rename(place.folder)
    finally:
        shutil.rmtree(before, ignore_errors=True)
    _goes_on(place, stage)


def _goes_on(place: Place, stage: str) -> None:
    code, said = run_stage(place.folder, stage)
    if code != 0:
        raise Failed(f"undone, it ended with {code}: {said[-900:]}")
    no_traceback(said)
    clean.same(place.clean, place.folder, stage)


def _harmless(stage: str, name: str, place: Place) -> None:
    """Change something that no stage reads: it goes on to the same bytes."""
    interrupt(place, stage)
    HARMLESS[name](place.folder, stage)
    _goes_on(place, stage)


def _finished(stage: str, name: str, place: Place) -> None:
    """Change something after the end: the stage is not 'done', and its files stay as they are."""
    inputs = dict.fromkeys([*recipe.inputs_of(stage), stage])
    recipe.copy_workplace(place.clean, place.folder, list(inputs))
    CHANGES[name](place.folder, stage)
    code, said = run_stage(place.folder, stage)
    refused(code, said, names=stage)
    clean.same(place.clean, place.folder, stage)
