"""From labels to better responses: a simulated annotator with known utilities labels over HTTP.

python -m benchmarks.labels_demo /tmp/demo --seeds 0 1 2

The quickstart's sft model answers 320 questions twice, and as many held-out ones. A simulated
annotator labels 200 of the pairs through the HTTP API of ``align serve``, whose button then trains
a reward model and dpo on the labels. The reward model ranks the held-out pairs; responses of dpo to
held-out questions are compared with those of sft, by the utilities.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from align.core.artifacts import read_json_object, read_manifest
from align.data.toy import ANSWER_PATTERN, POLITE_PATTERN
from align.serve.app import make_services
from align.serve.labels.quality import Rate
from align.serve.settings import Settings
from benchmarks.labels import ROOT, WAIT_S, Killable

RULES = [
    {"kind": "exact_match", "name": "correct", "pattern": ANSWER_PATTERN},
    {"kind": "format", "name": "polite", "pattern": POLITE_PATTERN},
]
UTILITY = 2.0
"""Utility of each rule that a response fulfills; the annotator prefers by Bradley-Terry (1952)."""
QUESTIONS, LABELS, STEPS = 320, 200, 40
TRAIN_WAIT_S = 7200

Known = Mapping[tuple[str, str], float]
"""Utility by prompt and response."""


@dataclass(frozen=True, slots=True)
class Found:
    """What came out.

    Attributes:
        answers: labels by their answer.
        accuracy: held-out pairs that the reward model ranks as the utilities do.
        models: measurements of sft and dpo, each with its 95 % interval; empty without dpo.
    """

    answers: Mapping[str, int]
    accuracy: Rate
    models: Mapping[str, Mapping[str, list[float]]]


# ---- stages


def sampling(split: str, rows: int, *, models: Sequence[str], samples: int) -> dict[str, Any]:
    """Return a stage that samples models and judges their responses by the utilities."""
    return {
        "kind": "evaluate",
        "models": list(models),
        "baseline": models[0],
        "prompts": [{"world": "prompts", "rows": rows, "split": split}],
        "samples": samples,
        "sampling": {"max_new_tokens": 32, "temperature": 1.0},
        "max_length": 128,
        "scores": RULES,
        "judge": [{**rule, "weight": UTILITY} for rule in RULES],
    }


def learning(project: str, model: Path) -> dict[str, Any]:
    """Return the stages that learn from labels, and the comparison with where they began."""
    more = {
        "init": "sft",
        "data": [{"labels": project}],
        "steps": STEPS,
        "batch_size": 32,
        "max_length": 128,
        "optim": {"learning_rate": 3e-4, "warmup_frac": 0.1},
    }
    return {
        "sft": {"kind": "base", "path": str(model)},
        "reward": {"kind": "reward", "heldout": [{"path": "heldout.jsonl"}], **more},
        "dpo": {"kind": "dpo", "beta": 0.3, "nll_coef": 1.0, **more},
        "evaluate": sampling("heldout", 400, models=["sft", "dpo"], samples=1),
    }


def write_recipe(path: Path, stages: Mapping[str, Any], *, seed: int = 0) -> None:
    """Write a recipe that is named as its file; JSON is YAML."""
    recipe = {"name": path.stem, "seed": seed, "stages": stages}
    path.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")


def align(folder: Path, *arguments: str) -> None:
    """Run a command of align in a folder."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "align", *arguments]
    subprocess.run(argv, cwd=folder, env=env, check=True, stdout=sys.stderr)


# ---- pairs


def read_samples(stage: Path) -> list[dict[str, Any]]:
    """Return the responses of a stage: prompt, completion and utility."""
    found = []
    for line in (stage / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = row["prompt"][-1]["content"]
        found.append({"prompt": prompt, "completion": row["completion"], "utility": row["judge"]})
    return found


def ranked(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return preferences between the two responses to a prompt, if their utilities differ."""
    both: dict[str, list[Mapping[str, Any]]] = {}
    for row in samples:
        both.setdefault(row["prompt"], []).append(row)
    found = []
    for prompt, rows in both.items():
        bad, good = sorted(rows, key=lambda row: row["utility"])
        if good["utility"] > bad["utility"]:
            pair = {"chosen": good["completion"], "rejected": bad["completion"]}
            found.append({"prompt": prompt, **pair})
    return found


# ---- labels


def label(client: httpx.Client, project: str, known: Known, *, count: int, seed: int) -> None:
    """Label as the simulated annotator does: a tie where the utilities are equal."""
    dice = random.Random(seed)
    for _ in range(count):
        task = client.post(f"/labels/{project}/next").raise_for_status().json()["task"]
        prompt = task["prompt"][-1]["content"]
        left, right = (known[prompt, turns[-1]["content"]] for turns in task["responses"])
        choice = "left" if dice.random() < 1 / (1 + math.exp(right - left)) else "right"
        body = {"choice": "tie" if left == right else choice, "seconds": 1.0}
        client.post(f"/labels/{project}/tasks/{task['id']}", json=body).raise_for_status()


def train(client: httpx.Client, project: str, recipe: str) -> None:
    """Press the button that exports and trains, and wait for the end of the run.

    Raises:
        RuntimeError: the run has failed, or has not ended in time.
    """
    client.post(f"/labels/{project}/train", data={"recipe": recipe}).raise_for_status()
    deadline = time.monotonic() + TRAIN_WAIT_S
    while True:
        page = client.get(f"/labels/{project}/training").text
        if '"state done"' in page:
            return
        if '"state failed"' in page or time.monotonic() > deadline:
            raise RuntimeError(page)
        time.sleep(0.5)


def label_and_train(
    folder: Path, source: Mapping[str, Any], known: Known, *, count: int, seed: int
) -> Found:
    """Label pairs through a server of a folder, and train its recipe ``learned.yaml`` on them.

    Args:
        folder: where the server runs; ``heldout.jsonl`` has pairs for the reward model.
        source: of the pairs; ``data`` and ``files`` of the form of a new project.
        known: utility of each response.
        count: labels to give.
        seed: of the annotator.
    """
    token = make_services(Settings(runs=folder / "runs")).auth.new_token("simulated")
    server = Killable(folder)
    server.start()
    project = "simulated"
    try:
        with httpx.Client(
            base_url=server.url,
            headers={"authorization": f"Bearer {token}"},
            timeout=WAIT_S,
            follow_redirects=True,
            transport=httpx.HTTPTransport(retries=12),  # until the server listens
        ) as client:
            form = {"name": project, **source.get("data", {})}
            client.post("/labels", data=form, files=source.get("files")).raise_for_status()
            label(client, project, known, count=count, seed=seed)
            train(client, project, "learned.yaml")
            votes = client.get(f"/labels/{project}/labels.jsonl").text.splitlines()
    finally:
        server.kill()
    answers = [json.loads(vote)["answer"] for vote in votes]
    run = folder / "runs/learned-1"
    accuracy = read_manifest(run / "reward")["metrics"]["eval/accuracy"]
    pairs = len((folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines())
    evaluated = read_json_object(run / "evaluate/summary.json")
    return Found(
        answers={name: answers.count(name) for name in sorted(set(answers))},
        accuracy=Rate(round(accuracy * pairs), pairs),
        models=evaluated["tasks"]["heldout"]["models"] if evaluated else {},
    )


def demonstrate(folder: Path, model: Path, *, seed: int) -> Found:
    """Sample pairs from a model, label them, train on the labels, and compare."""
    folder.mkdir(parents=True, exist_ok=True)
    stages = {
        "sft": {"kind": "base", "path": str(model)},
        "train": sampling("train", QUESTIONS, models=["sft"], samples=2),
        "heldout": sampling("heldout", QUESTIONS, models=["sft"], samples=2),
    }
    write_recipe(folder / "sampled.yaml", stages, seed=seed)
    align(folder, "run", "sampled.yaml")
    train_rows, heldout = (read_samples(folder / "runs/sampled" / s) for s in ("train", "heldout"))
    text = "".join(json.dumps(pair) + "\n" for pair in ranked(heldout))
    (folder / "heldout.jsonl").write_text(text, encoding="utf-8")
    write_recipe(folder / "learned.yaml", learning("simulated", model), seed=seed)
    known = {(row["prompt"], row["completion"]): row["utility"] for row in train_rows}
    source = {"data": {"first": "sampled/train:sft"}}
    return label_and_train(folder, source, known, count=LABELS, seed=seed)


def row_of(seed: int, found: Found) -> str:
    """Return a row of the table."""
    low, high = found.accuracy.interval()
    rate, worst, best = found.models["dpo"]["win_rate"]
    answers = ", ".join(f"{count} {answer}" for answer, count in found.answers.items())
    shares = [
        " to ".join(f"{found.models[model][rule][0]:.2f}" for model in ("sft", "dpo"))
        for rule in ("correct", "polite")
    ]
    cells = (
        str(seed),
        answers,
        f"{found.accuracy.value:.2f} [{low:.2f}, {high:.2f}] of {found.accuracy.trials}",
        f"{rate:.2f} [{worst:.2f}, {best:.2f}]",
        *shares,
    )
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    """Print one row for each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="runs and labels go there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    align(folder, "run", str(ROOT / "recipes/quickstart.yaml"), "--until", "sft")
    model = folder / "runs/quickstart/sft/model"
    sys.stdout.write(
        "| seed | labels | reward model: accuracy | dpo: win rate | correct | polite |\n"
        "|---|---|---|---|---|---|\n"
    )
    for seed in args.seeds:
        part = folder / f"seed{seed}"
        os.environ["ALIGN_LABELS"] = str(part / "labels")
        sys.stdout.write(row_of(seed, demonstrate(part, model, seed=seed)))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
