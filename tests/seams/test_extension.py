"""The kinds that extension.py adds from outside the package work in a real recipe."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from stage_runs import BASE, environment, manifest

HERE = Path(__file__).parent
LIMIT_S = 300.0
RECIPE = f"""\
name: seams
seed: 5
stages:
{BASE}"""
RECIPE += """\
  best:
    kind: best_of_n
    init: base
    prompts: [{world: prompts, rows: 6}]
    rewards: [{kind: vowels, letters: aeiouy}]
    sampling: {max_new_tokens: 16, engine: hf}
  loha:
    kind: sft
    init: base
    data: [{stage: best}]
    steps: 3
    batch_size: 4
    tuning: {method: loha}
    optim: {learning_rate: 5.0e-2}
  german: &sft
    kind: sft
    init: base
    data: [{path: german.jsonl}]
    steps: 2
    batch_size: 4
    optim: {learning_rate: 1.0e-3}
  english:
    <<: *sft
    data: [{path: english.jsonl}]
  reinforce: &online
    kind: grpo
    init: base
    algorithm: above_greedy
    prompts: [{world: prompts, rows: 6}]
    rewards: [{kind: vowels}]
    steps: 1
    prompts_per_step: 4
    sampling: {max_new_tokens: 8, engine: hf}
    optim: {learning_rate: 1.0e-3}
  clipped:
    <<: *online
    objective: clip
  grouped:
    <<: *online
    estimator: group_relative
"""
STAGES = ("base", "best", "loha", "german", "english", "reinforce", "clipped", "grouped")
PATH = os.pathsep.join([str(HERE), os.getcwd()])
EXTENDED = {"ALIGN_EXTENSIONS": "extension", "PYTHONPATH": PATH}


def started(command: list[str], folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment() | more,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the recipe and its files: the same rows in the new format and in a known one."""
    place = tmp_path_factory.mktemp("seams")
    (place / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    rows = [(f"What is {i} and {i}?", f"It is {2 * i}.") for i in range(8)]
    for name, keys in (("german", ("frage", "antwort")), ("english", ("question", "answer"))):
        lines = [json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows]
        (place / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def runs(folder: Path) -> Path:
    """Run every stage of the recipe with the extension loaded; return the run's folder."""
    worker = HERE.parent / "e2e" / "workers" / "stages.py"
    command = [str(worker), "--recipe", "recipe.yaml", "--run-dir", "run", "--stages", *STAGES]
    done = started(command, folder, **EXTENDED)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "run"


def weights(runs: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(runs / stage / "model" / "model.safetensors")


def test_a_recipe_may_name_the_new_kinds_only_with_the_extension(folder: Path):
    check = ["-m", "align", "check", "recipe.yaml"]
    known = started(check, folder, **EXTENDED)
    assert (known.returncode, known.stderr) == (0, "")
    assert f"valid, {len(STAGES)} stages: {', '.join(STAGES)}" in known.stdout
    unknown = started(check, folder, PYTHONPATH=PATH)
    assert unknown.returncode == 2
    assert "stages.best.kind: found 'best_of_n'; expected one of base, " in unknown.stderr
    assert "stages.loha.tuning.method: found 'loha'; expected one of full, " in unknown.stderr
    assert "stages.clipped.algorithm: found 'above_greedy'; expected one of" in unknown.stderr
    missing = started(check, folder, ALIGN_EXTENSIONS="extention")
    assert missing.returncode == 2
    assert "extension 'extention' cannot be imported" in missing.stderr


def test_a_key_of_a_new_kind_is_checked_like_any_other(folder: Path):
    wrong = ["-m", "align", "check", "recipe.yaml", "--set", "stages.best.rewards.0.leters=aei"]
    found = started(wrong, folder, **EXTENDED)
    assert found.returncode == 2
    assert "stages.best.rewards.0.leters: unknown key; did you mean 'letters'?" in found.stderr


def test_a_reward_and_a_stage_of_two_places_each(runs: Path):
    text = (runs / "best" / "data.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 6

    def share(text: str) -> float:
        letters = [letter for letter in text.lower() if letter.isalpha()]
        return sum(map(letters.count, "aeiouy")) / max(1, len(letters))

    for row in rows:
        assert row["scores"] == pytest.approx([share(text) for text in row["sampled"]])
        assert share(row["completion"]) == max(map(share, row["sampled"]))
    # Samples differ, and so does what the best of them is: a stage that takes the first would fail.
    assert any(row["completion"] != row["sampled"][0] for row in rows)
    made = manifest(runs, "best")
    assert (made["kind"], made["metrics"]) == ("data", {"rows/kept": 6.0})
    assert made["spec"]["rewards"][0]["letters"] == "aeiouy"


def test_a_tuning_method_of_two_places(runs: Path):
    before, after = weights(runs, "base"), weights(runs, "loha")
    saved = load_file(runs / "loha" / "adapter" / "adapter_model.safetensors")
    changed = set()
    for name, weight in before.items():
        part = f"base_model.model.{name.removesuffix('.weight')}.hada_"
        update = torch.zeros_like(weight)
        if f"{part}w1_a" in saved:
            # alpha / rank is 2; arXiv:2108.06098 proposition 1.
            one, two = (saved[f"{part}w{i}_a"] @ saved[f"{part}w{i}_b"] for i in (1, 2))
            update = 2.0 * one * two
            changed.add(name.split(".")[-2])
            assert update.abs().max() > 1e-4
        torch.testing.assert_close(after[name], weight + update, rtol=0.0, atol=1e-6)
    assert changed == {"q_proj", "down_proj"}
    assert manifest(runs, "loha")["inputs"].keys() == {"init", "data.0.stage"}


def test_a_data_format_of_two_places(runs: Path):
    # The same rows under the names of a known format train the same model, to the last bit.
    german, english = weights(runs, "german"), weights(runs, "english")
    assert german.keys() == english.keys()
    assert all(torch.equal(german[name], english[name]) for name in german)
    base = weights(runs, "base")
    assert not all(torch.equal(german[name], base[name]) for name in german)
    (data,) = manifest(runs, "german")["data"]
    assert (data["path"], data["rows"]) == ("german.jsonl", 8)


def test_an_algorithm_of_two_places_brings_its_advantage_and_its_objective(runs: Path):
    base = weights(runs, "base")

    def moved(stage: str) -> torch.Tensor:
        after = weights(runs, stage)
        return torch.cat([(after[name] - base[name]).flatten() for name in sorted(base)])

    def metric(stage: str, name: str) -> float:
        return float(manifest(runs, stage)["metrics"][name])

    # One step from the policy that sampled: the ratio is 1, and the gradient of A x ratio is that
    # of A x log p. The update is the same, up to rounding, but the loss is another number.
    own, clipped, grouped = (moved(stage) for stage in ("reinforce", "clipped", "grouped"))
    assert own.norm() > 1e-3
    assert (own - clipped).norm() < 1e-3 * own.norm()
    # Advantages are at least 0 and log p at most 0: -A log p >= 0 >= -A.
    assert metric("clipped", "policy/loss") < 0.0 < metric("reinforce", "policy/loss")
    # The same objective with another advantage makes another update.
    assert (own - grouped).norm() > 0.1 * own.norm()
