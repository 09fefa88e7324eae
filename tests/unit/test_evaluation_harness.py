"""The adapter of lm-evaluation-harness: its command line, its log, and what is missing."""

import json
import sys
from pathlib import Path

import pytest

from align.core.errors import AlignError
from align.evaluation.harness import check_harness, harness_argv, read_harness, run_harness


def write_log(folder: Path, task: str, rows: list[dict]) -> None:
    place = folder / "model" / f"samples_{task}_2026-11-25T10-00-00.123456.jsonl"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))


def line(doc: int, **more: object) -> dict:
    return {"doc_id": doc, "doc": {"q": doc}, "filtered_resps": ["A"], **more}


def test_scores_by_question_are_read_by_task_and_filter(tmp_path: Path):
    write_log(
        tmp_path,
        "my_quiz",
        [
            line(1, filter="strict", metrics=["exact_match"], exact_match=1.0),
            line(0, filter="strict", metrics=["exact_match"], exact_match=0.0),
            line(0, filter="loose", metrics=["exact_match"], exact_match=1),
            line(1, filter="loose", metrics=["exact_match"], exact_match=1),
        ],
    )
    write_log(tmp_path, "arc", [line(0, filter="none", metrics=["acc", "x"], acc=1.0, x=[1, 2])])
    found = read_harness(tmp_path, what="sft")
    assert list(found) == ["arc", "my_quiz"]
    assert [r["scores"] for r in found["my_quiz"]] == [
        {"exact_match (strict)": 0.0, "exact_match (loose)": 1.0},
        {"exact_match (strict)": 1.0, "exact_match (loose)": 1.0},
    ]
    assert found["arc"][0]["scores"] == {"acc": 1.0}


def test_log_without_scores_by_question_is_refused(tmp_path: Path):
    with pytest.raises(AlignError, match="no samples"):
        read_harness(tmp_path, what="sft")
    write_log(tmp_path, "ppl", [line(0, metrics=["word_perplexity"], word_perplexity=[-3.0, 4])])
    with pytest.raises(AlignError, match="task ppl: no per-question score"):
        read_harness(tmp_path, what="sft")


def test_environment_without_the_harness_is_told_with_the_remedy(tmp_path: Path):
    with pytest.raises(AlignError, match=r"no lm-eval .* python -m venv"):
        check_harness(sys.executable)
    with pytest.raises(AlignError, match=r"cannot be run .* python -m venv"):
        check_harness(str(tmp_path / "python"))


def test_command_line_names_model_tasks_and_options():
    argv = harness_argv(
        "py",
        Path("m"),
        Path("o"),
        tasks=["a", "b"],
        backend="vllm",
        dtype="bfloat16",
        batch_size=4,
        include_path="own",
        limit=7,
        num_fewshot=0,
        chat_template=True,
    )
    text = " ".join(argv)
    assert text.startswith("py -m lm_eval --model vllm --model_args pretrained=m,dtype=bfloat16")
    assert "--tasks a,b --batch_size 4 --output_path o --log_samples" in text
    assert text.endswith("--include_path own --limit 7 --num_fewshot 0 --apply_chat_template")


def test_failed_run_shows_the_end_of_its_log(tmp_path: Path):
    argv = [sys.executable, "-c", "print('no such task'); raise SystemExit(3)"]
    with pytest.raises(AlignError, match=r"(?s)ended with 3.*no such task"):
        run_harness(argv, tmp_path / "log.txt")


def test_the_harness_joins_no_process_group_of_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """torch in the other environment would wait for the ranks that these variables promise."""
    given = {"RANK": "1", "WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}
    for name, value in (given | {"PYTHONPATH": "here", "HF_HOME": "kept"}).items():
        monkeypatch.setenv(name, value)
    run_harness([sys.executable, "-c", "import os; print(*os.environ)"], tmp_path / "log.txt")
    found = set((tmp_path / "log.txt").read_text().split())
    assert not found & {*given, "PYTHONPATH"}
    assert "HF_HOME" in found
