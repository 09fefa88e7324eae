"""Stages train to the same bytes from stores as from rows that are made in memory."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import stage_runs as runs

WORDS = ["red", "blue", "small", "old", "round", "green", "quick", "slow", "warm", "cold"]


def question(i: int) -> str:
    return f"{i}: {' '.join(WORDS[(i * k) % 10] for k in range(1, 4 + i % 5))}?"


def row(kind: str, i: int) -> dict[str, Any]:
    asked = [{"role": "user", "content": question(i)}]
    good, bad = ([{"role": "assistant", "content": f"{word} {i}"}] for word in ("yes", "no"))
    if kind == "grpo":
        return {"prompt": asked, **({"topic": i} if i % 2 else {})}
    if kind == "dpo":
        return {"prompt": asked, "chosen": good, "rejected": bad}
    if kind == "kto":
        return {"prompt": asked, "completion": good if i % 2 else bad, "label": i % 2 == 1}
    if kind == "classify":
        return {"text": question(i), "label": WORDS[i % 3]}
    if kind == "reward":
        steps = [{"text": f"step {word}.", "label": i % 2 == 0} for word in WORDS[: 1 + i % 3]]
        return {"prompt": question(i), "steps": steps}
    weight = {"weight": 0.5} if i % 4 == 0 else {}
    return {"messages": [*asked, *good], **weight, "id": i}


MORE = """\
  classify:
    kind: classify
    init: base
    data: [{path: rows.jsonl}]
    steps: 3
    batch_size: 8
    micro_tokens: 256
    optim: {learning_rate: 1.0e-3}
  kto:
    kind: kto
    init: base
    data: [{world: preference, rows: 32, split: train}]
    steps: 3
    batch_size: 8
    micro_tokens: 256
    optim: {learning_rate: 1.0e-3}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    path = runs.write_recipe(folder)
    path.write_text(path.read_text(encoding="utf-8") + MORE, encoding="utf-8")
    runs.finish(path, "base", folder / "run")
    return path


def settings(kind: str, folder: Path) -> list[str]:
    folder.mkdir(exist_ok=True)
    path = folder / f"{kind}.jsonl"
    rows = [row(kind, i) for i in range(90)]
    rows[40] = row(kind, 40) | ({"id": "x" * 9} if kind == "sft" else {})
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    if kind == "grpo":
        return [f"stages.grpo.prompts=[{{path: {path}}}]", "stages.grpo.steps=2"]
    more = {"dpo": ", rows: 12", "kto": f", map: '{folder}/own.py:same'"}.get(kind, "")
    (folder / "own.py").write_text("def same(row): return row\n", encoding="utf-8")
    source = f"path: {path}, heldout_frac: 0.2{more}"
    sides = [f"{{{source}, split: {side}}}" for side in ("train", "heldout")]
    found = [f"stages.{kind}.data=[{sides[0]}]", f"stages.{kind}.heldout=[{sides[1]}]"]
    if kind == "reward":
        found += ["stages.reward.supervision=steps", "stages.reward.norm_prompts=64"]
    return [*found, f"stages.{kind}.steps=4", f"stages.{kind}.eval_every=2"]


def results(run_dir: Path, kind: str) -> list[Any]:
    found = runs.manifest(run_dir, kind)
    card = json.loads((run_dir / kind / "preflight.json").read_text(encoding="utf-8"))
    checked = [line for line in card["lines"] if line["name"] != "disk"]
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in checked]
    for line in lines:  # the speed of a reward is measured
        line["value"] = re.sub(r"[\d,]+ responses/s", "", line["value"])
    parts = [found["data"], found.get("contamination"), lines]
    return [runs.numbers(run_dir, kind), runs.weights(run_dir, kind), *parts]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        ("sft", 2),
        ("dpo", 1),
        ("grpo", 1),
        ("kto", 1),
        *(pytest.param(kind, 1, marks=pytest.mark.long) for kind in ("sft", "reward", "classify")),
    ],
)
def test_a_stage_trains_to_the_same_bytes(
    kind: str, ranks: int, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    options: dict[str, Any] = {"overrides": settings(kind, tmp_path / "data"), "ranks": ranks}
    options["overrides"].append(f"stages.{kind}.ranks={ranks}")
    found: list[Any] = []
    built: list[dict[Path, int]] = []
    for mib in ("32", "0", "0"):  # in memory, while the store is built, and from it
        run_dir = tmp_path / f"run{len(found)}"
        run_dir.mkdir()
        (run_dir / "base").symlink_to(recipe.parent / "run" / "base")
        monkeypatch.setenv("ALIGN_CACHE_FROM_MIB", mib)
        runs.finish(recipe, kind, run_dir, **options)
        found.append(results(run_dir, kind))
        built.append({path: path.stat().st_ino for path in (tmp_path / "cache").glob("*/ids")})
    assert found[0] == found[1] == found[2]
    # Training and held-out rows, or prompts: each once for all ranks and both starts.
    assert not built[0]
    assert len(built[1]) == (1 if kind == "grpo" else 2)
    assert built[1] == built[2]
