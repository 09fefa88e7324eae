"""Run a recipe with several seeds in both CPU modes and count how often its expectations hold.

    python -m benchmarks.seeds recipes/quickstart.yaml [--seeds 0-9] [--modes native avx2]
    python -m benchmarks.seeds recipes/quickstart.yaml --table      # print the table again

The mode avx2 limits torch and oneDNN to the instructions that every x86 server has; the sums are
then added in another order, so it stands for another machine. Every run adds one line to
``benchmarks/results/seeds-NAME.jsonl`` (NAME is the recipe's own) as soon as it ends; a second call
leaves out what is there. A run's folder is deleted once its numbers are kept. ``--runs DIR`` keeps
all of them, and a call that was interrupted continues the run that it finds in DIR/MODE/seedN.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from align.recipe.load import load_recipe

RESULTS = Path(__file__).parent / "results"
MODES = {
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}
Line = dict[str, Any]


def run(recipe: Path, seed: int, mode: str, folder: Path) -> Line:
    """Return the numbers of one run of the recipe; finished stages in ``folder`` are kept."""
    command = [sys.executable, "-m", "align", "run", str(recipe)]
    command += ["--set", f"seed={seed}", "--runs", str(folder)]
    log = folder.with_suffix(".log")
    with log.open("a") as out:
        code = subprocess.run(
            command, env=os.environ | MODES[mode], stdout=out, stderr=subprocess.STDOUT
        ).returncode
    summaries = list(folder.glob("*/summary.json"))
    if len(summaries) != 1 or code not in (0, 1):  # 1: an expectation does not hold
        raise SystemExit(f"seed {seed}, {mode}: exit code {code}; see {log}")
    summary = json.loads(summaries[0].read_text())
    return {
        "seed": seed,
        "mode": mode,
        "exit": code,
        "expectations": {
            one["key"]: [one["value"], one["holds"]] for one in summary["expectations"]
        },
        "models": _models(summary),
        "minutes": round(summary["seconds"] / 60, 1),
        "stages": {
            name: [round(one["seconds"] / 60, 1), one["peak_rss_gib"]]
            for name, one in summary["stages"].items()
        },
        "cpu": _cpu(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "date": time.strftime("%Y-%m-%d"),
    }


def _models(summary: dict) -> dict[str, dict[str, float]]:
    """Return {model: {score: its value}}: of reward models, and of each task's policies.

    Where there are several tasks, the name of each stands before its scores.
    """
    found = {
        name: {key: value[0] for key, value in card.items() if _interval(value)}
        for name, card in summary.get("reward_models", {}).items()
    }
    for task, result in summary["tasks"].items():
        prefix = f"{task}/" if len(summary["tasks"]) > 1 else ""
        for model, scores in result["models"].items():
            found.setdefault(model, {}).update(
                {prefix + name: value[0] for name, value in scores.items() if _interval(value)}
            )
    return found


def _interval(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(v, int | float) for v in value)
    )


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(": ", 1)[1]
    return platform.processor()


def _git(*words: str) -> str:
    here = Path(__file__).parent
    return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True).stdout.strip()


def table(lines: Sequence[Line]) -> str:
    """Return a Markdown table: median [lowest, highest] over the seeds, one column a mode."""
    modes = [mode for mode in MODES if any(line["mode"] == mode for line in lines)]
    of = {mode: [line for line in lines if line["mode"] == mode] for mode in modes}
    out = ["| number | " + " | ".join(f"{m} ({len(of[m])} seeds)" for m in modes) + " |"]
    out.append("|---" * (len(modes) + 1) + "|")
    for model, scores in lines[0]["models"].items():
        for score in scores:
            cells = (_spread(line["models"][model][score] for line in of[m]) for m in modes)
            out.append(f"| {model} {score} | " + " | ".join(cells) + " |")
    out += ["", "| expectation | " + " | ".join(modes) + " |", "|---" * (len(modes) + 1) + "|"]
    for key in lines[0]["expectations"]:
        cells = (_held([line["expectations"][key] for line in of[m]]) for m in modes)
        out.append(f"| {key} | " + " | ".join(cells) + " |")
    cells = (f"{sum(line['exit'] == 0 for line in of[m])} of {len(of[m])}" for m in modes)
    out.append("| all of them (runs with exit code 0) | " + " | ".join(cells) + " |")
    return "\n".join(out)


def _spread(values: Iterable[float]) -> str:
    known = list(values)
    return f"{median(known):.3g} [{min(known):.3g}, {max(known):.3g}]"


def _held(found: Sequence[tuple[float, bool]]) -> str:
    return f"{sum(held for _, held in found)} of {len(found)}: {_spread(v for v, _ in found)}"


def _seeds(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=_seeds, default=_seeds("0-9"), help="such as 0-9")
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=list(MODES))
    parser.add_argument("--runs", type=Path, help="keep the runs in this folder")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    kept = RESULTS / f"seeds-{load_recipe(args.recipe, ()).name}.jsonl"
    lines = [json.loads(text) for text in kept.read_text().splitlines()] if kept.exists() else []
    done = {(line["seed"], line["mode"]) for line in lines}
    for seed in [] if args.table else args.seeds:
        for mode in args.modes:
            if (seed, mode) in done:
                continue
            root = args.runs or Path(tempfile.mkdtemp(prefix="align-seeds-"))
            folder = root / mode / f"seed{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            lines.append(run(args.recipe, seed, mode, folder))
            with kept.open("a") as out:
                out.write(json.dumps(lines[-1]) + "\n")
            sys.stderr.write(f"seed {seed}, {mode}: exit {lines[-1]['exit']}\n")
            if not args.runs:
                shutil.rmtree(root)
    sys.stdout.write(table(lines) + "\n")


if __name__ == "__main__":
    main()
