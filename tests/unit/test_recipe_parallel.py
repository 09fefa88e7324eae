"""``parallel.sequence`` and ``sampling.tensor_parallel`` divide the ranks and the model's heads."""

import json
from pathlib import Path

import pytest

from align.core.errors import RecipeError, TrainingError
from align.recipe.load import load_recipe
from align.sampling import build

RECIPE = """\
name: toy
stages:
  base:
    kind: base
    build: {{vocab_size: 128, hidden_size: 96, num_heads: 6, num_kv_heads: 3}}
    data: [{{world: corpus, rows: 10}}]
    steps: 10
  saved: {{kind: base, path: {model}}}
  sft: {{kind: sft, init: base, data: [{{world: sft, rows: 100}}], {sft}}}
  grpo:
    kind: grpo
    init: {init}
    ranks: {ranks}
    prompts: [{{world: prompts, rows: 10}}]
    prompts_per_step: 48
    rewards: [{{kind: math}}]
    steps: 4
    sampling: {sampling}
"""


def load(
    folder: Path, *, sampling: str = "{}", ranks: int = 6, init: str = "sft", sft: str = "seed: 1"
) -> None:
    model = folder / "model"
    model.mkdir(exist_ok=True)
    config = {"num_attention_heads": 32, "num_key_value_heads": 8}
    (model / "config.json").write_text(json.dumps({"text_config": config}), encoding="utf-8")
    text = RECIPE.format(model=model, sampling=sampling, ranks=ranks, init=init, sft=sft)
    (folder / "toy.yaml").write_text(text, encoding="utf-8")
    load_recipe(folder / "toy.yaml")


@pytest.mark.parametrize(
    ("sampling", "options", "problem"),
    [
        ("{tensor_parallel: 4}", {}, "found 4; expected a divisor of the stage's 6 ranks"),
        # The built model has 6 heads and 3 key-value heads; the saved one 32 and 8.
        ("{tensor_parallel: 6}", {}, "the model's 3 key-value heads cannot be divided among 6"),
        ("{tensor_parallel: 2}", {}, "the model's 3 key-value heads cannot be divided among 2"),
        (
            "{tensor_parallel: 16}",
            {"init": "saved", "ranks": 16},
            "the model's 8 key-value heads cannot be divided among 16 ranks",
        ),
        ("{tensor_parallel: 3, engine: hf}", {}, "has no effect with engine hf"),
        ("{tensor_parallel: 3, push: adapter}", {}, "push: adapter"),
    ],
)
def test_ranks_of_an_engine_that_cannot_be_are_named_at_their_key(
    tmp_path, sampling, options, problem
):
    with pytest.raises(RecipeError) as error:
        load(tmp_path, sampling=sampling, **options)
    assert problem in str(error.value)
    assert "toy.yaml:" in str(error.value)


@pytest.mark.parametrize(
    ("ranks", "of", "init"), [(3, 6, "sft"), (4, 8, "saved"), (8, 8, "saved"), (1, 6, "sft")]
)
def test_ranks_of_an_engine_that_divide_both_are_taken(tmp_path, ranks, of, init):
    load(tmp_path, sampling=f"{{tensor_parallel: {ranks}}}", ranks=of, init=init)


@pytest.mark.parametrize(
    ("sft", "problem"),
    [
        ("ranks: 4, parallel: {sequence: 3}", "found 3; expected a divisor of the stage's 4 ranks"),
        ("ranks: 2, parallel: {sequence: 2}", "the model's 3 key-value heads cannot be divided"),
        (
            "ranks: 3, parallel: {sequence: 3}, tuning: {method: prompt}",
            "prompt tuning needs whole",
        ),
        ("ranks: 3, parallel: {sequence: 3}, keep: {dropout: 0.1}", "does not combine with keep"),
    ],
)
def test_ranks_that_cannot_share_rows_are_named(tmp_path, sft, problem):
    with pytest.raises(RecipeError) as error:
        load(tmp_path, sft=sft)
    assert problem in str(error.value)
    assert "toy.yaml:" in str(error.value)


def test_ranks_that_divide_both_share_rows(tmp_path):
    load(tmp_path, sft="ranks: 6, parallel: {sequence: 3}")


def test_an_engine_that_cannot_be_divided_is_not_started(tmp_path, monkeypatch):
    """The model is not known when the recipe is checked, or another engine is chosen."""
    config = {"num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(TrainingError, match="needs vLLM, and the engine would be hf"):
        build.build_engine("hf", build.EngineOptions(tmp_path, tensor_parallel=2))
    monkeypatch.setattr(build, "vllm_obstacle", lambda _: None)
    with pytest.raises(TrainingError, match="1 key-value heads cannot be divided among 2 ranks"):
        build.build_engine("auto", build.EngineOptions(tmp_path, tensor_parallel=2))
