"""Every tuning method on two tasks: what it trains, costs, saves and gives; prints a table.

    ALIGN_REAL_DATA=... python -m benchmarks.methods [--runs DIR] [--tasks T ...] [--methods M ...]
    ALIGN_REAL_DATA=... python -m benchmarks.methods --table

Runs the sft stages of benchmarks/methods.yaml that are not done, each as a process of its own
(forked after the imports), then reads each artifact from disk in another fresh process: its
held-out loss must be the one that the training process measured in memory, and its greedy answers
to held-out prompts give the score. What qlora saves is two models, so both are read: ``adapter/``
on the 4-bit start must have the loss that training measured, and ``model/`` the one that the stage
measured on what it saved. ``--table`` prints what is there without running anything.
"""

import argparse
import json
import logging
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

from align.core.artifacts import Artifact, read_artifact
from align.data.load import load_examples
from align.evaluation.stats import share_interval
from align.models.loading import load_policy
from align.models.logprobs import LogprobModel
from align.recipe.load import load_recipe
from align.recipe.schema import DataSpec, Recipe, SftStage
from align.sampling.build import build_engine, choose_engine
from align.sampling.engine import EngineOptions
from align.stages.base import chat_format, main
from align.stages.offline import (
    LOSS_SAVED,
    offline_rows,  # noqa: F401  imported before the fork
)
from align.stages.sft import collate, length_of, sft_loss
from align.training.offline import OfflineTask, evaluate_rows
from align.tuning.loading import load_tuned_policy, quantization
from align.tuning.merging import merges
from align.tuning.wrap import keep_layout
from reward_models import build_reward

RECIPE = Path(__file__).with_suffix(".yaml")
NUM_PROMPTS = 150
TASKS: dict[str, dict[str, Any]] = {
    "world": {
        "prompts": {"world": "prompts", "rows": 300, "split": "heldout"},
        "reward": {"kind": "exact_match", "pattern": "answer is ([a-z0-9]+(?: [a-z0-9]+)*)"},
        "tokens": 32,
    },
    "persona": {"reward": {"kind": "exact_match", "column": "reference"}, "tokens": 8},
}
HEAD = (
    "| method | trained | % | tokens/s | peak GiB | held-out loss | score [95 %] | adapter KiB | "
    "merges | engine | reload |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def run_stage(name: str, kind: str, run_dir: Path) -> None:
    """Be the process of one stage; never returns."""
    words = [kind, "--recipe", str(RECIPE), "--stage", name, "--run-dir", str(run_dir)]
    sys.argv = [sys.argv[0], *words]
    main()


def apart(function: Any, *args: Any) -> None:
    """Run a function in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{function.__name__}{args}: exit code {process.exitcode}")


def measure(name: str, spec: SftStage, run_dir: Path) -> None:
    """Read an artifact from disk and write down what it says of held-out rows."""
    import torch

    torch.set_num_threads(1)
    artifact = read_artifact(run_dir / name, "policy")
    chat = chat_format(artifact.model_dir)
    task = TASKS[name.partition("_")[0]]
    prompts = (
        [DataSpec(**task["prompts"])]
        if "prompts" in task
        else [d.model_copy(update={"answers": None}) for d in spec.heldout]
    )
    model = load_tuned_policy(artifact.model_dir, dtype="float32")
    found: dict[str, Any] = {
        "loss": held_out_loss(model, spec, chat),
        "merges": merges(model),
        "engine": choose_engine("auto", artifact.model_dir)[0],
        "score": greedy_score(artifact, chat, prompts, task, spec.max_length),
    }
    if spec.tuning.method == "qlora":
        found["adapter_loss"] = held_out_loss(in_four_bits(spec, run_dir, name), spec, chat)
    (run_dir / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")


def held_out_loss(model: Any, spec: SftStage, chat: Any) -> float:
    """Return the mean negative log-likelihood per trained token, batched as in training."""
    rows = [chat.sft_row(e) for e in load_examples(spec.heldout, kind="sft", seed=0)]
    rows = [row for row in rows if len(row.input_ids) <= spec.max_length]
    task = OfflineTask([], rows, length_of, collate, sft_loss)
    return evaluate_rows(LogprobModel(model), task, spec.micro_tokens)["eval/loss"]


def in_four_bits(spec: SftStage, run_dir: Path, name: str) -> Any:
    """Put a saved adapter on the 4-bit start: the model that was trained, by peft's own loading."""
    import peft

    held = quantization(spec.tuning, spec.dtype)
    start = load_policy(run_dir / spec.init / "model", dtype=spec.dtype, quantization=held)
    keep_layout(start)
    return peft.PeftModel.from_pretrained(start, str(run_dir / name / "adapter"))


def greedy_score(
    artifact: Artifact, chat: Any, prompts: list[DataSpec], task: dict[str, Any], length: int
) -> list[float]:
    """Return the fraction of correct greedy responses with its 95 % interval."""
    examples = load_examples(prompts, kind="prompts", seed=0)
    rows = [chat.prompt_row(e) for e in examples]
    room = length - task["tokens"]
    rows = [row for row in rows if len(row.input_ids) <= room][:NUM_PROMPTS]
    engine = build_engine(
        "hf",
        EngineOptions(artifact.model_dir, max_model_len=length, stop_token_ids=chat.stop_token_ids),
    )
    groups = engine.generate(
        [row.input_ids for row in rows], n=1, max_new_tokens=task["tokens"], temperature=0.0
    )
    columns = {k: [row.columns[k] for row in rows] for k in rows[0].columns}
    scores = build_reward(task["reward"])(
        prompts=[row.prompt for row in rows], completions=[g[0].text for g in groups], **columns
    )
    interval = share_interval([s or 0.0 for s in scores])
    return [interval.value, interval.low, interval.high]


def starts(recipe: Recipe, name: str) -> list[str]:
    """Name the stages that a stage goes back to, the first one first."""
    before = recipe.inputs(name).get("init")
    return [] if before is None else [*starts(recipe, before), before]


def line(name: str, run_dir: Path) -> str:
    """Return a method's row of the table."""
    manifest = json.loads((run_dir / name / "manifest.json").read_text(encoding="utf-8"))
    found = json.loads((run_dir / f"{name}.json").read_text(encoding="utf-8"))
    said = manifest["metrics"]
    trained, total = said["tuning/trained_params"], said["tuning/params"]
    size = sum(f["bytes"] for n, f in manifest["files"].items() if n.startswith("adapter/"))
    value, low, high = found["score"]
    cells = [
        name.partition("_")[2],
        f"{trained:,.0f}",
        f"{100 * trained / total:.2f}",
        f"{said['tokens/per_s']:.0f}",
        f"{manifest['peak_rss_gib']:.2f}",
        f"{found['loss']:.3f}",
        f"{value:.2f} [{low:.2f}, {high:.2f}]",
        f"{size / 1024:.0f}" if size else "-",
        "yes" if found["merges"] and size else "no" if size else "-",
        found["engine"],
        reload(found, said),
    ]
    return f"| {' | '.join(cells)} |"


def reload(found: dict[str, Any], said: dict[str, float]) -> str:
    """Return how close the losses of the fresh process are to those of the training process."""
    gap = abs(found["loss"] - said.get(LOSS_SAVED, said["eval/loss"]))
    if "adapter_loss" in found:
        gap = max(gap, abs(found["adapter_loss"] - said["eval/loss"]))
    if gap == 0.0:
        return "equal"
    return "within 1e-6" if gap <= 1e-6 else f"differs by {gap:.1g}"


def run() -> None:
    """Run what is not done and print the tables."""
    parser = argparse.ArgumentParser(description="Compare tuning methods.")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--methods", nargs="+", help="those to run; all by default")
    args = parser.parse_args()
    if "ALIGN_REAL_DATA" not in os.environ:
        sys.exit(
            "ALIGN_REAL_DATA is not set: it names a folder with "
            "data/preference/persona_yes_no.jsonl and models/stories260K-hd32, which the task "
            "persona reads; with --tasks world any folder does"
        )
    logging.getLogger("align").setLevel(logging.WARNING)
    recipe = load_recipe(RECIPE)
    run_dir = args.runs / recipe.name
    for task in args.tasks:
        names = [n for n in recipe.stages if n.startswith(f"{task}_")]
        if not args.table:
            for start in starts(recipe, names[0]):
                apart(run_stage, start, recipe.stages[start].kind, run_dir)
            chosen = args.methods or [n.partition("_")[2] for n in names]
            for name in (f"{task}_{method}" for method in chosen):
                apart(run_stage, name, "sft", run_dir)
                apart(measure, name, recipe.stages[name], run_dir)
        done = [n for n in names if (run_dir / f"{n}.json").is_file()]
        sys.stdout.write(f"\n{task}\n{HEAD}\n")
        sys.stdout.writelines(f"{line(name, run_dir)}\n" for name in done)


if __name__ == "__main__":
    run()
