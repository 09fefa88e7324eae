"""Show over-optimization and what the guard does: ``python -m benchmarks.overoptimize``.

For each seed a weak reward model is trained, PPO runs with the guard of recipes/overoptimize.yaml,
and once more without it to the end. Writes results/overoptimize.json and the picture beside it.
"""

import argparse
import datetime
import json
import logging
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.online import guard
from align.pipeline.processes import stage_argv, stage_env
from align.report.charts import STANDALONE, Series, picture

log = logging.getLogger("benchmarks")
ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "overoptimize.yaml"
RESULTS = Path(__file__).parent / "results"
NO_GUARD = "stages.ppo.watch.guard.stop_on=[]"


def main() -> None:
    """Parse the command line, run what is missing, write numbers and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/overoptimize-seeds"))
    parser.add_argument("--sft", type=Path, help="folder of an sft stage; default: made first")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    sft = args.sft or make_sft(args.runs, args.threads)
    found = {str(seed): run_seed(seed, args.runs, sft, args.threads) for seed in args.seeds}
    result = {"date": datetime.date.today().isoformat(), "seeds": found}
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=1) + "\n"
    (RESULTS / "overoptimize.json").write_text(text, encoding="utf-8")
    for seed, entry in found.items():
        svg = draw(entry, f"seed {seed}: proxy and gold over the square root of the KL")
        (RESULTS / f"overoptimize-{seed}.svg").write_text(svg + "\n", encoding="utf-8")
        log.info("seed %s: %s", seed, {k: v for k, v in entry.items() if k != "full"})


def make_sft(runs: Path, threads: int) -> Path:
    """Build and instruct the policy that all seeds start from."""
    for stage in ("base", "sft"):
        launch(stage, stage, runs / "start", [], threads)
    return runs / "start" / "sft"


def launch(stage: str, kind: str, run_dir: Path, overrides: Sequence[str], threads: int) -> None:
    """Run a stage of the recipe unless it is done."""
    if (run_dir / stage / "manifest.json").is_file():
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    words = [kind, "--recipe", str(RECIPE), "--stage", stage, "--run-dir", str(run_dir)]
    words += [word for text in overrides for word in ("--set", text)]
    argv = stage_argv(words, ranks=1, on_gpu=False)
    env = stage_env(ranks=1, threads=threads, on_gpu=False)
    with (run_dir / f"{stage}.log").open("wb") as out:
        code = subprocess.run(argv, env=env, stdout=out, stderr=out, check=False).returncode
    if code != 0:
        raise SystemExit(f"{stage} in {run_dir} ended with {code}; see {run_dir / stage}.log")


def run_seed(seed: int, runs: Path, sft: Path, threads: int) -> dict[str, Any]:
    """Train the weak reward model, then PPO with the guard and without it."""
    guarded, full = runs / f"seed-{seed}", runs / f"seed-{seed}-full"
    sft = sft.resolve()
    own = [f"stages.reward.init={sft}", f"stages.reward.seed={seed}"]
    launch("reward", "reward", guarded, own, threads)
    reward = (guarded / "reward").resolve()
    own = [
        f"stages.ppo.init={sft}",
        f"stages.ppo.seed={seed}",
        f"stages.ppo.rewards=[{{kind: scalar, model: {reward}}}]",
        f"stages.ppo.critic.init={reward}",
    ]
    launch("ppo", "ppo", guarded, own, threads)
    launch("ppo", "ppo", full, [*own, NO_GUARD], threads)
    manifest = json.loads((guarded / "ppo" / "manifest.json").read_text(encoding="utf-8"))
    return summary(points(full), points(guarded), manifest)


def points(run_dir: Path) -> list[dict[str, Any]]:
    """Read the evaluations of a run: step, KL, and [value, low, high] of proxy and gold."""
    lines = (run_dir / "ppo" / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    found = []
    for line in map(json.loads, lines):
        record = {"step": line["step"], "kl": line["kl"]}
        found.append(record | {name: line["intervals"][name] for name in ("proxy", "gold")})
    return found


def summary(
    full: list[dict[str, Any]], guarded: list[dict[str, Any]], manifest: dict[str, Any]
) -> dict[str, Any]:
    """Return where gold was highest, where the guard stopped, and how much would have been lost."""
    top = max(full, key=lambda point: (point["gold"][0], -point["step"]))
    watch = manifest["watch"]
    kept = next(point for point in guarded if point["step"] == watch["best_step"])
    return {
        "start_gold": full[0]["gold"],
        "top_step": top["step"],
        "top_gold": top["gold"],
        "end_gold": full[-1]["gold"],
        "end_proxy_gain": full[-1]["proxy"][0] - full[0]["proxy"][0],
        "stopped_by": watch.get("alarm"),
        "stop_step": watch["last_step"],
        "kept_step": watch["best_step"],
        "kept_gold": kept["gold"],
        "seconds_guarded": manifest["seconds"],
        "same_until_the_stop": guarded == full[: len(guarded)],
        "fit": {name: fitted(full, name) for name in ("proxy", "gold")},
        "full": full,
    }


def fitted(full: Sequence[dict[str, Any]], name: str) -> dict[str, float | None]:
    """Fit R(d) = d (alpha - beta log d) to the mean gains (arXiv:2210.10760 eq. 1)."""
    gains = np.array([[point[name][0] - full[0][name][0]] for point in full])
    fit = guard.fit_curve([point["kl"] for point in full], gains)
    assert fit is not None
    return {"alpha": fit.alpha.value, "beta": fit.beta.value, "top_kl": fit.top_kl}


def draw(entry: dict[str, Any], title: str) -> str:
    """Draw proxy (blue) and gold (red) as gains over the start, their fits, and the stop."""
    full = [point for point in entry["full"] if point["kl"] > 0.0 or point["step"] == 0]
    series = []
    for colour, name in ((1, "proxy"), (2, "gold")):
        start = entry["full"][0][name][0]
        places = [(math.sqrt(max(p["kl"], 0.0)), p[name][0] - start) for p in full]
        bounds = [(p[name][1] - start, p[name][2] - start) for p in full]
        series.append(Series(name, places, bounds, style="points", colour=colour))
        fit, end = entry["fit"][name], max(x for x, _ in places)
        curve = [d * end / 60 for d in range(1, 61)]
        values = [d * (fit["alpha"] - fit["beta"] * math.log(d)) for d in curve]
        line = list(zip(curve, values, strict=True))
        series.append(Series("", line, style="dashed", colour=colour))
    kls = {point["step"]: point["kl"] for point in full}
    values = [y for s in series for _, y in s.points]
    for step in (entry["kept_step"], entry["stop_step"]):
        x = math.sqrt(kls[step])
        upright = [(x, min(values)), (x, max(values))]
        series.append(Series("", upright, style="dashed", colour=3))
    labels = {"x_label": "square root of the KL (nats per answer)", "y_label": "score gained"}
    return picture(title, series, style=STANDALONE, **labels)


if __name__ == "__main__":
    main()
