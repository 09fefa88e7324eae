"""What the terminal shows: numbers, times left, plain lines, tables."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from align.core.card import Card, Line
from align.core.errors import ArtifactError
from align.pipeline.following import Tail, eta_s
from align.pipeline.progress import change_text, clock, number, sample_text
from align.pipeline.terminal import Terminal, machine, show_results


def test_eta_uses_the_pace_of_this_attempt():
    # A resumed stage: steps 10 to 14 took 8 s, so 2 s a step and 6 steps are left.
    first, last = {"step": 10, "time_s": 30.0}, {"step": 14, "time_s": 38.0, "total_steps": 20}
    assert eta_s(first, last) == 12.0
    # One row only: 10 steps in 30 s, 10 left.
    assert eta_s(first, first | {"total_steps": 20}) == 30.0
    assert eta_s(None, {}) is None


def test_numbers_and_times_are_written_short():
    assert [number(v) for v in (0.5, 1.23456, 12345.0, 1e-5, 0, None)] == [
        "0.5",
        "1.235",
        "1.23e+04",
        "1e-05",
        "0",
        "-",
    ]
    assert [clock(s) for s in (4.4, 65, 7260)] == ["4 s", "1 min 05 s", "2 h 01 min"]


def test_sample_is_one_line():
    assert sample_text({"prompt": "a\nb", "completion": "c\n\nd", "score": 0.25}) == (
        "a b -> c d  [0.25]"
    )


def test_tail_gives_whole_new_lines_only_and_follows_a_cut_file(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    tail = Tail(path)
    assert tail.rows() == []
    with path.open("a") as f:
        f.write('{"step": 2}\n{"st')
    assert tail.rows() == [{"step": 2}]
    with path.open("a") as f:
        f.write('ep": 3}\n')
    assert tail.rows() == [{"step": 3}]
    path.write_text('{"step": 1}\n')
    assert tail.rows() == []
    with path.open("a") as f:
        f.write('{"step": 4}\n')
    assert tail.rows() == [{"step": 4}]


def follow(folder: Path, *, tty: bool) -> str:
    shown = io.StringIO()
    terminal = Terminal(Console(file=shown, width=160, soft_wrap=True, force_terminal=tty))
    terminal.begin("sft", "sft", folder, position=2, count=5)
    row = {"step": 3, "time_s": 6.0, "total_steps": 9, "train/loss": 1.5, "tokens/per_s": 1234.5}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    sample = {"step": 3, "prompt": "2+2?", "completion": "4", "score": None}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    terminal.update()
    terminal.end(7.0)
    return shown.getvalue()


@pytest.mark.parametrize(("width", "tty", "lines"), [(60, True, 2), (160, True, 1), (60, False, 1)])
def test_a_narrow_terminal_gets_the_change_on_a_line_of_its_own(
    tmp_path: Path, width: int, tty: bool, lines: int
):
    shown = io.StringIO()
    console = Console(file=shown, width=width, force_terminal=tty, highlight=False)
    terminal = Terminal(console)
    terminal.begin("sft", "sft", tmp_path, position=2, count=5)
    row = {"step": 9, "time_s": 6.0, "train/loss": 1.5, "change/loss": -0.2}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    terminal.end(7.0)
    told = ["[2/5] sft: done in 7 s, train/loss 1.5", "eval/loss changed by -0.2 since step 0"]
    joined = "\n    ".join(told) if lines == 2 else ", ".join(told)
    assert joined in shown.getvalue()


def test_end_of_a_stage_shows_the_change_since_its_start():
    bounds = {"change/loss_low": -0.3, "change/loss_high": -0.1}
    assert change_text({"step": 9, "change/loss": -0.2, **bounds}) == (
        "eval/loss changed by -0.2 [-0.3, -0.1] since step 0"
    )
    # Too few prompts for an interval; accuracy comes before the loss.
    both = {"change/loss": -0.2, "change/accuracy": 0.125}
    assert change_text(both) == "eval/accuracy changed by 0.125 since step 0"
    assert change_text({"train/loss": 1.0}) == ""


def test_without_a_terminal_the_stage_is_plain_lines(tmp_path: Path):
    assert follow(tmp_path, tty=False).splitlines() == [
        "[2/5] sft (sft): started",
        "[2/5] sft: done in 7 s, train/loss 1.5",
        "    2+2? -> 4",
    ]


def test_in_a_terminal_the_line_has_pace_metric_time_left_and_sample(tmp_path: Path):
    shown = follow(tmp_path, tty=True)
    # 3 of 9 steps in 6 s leave 12 s.
    for part in ("step 3/9", "1,234 tokens/s", "train/loss 1.5", "12 s left", "2+2? -> 4"):
        assert part in shown


@pytest.mark.parametrize("tty", [False, True])
def test_warnings_of_the_preflight_are_shown_once(tmp_path: Path, tty: bool):
    lines = [
        Line("packing", "0", "at most 0.001", "ok"),
        Line("balance", "1 good answer, 39 bad ones", "1 : 2 at most", "warn", remedy="weigh them"),
    ]
    before = Card("kto", "kto", [Line("balance", "of the attempt before", "1 : 2", "warn")])
    (tmp_path / "preflight.json").write_text(json.dumps(before.plain()))
    shown = io.StringIO()
    terminal = Terminal(
        Console(file=shown, width=160, soft_wrap=True, force_terminal=tty, highlight=False)
    )
    terminal.begin("kto", "kto", tmp_path, position=2, count=2)
    terminal.update()
    (tmp_path / "preflight.json").write_text(json.dumps(Card("kto", "kto", lines).plain()))
    for _ in range(3):
        terminal.update()
    terminal.end(7.0)
    said = shown.getvalue()
    warning = "[2/2] kto: warning: balance: 1 good answer, 39 bad ones (1 : 2 at most)"
    assert said.count(warning) == said.count("-> weigh them") == 1
    assert "packing" not in said
    assert "of the attempt before" not in said


def test_alarms_are_shown_when_they_are_raised_and_in_the_summary(tmp_path: Path):
    alarm = {"step": 5, "name": "dead_groups", "reason": "all are equal", "remedy": "use others"}
    shown = io.StringIO()
    terminal = Terminal(Console(file=shown, width=160, soft_wrap=True, highlight=False))
    terminal.begin("grpo", "grpo", tmp_path, position=2, count=2)
    (tmp_path / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    for _ in range(3):
        terminal.update()
    terminal.end(7.0)
    line = "alarm at step 5: dead_groups: all are equal"
    assert shown.getvalue().count(f"[2/2] grpo: {line}") == 1
    assert shown.getvalue().count("    -> use others") == 1
    results = {"stages": {"grpo": {"alarms": [alarm]}}, "seconds": 7.0}
    terminal.summary(results, tmp_path / "report.html", order=["grpo"])
    assert shown.getvalue().splitlines()[-2] == f"grpo: {line}"


def test_without_steps_the_log_speaks_and_nothing_is_said_twice(tmp_path: Path, monkeypatch):
    now = 0.0
    monkeypatch.setattr("align.pipeline.terminal.time.monotonic", lambda: now)
    (tmp_path / "log.txt").write_text("12:00:00 of the attempt before\n")
    shown = io.StringIO()
    terminal = Terminal(Console(file=shown, width=160, soft_wrap=True, force_terminal=False))
    terminal.begin("evaluate", "evaluate", tmp_path, position=1, count=1)
    log = (tmp_path / "log.txt").open("a")
    row = {"step": 1, "time_s": 6.0, "total_steps": 1, "reward/mean": 0.5}
    for now, text in (
        (10.0, "a library's noise\n12:00:10 sft: 40 answers sampled\n"),
        (20.0, "12:00:11 [rank 1] another rank\n"),
        (75.0, ""),
        (90.0, "12:01:30 cards: 3 of 7 sets\n"),
    ):
        log.write(text)
        log.flush()
        if now == 90.0:
            (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        terminal.update()
    assert shown.getvalue().splitlines() == [
        "[1/1] evaluate (evaluate): started",
        "[1/1] evaluate: sft: 40 answers sampled",
        "[1/1] evaluate: sft: 40 answers sampled, 1 min 15 s so far",
        "[1/1] evaluate: cards: 3 of 7 sets",
    ]


HELDOUT = {
    "baseline": "sft",
    "metrics": ["exact_match"],
    "prompts": 40,
    "samples": 1,
    "models": {"sft": {"exact_match": [0.5, 0.4, 0.6]}, "dpo": {"exact_match": [0.7, 0.6, 0.8]}},
    "contrasts": {
        "dpo": {"exact_match": {"difference": [0.2, 0.1, 0.3], "null": 0.0, "verdict": "better"}}
    },
    "invalid": {"dpo": {"exact_match": 2}},
}


def test_summary_shows_intervals_and_expectations():
    shown = io.StringIO()
    terminal = Terminal(Console(file=shown, width=160, soft_wrap=True))
    summary = {
        "tasks": {"heldout": HELDOUT},
        "reward_models": {"rm": {"pair_accuracy": [0.9, 0.85, 0.95]}},
        "expectations": [
            {"key": "models/dpo/kl", "band": [0, 20], "value": 1.0, "holds": True},
            {"key": "x", "band": [1, None], "value": 0.5, "holds": False},
        ],
        "seconds": 130.0,
    }
    terminal.summary(summary, Path("runs/x/report.html"), order=["dpo", "sft"])
    text = shown.getvalue()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert lines == [
        "FAILED: 1 of 2 expectations do not hold",
        "x = 0.5, expected at least 1",
        "held-out prompts: 40 prompts, 95 % intervals; * differs significantly from sft",
        "model   exact match",
        "─" * 26,
        "sft     0.50 [0.40, 0.60]",
        "dpo     0.70 [0.60, 0.80]*",
        "dpo: responses without a valid score, left out: 2 by exact_match",
        "rm: ranks 0.90 [0.85, 0.95] of the held-out pairs correctly",
        "2 min 10 s in all, exit code 1; runs/x/report.html; all tables: align show runs/x",
    ]
    assert "models/dpo/kl" not in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_results_of_five_models_take_15_lines_and_never_cut_a_number(width: int):
    models = ["sft", "base", "dpo", "ppo", "grpo"]
    metrics = ["win_rate", "length_controlled_win_rate", "exact_match", "polite", "kl", "length"]
    value = [-0.25, -0.34, -0.16]
    block = HELDOUT | {
        "metrics": metrics,
        "models": {model: dict.fromkeys(metrics, value) for model in models},
        "contrasts": {m: {k: {"verdict": "worse"} for k in metrics} for m in models[1:]},
        "invalid": {},
    }
    shown = io.StringIO()
    terminal = Terminal(Console(file=shown, width=width))
    summary = {
        "tasks": {"heldout": block},
        "reward_models": {"rm": {"pair_accuracy": [0.9, 0.85, 0.95]}},
        "expectations": [{"key": "x", "band": [0, 1], "value": 0.5, "holds": True}],
        "seconds": 9.0,
    }
    terminal.summary(summary, Path("report.html"), order=models[1:])
    lines = [line.rstrip() for line in shown.getvalue().splitlines() if line.strip()]
    assert len(lines) <= 15
    rows = [line for line in lines if line.split()[0] in models and "[" in line]
    assert [row.split()[0] for row in rows] == models
    columns = {row.count("-0.25 [-0.34, -0.16]") for row in rows}
    assert len(columns) == 1
    assert columns.pop() == {60: 2, 80: 3, 120: 4}[width]
    assert "…" not in shown.getvalue()
    # The metrics without a column are named.
    assert "length controlled win rate" in " ".join(" ".join(lines).split())


def test_show_of_a_run_prints_every_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ArtifactError, match="expected a finished run"):
        show_results(tmp_path)
    summary = {"tasks": {"heldout": HELDOUT}, "reward_models": {"rm": {"ece": [0.03, 0.02, 0.05]}}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    show_results(tmp_path)
    text = capsys.readouterr().out
    for part in (
        "heldout: dpo better than sft by exact_match",
        "0.40..0.60",
        "2 invalid",
        "ece",
        "0.02..0.05",
    ):
        assert part in text


def test_the_first_line_of_a_run_names_the_device(monkeypatch: pytest.MonkeyPatch):
    def gpus(found: list[str]) -> None:
        monkeypatch.setattr("align.pipeline.terminal.has_gpu", lambda: bool(found))
        monkeypatch.setattr("align.core.accelerator.has_gpu", lambda: bool(found))
        monkeypatch.setattr("align.core.accelerator.list_gpus", lambda: found)

    monkeypatch.setattr("align.core.accelerator.os.sched_getaffinity", lambda _: {0, 1})
    gpus([])
    monkeypatch.setattr("align.pipeline.terminal.versions", lambda: {"torch": "2.13.0+cpu"})
    assert machine() == "CPU, 2 cores: no GPU found; torch 2.13.0+cpu"
    gpus(["NVIDIA H100, 81559 MiB, 580.1", "NVIDIA H100, 81559 MiB, 580.1"])
    assert machine() == "2 GPUs (NVIDIA H100, 80 GiB), 2 cores; torch 2.13.0+cpu"


def test_a_narrow_terminal_drops_metrics_instead_of_breaking_a_number(tmp_path: Path):
    file = io.StringIO()
    console = Console(file=file, width=60, force_terminal=True, no_color=True, soft_wrap=True)
    terminal = Terminal(console)
    terminal.begin("reward", "reward", tmp_path, position=3, count=7)
    row = {"step": 1, "total_steps": 1, "eval/accuracy": 0.885, "train/loss": 0.22, "eval/loss": 9}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    terminal.end(125.0)
    lines = [line for line in file.getvalue().splitlines() if "done in" in line]
    assert len(lines) == 1
    assert lines[0].rstrip().endswith("[3/7] reward: done in 2 min 05 s, eval/accuracy 0.885")
