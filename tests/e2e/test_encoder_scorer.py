"""Stage reward on an encoder, and the readers of what it writes; held to transformers alone."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, BertModel, BertTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "numeric"))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
sys.path.insert(0, str(Path(__file__).parent))
import alone
import stage_runs as runs
from small_encoders import save_bert
from tuned_stages import ONLINE, TUNINGS, make_base, run_plain

from align.core.artifacts import Artifact, write_manifest
from align.core.errors import ArtifactError
from align.models.loading import load_tokenizer
from align.recipe.schema import Recipe
from align.recipe.schema.tuning import METHODS as CLASSES
from align.stages.base import StageContext
from align.stages.evaluate.judge import calibrate
from align.stages.evaluate.reward_cards import CardInput, build_cards
from align.stages.rollouts import build_rewards
from align.stages.tools.deep_check import check_recipe
from align.stages.tools.reward_cards import sources
from align.tuning.loading import load_reward_model

COLORS, FRAMES = ("red", "blue"), ("the {} is", "{} is the colour", "which {}", "is {} the {}")
METHODS = ("full", "head", "lora", "qlora", "bottleneck", "ia3", "loreft")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pair_rows(part: str) -> list[dict[str, Any]]:
    """Make pairs whose better answer says "good", after prompts of one part of the letters."""
    letters = {"train": "abcdefgh", "heldout": "wxyz"}[part]
    return [
        {
            "prompt": f"{letter} which {colour}",
            "chosen": frame.replace("{}", colour) + " good",
            "rejected": f"bad {frame.replace('{}', colour)}",
        }
        for letter in letters
        for colour in COLORS
        for frame in FRAMES
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Hold a decoder, an encoder with and one without its pooler, and pairs."""
    with alone.world_of_one():
        place = make_base(tmp_path_factory.mktemp("paired"))
        for name in ("train", "heldout"):
            write(place / f"{name}.jsonl", pair_rows(name))
        for name in ("bert", "poolerless"):
            path = save_bert(place / f"{name}_files", pooler=name == "bert")
            run_plain(place, {"kind": "encoder", "path": path}, name=name)
        yield place


def train(folder: Path, name: str, method: str = "full", **more: Any) -> Artifact:
    tuning = {k: v for k, v in TUNINGS.get(method, {}).items() if k != "last"}
    plain = {
        "kind": "reward",
        "init": str(folder / "bert"),
        "steps": 3,
        "batch_size": 8,
        "micro_tokens": 128,
        "max_length": 64,
        "data": [{"path": str(folder / "train.jsonl")}],
        "heldout": [{"path": str(folder / "heldout.jsonl")}],
        "optim": {"learning_rate": 1e-2, "schedule": "constant", "warmup_frac": 0.0},
        "tuning": {"method": method, **tuning},
        **more,
    }
    return run_plain(folder, plain, name=name)


_DONE: dict[str, Artifact] = {}


def artifact(folder: Path, method: str) -> Artifact:
    """Train a scorer once."""
    if method not in _DONE:
        _DONE[method] = train(folder, method, method)
    return _DONE[method]


def by_transformers(found: Artifact, texts: list[tuple[str, str]]) -> list[list[float]]:
    """Score each text by itself with transformers and peft alone, in float64: one score a head."""
    weights = load_file(found.model_dir / "model.safetensors")
    encoder: Any = BertModel(AutoConfig.from_pretrained(found.model_dir), add_pooling_layer=False)
    encoder.load_state_dict(
        {n.removeprefix("backbone."): w for n, w in weights.items() if n != "head.weight"}
    )
    if not CLASSES[found.manifest["spec"]["tuning"]["method"]].merges:
        encoder = PeftModel.from_pretrained(encoder, str(found.path / "adapter"))
    encoder.double().eval()
    tokenizer = BertTokenizer.from_pretrained(found.model_dir)
    said = []
    for prompt, answer in texts:
        with torch.no_grad():
            states = encoder(**tokenizer(prompt, answer, return_tensors="pt")).last_hidden_state
        said.append((weights["head.weight"].double() @ states[0, 0]).tolist())
    return said


def scores_of(
    folder: Path, found: Artifact, texts: list[tuple[str, str]], **spec: Any
) -> list[float | None]:
    """Score texts as any stage does that reads a reward of the recipe."""
    plain = {
        "kind": "grpo",
        "init": "base",
        **ONLINE,
        "rewards": [{"kind": "scalar", "model": str(found.path), **spec}],
    }
    recipe = Recipe.model_validate(
        {"name": "t", "stages": {"base": {"kind": "base", "path": "x"}, "it": plain}}
    )
    context = StageContext(recipe, "it", folder, 0)
    (reward,) = build_rewards(list(recipe.stages["it"].rewards), context)
    ids = [[1]] * len(texts)  # of another vocabulary, as a policy's are
    return reward(
        prompts=[p for p, _ in texts],
        completions=[a for _, a in texts],
        prompt_ids=ids,
        completion_ids=ids,
    )


def answers(part: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    rows = pair_rows(part)
    return (
        [(r["prompt"], r["chosen"]) for r in rows],
        [(r["prompt"], r["rejected"]) for r in rows],
    )


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_those_of_transformers(folder, method):
    found = artifact(folder, method)
    chosen, rejected = answers("heldout")
    expected = [by_transformers(found, side) for side in (chosen, rejected)]
    for side, known in zip((chosen, rejected), expected, strict=True):
        raw = scores_of(folder, found, side, normalize=False)
        assert raw == pytest.approx([scores[0] for scores in known], abs=5e-5)
    right = [a[0] > b[0] for a, b in zip(*expected, strict=True)]
    metrics = found.manifest["metrics"]
    if method != "qlora":  # which is watched in 4 bits
        assert metrics["eval/accuracy"] == pytest.approx(sum(right) / len(right))
    # Mean and std of both answers to the first 64 pairs (arXiv:1909.08593).
    both = torch.tensor([s for side in answers("train") for s in by_transformers(found, side)])
    assert metrics["scorer/mean"] == pytest.approx(float(both.mean()), abs=5e-5)
    assert metrics["scorer/std"] == pytest.approx(float(both.std(correction=0)), abs=5e-5)
    first, *_ = scores_of(folder, found, chosen)
    mean, std = metrics["scorer/mean"], metrics["scorer/std"]
    assert first == pytest.approx((expected[0][0][0] - mean) / std, abs=1e-3)


def test_the_first_loss_is_that_of_bradley_and_terry_on_each_pair_alone(folder):
    found = train(
        folder,
        "still",
        "head",
        optim={"learning_rate": 1e-12},
        steps=1,
        batch_size=64,
        center_coef=0.0,
    )
    chosen, rejected = (torch.tensor(by_transformers(found, side)) for side in answers("train"))
    expected = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    assert found.manifest["metrics"]["train/loss"] == pytest.approx(float(expected), abs=1e-5)


def test_a_head_alone_leaves_the_encoder_as_it_was(folder):
    kept = load_file(artifact(folder, "head").model_dir / "model.safetensors")
    before = load_file(folder / "bert" / "model" / "model.safetensors")
    below = kept.keys() - {"head.weight"}
    assert len(below) > 20
    for name in below:
        own = f"bert.{name.removeprefix('backbone.')}"
        assert torch.equal(kept[name], before[own]), name
    moved = load_file(artifact(folder, "full").model_dir / "model.safetensors")
    assert sum(torch.equal(moved[name], kept[name]) for name in kept) <= 1  # unused positions


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_preference_that_one_word_tells_is_learnt(folder, method):
    optim = {"learning_rate": 3e-3, "warmup_frac": 0.1}
    found = train(folder, f"learnt_{method}", method, steps=40, batch_size=16, optim=optim)
    assert found.manifest["metrics"]["eval/accuracy"] > 0.9


def test_heads_ties_soft_labels_noise_and_early_stopping_work_on_an_encoder(folder):
    rows = [
        row | {"tie": i % 8 == 0, "label_prob": 0.9} for i, row in enumerate(pair_rows("train"))
    ]
    found = train(
        folder,
        "many",
        "bottleneck",
        data=[{"path": write(folder / "ties.jsonl", rows)}],
        heads=2,
        tie_margin=1.1,
        noise_folds=2,
        steps=4,
        eval_every=1,
        gradient_checkpointing=True,
        keep={"dropout": 0.1, "early_stopping": {"metric": "eval/loss", "patience": 2}},
    )
    texts = answers("heldout")[0]
    numbers = json.loads((found.model_dir / "scorer.json").read_text())
    assert (numbers["reads"], len(numbers["mean"]), len(numbers["std"])) == ("first", 2, 2)
    heads = torch.tensor(by_transformers(found, texts))
    mean, std = torch.tensor(numbers["mean"]), torch.tensor(numbers["std"])
    expected = ((heads - mean) / std).min(1).values.tolist()
    assert scores_of(folder, found, texts, combine="min") == pytest.approx(expected, abs=1e-3)
    report = [json.loads(x) for x in (found.path / "noise.jsonl").read_text().splitlines()]
    assert len(report) == len(rows) - 8
    parts = {line["row"]: line["part"] for line in report}
    assert set(parts.values()) == {1, 2}


def test_answers_judged_one_by_one_teach_an_encoder(folder):
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pair_rows("train")
        for side in ("chosen", "rejected")
    ]
    data = [{"path": write(folder / "judged.jsonl", rows)}]
    optim = {"learning_rate": 3e-3, "warmup_frac": 0.1}
    found = train(
        folder,
        "judged",
        supervision="answers",
        data=data,
        heldout=[],
        steps=40,
        batch_size=16,
        optim=optim,
    )
    for side, sign in zip(answers("heldout"), (1, -1), strict=True):
        scores = [s[0] * sign for s in by_transformers(found, side)]
        assert sum(score > 0 for score in scores) > 0.9 * len(scores)


def test_a_stage_resumed_from_a_checkpoint_ends_with_the_same_bytes(folder):
    options = {"checkpoint_every": 2, "steps": 4, "keep": {"dropout": 0.2}}
    found = train(folder, "resumed", "full", **options)
    weights = found.model_dir / "model.safetensors"
    whole = weights.read_bytes()
    shutil.rmtree(max((found.path / "checkpoints").iterdir()))
    weights.unlink()
    again = train(folder, "resumed", "full", **options)
    assert weights.read_bytes() == whole
    assert again.manifest["metrics"]["eval/loss"] == found.manifest["metrics"]["eval/loss"]


def test_layers_are_frozen_and_thawed_in_an_encoder(folder):
    layers = {"freeze_first": 1, "freeze_embeddings": True, "rate_decay": 0.5}
    found = train(folder, "layered", layers=layers)
    kept = load_file(found.model_dir / "model.safetensors")
    before = load_file(folder / "bert" / "model" / "model.safetensors")
    moved = {
        name
        for name in kept.keys() - {"head.weight"}
        if not torch.equal(kept[name], before[f"bert.{name.removeprefix('backbone.')}"])
    }
    assert moved == {name for name in kept if "encoder.layer.1." in name}


def test_pairs_that_are_too_long_are_lost_and_written_down(folder):
    rows = [*pair_rows("train"), {"prompt": "a", "chosen": "good " * 70, "rejected": "bad"}]
    data = [{"path": write(folder / "long.jsonl", rows)}]
    found = train(folder, "long", "head", data=data, max_lost_frac=0.1)
    (line,) = [json.loads(x) for x in (found.path / "ledger.jsonl").read_text().splitlines()]
    assert line["source"].endswith(f"long.jsonl:{len(rows)}")
    assert (line["reason"], line["tokens"], line["max_length"]) == ("too long", 74, 64)


def test_an_encoder_without_its_pooler_will_do_and_one_that_lacks_more_will_not(folder):
    found = train(folder, "bare", "head", init=str(folder / "poolerless"))
    texts = answers("heldout")[0]
    raw = scores_of(folder, found, texts, normalize=False)
    assert raw == pytest.approx([s[0] for s in by_transformers(found, texts)], abs=5e-5)
    lacking = folder / "lacking_files"
    shutil.copytree(folder / "poolerless_files", lacking)
    weights = load_file(lacking / "model.safetensors")
    model = BertModel.from_pretrained(lacking)
    model.save_pretrained(
        lacking, state_dict={n: w for n, w in weights.items() if "layer.1." not in n}
    )
    run_plain(folder, {"kind": "encoder", "path": str(lacking)}, name="lacking")
    with pytest.raises(ArtifactError, match=r"no weights for encoder\.layer\.1.*stay random"):
        train(folder, "refused", "head", init=str(folder / "lacking"))


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_a_policy_is_reinforced_by_an_encoder(folder, kind):
    scalar = {"kind": "scalar", "model": str(artifact(folder, "bottleneck").path)}
    other = {"kind": "scalar", "model": str(artifact(folder, "lora").path), "name": "other"}
    rewards = [{"kind": "ensemble", "members": [scalar, other]}]
    more: dict[str, Any] = {"group_size": 2} if kind == "grpo" else {"kl": {"coef": 0.1}}
    plain = {"kind": kind, "init": "base", "max_length": 128, **ONLINE, "rewards": rewards, **more}
    found = run_plain(folder, plain, name=f"reinforced_{kind}")
    assert found.manifest["metrics"]["reward/disagreement"] > 0.0
    for line in (found.path / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        shown = json.loads(line)
        (asked,) = shown["prompt"]
        members = []
        for method in ("bottleneck", "lora"):
            trained = artifact(folder, method)
            ((raw,),) = by_transformers(trained, [(asked["content"], shown["completion"])])
            numbers = trained.manifest["metrics"]
            members.append((raw - numbers["scorer/mean"]) / numbers["scorer/std"])
        assert shown["score"] == pytest.approx(sum(members) / 2, abs=1e-3)


def test_a_critic_of_another_vocabulary_is_refused(folder):
    shutil.copytree(folder / "base" / "model", folder / "other" / "model")
    tokenizer = load_tokenizer(folder / "other" / "model")
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(folder / "other" / "model")
    write_manifest(folder / "other", {"kind": "policy", "spec_hash": "other", "spec": {}})
    plain = {
        "kind": "ppo",
        "init": "base",
        "max_length": 128,
        **ONLINE,
        "critic": {"init": str(folder / "other")},
    }
    with pytest.raises(ArtifactError, match="has another vocabulary than the policy"):
        run_plain(folder, plain, name="refused_critic")


def test_an_evaluation_judges_by_an_encoder_and_measures_it(folder):
    reward = str(artifact(folder, "bottleneck").path)
    pairs = [{"path": str(folder / "heldout.jsonl")}]
    sets = [
        {"prompt": r["prompt"], "chosen": [r["chosen"]], "rejected": [r["rejected"]]}
        for r in pair_rows("heldout")
    ]
    plain = {
        "kind": "evaluate",
        "models": [str(folder / "base")],
        "baseline": str(folder / "base"),
        "prompts": [{"world": "prompts", "rows": 6}],
        "samples": 2,
        "scores": [{"kind": "scalar", "model": reward}],
        "judge": [{"kind": "length", "target": 2, "limit": 12}],
        "reward_models": [reward, str(artifact(folder, "full").path)],
        "pairs": pairs,
        "sets": [{"path": write(folder / "sets.jsonl", sets)}],
        "sampling": {"engine": "hf", "max_new_tokens": 6, "temperature": 1.0},
        "max_length": 128,
    }
    found = run_plain(folder, plain, name="judged_by_it")
    cards = json.loads((found.path / "cards.json").read_text())
    for method in ("bottleneck", "full"):
        trained = artifact(folder, method)
        chosen, rejected = (by_transformers(trained, side) for side in answers("heldout"))
        right = sum(a[0] > b[0] for a, b in zip(chosen, rejected, strict=True)) / len(chosen)
        card = cards[str(trained.path)]
        assert card["pair_accuracy"][0] == pytest.approx(right)
        assert card["best_of_set_accuracy"][0] == pytest.approx(right)
        assert [point["n"] for point in card["best_of_n"]] == [1, 2]
    assert cards[reward]["agreement"]["with"] == str(artifact(folder, "full").path)


def test_a_card_counts_what_has_no_positions(folder):
    rows = [*pair_rows("heldout"), {"prompt": "a", "chosen": "good " * 70, "rejected": "bad"}]
    path = write(folder / "long_pairs.jsonl", rows)
    given = CardInput(sources([{"path": path}]), [], 1024, 1.0, 0)
    card = build_cards({"it": artifact(folder, "full")}, given)["it"]
    assert (card["num_pairs"], card["num_pairs_too_long"]) == (len(rows) - 1, 1)
    judge, data = str(artifact(folder, "full").path), sources([{"path": path}])
    found = calibrate(judge, model=None, data=data, criteria="", cache=None)
    assert found["pairs"] == len(rows)


def test_an_adapter_beside_the_encoder_is_added_wherever_scores_are_asked_for(folder):
    texts = answers("heldout")[0][:2]
    found = artifact(folder, "bottleneck")
    whole = load_reward_model(found.model_dir)
    assert type(whole.backbone).__name__ != "BertModel"
    bare = [
        s[0]
        for s in by_transformers(
            Artifact(found.path, {"spec": {"tuning": {"method": "full"}}}), texts
        )
    ]
    assert scores_of(folder, found, texts, normalize=False) != pytest.approx(bare, abs=1e-3)


def test_deep_check_passes_a_reward_stage_on_an_encoder(folder):
    bert = {"kind": "encoder", "path": str(folder / "bert_files")}
    reward = {
        "kind": "reward",
        "init": "bert",
        "steps": 4,
        "batch_size": 8,
        "max_length": 64,
        "use_margin": True,
        "data": [{"path": str(folder / "margins.jsonl")}],
    }
    rows = [row | {"margin": 0.1} for row in pair_rows("train")]
    write(folder / "margins.jsonl", rows)
    recipe = Recipe.model_validate({"name": "t", "stages": {"bert": bert, "rm": reward}})
    cards = list(check_recipe(recipe, {}))
    assert [card.stage for card in cards] == ["bert", "rm"]
    assert {line.verdict for card in cards for line in card.lines} == {"ok"}, cards
    names = [line.name for line in cards[1].lines]
    assert {"tokens", "start", "whole texts", "first loss", "packing", "margins"} <= set(names)


def test_a_decoder_that_is_called_an_encoder_is_refused(folder):
    path = str(folder / "base" / "model")
    run_plain(folder, {"kind": "encoder", "path": path}, name="no_encoder")
    with pytest.raises(ArtifactError, match="no token between"):
        train(folder, "never", "head", init=str(folder / "no_encoder"))


RANKS = """\
name: ranks
stages:
  bert: {{kind: encoder, path: x}}
  lora_{zero}: &it
    kind: reward
    init: {folder}/bert
    data: [{{path: {folder}/train.jsonl}}]
    heldout: [{{path: {folder}/heldout.jsonl}}]
    steps: 3
    batch_size: 8
    micro_tokens: 64
    max_length: 64
    heads: 2
    optim: {{learning_rate: 1.0e-2, max_grad_norm: 0.05, eps: 1.0e-4}}
    tuning: {{method: lora, rank: 4}}
    zero: {{stage: {zero}}}
    ranks: {ranks}
  full_{zero}: {{<<: *it, heads: 1, tuning: {{method: full}}}}
"""


@pytest.mark.slow
def test_zero_on_two_ranks_equals_one_process(folder, tmp_path):
    metrics = ("train/loss", "eval/loss", "eval/accuracy", "scorer/mean", "scorer/std")
    runs.two_ranks_equal_one(RANKS, folder, tmp_path, stages=("lora", "full"), metrics=metrics)
