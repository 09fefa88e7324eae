"""Stages of models that scale their logits: the loss is that of the saved model in transformers."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "numeric"))
import alone

from align.core.artifacts import write_manifest
from align.core.types import Example
from align.data.render.chat import ChatFormat
from align.models.loading import load_tokenizer
from benchmarks.not_learning import Workshop
from benchmarks.not_learning_cases import Case

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MODELS = {
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
}


@pytest.fixture(scope="module", params=list(MODELS))
def workshop(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workshop]:
    with alone.world_of_one():
        found = Workshop(tmp_path_factory.mktemp(request.param))
        torch.manual_seed(0)
        MODELS[request.param]().save_pretrained(found.folder / "base" / "model")
        write_manifest(found.folder / "base", {"kind": "policy", "spec_hash": ""})
        yield found


def plain_loss(folder: Path, data: Path) -> float:
    """Return the mean loss of a saved model over the trained tokens, each row alone."""
    chat, total, count = ChatFormat(load_tokenizer(folder)), 0.0, 0
    model: Any = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    for line in data.read_text().splitlines():
        pair = json.loads(line)
        row = chat.sft_row(Example(prompt=pair["prompt"], completion=pair["completion"]))
        with torch.no_grad():
            logprobs = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        for t, trained in enumerate(row.trained):
            if trained:
                total, count = total - float(logprobs[t - 1, row.input_ids[t]]), count + 1
    return total / count


def test_the_loss_of_sft_is_that_of_the_saved_model_in_transformers(workshop: Workshop) -> None:
    # Each step takes all 64 rows, so the second step's loss is that of the model after the first.
    found = workshop.run(Case("scaled", "sft", changes={"steps": 1, "batch_size": 64}))
    assert not found.error
    out = workshop.folder / "runs" / "case"
    data, start = workshop.folder / "sft.jsonl", workshop.folder / "base" / "model"
    assert found.before == pytest.approx(plain_loss(start, data), rel=1e-5)
    after = plain_loss(out / "model", data)
    again = workshop.run(Case("scaled", "sft", changes={"steps": 2, "batch_size": 64}))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert not again.error
    assert rows[1]["train/loss"] == pytest.approx(after, rel=1e-5)
    assert after < found.before
