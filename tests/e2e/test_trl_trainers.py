"""Every trainer of TRL as a stage: it trains, leaves a policy, and resumes to the same bytes."""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "numeric"))
import alone
import stage_runs as runs

from align.core import distributed as signals
from align.core.artifacts import read_artifact
from align.core.errors import DataError, Preempted, RecipeError
from align.core.types import Example
from align.data.load import load_examples
from align.data.toy import generate
from align.models.loading import load_policy, load_tokenizer
from align.recipe.load import load_recipe
from align.stages.base import StageContext, chat_format, run_stage
from align.stages.trl import stage as trl
from align.stages.trl.trainers import build_trainer, configuration, find_trainer, load_model

LENGTH = "rewards: [{kind: length, target: 2, limit: 12}]"
SHORT = "max_completion_length: 12"
TRAINERS = {
    "SFT": ("sft", "", ""),
    "DPO": ("preference", "", ""),
    "KTO": ("unpaired", "", ""),
    "RLOO": ("prompts", LENGTH, f"num_generations: 2, {SHORT}"),
    "GRPO": ("prompts", LENGTH, f"num_generations: 2, {SHORT}"),
    "Distillation": ("prompts", "teacher: taught", SHORT),
    "CPO": ("preference", "", ""),
    "ORPO": ("preference", "", ""),
    "TPO": ("preference", "columns: [reference]", ""),
    "OnlineDPO": ("prompts", LENGTH, "max_new_tokens: 12"),
    "GKD": ("sft", "teacher: taught", "max_new_tokens: 12"),
    "GOLD": ("sft", "teacher: taught", SHORT),
    "A2PO": ("prompts", LENGTH, SHORT),
    "GMPO": ("prompts", LENGTH, f"num_generations: 2, {SHORT}"),
    "SDFT": ("prompts", "", f"num_generations: 2, {SHORT}"),
    # Its usual teacher, a moving average, is in no checkpoint (see below).
    "SDPO": ("prompts", LENGTH, f"num_generations: 2, teacher_model_kind: base, {SHORT}"),
}
UNRESUMABLE = {"IWOPD": ("sft", "teacher: taught", SHORT)}
STAGE = """\
  {name}:
    kind: trl
    trainer: {name}
    init: base
    rows: {rows}
    data: [{{path: FOLDER/{rows}.jsonl}}]
    steps: 3
    batch_size: 4
    micro_batch_size: 2
    checkpoint_every: 1
    optim: {{learning_rate: 1.0e-3}}
    args: {{{args}}}
    {extra}
"""
TAUGHT = STAGE.format(name="SFT", rows="sft", args="", extra="").replace("  SFT:", "  taught:")
RECIPE = (
    runs.RECIPE.partition("  sft:")[0]
    + TAUGHT.replace("1.0e-3", "1.0e-2")
    + "".join(
        STAGE.format(name=name, rows=rows, extra=extra, args=args)
        for name, (rows, extra, args) in (TRAINERS | UNRESUMABLE).items()
    )
)


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainers")
    pairs = [
        {
            "prompt": e.prompt,
            "chosen": e.completion,
            "rejected": e.rejected,
            "reference": e.completion,
        }
        for e in generate("preference", rows=24, seed=1, split="train")
    ]
    write(folder / "preference.jsonl", pairs)
    write(
        folder / "unpaired.jsonl",
        [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in pairs
            for side in ("chosen", "rejected")
        ],
    )
    write(
        folder / "prompts.jsonl",
        [
            {"prompt": row["prompt"], "privileged_context": row["chosen"][0]["content"]}
            for row in pairs
        ],
    )
    write(
        folder / "sft.jsonl",
        [
            {"prompt": e.prompt, "completion": e.completion}
            for e in generate("sft", rows=24, seed=1, split="train")
        ],
    )
    write(folder / "text.jsonl", [{"text": f"one two {i}"} for i in range(8)])
    path = folder / "trainers.yaml"
    path.write_text(RECIPE.replace("FOLDER", str(folder)))
    return path


def run(recipe: Path, stage: str, run_dir: Path, *changes: str) -> None:
    """Run one stage in this process."""
    kind = load_recipe(recipe).stages[stage].kind
    given = argparse.Namespace(
        recipe=str(recipe),
        stage=stage,
        runs=run_dir.parent,
        run_dir=str(run_dir),
        resolved=None,
        force=False,
        overrides=[f"stages.{stage}.{change}" for change in changes],
    )
    assert run_stage(kind, given) == 0


@pytest.fixture(scope="module")
def run_dir(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Train a base and a teacher, in a world of one."""
    with alone.world_of_one():
        folder = tmp_path_factory.mktemp("run")
        for stage in ("base", "taught"):
            run(recipe, stage, folder)
        yield folder


@pytest.fixture
def fresh(run_dir: Path, tmp_path: Path) -> Path:
    """Give a run of its own that has the base and the teacher."""
    for stage in ("base", "taught"):
        (tmp_path / stage).symlink_to(run_dir / stage)
    return tmp_path


def numbers(run_dir: Path, stage: str) -> list[dict[str, float]]:
    """Give the metrics without the times, TRL's own among them."""
    timed = ("step_time", "_per_second", "_runtime")
    lines = runs.numbers(run_dir, stage)
    return [{k: v for k, v in line.items() if not k.endswith(timed)} for line in lines]


def resumed(recipe: Path, whole: Path, part: Path, name: str, *changes: str) -> None:
    """Run a stage, and once more from what is left of it when it is killed after two steps."""
    run(recipe, name, whole, *changes)
    (part / name / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / name / "begun.json", part / name)
    kept = whole / name / "checkpoints" / "checkpoint-2"
    shutil.copytree(kept, part / name / "checkpoints" / kept.name)
    shutil.copy(whole / name / "metrics.jsonl", part / name)
    run(recipe, name, part, *changes)
    assert runs.weights(part, name) == runs.weights(whole, name)
    assert numbers(part, name) == numbers(whole, name)
    assert [line["step"] for line in numbers(whole, name)] == [1, 2, 3]


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_trains_leaves_a_policy_and_resumes_to_the_same_bytes(
    recipe: Path, run_dir: Path, fresh: Path, name: str
) -> None:
    resumed(recipe, run_dir, fresh, name)
    # A next stage reads it as it reads every policy, and it has moved.
    found = read_artifact(run_dir / name, "policy")
    load_policy(found.model_dir, dtype="float32")
    before, after = (load(runs.weights(run_dir, stage)) for stage in ("base", name))
    assert max(float((after[k] - before[k]).abs().max()) for k in before) > 1e-4


@pytest.fixture
def second(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give another run that has the base and the teacher."""
    folder = tmp_path_factory.mktemp("second")
    for stage in ("base", "taught"):
        (folder / stage).symlink_to(run_dir / stage)
    return folder


OTHERS = ("rslora", "dora", "ia3", "oft", "vera")
TUNED = [*((name, "lora") for name in TRAINERS), *(("KTO", method) for method in OTHERS)]


@pytest.mark.parametrize(("name", "method"), TUNED)
def test_a_tuned_policy_is_saved_merged_and_resumes_to_the_same_bytes(
    recipe: Path, fresh: Path, second: Path, name: str, method: str
) -> None:
    resumed(recipe, fresh, second, name, f"tuning.method={method}")
    base = load_policy(fresh / "base" / "model", dtype="float32")
    before = {k: v.clone() for k, v in base.state_dict().items()}
    # peft's own loading and merging of the adapter says what model/ must hold.
    tuned = peft.PeftModel.from_pretrained(base, str(fresh / name / "adapter"))
    merged = tuned.merge_and_unload().state_dict()
    saved = load(runs.weights(fresh, name))
    for key, tensor in saved.items():
        torch.testing.assert_close(tensor, merged[key], rtol=0.0, atol=1e-6, msg=key)
    moved = {k for k in saved if not torch.equal(saved[k], before[k])}
    assert moved
    assert all("proj" in k for k in moved), moved


@pytest.mark.parametrize(
    ("name", "change", "after", "checkpoints"),
    [
        # 4 passes on one generation, 2 passes a step: whole after every second step.
        ("GRPO", "args.steps_per_generation=4", 2, ["checkpoint-2"]),
        ("SDPO", "args.teacher_model_kind=ema", 1, []),
        ("IWOPD", "keep_checkpoints=2", 1, []),
    ],
)
def test_a_stopped_trainer_goes_on_only_from_what_holds_all_of_it(
    recipe: Path,
    run_dir: Path,
    fresh: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    change: str,
    after: int,
    checkpoints: list[str],
) -> None:
    with pytest.raises(
        RecipeError, match=r"not in a checkpoint|lack the second model|again at its first batch"
    ):
        run(recipe, name, fresh, change)
    changes = (change, "checkpoint_every=0")
    whole = fresh / "whole"
    whole.mkdir()
    for stage in ("base", "taught"):
        (whole / stage).symlink_to(run_dir / stage)
    run(recipe, name, whole, *changes)
    shutil.rmtree(fresh / name)
    monkeypatch.setattr(signals, "_asked", True)
    with pytest.raises(Preempted, match=rf"after step {after}\. Run again"):
        run(recipe, name, fresh, *changes)
    monkeypatch.setattr(signals, "_asked", False)
    found = [folder.name for folder in (fresh / name / "checkpoints").glob("checkpoint-*")]
    assert found == checkpoints
    run(recipe, name, fresh, *changes)
    assert runs.weights(fresh, name) == runs.weights(whole, name)
    assert numbers(fresh, name) == numbers(whole, name)


def test_pairs_end_in_one_stop_token_where_the_template_writes_a_line_break_after_it(
    recipe: Path, run_dir: Path, tmp_path: Path
) -> None:
    loaded = load_recipe(recipe)
    spec, context = loaded.stages["ORPO"], StageContext(loaded, "ORPO", tmp_path, 0)
    source = read_artifact(run_dir / "base", "policy").model_dir
    chat, (trainer_class, config_class) = chat_format(source), find_trainer("ORPO")
    examples = load_examples(spec.data, kind="preference", seed=0)
    rows = build_trainer(
        trainer_class,
        where="x",
        model=load_model(source, spec),
        args=configuration(config_class, spec, context),
        train_dataset=trl.to_dataset(examples, spec),
        processing_class=load_tokenizer(source),
    ).train_dataset
    (stop,) = chat.stop_token_ids
    assert rows[0]["chosen_input_ids"].count(stop) == 2
    for row, example in zip(trl.end_once(rows, chat), examples, strict=True):
        pair = chat.pair_row(example)
        for side, own in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            ids, labels = row[f"{side}_input_ids"], row[f"{side}_labels"]
            assert len(ids) == len(labels) == len(row[f"{side}_attention_mask"])
            said = [token for token, kept in zip(own.input_ids, own.trained, strict=True) if kept]
            trained = [token for token in labels if token != -100]
            # TRL trains the template's line break after the stop as well.
            assert trained[: len(said)] == said
            assert trained[len(said) :] in ([], list(chat.tokenizer("\n")["input_ids"]))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("GKD", ["teacher=null"], "GKDTrainer learns from teacher; give teacher"),
        ("RLOO", ["rewards=[]"], "RLOOTrainer learns from rewards; give rewards"),
        ("KTO", ["teacher=taught"], "KTOTrainer takes no teacher_model; remove teacher"),
        ("SFT", ["trainer=Reward"], "TRL's Reward trains a reward model"),
        ("SFT", ["trainer=AsyncGRPO"], "samples from a separate vLLM server"),
        ("TPO", ["columns=[]"], "TPOTrainer refuses its data or arguments"),
        ("TPO", ["columns=[gold]"], "no column 'gold', which 'columns' names; the row has refer"),
        ("ORPO", ["rows=sft", "data=[{path: FOLDER/sft.jsonl}]"], "ORPOTrainer refuses its data"),
        ("GKD", ["data=[{path: FOLDER/text.jsonl}]"], "plain text, but TRL's GKD reads conv"),
        ("GRPO", ["columns=[a]"], "columns: has no effect"),
        ("SFT", ["tuning.method=prefix"], "tuning.method prefix is not for trainers of TRL"),
        ("SFT", ["args={save_only_model: true}"], "save_only_model are set by the stage's own"),
    ],
)
def test_what_a_trainer_cannot_do_is_refused_with_the_reason(
    recipe: Path, fresh: Path, name: str, changes: list[str], said: str
) -> None:
    with pytest.raises((RecipeError, DataError), match=re.escape(said)):
        run(recipe, name, fresh, *(c.replace("FOLDER", str(recipe.parent)) for c in changes))
    assert not (fresh / name / "manifest.json").exists()


def test_plain_text_trains_as_plain_text(recipe: Path, fresh: Path) -> None:
    run(recipe, "SFT", fresh, f"data=[{{path: {recipe.parent}/text.jsonl}}]")
    assert [line["step"] for line in numbers(fresh, "SFT")] == [1, 2, 3]


def test_a_dataset_has_the_columns_of_every_row() -> None:
    asked: Any = [{"role": "user", "content": "q"}]
    said: Any = [{"role": "assistant", "content": "a"}]
    spec: Any = SimpleNamespace(trainer="GRPO", rows="prompts", columns=[])
    rows = [Example(asked, columns={"text": "a"}), Example(asked, columns={"answer": "4"})]
    found = trl.to_dataset(rows, spec)
    assert (found["answer"], found["text"]) == ([None, "4"], ["a", None])
    assert found["prompt"] == [asked, asked]
    mixed = [Example([], [*asked, *said], source="f:1"), Example(asked, said, source="f:2")]
    spec = SimpleNamespace(trainer="SFT", rows="sft", columns=[])
    with pytest.raises(DataError, match=r"f:2: a row without 'messages', but f:1 has it"):
        trl.to_dataset(mixed, spec)
