"""A saved scorer is a reward model of plain transformers, with the same scores."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from reward_models.scalar import RewardModel, score_heads

WORDS = ["<pad>", "<eos>", "<unk>", "user", "hi", "yes", "no", "a", "b", "c"]
ROWS = [[4, 5, 1], [7, 8, 7, 8, 4, 6, 1], [4, 1], [9] * 12 + [1], [5, 3]]
SIZES = {"vocab_size": 10, "max_position_embeddings": 32}
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES = {
    "llama": {**WIDTHS, "intermediate_size": 48, "num_key_value_heads": 2},
    "qwen2": {**WIDTHS, "intermediate_size": 48, "num_key_value_heads": 2},
    "gpt_neox": {**WIDTHS, "intermediate_size": 48},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "opt": {**WIDTHS, "ffn_dim": 48, "word_embed_proj_dim": 32},
}


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", **special)


def scorer(architecture: str = "llama", *, num_heads: int = 1) -> RewardModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[architecture](**SIZES, **ARCHITECTURES[architecture])
    model = RewardModel(AutoModel.from_config(config), 32, num_heads=num_heads)
    return model.eval()


def by_transformers(folder: Path, rows: list[list[int]]) -> torch.Tensor:
    """Score padded rows with transformers alone, which must know every weight."""
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    texts = AutoTokenizer.from_pretrained(folder)
    batch = texts.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        return model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_transformers_computes_the_scores(tmp_path, architecture, num_heads):
    model = scorer(architecture, num_heads=num_heads)
    model.save(tmp_path, tokenizer=tokenizer(pad_token="<pad>"))
    found = by_transformers(tmp_path, ROWS)
    assert found.shape == (len(ROWS), num_heads)
    assert found.numpy() == pytest.approx(torch.tensor(score_heads(model, ROWS)).numpy(), abs=1e-5)


def test_trl_reward_trainer_goes_on_from_the_scores(tmp_path):
    trl = pytest.importorskip("trl", reason="the extra 'trl' is not installed")
    datasets = pytest.importorskip("datasets")
    model = scorer()
    model.set_normalization(mean=0.3, std=1.7)
    model.save(tmp_path / "model", tokenizer=tokenizer(pad_token="<pad>"))
    pairs = [("hi yes", "hi no no"), ("a b a b", "c"), ("user hi", "user"), ("b", "c a")]
    data = datasets.Dataset.from_list([{"chosen": c, "rejected": r} for c, r in pairs])
    trainer = trl.RewardTrainer(
        model=str(tmp_path / "model"),
        args=trl.RewardConfig(
            output_dir=str(tmp_path / "out"),
            per_device_eval_batch_size=len(pairs),
            report_to=[],
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=data,
        eval_dataset=data,
    )
    found = trainer.evaluate()
    # TRL ends each text with the stop token, as the rows of training end here.
    rows = [[*(WORDS.index(w) for w in text.split()), 1] for pair in pairs for text in pair]
    scores = torch.tensor(score_heads(model, rows)).reshape(len(pairs), 2)
    margin = scores[:, 0] - scores[:, 1]
    expected = {
        "eval_loss": -torch.nn.functional.logsigmoid(margin).mean(),
        "eval_margin": margin.mean(),
        "eval_mean_reward": scores.mean(),
        "eval_min_reward": scores.min(),
        "eval_max_reward": scores.max(),
        "eval_accuracy": (margin > 0).float().mean(),
    }
    assert {name: found[name] for name in expected} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, abs=1e-5
    )


def test_pad_token_is_never_the_stop_token_of_a_row(tmp_path):
    # With the stop token as pad token, transformers would read the score one token too early.
    model = scorer()
    model.save(tmp_path, tokenizer=tokenizer(pad_token="<eos>", unk_token="<unk>"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pad_token_id"] == WORDS.index("<unk>")
    expected = [score for (score,) in score_heads(model, ROWS)]
    assert by_transformers(tmp_path, ROWS)[:, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_stop_token_of_the_template_is_no_pad_token_either(tmp_path):
    stops = (WORDS.index("<pad>"),)
    given = tokenizer(pad_token="<pad>", unk_token="<unk>")
    scorer().save(tmp_path, tokenizer=given, stop_token_ids=stops)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token == "<unk>"
    assert given.pad_token == "<pad>"  # the caller's tokenizer is unchanged


def test_without_a_spare_token_single_rows_are_scored_and_batches_refused(tmp_path):
    model = scorer()
    model.save(tmp_path, tokenizer=tokenizer(pad_token="<eos>"))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        found = [float(plain(torch.tensor([row])).logits) for row in ROWS]
    assert found == pytest.approx([score for (score,) in score_heads(model, ROWS)], abs=1e-5)
    with pytest.raises(ValueError, match="no padding token"):
        plain(torch.tensor([ROWS[0], ROWS[0]]))


def test_config_has_the_normalization_and_a_regression_head(tmp_path):
    model = scorer()
    model.set_normalization(mean=0.5, std=2.0)
    model.save(tmp_path, tokenizer=tokenizer(pad_token="<pad>"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert (config["scorer_mean"], config["scorer_std"]) == (0.5, 2.0)
    assert config["problem_type"] == "regression"  # vLLM applies a sigmoid otherwise
    assert "head.weight" not in load_file(tmp_path / "model.safetensors")
    # The trained model's own configuration is unchanged.
    assert not hasattr(model.config, "scorer_mean")


def test_folder_of_an_earlier_version_loads(tmp_path):
    model = scorer()
    model.save(tmp_path, tokenizer=tokenizer(pad_token="<pad>"))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert "head.weight" in load_file(tmp_path / "model.safetensors")
    assert score_heads(RewardModel.load(tmp_path), ROWS) == score_heads(model, ROWS)
