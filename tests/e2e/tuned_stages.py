"""Run training stages inside the test process on a tiny model, for every tuning method."""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from transformers import Qwen2Config, Qwen2ForCausalLM

from align.core.artifacts import read_artifact, write_manifest
from align.data.load import load_examples
from align.data.render.chat import apply_tokenizer_spec
from align.recipe.schema import BuildSpec, DataSpec, Recipe, TokenizerSpec
from align.recipe.schema.tuning import TuningSpec
from align.stages.base import StageContext, _manifest_head, prepare_and_train
from align.stages.base_model import _save, train_tokenizer

TUNINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"rank": 4},
    "rslora": {"rank": 4},
    "dora": {"rank": 4},
    "pissa": {"rank": 4},
    "qlora": {"rank": 4},
    "ia3": {},
    "oft": {"block_size": 32},
    "vera": {"rank": 32},
    "bottleneck": {"size": 8},
    "prefix": {"virtual_tokens": 3},
    "prompt": {"virtual_tokens": 3},
    "ptuning": {"virtual_tokens": 3, "hidden": 16},
    "loreft": {"first": 2, "last": 2},
}
"""Every method of the schema but head, small."""

COMMON: dict[str, Any] = {
    "init": "base",
    "max_length": 128,
    "optim": {"learning_rate": 1e-2, "schedule": "constant", "warmup_frac": 0.0},
}
OFFLINE = {"steps": 2, "batch_size": 4}
PAIRS = {"data": [{"world": "preference", "rows": 8}], **OFFLINE}
ONLINE = {
    "prompts": [{"world": "prompts", "rows": 8}],
    "steps": 2,
    "prompts_per_step": 4,
    "rewards": [{"kind": "length", "target": 2, "limit": 12}],
    "sampling": {"engine": "hf", "max_new_tokens": 6},
}
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"data": [{"world": "sft", "rows": 8}], **OFFLINE},
    "reward": {"norm_prompts": 4, **PAIRS},
    "dpo": PAIRS,
    "kto": OFFLINE,
    "classify": OFFLINE,
    "ppo": {"kl": {"coef": 0.1}, **ONLINE},
    "grpo": {"kl": {"coef": 0.1, "place": "loss", "estimator": "k3"}, "group_size": 2, **ONLINE},
}

JUDGED: dict[str, list[dict[str, Any]]] = {
    "kto": [
        {"prompt": f"{i} plus {i}", "completion": f"it is {2 * i}", "label": i % 2 == 0}
        for i in range(8)
    ],
    "classify": [
        {"text": f"{word} number {i}", "label": word} for i in range(4) for word in ("red", "blue")
    ],
}
"""Rows of the stages for which the made world has none."""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tuning_spec(method: str) -> Any:
    """Give the small spec of a method."""
    return TypeAdapter(TuningSpec).validate_python({"method": method, **TUNINGS[method]})


def make_base(folder: Path) -> Path:
    """Write the artifact of a random model whose answers are far from uniform."""
    out = folder / "base" / "model"
    build = BuildSpec(vocab_size=320)
    corpus = load_examples([DataSpec(world="corpus", rows=50)], kind="corpus", seed=0)
    tokenizer = train_tokenizer(corpus, build, out)
    apply_tokenizer_spec(tokenizer, TokenizerSpec(chat_template="plain"))
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.15,
    )
    _save(Qwen2ForCausalLM(config), tokenizer, out)
    write_manifest(folder / "base", {"kind": "policy", "spec_hash": "base", "spec": {}})
    return folder


def run_stage(folder: Path, kind: str, tuning: dict[str, Any], *, name: str, **more: Any) -> Any:
    """Run one training stage to its end as the launcher's process would; give its artifact."""
    plain = {"kind": kind, **COMMON, **STAGES[kind], "tuning": tuning, **more}
    if kind in JUDGED:
        plain["data"] = [{"path": str(write_rows(folder / f"{kind}.jsonl", JUDGED[kind]))}]
    return run_plain(folder, plain, name=name)


def run_plain(folder: Path, plain: dict[str, Any], *, name: str) -> Any:
    """Run a stage of any kind."""
    base = {"kind": "base", "path": "x"}
    recipe = Recipe.model_validate({"name": "t", "stages": {"base": base, name: plain}})
    context = StageContext(recipe, name, folder, 0)
    context.out.mkdir(parents=True, exist_ok=True)
    spec = recipe.stages[name]
    result = prepare_and_train(spec, context)
    head = _manifest_head(context, spec)
    write_manifest(context.out, head | {"metrics": dict(result.metrics)})
    return read_artifact(context.out, head["kind"])
