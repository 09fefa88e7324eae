"""A TRL GRPO script's rewards and data, unchanged, and losses of one's own, in real stages."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from stage_runs import environment

# As such scripts look: rewards of conversations by column, an async one, data made by a function.
SCRIPT = '''
"""GRPO on a handful of sums."""
import asyncio
import re

SYSTEM = "Reason inside <think> tags, then answer inside <answer> tags."


def make_conversation(example):
    return {
        "prompt": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": example["problem"]},
        ],
        "solution": example["solution"],
    }


def format_reward(completions, **kwargs):
    """Reward what has tags."""
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(r"^<think>.*?</think>", c, re.DOTALL) else 0.0 for c in contents]


async def accuracy_reward(prompts, completions, completion_ids, solution, trainer_state, **kwargs):
    await asyncio.sleep(0)
    assert [p[-1]["role"] for p in prompts] == ["user"] * len(prompts)
    assert len(completion_ids) == len(completions)
    rewards = []
    for completion, right in zip(completions, solution):
        said = set(completion[0]["content"])
        rewards.append(None if not said else len(said) / 10 + len(right))
    return rewards


class Length:
    def __init__(self, limit=10):
        self.__name__, self.limit = "length", limit

    def __call__(self, prompts, completions, **kwargs):
        return [-abs(self.limit - len(completion[0]["content"])) / 10 for completion in completions]


if __name__ == "__main__":
    from datasets import load_dataset
    from trl import GRPOConfig, GRPOTrainer

    data = load_dataset("json", data_files="problems.jsonl", split="train").map(make_conversation)
    trainer = GRPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=[format_reward, accuracy_reward, Length()],
        args=GRPOConfig(output_dir="out"),
        train_dataset=data,
    )
    trainer.train()
'''
LOSSES = """
import torch

def centered(scores, group_ids):
    found = torch.zeros_like(scores)
    for group in group_ids.unique():
        own = group_ids == group
        found[own] = scores[own] - scores[own].mean()
    return found

def surrogate(logprobs, old_logprobs, advantages, mask, *, clip_low, clip_high):
    ratio = (logprobs - old_logprobs).exp()
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(ratio * advantages, bounded * advantages)

def sigmoid(policy_chosen, policy_rejected, ref_chosen, ref_rejected, *, beta):
    margin = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    return -torch.nn.functional.logsigmoid(beta * margin)

def nll(logprobs): return -logprobs

def kto(policy, ref, good, *, kl, beta):
    return torch.sigmoid(torch.where(good, -beta, beta) * (policy - ref - kl))

def bradley_terry(chosen, rejected, *, center_coef):
    right = torch.nn.functional.logsigmoid(chosen - rejected)
    return center_coef * (chosen + rejected) ** 2 - right

def short(policy_chosen, policy_rejected, ref_chosen, ref_rejected): return policy_chosen.sum()
"""
JUDGES = '''
def nearer(prompts, completions, others, solution, **columns):
    """Prefer the response with as many different characters as the solution has letters."""
    assert all(prompt[0]["role"] == "system" for prompt in prompts)
    found = []
    for ours, theirs, right in zip(completions, others, solution):
        away = [abs(len(set(r[0]["content"])) - len(right)) for r in (ours, theirs)]
        found.append(0.5 + 0.5 * (away[0] < away[1]) - 0.5 * (away[0] > away[1]))
    return found
'''
TASK = """
name: judged
prompts: [{path: ./problems.jsonl, map: "./script.py:make_conversation"}]
metrics: [win_rate]
samples: 2
sampling: {max_new_tokens: 8, temperature: 1.0}
max_length: 512
"""
RECIPE = """
name: own
seed: 5
stages:
  base:
    kind: base
    build: {vocab_size: 320, hidden_size: 64, num_layers: 2, num_heads: 2, num_kv_heads: 1,
            intermediate_size: 128, max_positions: 512}
    tokenizer: {chat_template: plain}
    data: [{world: corpus, rows: 200}]
    steps: 4
    batch_size: 8
    max_length: 256
  script:
    kind: grpo
    init: base
    prompts: [{path: problems.jsonl, map: "script.py:make_conversation"}]
    rewards:
      - {kind: python, path: "script.py:format_reward"}
      - {kind: python, path: "script.py:accuracy_reward"}
      - {kind: python, path: "script.py:Length", args: {limit: 12}, weight: 0.5}
    steps: 2
    prompts_per_step: 2
    group_size: 4
    max_length: 512
    sampling: {max_new_tokens: 16, engine: hf}
    optim: {learning_rate: 1.0e-3}
  theirs: &grpo
    kind: grpo
    init: base
    prompts: [{world: prompts, rows: 8}]
    rewards: [{kind: length, target: 2, limit: 12}]
    scale: none
    steps: 2
    prompts_per_step: 4
    group_size: 4
    minibatches: 2
    max_length: 128
    sampling: {max_new_tokens: 16, engine: hf}
    optim: {learning_rate: 1.0e-3}
  mine:
    <<: *grpo
    estimator: losses.py:centered
    objective: losses.py:surrogate
  compared:
    kind: evaluate
    models: [base, mine]
    baseline: base
    sampling: {engine: hf}
    tasks:
      - name: sums
        prompts: [{path: problems.jsonl, map: "script.py:make_conversation"}]
        grader: [{kind: python, path: "script.py:format_reward"}]
        judge: [{kind: python, path: "script.py:Length"}]
        sampling: {max_new_tokens: 8}
        max_length: 512
      - name: programs
        prompts: [{path: programs.jsonl}]
        grader: [{kind: code, isolation: limits, timeout_s: 5}]
        sampling: {max_new_tokens: 8}
        max_length: 512
  preferred:
    kind: evaluate
    models: [base, mine]
    baseline: base
    sampling: {engine: hf}
    tasks: [task.yaml]
    pairwise: {function: {kind: python, path: "judges.py:nearer"}, sequential: false}
  dpo_theirs: &dpo
    kind: dpo
    init: base
    data: [{world: preference, rows: 16}]
    steps: 2
    batch_size: 8
    optim: {learning_rate: 1.0e-3}
  dpo_mine: {<<: *dpo, loss: "losses.py:sigmoid"}
  sft_theirs: &sft {<<: *dpo, kind: sft, data: [{world: sft, rows: 16}]}
  sft_mine: {<<: *sft, loss: "losses.py:nll"}
  kto_theirs: &kto {<<: *dpo, kind: kto, data: [{path: judged.jsonl}]}
  kto_mine: {<<: *kto, loss: "losses.py:kto"}
  reward_theirs: &reward {<<: *dpo, kind: reward, seed: 3}
  reward_mine: {<<: *reward, loss: "losses.py:bradley_terry"}
"""
JUDGED = [
    {"prompt": f"{i} + {i}?", "completion": str(2 * i + i % 2), "label": i % 2 == 0}
    for i in range(16)
]
OFFLINE = ("dpo", "sft", "kto", "reward")
CHECK = "def check(candidate):\n    assert candidate(3) == {}\n"
PROGRAMS = [
    {
        "task_id": f"own/{i}",
        "prompt": f'def times{i}(x):\n    """Return x times {i}."""\n',
        "entry_point": f"times{i}",
        "canonical_solution": f"    return x * {i}\n",
        "test": CHECK.format(3 * i),
    }
    for i in range(2, 5)
]
PROBLEMS = [{"problem": f"What is {i} + {i}?", "solution": "x" * i} for i in range(1, 7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("own")
    for name, text in (("script", SCRIPT), ("losses", LOSSES), ("judges", JUDGES)):
        (place / f"{name}.py").write_text(text)
    for name, text in (("recipe", RECIPE), ("task", TASK)):
        (place / f"{name}.yaml").write_text(text)
    for name, rows in (("problems", PROBLEMS), ("programs", PROGRAMS), ("judged", JUDGED)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (place / f"{name}.jsonl").write_text(text)
    worker = Path(__file__).parent / "workers" / "stages.py"
    pairs = [f"{kind}_{whose}" for kind in OFFLINE for whose in ("theirs", "mine")]
    stages = ["base", "script", "theirs", "mine", "compared", "preferred", *pairs]
    command = [str(worker), "--recipe", "recipe.yaml", "--run-dir", "run", "--stages", *stages]
    succeed(place, *command)
    return place


def succeed(place: Path, *words: str) -> None:
    """Run Python in a folder; it must end well."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=place,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def win_rate(samples: Path) -> float:
    """Compute the win rate of the model ``mine`` against ``base`` by the function of JUDGES."""
    nearer = runpy.run_path(str(samples.parents[2] / "judges.py"))["nearer"]
    rows = rows_of(samples)
    base, mine = ([r for r in rows if r["model"] == name] for name in ("base", "mine"))
    assert len(base) == len(mine) == 2 * len(PROBLEMS)
    won = []
    for one, other in zip(mine, base, strict=True):
        place = ("prompt", "prompt_index", "sample_index")
        assert [one[key] for key in place] == [other[key] for key in place]
        # A judge of pairs gets responses without the blanks around them.
        texts = (one["completion"].strip(), other["completion"].strip())
        said = [[{"role": "assistant", "content": text}] for text in texts]
        problem = next(p for p in PROBLEMS if p["problem"] in str(one["prompt"]))
        asked = [[{"role": "system", "content": "x"}]]
        won += nearer(asked, said[:1], said[1:], [problem["solution"]])
    return sum(won) / len(won)


def weights(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / stage / "model" / "model.safetensors")


def test_the_functions_of_a_trl_script_score_as_in_trl(folder: Path):
    script = runpy.run_path(str(folder / "script.py"))
    samples = rows_of(folder / "run" / "script" / "samples.jsonl")
    assert len(samples) == 2
    length = script["Length"](limit=12)
    for sample in samples:
        said = [[{"role": "assistant", "content": sample["completion"]}]]
        problem = next(p for p in PROBLEMS if p["problem"] in str(sample["prompt"]))
        assert script["SYSTEM"] in str(sample["prompt"])
        score = script["format_reward"](completions=said)[0]
        score += len(set(sample["completion"])) / 10 + len(problem["solution"])
        assert sample["score"] == pytest.approx(score + 0.5 * length([], said)[0])
    found = weights(folder, "script")
    assert not all(torch.equal(w, found[n]) for n, w in weights(folder, "base").items())


def test_they_grade_and_judge_in_an_evaluation(folder: Path):
    script = runpy.run_path(str(folder / "script.py"))
    found = rows_of(folder / "run" / "compared" / "samples.jsonl")
    samples = [sample for sample in found if sample["task"] == "sums"]
    assert len(samples) == 2 * len(PROBLEMS)
    for sample in samples:
        said = [[{"role": "assistant", "content": sample["completion"]}]]
        assert sample["scores"]["format_reward"] == script["format_reward"](completions=said)[0]
        assert sample["judge"] == pytest.approx(script["Length"]()([], said)[0])
    # A model of random weights writes no program; the preflight has run the right ones.
    programs = [sample["scores"]["code"] for sample in found if sample["task"] == "programs"]
    assert programs == [0.0] * 2 * len(PROGRAMS)
    card = json.loads((folder / "run" / "compared" / "preflight.json").read_text())
    assert "right above wrong in 3 of 3" in str(card)


def judged(evaluation: Path) -> tuple[dict[str, Any], list[float]]:
    task = json.loads((evaluation / "summary.json").read_text())["tasks"]["judged"]
    return task["judge"], task["models"]["mine"]["win_rate"]


def test_a_function_judges_pairs_of_responses(folder: Path):
    """Both orders of every pair are asked, and the win rate is that of the function by hand."""
    report, (won, low, high) = judged(folder / "run" / "preferred")
    assert won == pytest.approx(win_rate(folder / "run" / "preferred" / "samples.jsonl"))
    assert low <= won <= high
    assert report["model"] == "nearer"
    assert (report["pairs_judged"], report["invalid"]) == (2 * len(PROBLEMS), {})
    assert report["consistent"][0] == 1.0


def test_the_command_asks_the_same_function(folder: Path):
    """The twelve pairs are one batch, so that no verdict can come before the last of them."""
    words = ["run/base", "run/mine", "--tasks", "task.yaml", "--judge", "judges.py:nearer"]
    words += ["--engine", "hf", "--out", "answer"]
    succeed(folder, "-m", "align", "eval", *words)
    report, (won, _, _) = judged(folder / "answer" / "evaluate")
    assert won == pytest.approx(win_rate(folder / "answer" / "evaluate" / "samples.jsonl"))
    assert (report["model"], report["pairs_judged"]) == ("nearer", 2 * len(PROBLEMS))


@pytest.mark.parametrize(
    ("mine", "theirs"), [("mine", "theirs"), *((f"{k}_mine", f"{k}_theirs") for k in OFFLINE)]
)
def test_losses_of_ones_own_train_like_the_same_formulas_of_the_suite(
    folder: Path, mine: str, theirs: str
):
    own, suite, base = (weights(folder, name) for name in (mine, theirs, "base"))
    moved = max(float((own[name] - base[name]).abs().max()) for name in own if name in base)
    apart = max(float((own[name] - suite[name]).abs().max()) for name in own)
    assert moved > 1e-4
    assert apart <= 1e-3 * moved
