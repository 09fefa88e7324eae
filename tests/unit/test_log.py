"""The metrics log: what a resumed run leaves equals what an uninterrupted one leaves."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from align.core.errors import RecipeError
from align.core.log import MetricsLog, short_number


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def without_time(found: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "time_s"} for row in found]


def write_steps(log: MetricsLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        sample = {"prompt": f"p{step}", "completion": "c\n\u2028</script>", "score": step / 2}
        log.log(step, {"train/loss": 1.0 / step, "optim/grad_norm": 2.0}, sample=sample)


def test_log_after_rewind_equals_uninterrupted_log(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    log = MetricsLog(whole, total_steps=6, sinks=(), rank=0)
    write_steps(log, 1, 6)
    log.close()

    first = MetricsLog(cut, total_steps=6, sinks=(), rank=0)
    write_steps(first, 1, 5)
    first.close()
    with (cut / "metrics.jsonl").open("a") as f:
        f.write('{"step": 6, "train/l')  # what kill -9 in the middle of a write leaves
    second = MetricsLog(cut, total_steps=6, sinks=(), rank=0)
    second.rewind(3)
    write_steps(second, 4, 6)
    second.close()

    assert without_time(rows(cut / "metrics.jsonl")) == without_time(rows(whole / "metrics.jsonl"))
    assert rows(cut / "samples.jsonl") == rows(whole / "samples.jsonl")
    times = [row["time_s"] for row in rows(cut / "metrics.jsonl")]
    assert times == sorted(times)


def test_log_without_rewind_starts_anew(tmp_path: Path) -> None:
    for last in (4, 2):
        log = MetricsLog(tmp_path, total_steps=4, sinks=(), rank=0)
        write_steps(log, 1, last)
        log.close()
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [row["step"] for row in rows(tmp_path / "samples.jsonl")] == [1, 2]


def test_log_line_is_on_disk_before_close(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, total_steps=1, sinks=(), rank=0)
    log.log(1, {"train/loss": 0.5})
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert (row["step"], row["total_steps"], row["train/loss"]) == (1, 1, 0.5)
    log.close()


def test_log_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, total_steps=1, sinks=["tensorboard"], rank=1)
    log.rewind(0)
    write_steps(log, 1, 1)
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_log_non_finite_number_is_null_not_invalid_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, total_steps=1, sinks=(), rank=0)
    log.log(1, {"train/loss": float("nan"), "kl/reference": float("inf")})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["train/loss"] is None
    log.close()


def test_log_human_line_says_step_loss_and_time_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    # A handler of its own: what else listens to the root logger differs with the tests before.
    listener = logging.Handler()
    monkeypatch.setattr(listener, "emit", lambda record: said.append(record.getMessage()))
    monkeypatch.setattr(logging.getLogger("align"), "handlers", [listener])
    caplog.set_level(logging.INFO, logger="align")
    log = MetricsLog(tmp_path / "sft", total_steps=10, sinks=(), rank=0)
    log.log(10, {"optim/learning_rate": 2.5e-5, "train/loss": 1.23456})
    log.close()
    assert said == ["sft 10/10  train/loss 1.235  optim/learning_rate 2.50e-05  eta 0:00"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (12345.6, "12346"), (0.25, "0.25"), (-3e-4, "-3.00e-04")]
)
def test_short_number_keeps_four_digits(value: float, text: str) -> None:
    assert short_number(value) == text


def test_tensorboard_sink_holds_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra 'sinks' is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, rewind in ((1, 4, None), (3, 5, 2)):
        log = MetricsLog(tmp_path, total_steps=5, sinks=["tensorboard"], rank=0)
        if rewind is not None:
            log.rewind(rewind)
        write_steps(log, first, last)
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5]
    assert [event.value for event in events] == pytest.approx([1 / s for s in range(1, 6)])


def test_unknown_sink_is_a_recipe_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown sink 'comet'"):
        MetricsLog(tmp_path, total_steps=1, sinks=["comet"], rank=0)


def test_missing_sink_package_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)  # what Python puts there: "import fails"
    with pytest.raises(RecipeError, match="pip install trackio"):
        MetricsLog(tmp_path, total_steps=1, sinks=["trackio"], rank=0)


def test_log_module_imports_no_torch_and_speaks_on_rank_0_only() -> None:
    code = (
        "import sys, logging; from align.core.log import setup_logging\n"
        "setup_logging(int(sys.argv[1])); setup_logging(int(sys.argv[1]))\n"
        "logging.getLogger('align.x').info('quiet'); logging.getLogger('align.x').warning('loud')\n"
        "assert 'torch' not in sys.modules"
    )
    for rank, expected in (("0", ["quiet", "loud"]), ("1", ["loud"])):
        done = subprocess.run(
            [sys.executable, "-c", code, rank], capture_output=True, text=True, check=True
        )
        assert [line.split()[-1] for line in done.stderr.splitlines()] == expected


def test_a_rank_that_is_known_later_than_the_first_line_is_named() -> None:
    code = (
        "import logging; from align.core.log import setup_logging\n"
        "setup_logging(0); logging.getLogger('align.x').info('early')\n"
        "setup_logging(3); logging.getLogger('align.x').warning('late')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [line.partition(" ")[2] for line in done.stderr.splitlines()]
    assert lines == ["early", "[rank 3] late"]
