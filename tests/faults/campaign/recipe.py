"""The run that every fault is injected into: one tiny stage of each kind, with its data."""

import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

RUN = "run"
"""Folder of the run inside a case's folder."""
RECIPE = """\
name: run
seed: 3
stages:
  base:
    kind: base
    threads: 1
    build: {vocab_size: 300, hidden_size: 64, num_layers: 1, num_heads: 2, num_kv_heads: 1,
            intermediate_size: 96, max_positions: 128}
    tokenizer: {chat_template: template.jinja}
    data: [{path: data/texts.jsonl}]
    steps: 40
    batch_size: 8
    max_length: 64
    optim: {learning_rate: 3.0e-3}
"""
TRAINED = """\
  {name}:
    kind: {kind}
    threads: 1
    init: base
    data: [{{path: data/{rows}.jsonl}}]
    steps: {steps}
    batch_size: 4
    checkpoint_every: 2
    keep_checkpoints: 2
    optim: {{learning_rate: 1.0e-3}}
    {more}
"""
ONLINE = """\
  {name}:
    kind: {kind}
    threads: 1
    init: base
    prompts: [{{path: data/prompts.jsonl}}]
    rewards: [{{kind: length, target: 2, limit: 12}}]
    steps: {steps}
    prompts_per_step: 4
    micro_tokens: 128
    max_length: 96
    checkpoint_every: 1
    sampling: {{max_new_tokens: 6, engine: {engine}}}
    optim: {{learning_rate: 1.0e-3}}
    {more}
"""
REST = """\
  trl:
    kind: trl
    threads: 1
    trainer: KTO
    init: base
    rows: unpaired
    data: [{path: data/unpaired.jsonl}]
    steps: 6
    batch_size: 4
    micro_batch_size: 2
    checkpoint_every: 2
    optim: {learning_rate: 1.0e-3}
  merge:
    kind: merge
    base: base
    tuned: sft
    alphas: [0.5]
  curate:
    kind: curate
    data: [{path: data/messages.jsonl}]
    words: {min: 2, max: 12}
    quality: [{kind: length, target: 3, limit: 12}]
    min_quality: 0.2
    diversity: {rows: 12, min_distance: 0.05}
  weak_label:
    kind: weak_label
    of: preference
    data: [{path: data/pairs.jsonl}]
    functions:
      - {by: {kind: regex, name: polite, pattern: '^(sure|of course|gladly)'}}
      - {by: {kind: length, target: 4, limit: 14}}
      - {by: {kind: regex, name: finished, pattern: '[.]$'}}
  self_instruct:
    kind: self_instruct
    threads: 1
    init: base
    seeds: [{path: data/messages.jsonl}]
    target: 500
    prompts_per_round: 6
    max_rounds: 3
    examples: 3
    grown_examples: 1
    answer_examples: 2
    min_words: 1
    wording: {head: "", item: "{instruction}. ", solved: "{instruction}. it is {answer}. "}
    sampling: {max_new_tokens: 24, engine: hf}
    max_length: 120
"""
GROUPS = "group_size: 2\n    kl: {coef: 0.05, place: loss, estimator: k3}"
CRITIC = "kl: {coef: 0.05, target: 1.0, horizon: 40}\n    critic: {optim: {learning_rate: 1.0e-3}}"


def recipe_text() -> str:
    """Return the recipe with every stage."""
    trained: Sequence[tuple[str, str, str, str]] = (
        ("sft", "sft", "messages", ""),
        ("sft_bf16", "sft", "messages", "dtype: bfloat16"),
        ("sft_lora", "sft", "messages", "tuning: {method: lora, rank: 4, alpha: 8}"),
        ("sft_z2", "sft", "messages", "ranks: 2\n    zero: {stage: 2}"),
        ("sft_z3", "sft", "messages", "ranks: 2\n    zero: {stage: 3}"),
        ("reward", "reward", "pairs", "norm_prompts: 4"),
        ("dpo", "dpo", "pairs", ""),
        ("kto", "kto", "unpaired", ""),
        ("classify", "classify", "classes", ""),
    )
    text = RECIPE
    for name, kind, rows, more in trained:
        text += TRAINED.format(name=name, kind=kind, rows=rows, more=more, steps=6)
    online = (
        ("ppo", "ppo", "hf", CRITIC),
        ("grpo", "grpo", "hf", GROUPS),
        ("grpo_r2", "grpo", "hf", GROUPS + "\n    ranks: 2"),
        ("ppo_vllm", "ppo", "vllm", CRITIC),
    )
    for name, kind, engine, more in online:
        text += ONLINE.format(name=name, kind=kind, engine=engine, more=more, steps=4)
    return text + REST


RANKS = {"sft_z2": 2, "sft_z3": 2, "grpo_r2": 2}
INPUTS: dict[str, tuple[str, ...]] = {
    "base": (),
    "curate": (),
    "weak_label": (),
    "merge": ("base", "sft"),
}
"""Stages whose inputs are not ``base`` alone."""
KINDS = (
    *("base", "sft", "sft_bf16", "sft_lora", "sft_z2", "sft_z3", "reward", "dpo", "kto"),
    *("classify", "ppo", "grpo", "grpo_r2", "trl", "merge", "curate", "weak_label"),
    *("self_instruct", "ppo_vllm"),
)


def kind_of(stage: str) -> str:
    """Return the kind of a stage by its name."""
    return stage if stage in ("weak_label", "self_instruct") else stage.partition("_")[0]


def inputs_of(stage: str) -> tuple[str, ...]:
    """Return the stages whose artifacts a stage reads."""
    return INPUTS.get(stage, ("base",))


TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_workplace(folder: Path) -> Path:
    """Write the recipe, the template and the data into a new folder."""
    (folder / "data").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe_text(), encoding="utf-8")
    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    rng = random.Random(0)
    words = ("red", "blue", "green", "small", "old", "new", "cat", "dog", "house", "tree", "stone")

    def said(count: int) -> str:
        return " ".join(rng.choice(words) for _ in range(count))

    rows: dict[str, list[dict]] = {name: [] for name in ROWS}
    for i in range(24):
        prompt, good, bad = f"item {i}: {said(3)}", f"{said(3)}.", f"sure {said(4)}"
        rows["texts"].append({"text": f"{prompt} {good} {said(6)}"})
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": good}]
        rows["messages"].append({"messages": turns})
        rows["pairs"].append({"prompt": prompt, "chosen": good, "rejected": bad})
        label = i % 2 == 0
        rows["unpaired"].append({"prompt": prompt, "completion": good if label else bad})
        rows["unpaired"][-1]["label"] = label
        rows["classes"].append({"text": f"{prompt} {good}", "label": ("odd", "even")[label]})
        rows["prompts"].append({"prompt": prompt})
    for name, found in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in found)
        (folder / "data" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


ROWS = ("texts", "messages", "pairs", "unpaired", "classes", "prompts")


def copy_workplace(source: Path, folder: Path, stages: Sequence[str]) -> Path:
    """Copy a workplace with the artifacts of some stages; times stay, so nothing looks changed."""
    folder.mkdir(parents=True)
    for name in ("recipe.yaml", "template.jinja"):
        shutil.copy2(source / name, folder / name)
    shutil.copytree(source / "data", folder / "data")
    os.mkdir(folder / RUN)
    for stage in stages:
        shutil.copytree(source / RUN / stage, folder / RUN / stage)
    return folder
