"""Stages on a base whose turn markers are new: an adapter trains their rows, and keeps them."""

import json
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "numeric"))
sys.path.insert(0, str(Path(__file__).parent))
import alone
from test_tuning_stages import IDS, SAVING, first_metrics, oracle
from tuned_stages import TUNINGS, make_base, run_stage

from align.core.artifacts import Artifact, write_manifest
from align.core.errors import RecipeError
from align.data.render.chat import apply_tokenizer_spec
from align.models.loading import add_embeddings, load_tokenizer
from align.recipe.schema import TokenizerSpec
from align.stages.base_model import _save

TABLE = "model.embed_tokens.weight"
NEEDS_VLLM = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base that was just given the markers of ChatML."""
    with alone.world_of_one():
        folder = make_base(tmp_path_factory.mktemp("marked"))
        out = folder / "base" / "model"
        model, tokenizer = AutoModelForCausalLM.from_pretrained(out), load_tokenizer(out)
        added = apply_tokenizer_spec(tokenizer, TokenizerSpec(chat_template="chatml"))
        add_embeddings(model, len(tokenizer), tokenizer.convert_tokens_to_ids(added))
        _save(model, tokenizer, out)
        write_manifest(folder / "base", {"kind": "policy", "spec_hash": "base", "spec": {}})
        yield folder


def lora(folder: Path, kind: str, name: str, **more: Any) -> Artifact:
    return run_stage(folder, kind, {"method": "lora", "rank": 4}, name=name, **more)


def markers(folder: Path) -> list[int]:
    found = load_tokenizer(folder / "base" / "model").convert_tokens_to_ids(
        ["<|im_start|>", "<|im_end|>"]
    )
    return sorted(found)


def changed(folder: Path, found: Artifact) -> list[int]:
    """Give the rows of the embeddings that a stage has changed."""
    tables = [
        load_file(d / "model.safetensors")[TABLE] for d in (folder / "base/model", found.model_dir)
    ]
    return (tables[0] != tables[1]).any(1).nonzero().flatten().tolist()


def lines(found: Artifact) -> dict[str, str]:
    card = json.loads((found.path / "preflight.json").read_text(encoding="utf-8"))
    return {line["name"]: line["value"] for line in card["lines"]}


def test_lora_trains_the_rows_of_new_markers_and_resumes_them(folder):
    whole = lora(folder, "sft", "sft", **SAVING)
    new = markers(folder)
    assert changed(folder, whole) == new
    base = AutoModelForCausalLM.from_pretrained(folder / "base" / "model")
    by_peft = PeftModel.from_pretrained(base, str(whole.path / "adapter")).eval()
    saved = AutoModelForCausalLM.from_pretrained(whole.model_dir).eval()
    ids = [*IDS, *new, 5]
    assert oracle(saved, ids) == pytest.approx(oracle(by_peft, ids), abs=2e-5)
    # The card says so, and measures the stop token; so does the end of training.
    card = lines(whole)
    assert "<|im_start|>" in card["new tokens"]
    assert "<|im_end|>" in card["new tokens"]
    assert "after 4 responses" in card["stop token"]
    assert 0.0 < whole.manifest["metrics"]["eval/stop_prob"] < 1.0
    # Resumed after the first step: the same bytes.
    kept = "checkpoints/step-00000001"
    shutil.copytree(whole.path / kept, folder / "again" / kept)
    first = (whole.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[0]
    (folder / "again" / "metrics.jsonl").write_text(first, encoding="utf-8")
    again = lora(folder, "sft", "again", **SAVING)
    assert first_metrics(again) == first_metrics(whole)
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (again.path / file).read_bytes() == (whole.path / file).read_bytes()


def test_rows_are_trained_in_bfloat16_below_a_scorer_and_on_four_bits(folder):
    for kind, method, more in (
        ("sft", "lora", {"dtype": "bfloat16"}),
        ("reward", "lora", {}),
        ("sft", "qlora", {}),
    ):
        name = f"{kind}_{method}_{len(more)}"
        found = run_stage(folder, kind, {"method": method, "rank": 4}, name=name, **more)
        table = load_file(found.model_dir / "model.safetensors")[TABLE]
        base = load_file(folder / "base/model/model.safetensors")[TABLE].to(table.dtype)
        assert (table != base).any(1).nonzero().flatten().tolist() == markers(folder), name
        (rows,) = (
            x
            for n, x in load_file(found.path / "adapter" / "adapter_model.safetensors").items()
            if "trainable_tokens_delta" in n
        )
        # Rounded to bfloat16 once, otherwise exact.
        limit = 0.0 if table.dtype == torch.float32 else 2.0**-7
        new = table[markers(folder)].float()
        torch.testing.assert_close(new, rows.float(), atol=0.0, rtol=limit)


@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=NEEDS_VLLM)])
def test_sampler_is_pushed_the_rows(folder, engine):
    sampling = {"engine": engine, "max_new_tokens": 6, "cache_gib": 0.02}
    found = lora(folder, "grpo", f"grpo_{engine}", sampling=sampling)
    assert found.manifest["metrics"]["engine/vllm"] == (engine == "vllm")
    assert abs(first_metrics(found)["kl/reference"]) < 1e-4
    # After a step the sampler still has the probabilities of the trainer.
    assert found.manifest["metrics"]["kl/reference_k3"] > 1e-6
    assert abs(found.manifest["metrics"]["kl/sampler"]) < 1e-4
    assert changed(folder, found) == markers(folder)


@pytest.mark.parametrize(("kind", "method"), [("sft", "ia3"), ("dpo", "prefix"), ("reward", "oft")])
def test_methods_that_freeze_the_rows_are_refused(folder, kind, method):
    tuning = {"method": method, **TUNINGS[method]}
    with pytest.raises(RecipeError, match=r"<\|im_end\|>"):
        run_stage(folder, kind, tuning, name=f"{kind}_{method}")
