"""Ranks that share the tokens of a row (``parallel.sequence``) train as one rank does."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import stage_runs as runs

WORKERS = Path(__file__).parent / "workers"
MODELS = ["llama", "qwen2", "mistral", "gpt_oss"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Give what each of two ranks found."""
    out = tmp_path_factory.mktemp("shared")
    runs.finish_ranks([str(WORKERS / "shared_rows.py"), str(out)], 2)
    return [torch.load(out / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["rows", "pairs", "placeholder"])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_a_shared_row_are_those_of_one_rank(found, model, batch):
    """In float64 only the order of sums differs: 1e-10 of the largest gradient bounds it."""
    for part in found:
        together, alone = part[model, batch, 2], part[model, batch, 1]
        for name in ("logprobs", "entropy"):
            torch.testing.assert_close(together[name], alone[name], rtol=1e-10, atol=1e-12)
        assert together["gradients"].keys() == alone["gradients"].keys()
        largest = max(float(x.abs().max()) for x in alone["gradients"].values())
        assert (largest > 1e-3) == (batch != "placeholder")
        for name, gradient in alone["gradients"].items():
            torch.testing.assert_close(
                together["gradients"][name], gradient, rtol=0.0, atol=1e-10 * max(largest, 1.0)
            )


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_each_rank_runs_the_layers_on_half_of_the_tokens(found, model):
    for part in found:
        assert part[model, "rows", 1]["tokens"] == 41
        assert part[model, "rows", 2]["tokens"] == 21  # one more token, so that two divide them
        assert part[model, "placeholder", 2]["tokens"] == 1


RECIPE = """\
name: shared
stages:
  base:
    kind: base
    build: {{vocab_size: 300, hidden_size: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2}}
    tokenizer: {{chat_template: plain}}
    data: [{{world: corpus, rows: 40}}]
    steps: 4
  sft_{zero}: &it
    kind: sft
    init: base
    data: [{{world: sft, rows: 40}}]
    heldout: [{{world: sft, rows: 12, split: heldout}}]
    steps: 3
    batch_size: 6
    micro_tokens: 256
    optim: {{learning_rate: 1.0e-2, max_grad_norm: 0.05, eps: 1.0e-4}}
    zero: {{stage: {zero}}}
    ranks: {ranks}
    parallel: {{sequence: {ranks}}}
    not_learning: ignore
  dpo_{zero}:
    <<: *it
    kind: dpo
    data: [{{world: preference, rows: 40}}]
    heldout: [{{world: preference, rows: 12, split: heldout}}]
    tuning: {{method: lora, rank: 4}}
"""


@pytest.mark.slow
def test_sft_and_dpo_on_shared_rows_equal_one_process(tmp_path):
    """Also losses, norms and held-out statistics, whose counts are those of all rows."""
    recipe = tmp_path / "base.yaml"
    recipe.write_text(RECIPE.format(zero=0, ranks=1), encoding="utf-8")
    command = [str(WORKERS / "stages.py"), "--recipe", str(recipe)]
    runs.finish_ranks([*command, "--run-dir", str(tmp_path), "--stages", "base"], 1)
    metrics = ("train/loss", "optim/grad_norm", "eval/loss", "tokens/trained")
    runs.two_ranks_equal_one(RECIPE, tmp_path, tmp_path, stages=("sft", "dpo"), metrics=metrics)
