"""Measure what EWC, replay, interpolation and gradual unfreezing keep, over several seeds.

    python benchmarks/keeping.py [--seeds 5] [--first-seed 0] [--only NAME ...] [--runs D] [--out F]
    python benchmarks/keeping.py --data             # write recipes/facts/ again
    make keeping

Runs recipes/ewc.yaml, wiseft.yaml and unfreeze.yaml from the seeds 0, 1 ...: the model, the order
of its rows and what it samples differ, the facts are the same. All stages run in this process, one
after the other, exactly as ``align run`` runs them in processes of their own; stages that two
recipes share are copied. Differences are paired by seed; their intervals are Student's over the
seeds. A score is the share of prompts answered exactly.
"""

import argparse
import json
import os
import random
import shutil
import sys
import time
from argparse import Namespace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from scipy.stats import t as student

from align.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[1]
FACTS = ROOT / "recipes" / "facts"
RESULTS = ROOT / "benchmarks" / "results" / "keeping.json"
ANIMALS = """
cat dog fox cow pig hen bee ant owl bat rat elk eel cod ape asp boar calf crab crow deer dove duck
fawn fish flea frog goat gull hare hawk ibis kite lamb lion lynx mink mole moth mule newt orca puma
seal slug swan toad tuna vole wasp wolf worm wren yak bear bull carp clam colt stag
"""
COLORS = "red blue green pink white black brown gold grey teal plum rust sand snow rose lime"
FORMS = ("{animal} colour is", "say the colour of {animal}:", "what colour has {animal}?")
ARMS = {
    "ewc": (("ewc", "plain"), ("replay", "plain")),
    "wiseft": (("merge", "tuned"),),
    "unfreeze": (("gradual", "full"), ("slower", "full")),
}
"""Pairs of models that are compared in each recipe: (with, without)."""


def write_facts() -> None:
    """Write the colors of 30 old and 30 new animals, asked in three forms, and a corpus."""
    dice, animals, colors = random.Random(0), ANIMALS.split(), COLORS.split()
    FACTS.mkdir(exist_ok=True)
    colour = {animal: dice.choice(colors) for animal in animals}
    for name, asked in (("old", animals[:30]), ("new", animals[30:])):
        for form, words in zip("abc", FORMS, strict=True):
            rows = [
                {
                    "prompt": words.format(animal=a),
                    "completion": f" {colour[a]}",
                    "answer": colour[a],
                }
                for a in asked
            ]
            _write(f"{name}_{form}", rows)
    lines = [
        f"{dice.choice(FORMS).format(animal=dice.choice(animals))} {dice.choice(colors)}"
        for _ in range(800)
    ]
    _write("corpus", [{"text": line} for line in lines])


def _write(name: str, rows: list[dict[str, str]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (FACTS / f"{name}.jsonl").write_text(text, encoding="utf-8")


def run_recipe(name: str, seed: int, runs: Path) -> dict[str, dict[str, float]]:
    """Run all stages of a recipe; give {model: {what the evaluation is named after: score}}."""
    from align.stages.base import run_stage

    path, run_dir = ROOT / "recipes" / f"{name}.yaml", runs / f"{name}-{seed}"
    recipe = load_recipe(path, [f"seed={seed}"])
    for stage, spec in recipe.stages.items():
        if stage in ("base", "old"):
            _copy_twin(runs, run_dir, stage, seed)
        arguments = Namespace(
            recipe=path,
            resolved=None,
            stage=stage,
            runs=runs,
            run_dir=run_dir,
            overrides=[f"seed={seed}"],
            force=False,
        )
        code = run_stage(spec.kind, arguments)
        assert code == 0, (stage, code)
    found: dict[str, dict[str, float]] = {}
    for stage in (s for s in recipe.stages if s.startswith("evaluate_")):
        summary = json.loads((run_dir / stage / "summary.json").read_text())
        for model, block in summary["tasks"]["heldout"]["models"].items():
            found.setdefault(model, {})[stage.removeprefix("evaluate_")] = block["exact_match"][0]
    if "merge" in recipe.stages:
        manifest = json.loads((run_dir / "merge" / "manifest.json").read_text())
        found["merge"]["alpha"] = manifest["alpha"]
    return found


def _copy_twin(runs: Path, run_dir: Path, stage: str, seed: int) -> None:
    """Copy a stage that another recipe has run from this seed; what differs would be refused."""
    for other in runs.glob(f"*-{seed}"):
        if (other / stage / "manifest.json").is_file() and not (run_dir / stage).exists():
            shutil.copytree(other / stage, run_dir / stage)


def interval(values: list[float]) -> list[float]:
    """Return [mean, low, high] at 95 % over the seeds."""
    middle = mean(values)
    half = student.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return [round(x, 4) for x in (middle, middle - half, middle + half)]


def summarize(name: str, seeds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return the mean scores of each model and the paired differences."""
    scores = {
        model: {key: interval([s[model][key] for s in seeds]) for key in seeds[0][model]}
        for model in seeds[0]
    }
    differences = {
        f"{a}-{b}": {
            task: interval([s[a][task] - s[b][task] for s in seeds])
            for task in seeds[0][a]
            if task in seeds[0][b]
        }
        for a, b in ARMS[name]
    }
    return {"scores": scores, "differences": differences, "seeds": seeds}


def main() -> None:
    """Run, print a table, write the results."""
    parser = argparse.ArgumentParser(description="Measure what is kept.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "keeping")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--data", action="store_true", help="write recipes/facts/ and end")
    args = parser.parse_args()
    if args.data:
        write_facts()
        return
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    for name in args.only:
        began = time.process_time()
        seeds = []
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            seeds.append(run_recipe(name, seed, args.runs))
            sys.stdout.write(f"{name} seed {seed}: {json.dumps(seeds[-1])}\n")
            sys.stdout.flush()
        results[name] = summarize(name, seeds) | {"cpu_s": round(time.process_time() - began, 1)}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        for pair, rows in results[name]["differences"].items():
            for task, (value, low, high) in rows.items():
                sys.stdout.write(f"{name}: {pair} {task} {value:+.3f} [{low:+.3f}, {high:+.3f}]\n")


if __name__ == "__main__":
    main()
