"""Stages that make data, and trainers of TRL as stages: run as processes, killed and resumed."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

sys.path.insert(0, str(Path(__file__).parent))
import stage_runs as runs
from test_deep_check import deep

from align.core.errors import EXIT_PREEMPTED, DataError, RecipeError
from align.data.toy import generate
from align.recipe.load import load_recipe
from align.stages.base import StageContext, prepare_and_train
from align.stages.rollouts import build_rewards
from align.stages.tools.deep_check import check_recipe
from align.stages.trl.trainers import configuration, extras, find_trainer

RECIPE = (
    runs.RECIPE.partition("  sft:")[0].replace("steps: 4", "steps: 40")
    + """\
  self_instruct:
    kind: self_instruct
    init: base
    seeds: [{path: FOLDER/seeds.jsonl}]
    target: 500
    prompts_per_round: 12
    max_rounds: 4
    examples: 3
    grown_examples: 1
    answer_examples: 2
    min_words: 1
    wording: {head: "", item: "{instruction}. ", solved: "{instruction}. it is {answer}. "}
    sampling: {max_new_tokens: 24, engine: hf}
    max_length: 120
  curate:
    kind: curate
    data: [{path: FOLDER/rows.jsonl}]
    words: {min: 2, max: 12}
    quality: [{kind: length, target: 3, limit: 12}]
    min_quality: 0.2
    diversity: {rows: 12, min_distance: 0.05}
  weak_label:
    kind: weak_label
    of: preference
    data: [{path: FOLDER/pairs.jsonl}]
    functions:
      - {by: {kind: regex, name: polite, pattern: '^(sure|of course|gladly)'}}
      - {by: {kind: length, target: 4, limit: 14}}
      - {by: {kind: regex, name: finished, pattern: '[.]$'}}
    min_confidence: 0.6
  dpo:
    kind: dpo
    init: base
    data: [{stage: weak_label}]
    steps: 2
    batch_size: 4
  trl:
    kind: trl
    trainer: KTO
    init: base
    rows: unpaired
    data: [{path: FOLDER/unpaired.jsonl}]
    steps: 6
    batch_size: 8
    micro_batch_size: 4
    checkpoint_every: 2
    optim: {learning_rate: 1.0e-3}
  orpo:
    kind: trl
    trainer: ORPO
    init: base
    rows: preference
    data: [{path: FOLDER/pairs.jsonl}]
    heldout: [{path: FOLDER/heldout.jsonl}]
    steps: 2
    batch_size: 8
    micro_batch_size: 4
  whole_sft:
    kind: trl
    trainer: SFT
    init: base
    rows: sft
    data: [{path: FOLDER/messages.jsonl}]
    steps: 2
  answers_sft:
    kind: trl
    trainer: SFT
    init: base
    rows: sft
    data: [{path: FOLDER/rows.jsonl}]
    steps: 2
"""
)


def rouge_l(a: str, b: str) -> float:
    """Give the F-measure of the longest common subsequence of words, by its recursion."""
    one, two = (re.findall(r"\w+", text.lower()) for text in (a, b))
    table = {(i, j): 0 for i in range(len(one) + 1) for j in range(len(two) + 1)}
    for i, x in enumerate(one, 1):
        for j, y in enumerate(two, 1):
            same = table[i - 1, j - 1] + 1
            table[i, j] = same if x == y else max(table[i - 1, j], table[i, j - 1])
    return 2 * table[len(one), len(two)] / max(len(one) + len(two), 1)


def write(path: Path, rows: list[dict]) -> list[dict]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("making")
    pairs = [
        {"prompt": e.prompt, "chosen": e.completion, "rejected": e.rejected}
        for e in generate("preference", rows=120, seed=1, split="train")
    ]
    # Every fourth label is turned: what the judges are to find out.
    for row in pairs[::4]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    write(folder / "pairs.jsonl", pairs)
    write(
        folder / "heldout.jsonl",
        [
            {"prompt": e.prompt, "chosen": e.completion, "rejected": e.rejected}
            for e in generate("preference", rows=8, seed=1, split="heldout")
        ],
    )
    write(
        folder / "unpaired.jsonl",
        [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in pairs
            for side in ("chosen", "rejected")
        ],
    )
    rows = write(
        folder / "rows.jsonl",
        [
            {"prompt": e.prompt, "completion": e.completion}
            for e in generate("sft", rows=30, seed=1, split="train")
        ],
    )
    write(folder / "rows.jsonl", [*rows, rows[0], rows[1]])
    write(
        folder / "messages.jsonl",
        [{"messages": [*row["prompt"], *row["completion"]]} for row in rows],
    )
    seeds = [
        {"prompt": e.prompt[0]["content"].strip(".?"), "completion": e.columns["answer"]}
        for e in generate("sft", rows=20, seed=2, split="train")
    ]
    turns = [{"role": r, "content": "x"} for r in ("user", "assistant", "user", "assistant")]
    write(
        folder / "seeds.jsonl", [*seeds, seeds[3], {"prompt": turns[:3], "completion": turns[3:]}]
    )
    path = folder / "making.yaml"
    path.write_text(RECIPE.replace("FOLDER", str(folder)))
    return path


@pytest.fixture(scope="module")
def run_dir(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    runs.finish(recipe, "base", folder)
    return folder


def test_self_instruct_accounts_for_every_candidate_and_resumes_to_the_same_rows(
    recipe, run_dir
) -> None:
    folder = run_dir / "self_instruct"
    code, _ = runs.interrupt(recipe, "self_instruct", run_dir, signal.SIGKILL, runs.half_of(2))
    assert code == -signal.SIGKILL
    assert "resumed from" in runs.finish(recipe, "self_instruct", run_dir)
    rows, ledger = read(folder / "data.jsonl"), read(folder / "ledger.jsonl")
    candidates = [row["provenance"]["name"] for row in rows]
    candidates += [line["source"] for line in ledger if line["source"].startswith("round")]
    assert sorted(candidates) == sorted(f"round {r}, {i}" for r in range(4) for i in range(12))
    # The two seeds that leave, below; nothing else does before the first round.
    assert [(line["source"].rpartition(":")[2], line["reason"]) for line in ledger[:2]] == [
        ("21", "seed twice"),
        ("22", "seed of several turns"),
    ]
    assert len(rows) + len(ledger) == 4 * 12 + 2
    assert [row["provenance"]["round"] for row in rows] == sorted(
        row["provenance"]["round"] for row in rows
    )
    instructions = [row["prompt"][0]["content"] for row in rows]
    assert len(set(instructions)) == len(instructions)
    known = {
        f"{recipe.parent}/seeds.jsonl:{i + 1}": row["prompt"]
        for i, row in enumerate(read(recipe.parent / "seeds.jsonl")[:20])
    }
    for row, text in zip(rows, instructions, strict=True):
        origin = row["provenance"]
        # Seeds and what was kept before; candidates that later left for their answer count too.
        likeness = {name: rouge_l(text, other) for name, other in known.items()}
        assert max(likeness.values()) < 0.7
        assert set(origin["examples"]) <= known.keys()
        assert len(origin["examples"]) == 3
        assert origin["model"] == runs.manifest(run_dir, "base")["spec_hash"]
        known[origin["name"]] = text
    before = (folder / "data.jsonl").read_bytes(), (folder / "ledger.jsonl").read_bytes()
    runs.finish(recipe, "self_instruct", run_dir, flags=["--force"])
    assert before == ((folder / "data.jsonl").read_bytes(), (folder / "ledger.jsonl").read_bytes())


def test_curate_writes_each_row_to_the_data_or_to_the_ledger(recipe, run_dir) -> None:
    runs.finish(recipe, "curate", run_dir)
    folder = run_dir / "curate"
    rows, ledger = read(folder / "data.jsonl"), read(folder / "ledger.jsonl")
    places = [row["from"] for row in rows] + [entry["source"] for entry in ledger]
    assert sorted(places) == sorted(f"{recipe.parent}/rows.jsonl:{i}" for i in range(1, 33))
    assert 0 < len(rows) <= 12
    reasons = {entry["source"].rpartition(":")[2]: entry["reason"] for entry in ledger}
    # Rows 31 and 32 repeat rows 1 and 2, so of each two one must have left as a near-duplicate,
    # unless both had left before for their length or quality.
    for late, early in (("31", "1"), ("32", "2")):
        assert reasons[late] in ("near-duplicate", reasons.get(early))
    for row in rows:
        count = len(row["completion"][0]["content"].split())
        assert 2 <= count <= 12
        # The reward `length` falls linearly from 1 at 3 words to 0 at 12.
        assert row["quality"] == pytest.approx(min(1.0, (12 - count) / 9))
        assert row["quality"] >= 0.2


def test_weak_labels_turn_wrong_pairs_and_train_with_their_probability(recipe, run_dir) -> None:
    runs.finish(recipe, "weak_label", run_dir)
    rows = read(run_dir / "weak_label" / "data.jsonl")
    metrics = runs.manifest(run_dir, "weak_label")["metrics"]
    given = read(recipe.parent / "pairs.jsonl")
    turned = [
        r for r in rows if r["chosen"] != given[int(r["from"].rpartition(":")[2]) - 1]["chosen"]
    ]
    # What was turned before is turned back where manner shows it; the rest differs in correctness.
    wrong = {f"{recipe.parent}/pairs.jsonl:{i}" for i in range(1, 121, 4)}
    assert len(turned) >= 15
    assert {row["from"] for row in turned} <= wrong
    assert all(row["votes"]["polite"] == 0 for row in turned)
    assert all(0.6 <= row["label_prob"] <= 1.0 for row in rows)
    # Politeness sides with the generating rule; the given order is wrong in a quarter of the rows.
    assert metrics["polite/accuracy"] > metrics["given/accuracy"]
    runs.finish(recipe, "dpo", run_dir)
    inputs = runs.manifest(run_dir, "dpo")["inputs"]
    assert inputs["data.0.stage"]["path"] == "weak_label"


def test_every_stage_is_checked_before_it_begins(recipe, run_dir, tmp_path) -> None:
    os.symlink(run_dir, tmp_path / "tiny")
    code, said = deep(recipe, tmp_path)
    assert code == 0, said
    # weak_label has run in a test above, or dpo has to wait for it.
    assert said.splitlines()[-1] in (
        "9 of 9 stages checked",
        "8 of 9 stages checked; not checkable yet: dpo",
    )
    cards = {part.partition(" (")[0]: part for part in re.split(r"\n(?=\w+ \()", "\n" + said)}
    for stage in ("trl", "orpo", "answers_sft"):
        for line in ("rows", "trained tokens", "stop tokens", "template", "start"):
            assert re.search(rf"ok +{line}", cards[stage]), cards[stage]
    # Of a conversation TRL's SFT trains the questions as well.
    assert "warn     trained tokens" in cards["whole_sft"]
    assert "also trains tokens that are not the assistant's" in cards["whole_sft"]
    for line in ("seeds", "stop tokens", "sampler"):
        assert line in cards["self_instruct"]
    assert re.search(r"ok +quality length +16 of 16 rows scored", cards["curate"])
    assert re.search(r"ok +votes of polite", cards["weak_label"])


@pytest.mark.parametrize(
    ("stage", "change", "line", "remedy"),
    [
        ("curate", "words={min: 500}", "words", "no row would be kept"),
        ("curate", "quality=[{kind: exact_match, column: gone}]", "preparation", "gone"),
    ],
)
def test_data_that_cannot_be_made_fails_before_the_stage(
    recipe, tmp_path, stage, change, line, remedy
) -> None:
    (card,) = check_recipe(load_recipe(recipe, [f"stages.{stage}.{change}"]), {}, only=stage)
    (failed,) = card.failed
    assert (failed.name, remedy in failed.remedy) == (line, True), card


def test_judges_that_never_vote_warn_before_the_stage_and_stop_it(recipe, tmp_path) -> None:
    silent = "{by: {kind: regex, name: NAME, pattern: 'q(zz)q'}}"
    functions = ", ".join(silent.replace("NAME", name) for name in "abc")
    loaded = load_recipe(
        recipe, ["stages.weak_label.use_given=false", f"stages.weak_label.functions=[{functions}]"]
    )
    (card,) = check_recipe(loaded, {}, only="weak_label")
    assert [line.name for line in card.lines if line.verdict == "warn"] == [
        "votes of a",
        "votes of b",
        "votes of c",
        "votes",
    ]
    context = StageContext(loaded, "weak_label", tmp_path, 0)
    context.out.mkdir()
    with pytest.raises(DataError, match="no function gave any vote"):
        prepare_and_train(loaded.stages["weak_label"], context)


def test_rows_that_trl_would_cut_at_its_own_limit_stop_the_stage(recipe, run_dir, tmp_path) -> None:
    # The recipe says no max_length; KTO's own is 1024 tokens.
    long = {"prompt": "q", "completion": "a b c d " * 500, "label": True}
    path = tmp_path / "long.jsonl"
    write(path, [{"prompt": "q", "completion": "a", "label": False}, long, long])
    loaded = load_recipe(recipe, [f"stages.trl.data=[{{path: {path}}}]"])
    (card,) = check_recipe(loaded, {"base": run_dir / "base"}, only="trl")
    (failed,) = card.failed
    assert f"2 of 3 rows are longer than max_length 1024: {path}:2 (" in failed.remedy


@pytest.mark.slow
def test_a_trainer_of_trl_resumes_to_the_same_weights_and_passes_over_damage(
    recipe, run_dir, tmp_path
) -> None:
    runs.finish(recipe, "trl", run_dir)
    (tmp_path / "base").symlink_to(run_dir / "base")
    # A signal after the first step saves a checkpoint of its own.
    code, said = runs.interrupt(recipe, "trl", tmp_path, signal.SIGTERM, "metrics.jsonl")
    assert code == EXIT_PREEMPTED, said[-3000:]
    newest = max(
        (tmp_path / "trl" / "checkpoints").glob("checkpoint-*"),
        key=lambda p: int(p.name.split("-")[1]),
    )
    assert (newest / "hashes.json").exists()
    damaged = newest.with_name("checkpoint-5")
    shutil.copytree(newest, damaged)
    (damaged / "model.safetensors").unlink()
    said = runs.finish(recipe, "trl", tmp_path)
    assert "checkpoint-5: damaged (model.safetensors is missing)" in said
    assert f"resumed from {newest}" in said
    assert runs.weights(tmp_path, "trl") == runs.weights(run_dir, "trl")
    steps = [line["step"] for line in runs.numbers(tmp_path, "trl")]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_an_experimental_trainer_runs(recipe, run_dir) -> None:
    runs.finish(recipe, "orpo", run_dir, kind="trl")
    assert "eval/loss" in runs.numbers(run_dir, "orpo")[-1]
    assert runs.manifest(run_dir, "orpo")["kind"] == "policy"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "method"),
    [(2, "full"), pytest.param(3, "full", marks=pytest.mark.long), (3, "lora")],
)
def test_a_trainer_of_trl_under_zero_on_two_ranks_equals_one_process(
    recipe, run_dir, tmp_path, stage, method
) -> None:
    """ORPO's loss is a mean over pairs, so ranks and accumulation must not change it."""
    tuning = [f"stages.orpo.tuning.method={method}"]
    if method != "full":
        (tmp_path / "one").mkdir()
        (tmp_path / "one" / "base").symlink_to(run_dir / "base")
        run_dir = tmp_path / "one"
    if not (run_dir / "orpo" / "manifest.json").exists():
        runs.finish(recipe, "orpo", run_dir, kind="trl", overrides=tuning)
    (tmp_path / "base").symlink_to(run_dir / "base")
    changes = ["stages.orpo.ranks=2", f"stages.orpo.zero.stage={stage}", *tuning]
    runs.finish(recipe, "orpo", tmp_path, kind="trl", ranks=2, overrides=changes)
    one, two = (runs.numbers(folder, "orpo") for folder in (run_dir, tmp_path))
    for name in ("train/loss", "optim/grad_norm"):
        found = [line[name] for line in two if name in line]
        assert found == pytest.approx([line[name] for line in one if name in line], rel=2e-3)
    one, two = (load(runs.weights(folder, "orpo")) for folder in (run_dir, tmp_path))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0.0, atol=2e-5, msg=name)


def trainer_arguments(recipe: Path, change: str, folder: Path) -> None:
    """Build what a trainer of TRL is given, without a model."""
    loaded = load_recipe(recipe, [f"stages.trl.{change}"])
    spec, context = loaded.stages["trl"], StageContext(loaded, "trl", folder, 0)
    trainer_class, config_class = find_trainer(spec.trainer)
    configuration(config_class, spec, context)
    extras(
        trainer_class,
        spec,
        model_dir=folder,
        context=context,
        rewards=build_rewards(spec.rewards, context),
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("trainer=Orpo", "did you mean ORPO?"),
        ("trainer=Nonsense", "has no NonsenseTrainer; stable ones are DPO"),
        ("args={bta: 1}", "KTOConfig has no argument bta"),
        ("rewards=[{kind: repetition}]", "KTOTrainer takes no reward_funcs; remove rewards"),
    ],
)
def test_what_a_trainer_does_not_take_is_told(recipe, tmp_path, change, said) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)):
        trainer_arguments(recipe, change, tmp_path)
