"""Run tasks of lm-evaluation-harness in its own environment and read what it writes.

The harness pins other versions than this project, so it is never imported here: it runs as a
process of the Python that the recipe names, and its scores by question are read from its log.
"""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.core.errors import AlignError
from align.evaluation.compare import Record

REMEDY = "python -m venv lm && lm/bin/pip install 'lm-eval[hf]==0.4.13'"
LOG_TAIL = 15
NOT_PASSED_ON = (
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def harness_argv(
    python: str,
    model_dir: Path,
    out: Path,
    *,
    tasks: Sequence[str],
    backend: str,
    dtype: str,
    batch_size: int,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    device: str | None = None,
) -> list[str]:
    """Give the command line that asks one model.

    Args:
        python: of the harness's environment. model_dir: folder of the model.
        out: folder for the results. tasks: names the harness knows, also from ``include_path``.
        backend: hf or vllm. dtype: of the weights. batch_size: requests at a time.
        include_path: folder of own task files. limit: questions of each task; None asks all.
        num_fewshot: examples before each question; None is the task's own number.
        chat_template: ask through the model's chat template. device: cpu, or None.
    """
    argv = [python, "-m", "lm_eval", "--model", backend]
    argv += ["--model_args", f"pretrained={model_dir},dtype={dtype}"]
    argv += ["--tasks", ",".join(tasks), "--batch_size", str(batch_size)]
    argv += ["--output_path", str(out), "--log_samples"]
    argv += ["--include_path", include_path] if include_path else []
    argv += ["--limit", str(limit)] if limit is not None else []
    argv += ["--num_fewshot", str(num_fewshot)] if num_fewshot is not None else []
    argv += ["--apply_chat_template"] if chat_template else []
    return argv + (["--device", device] if device else [])


def check_harness(python: str) -> str:
    """Give the version of the harness in an environment.

    Raises:
        AlignError: there is no such Python, or no lm-eval in it; says how to install it.
    """
    code = "from importlib.metadata import version; print(version('lm_eval'))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=_env())
    except OSError as error:
        raise AlignError(f"harness.python: {python} cannot be run ({error}); {REMEDY}") from error
    if done.returncode != 0:
        raise AlignError(f"harness.python: no lm-eval in the environment of {python}; {REMEDY}")
    return done.stdout.strip()


def run_harness(argv: Sequence[str], log: Path) -> None:
    """Run the harness; what it says goes to ``log``.

    Raises:
        AlignError: it failed; the end of its log is shown.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as f:
        done = subprocess.run(argv, stdout=f, stderr=subprocess.STDOUT, env=_env())
    if done.returncode != 0:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:]
        said = "\n".join(tail)
        raise AlignError(f"lm-eval ended with {done.returncode}; the end of {log}:\n{said}")


def _env() -> dict[str, str]:
    """Give the environment without this project's own packages and process group."""
    return {k: v for k, v in os.environ.items() if k not in NOT_PASSED_ON}


def read_harness(out: Path, *, what: str) -> dict[str, list[Record]]:
    """Read the scores by question of every task that one run of the harness has logged.

    Args:
        out: the run's ``--output_path``. what: name of the model in messages.

    Returns:
        Task to one record per question; its ``scores`` are the metrics, by filter where there are
        several ("exact_match (strict-match)").

    Raises:
        AlignError: there is no log, or a task has no score by question.
    """
    found: dict[str, dict[int, Record]] = {}
    for file in sorted(out.rglob("samples_*.jsonl")):
        # samples_<task>_<time>.jsonl; the time has no underscore.
        task = file.stem.removeprefix("samples_").rpartition("_")[0]
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            records = found.setdefault(task, {})
            record = records.setdefault(row["doc_id"], _record(row))
            record["scores"] |= _scores(row)
    if not found:
        raise AlignError(f"lm-eval of {what}: no samples_*.jsonl below {out}")
    for task, records in found.items():
        if not next(iter(records.values()))["scores"]:
            raise AlignError(
                f"lm-eval task {task}: no score by question (a corpus perplexity, say); "
                "intervals need one; choose another task"
            )
    return {task: [records[i] for i in sorted(records)] for task, records in found.items()}


def _record(row: dict[str, Any]) -> Record:
    answers = row.get("filtered_resps") or [""]
    return Record(
        prompt_index=row["doc_id"],
        sample_index=0,
        prompt=json.dumps(row["doc"], ensure_ascii=False),
        completion=str(answers[0]),
        scores={},
        judge=None,
        length=0,
        repeats=0.0,
        kl=None,
        finish_reason="stop",
        group=None,
    )


def _scores(row: dict[str, Any]) -> dict[str, float | None]:
    """Give the metrics of a question that are plain numbers."""
    name = row.get("filter", "none")
    suffix = "" if name == "none" else f" ({name})"
    return {
        f"{metric}{suffix}": float(row[metric])
        for metric in row.get("metrics", [])
        if isinstance(row.get(metric), int | float)
    }
