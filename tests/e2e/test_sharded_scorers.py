"""Critics and reward models in the shards of ZeRO-3 on two ranks equal those of one process."""

import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
import stage_runs as runs
from small_encoders import wordpiece
from test_ranks import assert_close, assert_equal
from test_sharded_load import HIDDEN, INNER, LARGE_LAYERS, write

WORKER = Path(__file__).parent / "workers" / "shard_scorers.py"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the worker in one process and on two ranks."""
    out = tmp_path_factory.mktemp("scorers")
    model = write(out / "small" / "model", hidden=64, inner=1600, layers=2)
    large = write(out / "large" / "model", hidden=HIDDEN, inner=INNER, layers=LARGE_LAYERS)
    encoder = out / "bert"
    torch.manual_seed(3)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    BertForMaskedLM(BertConfig(vocab_size=1600, num_attention_heads=2, **shape)).save_pretrained(
        encoder
    )
    wordpiece().save_pretrained(encoder)
    # Names that are not those of the model: transformers translates, shards cannot.
    split = write(out / "split", hidden=64, inner=1600, layers=2)
    file = split / "model.safetensors"
    renamed = {n.replace("model.layers", "layer"): t for n, t in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    command = [str(WORKER), "--out", str(out), "--model", str(model)]
    command += ["--large", str(large), "--encoder", str(encoder), "--split", str(split)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**20))
        for ranks in (1, 2):
            runs.finish_ranks(command, ranks, start=runs.Fresh)
    return out


def found(out: Path, place: str) -> dict:
    return torch.load(out / f"{place}.pt")


@pytest.mark.parametrize("part", ["critic", "reward"])
def test_training_in_shards_equals_one_process(out: Path, part: str) -> None:
    expected = found(out, "0of1")[part]
    for place in ("0of2", "1of2"):
        sharded = found(out, place)[part]
        # Sums over rows are added in another order: float32's rounding.
        assert sharded["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert_close(sharded["weights"], expected["weights"])
    assert_equal(found(out, "0of2")[part]["weights"], found(out, "1of2")[part]["weights"])


def test_a_critic_in_shards_resumes_to_the_bit(out: Path) -> None:
    for place in ("0of2", "1of2"):
        critic = found(out, place)["critic"]
        assert critic["resumed loss"] == critic["loss"][-1:]
        assert_equal(critic["resumed"], critic["weights"])


def test_no_rank_has_the_whole_scorer(out: Path) -> None:
    size = (out / "large" / "model" / "model.safetensors").stat().st_size / 2**20
    for place in ("0of2", "1of2"):
        assert found(out, place)["grown_mib"] < 0.75 * size
    assert found(out, "0of1")["grown_mib"] > 0.75 * size


def test_a_reward_model_is_saved_by_streaming_and_read_again(out: Path) -> None:
    for place, is_sharded in (("0of1", False), ("0of2", True), ("1of2", True)):
        reward = found(out, place)["reward"]
        assert reward["sharded"] is is_sharded
        assert reward["loaded sharded"] is is_sharded
        assert reward["loaded"] == reward["after"]
        assert reward["loaded"] != reward["before"]
        assert reward["numbers"] == (
            [0.5, 0.25],
            [2.0, 1.0],
            {"stop_token_ids": [1], "supervision": "pairs"},
        )
    saved = [out / f"reward-{ranks}" / "model" for ranks in (1, 2)]
    names = [sorted(p.name for p in folder.iterdir()) for folder in saved]
    assert names[0] == names[1]
    assert "model.safetensors.index.json" in names[0]
    others = [n for n in names[0] if not n.endswith(".safetensors")]
    for name in others:
        first, second = (sha256((folder / name).read_bytes()).hexdigest() for folder in saved)
        assert first == second, name


def test_transformers_reads_the_files_with_the_trained_weights(out: Path) -> None:
    model, report = AutoModelForSequenceClassification.from_pretrained(
        out / "reward-2" / "model", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    trained = found(out, "0of2")["reward"]["weights"]
    read = {f"backbone.{n}": p for n, p in model.model.named_parameters()}
    assert_equal(read | {"head.weight": model.score.weight}, trained)


def test_a_scorer_and_an_encoder_are_loaded_alike(out: Path) -> None:
    whole = found(out, "0of1")
    for place in ("0of2", "1of2"):
        sharded = found(out, place)
        assert sharded["other heads"] == ((3, 64), True)
        values, lacking, is_sharded = sharded["encoder"]
        assert (lacking, is_sharded) == ([], True)
        for a, b in zip(values, whole["encoder"][0], strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=0.0, atol=1e-5)
        assert sharded["started"] == sharded["reward"]["after"]
        assert sharded["split"] is False
