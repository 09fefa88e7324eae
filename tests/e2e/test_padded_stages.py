"""Stages of a model whose sequences cannot be packed: padded rows through its own layers."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, StableLmConfig, StableLmForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "numeric"))
import alone

from align.core.artifacts import write_manifest
from align.core.card import CARD_FILE, read_card
from align.models.decoder import form_of
from align.models.loading import load_policy
from benchmarks.not_learning import Workshop
from benchmarks.not_learning_cases import Case

MODELS = {
    "stablelm": lambda: StableLmForCausalLM(
        StableLmConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            initializer_range=0.15,
            bos_token_id=0,
            eos_token_id=1,
        )
    ),
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(
            vocab_size=32,
            hidden_size=32,
            n_layer=2,
            n_head=2,
            initializer_range=0.15,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    ),
}
FEW = {"steps": 3}


@pytest.fixture(scope="module", params=list(MODELS))
def workshop(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workshop]:
    with alone.world_of_one():
        found = Workshop(tmp_path_factory.mktemp(request.param))
        torch.manual_seed(0)
        base = found.folder / "base"
        MODELS[request.param]().save_pretrained(base / "model")
        write_manifest(base, {"kind": "policy", "spec_hash": ""})
        assert not form_of(load_policy(base / "model", dtype="float32")).packs
        yield found


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "reward", "classify", "ppo", "grpo"])
def test_every_stage_trains_on_padded_rows(workshop: Workshop, kind: str) -> None:
    kl = {"kl": {"coef": 0.05, "place": "loss", "estimator": "k3"}} if kind == "grpo" else {}
    found = workshop.run(Case("padded", kind, changes=FEW | kl))
    assert not found.error
    out = workshop.folder / "runs" / "case"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == FEW["steps"]
    # The sampler is transformers' own forward: the trainer computes the same probabilities.
    if kind in ("ppo", "grpo"):
        assert max(row["sampler/logprob_gap"] for row in rows) < 1e-5
    if kind == "dpo":
        assert rows[0]["train/loss"] == pytest.approx(0.693147, abs=1e-5)
    if kind not in ("reward", "classify"):
        # The preflight has compared the stage's own rows, token by token, with that forward.
        card = read_card(json.loads((out / CARD_FILE).read_text()))
        assert {line.name: line.verdict for line in card.lines}["own forward"] == "ok"
