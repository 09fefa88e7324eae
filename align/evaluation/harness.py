"""Run lm-evaluation-harness tasks in a separate environment and read their scores.

The harness pins other versions than this project, so it is never imported here. It runs in the
Python interpreter that the recipe names, and its per-question scores are read from its log.
"""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.core.errors import AlignError
from align.core.seats import without_launcher
from align.evaluation.compare import Record

REMEDY = "python -m venv lm && lm/bin/pip install 'lm-eval[hf]==0.4.13'"
LOG_TAIL = 15
NOT_PASSED_ON = ("PYTHONPATH", "VIRTUAL_ENV")
"""Variables that would bring this project's packages into the other environment."""


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
    """Return the command line that evaluates one model.

    Args:
        python: Python interpreter of the harness's environment.
        model_dir: folder of the model.
        out: folder for the results.
        tasks: names of harness tasks, including those of ``include_path``.
        backend: hf or vllm.
        dtype: dtype of the weights.
        batch_size: requests per batch.
        include_path: folder with custom task files.
        limit: questions per task; None for all.
        num_fewshot: examples before each question; None for the task's own number.
        chat_template: apply the model's chat template.
        device: cpu, or None for the harness's choice.
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
    """Return the version of lm-eval in an environment.

    Raises:
        AlignError: the Python interpreter or lm-eval is missing; the message says how to install.
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
    """Run the harness and write its output to ``log``.

    Raises:
        AlignError: the harness failed; the message contains the end of the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as f:
        done = subprocess.run(argv, stdout=f, stderr=subprocess.STDOUT, env=_env())
    if done.returncode != 0:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:]
        shown = "\n".join(tail)
        raise AlignError(f"lm-eval ended with {done.returncode}; the end of {log}:\n{shown}")


def _env() -> dict[str, str]:
    """Return the environment without this project's packages and process group."""
    return {k: v for k, v in without_launcher(os.environ).items() if k not in NOT_PASSED_ON}


def read_harness(out: Path, *, what: str) -> dict[str, list[Record]]:
    """Return the per-question scores of every task that a harness run has logged.

    Args:
        out: the run's ``--output_path``.
        what: name of the model in messages.

    Returns:
        Task to one record per question. Its ``scores`` are the metrics, with the filter in the name
        if the task has filters ("exact_match (strict-match)").

    Raises:
        AlignError: there is no log, or a task has no per-question score.
    """
    found: dict[str, dict[int, Record]] = {}
    for file in sorted(out.rglob("samples_*.jsonl")):
        # The file is samples_<task>_<time>.jsonl, and the time contains no underscore.
        task = file.stem.removeprefix("samples_").rpartition("_")[0]
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            records = found.setdefault(task, {})
            # A task with several filters has one line per question and filter.
            record = records.setdefault(row["doc_id"], _record(row))
            record["scores"] |= _scores(row)
    if not found:
        raise AlignError(f"lm-eval of {what}: no samples_*.jsonl below {out}")
    for task, records in found.items():
        if not next(iter(records.values()))["scores"]:
            raise AlignError(
                f"lm-eval task {task}: no per-question score (a corpus perplexity, for example). "
                "Intervals need one; choose another task"
            )
    return {task: [records[i] for i in sorted(records)] for task, records in found.items()}


def _record(row: dict[str, Any]) -> Record:
    answers = row.get("filtered_resps") or [""]
    # The harness does not log lengths or KL; their placeholders are never reported.
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
    """Return the metrics of a question that are plain numbers."""
    name = row.get("filter", "none")
    suffix = "" if name == "none" else f" ({name})"
    return {
        f"{metric}{suffix}": float(row[metric])
        for metric in row.get("metrics", [])
        if isinstance(row.get(metric), int | float)
    }
