"""The line of a running stage: what it shows at each width, its times, phases and errors."""

import io
import json
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from align.pipeline import terminal
from align.pipeline.following import Followed, last_messages
from align.pipeline.progress import Facts, ProgressLine, make_console, sample_text
from align.pipeline.summary import add_seconds, measured_seconds
from align.pipeline.terminal import Terminal, settings
from align.recipe.load import load_recipe


@pytest.mark.parametrize("width", [10, 20, 40, 60, 80, 120, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_line_fills_the_width_and_drops_the_least_important(width: int, encoding: str):
    metrics = {"train/loss": 1.5, "eval/loss": 1.25, "reward/mean": 0.2}
    given = {"left_s": 130, "tokens_per_s": 4122, "metrics": metrics, "memory": "1.9 GiB"}
    buffer = io.BytesIO()
    shown = io.TextIOWrapper(buffer, encoding=encoding)
    Console(file=shown, width=width).print(ProgressLine(Facts("[2/7] sft", 450, 900, **given)))
    shown.flush()
    (line,) = buffer.getvalue().decode(encoding).splitlines()
    assert len(line) <= width
    if width >= 80:
        assert len(line.rstrip()) > width - 5
    expected = {
        40: ["step 450/900", "2 min 10 s left"],
        80: ["step 450/900", "2 min 10 s left", "4,122 tokens/s"],
        120: ["reward/mean 0.2", "1.9 GiB", "train/loss 1.5"],
        200: ["reward/mean 0.2", "1.9 GiB", "train/loss 1.5", "eval/loss 1.25"],
    }
    assert all(part in line for part in expected.get(width, []))
    assert ("eval/loss" in line) == (width == 200)


def test_a_long_name_and_wide_characters_never_break_the_line():
    for title, phase in (("[1/2] " + "n" * 60, "loading"), ("[1/2] sft", "\u8bfb\u53d6" * 40)):
        for width in (20, 40, 80):
            shown = io.StringIO()
            facts = Facts(title, phase=phase, elapsed_s=3.0)
            Console(file=shown, width=width).print(ProgressLine(facts))
            (line,) = shown.getvalue().splitlines()
            assert cell_len(line) <= width
            assert line.startswith("[1/2] ")


def test_sample_of_a_conversation_is_the_text_of_its_last_message():
    prompt = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "2+2?"}]
    assert sample_text({"prompt": prompt, "completion": "4", "score": 1}) == "2+2? -> 4  [1]"
    parts = [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}]
    assert sample_text({"prompt": parts, "completion": "4"}) == "2+2? -> 4"
    long = {"prompt": "p" * 200, "completion": "c" * 200, "score": 0.5}
    assert len(sample_text(long, width=80)) == 80


def test_tokens_per_second_are_those_of_the_last_steps_weighted_by_time(tmp_path: Path):
    followed = Followed(tmp_path)
    rows = [
        {"step": 1, "time_s": 1.0, "tokens/per_s": 100.0},
        {"step": 2, "time_s": 4.0, "tokens/per_s": 300.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    followed.read()
    # 1 s at 100 and 3 s at 300.
    assert followed.tokens_per_s() == 250.0


def test_the_first_row_after_a_resume_does_not_weigh_as_much_as_the_attempt_before(tmp_path: Path):
    followed = Followed(tmp_path)
    row = {"step": 501, "time_s": 5001.0, "tokens/per_s": 10.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    followed.read()
    assert followed.tokens_per_s() == pytest.approx(10.0)
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write(json.dumps({"step": 502, "time_s": 5002.0, "tokens/per_s": 300.0}) + "\n")
    followed.read()
    assert followed.tokens_per_s() == pytest.approx(300.0, rel=0.01)


def test_the_phase_is_a_line_of_the_log_that_is_no_detail(tmp_path: Path):
    followed = Followed(tmp_path)
    (tmp_path / "log.txt").write_text(
        "12:00:00 loading model base (0.5 GB)\n"
        "12:00:01   ok       corpus  9 texts\n"
        "12:00:02 sft 3/9  train/loss 1.5\n"
        "12:00:03 step 3: dead_groups: all are equal\n"
        "12:00:04 [rank 1] another rank\n"
        "Loading weights: 100%\n"
    )
    followed.read()
    assert followed.phase == "loading model base (0.5 GB)"


def test_the_total_is_shown_only_if_every_later_stage_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TERM", "xterm")

    def last(later_s: float | None) -> str:
        shown = io.StringIO()
        terminal = Terminal(Console(file=shown, width=160, force_terminal=True))
        terminal.expect(None, later_s)
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        terminal.begin("sft", "sft", tmp_path, position=2, count=3)
        row = {"step": 3, "time_s": 6.0, "total_steps": 9}
        (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        terminal.update()
        terminal.end(7.0)
        return shown.getvalue()

    # 12 s of this stage and 50 s of the later ones.
    assert "all stages: 1 min 02 s left" in last(50.0)
    assert "all stages" not in last(None)


def test_a_stage_after_its_last_step_is_not_announced_as_0_s_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("align.pipeline.terminal.PLAIN_EVERY_S", -1.0)

    def line(now_s: float | None, later_s: float) -> str:
        shown = io.StringIO()
        terminal = Terminal(Console(file=shown, width=160))
        terminal.expect(now_s, later_s)
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        (tmp_path / "log.txt").unlink(missing_ok=True)
        terminal.begin("evaluate", "evaluate", tmp_path, position=3, count=3)
        row = {"step": 5, "time_s": 60.0, "total_steps": 5}
        (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        (tmp_path / "log.txt").write_text("12:00:00 comparing the models\n")
        terminal.update()
        return shown.getvalue().splitlines()[-1]

    # The last stage: nothing is known of the rest, or it took longer than before.
    assert line(None, 0.0) == "[3/3] evaluate: comparing the models"
    assert line(0.0, 0.0) == "[3/3] evaluate: comparing the models"
    # The time that it took before, and the stages after it.
    assert "all stages: 1 min " in line(100.0, 0.0)
    assert line(None, 50.0) == "[3/3] evaluate: comparing the models, all stages: 50 s left"


def test_the_time_of_a_stage_counts_only_with_the_same_settings(tmp_path: Path):
    recipe = load_recipe("quickstart")
    (tmp_path / "sft").mkdir()
    manifest = {"spec": recipe.stages["sft"].model_dump(mode="json")}
    (tmp_path / "sft" / "manifest.json").write_text(json.dumps(manifest))
    for stage in ("sft", "dpo"):
        add_seconds(tmp_path, stage, 31.5)
    # dpo has a time, but never finished.
    assert measured_seconds(tmp_path, recipe) == {"sft": 31.5}
    assert measured_seconds(tmp_path, load_recipe("quickstart", ["sft.steps=3"])) == {}


def test_an_error_of_two_ranks_is_shown_once_without_the_launcher():
    log = [
        "12:00:00 loading model base",
        "12:00:01 error: reward: the preflight failed, nothing was trained",
        "  stop tokens: none: add one",
        "12:00:01 [rank 1] error: reward: the preflight failed, nothing was trained",
        "  stop tokens: none: add one",
        "12:00:02 [rank 2] error: another rank of this stage has ended; its own message (x)",
        "[2026-11-28 02:26:29,374] [ERROR] [launch.py:285:main] exits with return code = 2",
    ]
    assert last_messages(log) == [
        "reward: the preflight failed, nothing was trained",
        "  stop tokens: none: add one",
    ]
    # Two different errors are both shown; one rank that only lost the others is better than none.
    assert last_messages(["1", "12:00:01 error: a", "12:00:01 [rank 1] error: b"]) == ["a", "b"]
    assert len(last_messages([log[5]])) == 1
    assert last_messages(["12:00:00 sft 1/2  train/loss 1", "Segmentation fault"]) == []


@pytest.mark.parametrize("name", ["pipe", "dumb", "forced"])
def test_lines_are_plain_where_no_cursor_can_move(name: str, monkeypatch: pytest.MonkeyPatch):
    class Output(io.StringIO):
        def isatty(self) -> bool:
            return name == "dumb"

    monkeypatch.setattr("sys.stdout", Output())
    monkeypatch.setenv("TERM", "dumb" if name == "dumb" else "xterm")
    if name == "forced":
        monkeypatch.setenv("FORCE_COLOR", "1")
    assert not make_console().is_interactive


def test_a_run_names_its_stages_dtype_and_engine():
    recipe = load_recipe("quickstart", ["sft.dtype=bfloat16"])
    assert settings(recipe) == "7 stages, bfloat16, float32, engine auto"


@pytest.mark.parametrize("fast", ["bfloat16", "float32"])
def test_stages_in_float32_are_named_where_bfloat16_is_faster(monkeypatch, fast: str):
    monkeypatch.setattr(terminal, "fast_dtype", lambda: fast)
    recipe = load_recipe("quickstart")
    slow = [name for name, spec in recipe.stages.items() if getattr(spec, "dtype", 0) == "float32"]
    found = terminal.slow_dtypes(recipe)
    assert slow
    assert found.startswith(f"float32 in {', '.join(slow)}: ") == (fast == "bfloat16")
    assert bool(found) == (fast == "bfloat16")
    faster = load_recipe("quickstart", [f"{name}.dtype=bfloat16" for name in slow])
    assert terminal.slow_dtypes(faster) == ""
