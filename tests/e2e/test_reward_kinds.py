"""Reward stages beyond plain pairs, as real processes: label noise, heads, answers, steps."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, pstdev

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

sys.path.insert(0, str(Path(__file__).parent))
import stage_runs as runs

from align.data.toy import NUMBERS, generate
from reward_models import build_reward

NUM_PAIRS, NUM_FLIPPED = 400, 80


def write(path: Path, rows: Sequence[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def say(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Give the recipe, and a run folder whose stage base is done."""
    folder = tmp_path_factory.mktemp("kinds")
    recipe = runs.write_recipe(folder)
    runs.finish(recipe, "base", folder / "run")
    return recipe, folder


def train(base: tuple[Path, Path], *overrides: str) -> Path:
    recipe, folder = base
    runs.finish(recipe, "reward", folder / "run", overrides=overrides, flags=["--force"])
    return folder / "run" / "reward"


@pytest.mark.slow
def test_planted_label_noise_is_found_by_scorers_that_did_not_see_it(base) -> None:
    # Pairs that differ in manner, which even a model this small learns; every fifth is flipped.
    rows = []
    for example in generate("preference", rows=3 * NUM_PAIRS, seed=7):
        good, bad = (str(side[0]["content"]) for side in (example.completion, example.rejected))
        if example.columns["answer"] in bad.split("answer is ")[-1] and len(rows) < NUM_PAIRS:
            flip = len(rows) * NUM_FLIPPED % NUM_PAIRS < NUM_FLIPPED
            sides = (bad, good) if flip else (good, bad)
            rows.append(
                {
                    "prompt": example.prompt,
                    "chosen": say(sides[0]),
                    "rejected": say(sides[1]),
                    "flip": flip,
                }
            )
    assert sum(row["flip"] for row in rows) == NUM_FLIPPED
    data = write(base[1] / "noisy.jsonl", rows)
    out = train(
        base,
        f"stages.reward.data=[{{path: {data}}}]",
        "stages.reward.noise_folds=2",
        "stages.reward.steps=60",
        "stages.reward.batch_size=32",
        "stages.reward.micro_tokens=4096",
        "stages.reward.heads=2",
    )
    report = [json.loads(line) for line in (out / "noise.jsonl").read_text().splitlines()]
    assert len(report) == NUM_PAIRS
    assert {line["row"] for line in report} == {f"{data}:{i + 1}" for i in range(NUM_PAIRS)}
    chances = [line["probability"] for line in report]
    assert chances == sorted(chances, reverse=True)
    flips = {f"{data}:{i + 1}": row["flip"] for i, row in enumerate(rows)}
    flagged = [line for line in report if line["flagged"]]
    right = sum(flips[line["row"]] for line in flagged)
    # Chance finds a fifth. TUNING's figures for such reports are .79 and .74.
    assert right / len(flagged) > 0.6
    assert right / NUM_FLIPPED > 0.6
    notes = runs.manifest(base[1] / "run", "reward")["noise"]
    assert (notes["pairs"], notes["flagged"]) == (NUM_PAIRS, len(flagged))
    assert not list(out.glob("noise-*"))
    scorer = json.loads((out / "model" / "scorer.json").read_text())
    assert len(scorer["mean"]) == len(scorer["std"]) == 2


@pytest.mark.slow
def test_answers_judged_one_by_one_teach_a_scorer(base) -> None:
    rows = [
        {"prompt": example.prompt, "completion": side, "label": good}
        for example in generate("preference", rows=200, seed=8)
        for side, good in ((example.completion, True), (example.rejected, False))
    ]
    data = write(base[1] / "judged.jsonl", rows)
    train(
        base,
        f"stages.reward.data=[{{path: {data}, split: train}}]",
        f"stages.reward.heldout=[{{path: {data}, split: heldout}}]",
        "stages.reward.supervision=answers",
        "stages.reward.steps=60",
        "stages.reward.batch_size=32",
        "stages.reward.micro_tokens=4096",
    )
    found = runs.manifest(base[1] / "run", "reward")["metrics"]
    assert found["eval/accuracy"] > 0.65


@pytest.mark.slow
def test_steps_judged_one_by_one_teach_a_process_reward(base) -> None:
    # A step is right where it says "good": what a model this small can see at once.
    rows = [
        {
            "prompt": f"what is {NUMBERS[i % 7]}?",
            "steps": [
                {
                    "text": f"step {NUMBERS[j]} is {'good' if j < i % 4 else 'bad'}.",
                    "label": j < i % 4,
                }
                for j in range(3)
            ],
        }
        for i in range(120)
    ]
    out = train(
        base,
        f"stages.reward.data=[{{path: {write(base[1] / 'steps.jsonl', rows)}}}]",
        "stages.reward.supervision=steps",
        "stages.reward.norm_prompts=64",
        "stages.reward.steps=40",
        "stages.reward.batch_size=16",
        "stages.reward.micro_tokens=4096",
    )
    reward = build_reward({"kind": "process", "model": str(out / "model"), "aggregate": "min"})
    asked = [{"role": "user", "content": "what is two?"}]
    good, bad = ("step zero is good.\nstep one is good.", "step zero is good.\nstep one is bad.")
    scores = reward(prompts=[asked, asked], completions=[say(good), say(bad)])
    assert scores[0] > 0.5 > scores[1]
    for score, tokens in zip(scores, reward.token_rewards, strict=True):
        assert sum(tokens) == pytest.approx(score)


def test_scores_are_normalized_on_responses_that_the_policy_writes(base) -> None:
    asked = [example.prompt for example in generate("preference", rows=5, seed=9)]
    # A prompt counts once, however many pairs it has.
    pairs = [
        {"prompt": prompt, "chosen": say(f"yes {word}."), "rejected": say(f"no {word}.")}
        for i, prompt in enumerate(asked)
        for word in NUMBERS[: i + 1]
    ]
    out = train(
        base,
        f"stages.reward.data=[{{path: {write(base[1] / 'pairs.jsonl', pairs)}}}]",
        "stages.reward.norm_prompts=64",
        "stages.reward.norm_sampling={engine: hf, max_new_tokens: 5, temperature: 0}",
    )
    # The same by transformers alone: greedy responses of the base, scored one by one.
    policy_dir, model_dir = base[1] / "run" / "base" / "model", out / "model"
    tokenizer = AutoTokenizer.from_pretrained(policy_dir)
    policy = AutoModelForCausalLM.from_pretrained(policy_dir)
    scorer = AutoModelForSequenceClassification.from_pretrained(model_dir)
    scores = []
    for prompt in asked:
        given = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            whole = policy.generate(**given, max_new_tokens=5, do_sample=False)
            scores.append(scorer(input_ids=whole).logits.item())
    assert len(set(scores)) == len(asked)
    found = runs.manifest(base[1] / "run", "reward")["metrics"]
    assert found["scorer/mean"] == pytest.approx(mean(scores), abs=1e-5)
    assert found["scorer/std"] == pytest.approx(pstdev(scores), abs=1e-5)
