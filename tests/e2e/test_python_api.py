"""Runs from Python: every example of docs/python.md, equal bytes from YAML, resuming, Ctrl-C."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import align
from align.core.errors import RecipeError, RunError
from tests.e2e import stage_runs
from tests.moments import wait_at
from tests.unit.small_models import small_llama
from tests.unit.small_tokenizers import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 900.0
WORDS = ("sun", "moon", "star", "rain")
TWIN = """\
name: twin
stages:
  sft:
    kind: sft
    init: runs/sft/base
    data: [{path: rows.jsonl}]
    heldout: [{path: heldout.jsonl}]
    steps: 4
    batch_size: 4
    optim: {learning_rate: 1.0e-3}
"""


def tiny() -> tuple[LlamaForCausalLM, Any]:
    tokenizer = byte_tokenizer(None)
    return small_llama(tokenizer), tokenizer


def script(code: str, folder: Path, **more: str) -> subprocess.Popen[str]:
    """Start code as a plain script in a folder, in a session of its own."""
    (folder / "page.py").write_text(code, encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "page.py"],
        cwd=folder,
        env=stage_runs.environment() | {"PYTHONPATH": str(ROOT), **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    try:
        said, _ = process.communicate(timeout=LIMIT_S)
    finally:
        stage_runs.end(process)
    assert process.returncode == 0, said[-4000:]
    return said


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the examples of the page as one script, without a guard around its top level."""
    folder = tmp_path_factory.mktemp("page")
    model, tokenizer = tiny()
    model.save_pretrained(folder / "my" / "model")
    tokenizer.save_pretrained(folder / "my" / "model")
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 8
    said = finished(script("\n".join(blocks), folder))
    # Plain lines, also where standard output is no terminal.
    assert "[2/2] sft: done in" in said
    assert not re.search(r"\x1b\[", said)
    return folder


@pytest.mark.slow
def test_every_example_of_the_page_runs(page):
    for run, stage in (("sft", "sft"), ("dpo", "dpo"), ("grpo", "grpo"), ("again", "sft")):
        assert (page / "runs" / run / stage / "manifest.json").is_file()
    found = json.loads((page / "runs/compared/summary.json").read_text())
    (models,) = [task["models"] for task in found["tasks"].values()]
    assert set(models) == {"sft", "dpo", "grpo"}
    assert all("short" in row for row in models.values())


@pytest.mark.slow
def test_the_same_run_from_yaml_has_the_same_bytes(page):
    rows = [{"prompt": f"Say {word}.", "completion": word} for word in WORDS * 4]
    heldout = [{"prompt": "Say snow.", "completion": "snow"}]
    for name, content in (("rows", rows), ("heldout", heldout)):
        lines = [json.dumps(row) + "\n" for row in content]
        (page / f"{name}.jsonl").write_text("".join(lines))
    (page / "twin.yaml").write_text(TWIN)
    code = (
        "from align.__main__ import main; import sys; sys.argv[1:] = ['run', 'twin.yaml']; main()"
    )
    finished(script(code, page))
    twin, ours = page / "runs" / "twin", page / "runs" / "sft"
    assert stage_runs.weights(twin, "sft") == stage_runs.weights(ours, "sft")
    assert stage_runs.numbers(twin, "sft") == stage_runs.numbers(ours, "sft")


@pytest.mark.slow
def test_a_finished_run_is_skipped_and_a_changed_one_refused(page, monkeypatch, capsys):
    monkeypatch.chdir(page)
    rows = [{"prompt": f"Say {word}.", "completion": word} for word in WORDS * 4]
    call: dict[str, Any] = {
        "model": "my/model",
        "tokenizer": {"chat_template": "plain"},
        "data": rows,
        "heldout": [{"prompt": "Say snow.", "completion": "snow"}],
        "out": "runs/sft",
        "steps": 4,
        "batch_size": 4,
        "optim": {"learning_rate": 1e-3},
    }
    manifest = page / "runs/sft/sft/manifest.json"
    before = manifest.stat().st_mtime_ns
    run = align.sft(**call)
    assert manifest.stat().st_mtime_ns == before
    assert [stage.status for stage in run.stages.values()] == ["done", "done"]
    assert "sft: done already" in capsys.readouterr().out
    align.sft(**call, quiet=True)
    assert capsys.readouterr().out == ""
    # With nothing to replace, force returns the finished run.
    align.sft(**call, force=True, quiet=True)
    assert manifest.stat().st_mtime_ns == before
    with pytest.raises(RecipeError, match=r"sft: changed since it ran: steps 4 -> 5\n.*force=True"):
        align.sft(**{**call, "steps": 5})
    with pytest.raises(RecipeError, match="sft: changed since it ran: data"):
        align.sft(**{**call, "data": rows[:-1]})


@pytest.mark.slow
def test_evaluate_returns_the_results_on_disk_and_forced_measures_again(page, monkeypatch):
    monkeypatch.chdir(page)
    grader = [align.rewards.length(name="brief", target=2, limit=4)]
    task = {"name": "words", "prompts": [{"prompt": "Say fog."}], "grader": grader}
    call: dict[str, Any] = {"tasks": task, "out": "runs/measured", "quiet": True}
    made = []
    for force in (False, False, True):
        found = align.evaluate(["runs/sft/sft", "runs/sft/base"], **call, force=force)
        made.append((page / "runs/measured/evaluate/manifest.json").stat().st_mtime_ns)
        assert set(found.summary["tasks"]["words"]["models"]) == {"sft", "base"}
    assert made[0] == made[1] < made[2]


@pytest.mark.slow
def test_preferences_labels_a_reward_model_and_ppo_run_from_python(page, monkeypatch):
    monkeypatch.chdir(page)
    few: dict[str, Any] = {"steps": 2, "quiet": True}
    pairs = [{"prompt": f"Say {w}.", "chosen": w, "rejected": w[::-1]} for w in WORDS]
    labels = [
        {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
        for row in pairs
        for key in ("chosen", "rejected")
    ]
    start = align.Run("runs/sft")
    trained = {
        "kto": align.kto(model=start, data=labels, batch_size=4, **few),
        "reward": align.reward(model=start, data=pairs, batch_size=2, **few),
    }
    trained["ppo"] = align.ppo(
        model=start,
        data=[{"prompt": f"Say {word}."} for word in WORDS],
        # A run and a function at once.
        rewards=[trained["reward"], shortness],
        prompts_per_step=2,
        sampling={"max_new_tokens": 4, "engine": "hf"},
        **few,
    )
    for kind, run in trained.items():
        assert run.path == Path("runs") / kind
        assert run.stages[kind].status == "done"
        assert [row["step"] for row in run.stages[kind].metrics if "time_s" in row][-1] == 2
        assert run.last_model() == run.path / kind
    model, tokenizer = trained["reward"].model()
    scores = [float(model(**tokenizer(f"Say {w}. {w}", return_tensors="pt")).logits) for w in WORDS]
    assert len(set(scores)) == len(WORDS)
    last = trained["ppo"].stages["ppo"].metrics[-1]
    assert {"reward/scalar", "reward/shortness", "value/loss", "policy/loss"} <= last.keys()


def shortness(completions: list[str], **columns: Any) -> list[float]:
    return [-len(text) / 10 for text in completions]


@pytest.mark.slow
def test_a_run_gives_its_metrics_samples_model_and_recipe(page, monkeypatch):
    pandas = pytest.importorskip("pandas")
    monkeypatch.chdir(page)
    run = align.Run("runs/grpo")
    metrics = run.metrics()
    assert isinstance(metrics, pandas.DataFrame)
    samples = run.samples("grpo")
    assert isinstance(samples, pandas.DataFrame)
    lines = stage_runs.samples(page / "runs/grpo", "grpo").splitlines()
    assert samples.drop(columns="stage").to_dict("records") == [json.loads(x) for x in lines]
    assert {"prompt", "completion", "score"} <= set(samples)
    logged = stage_runs.numbers(page / "runs/grpo", "grpo")
    assert list(metrics["step"]) == [row["step"] for row in logged]
    # The model is the one on the disk, and computes what transformers computes.
    model, tokenizer = run.model()
    saved = LlamaForCausalLM.from_pretrained(page / "runs/grpo/grpo/model")
    ids = torch.tensor([tokenizer("Say sun.")["input_ids"]])
    torch.testing.assert_close(model(ids).logits, saved(ids).logits, rtol=0, atol=1e-5)
    assert "grpo" in run._repr_html_()
    assert (
        align.load_recipe("runs/grpo.yaml").stages
        == align.load_recipe(
            json.loads(json.dumps(run._record().recipe.model_dump(mode="json")))
        ).stages
    )


@pytest.mark.slow
def test_a_stage_that_fails_raises_its_own_message(page, monkeypatch):
    monkeypatch.chdir(page)
    expected = r"stage sft failed \(exit code 2\): .*jsonl:2: no known format has the fields"
    rows = [{"prompt": "a", "completion": "b"}, {"colour": "red"}]
    with pytest.raises(RunError, match=expected) as caught:
        align.sft(model="runs/sft/base", data=rows, out="runs/bad", quiet=True)
    assert (caught.value.stage, caught.value.exit_code) == ("sft", 2)
    assert "Traceback" not in str(caught.value)


INTERRUPTED = """
import align
align.sft(
    model="runs/sft/base",
    data=[{"prompt": f"Say {i}.", "completion": str(i)} for i in range(64)],
    out="runs/stopped",
    steps=8,
    batch_size=4,
    checkpoint_every=2,
    optim={"learning_rate": 1e-3},
)
print("finished")
"""


@pytest.mark.slow
def test_ctrl_c_is_a_keyboard_interrupt_and_the_same_call_resumes(page):
    metrics = page / "runs/stopped/sft/metrics.jsonl"
    waits = page / "waits"
    process = script(INTERRUPTED, page, **wait_at("sft/" + stage_runs.half_of(4), waits))
    limit = time.monotonic() + LIMIT_S
    try:
        while not waits.exists():
            assert process.poll() is None, process.communicate()[0][-4000:]
            assert time.monotonic() < limit
            time.sleep(0.05)
        # A notebook's stop button and a terminal signal the process alone: stages have a session.
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=LIMIT_S)
    finally:
        stage_runs.end(process)
    assert "KeyboardInterrupt: runs/stopped: stopped by a signal; the same call again" in said
    assert "finished" not in said
    before = len(metrics.read_text().splitlines())
    assert 4 <= before < 8
    said = finished(script(INTERRUPTED, page))
    assert "half-done: sft" in said
    # Every step once: the second call went on from the last checkpoint.
    steps = [row["step"] for row in stage_runs.numbers(page / "runs/stopped", "sft")]
    assert steps == list(range(1, 9))
