"""ZeRO-3 loads a model into shards: the same weights and training, and never the whole model."""

import math
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertModel, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import stage_runs as runs
from engine_models import words

from reward_models.scalar import RewardModel

WORKER = Path(__file__).parent / "workers" / "shards.py"
LARGE_LAYERS, HIDDEN, INNER = 24, 512, 2048


def write(folder: Path, *, hidden: int, inner: int, layers: int, tied: bool = True) -> Path:
    config = Qwen2Config(
        vocab_size=1600,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        initializer_range=0.06,
    )
    torch.manual_seed(1)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    words(1600).save_pretrained(folder)
    return folder


def scorer(folder: Path, policy: Path) -> None:
    """Save a reward model on the decoder of a policy."""
    torch.manual_seed(2)
    model = RewardModel(AutoModel.from_pretrained(policy), 64)
    model.set_normalization(mean=0.3, std=1.7)
    model.save(folder, tokenizer=words(1600), stop_token_ids=[2])


def encoder(folder: Path) -> None:
    """Save a reward model on a small BERT, whose files have other names than a decoder's."""
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=1600,
        hidden_size=64,
        intermediate_size=1600,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    model = RewardModel(BertModel(config, add_pooling_layer=False), 64, reads="first")
    model.save(folder, tokenizer=words(1600))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], dict, float]:
    """Run the worker on two ranks; give what each found, the saved tensors and the large size."""
    out = tmp_path_factory.mktemp("shards")
    model = write(out / "small" / "model", hidden=64, inner=1600, layers=2)
    large = write(out / "large" / "model", hidden=HIDDEN, inner=INNER, layers=LARGE_LAYERS)
    # Files whose names are not those of the model: transformers translates, shards cannot.
    split = write(out / "split", hidden=64, inner=1600, layers=2)
    file = split / "model.safetensors"
    renamed = {n.replace("model.layers", "layers"): t for n, t in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    scorer(out / "scorer", model)
    encoder(out / "encoder")
    command = [str(WORKER), "--out", str(out), "--model", str(model)]
    command += ["--large", str(large), "--split", str(split)]
    # What is freed before the product sets this, in imports, would count or not by chance.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**20))
        runs.finish_ranks(command, 2, start=runs.Fresh)
    size = (large / "model.safetensors").stat().st_size / 2**20
    saved = load_file(model / "model.safetensors")
    found = [torch.load(out / f"{rank}.pt") for rank in range(2)]
    for kind in ("whole", "sharded", "large"):
        files = sorted((out / f"{kind}-saved" / "model").iterdir())
        found[0][f"{kind}-saved"] = {f.name: sha256(f.read_bytes()).hexdigest() for f in files}
    read = {
        n: t
        for f in (out / "large-saved" / "model").glob("*.safetensors")
        for n, t in load_file(f).items()
    }
    kept = load_file(large / "model.safetensors")
    found[0]["large-equal"] = {n: torch.equal(t, kept[n]) for n, t in read.items()}
    return found, saved, size


def test_each_rank_holds_half_and_the_files_weights(found: tuple) -> None:
    ranks, saved, _ = found
    total = sum(t.numel() for t in saved.values())
    for rank in ranks:
        held, whole = rank["held"]
        # Odd sizes are padded to a multiple of the ranks; nothing is whole.
        assert total / 2 <= held <= total / 2 + len(saved)
        assert whole == 0
        assert rank["tied"] == (True, True)
        assert all(rank["buffers"])
        assert rank["weights"].keys() == saved.keys()
        for name, (a, b) in rank["weights"].items():
            assert torch.equal(a, saved[name]), name
            assert torch.equal(b, saved[name]), name


def test_no_rank_ever_has_the_whole_model(found: tuple) -> None:
    ranks, _, size = found
    for rank in ranks:
        # Its half, one tensor and what DeepSpeed imports; the whole model would be all of it.
        assert rank["grown_mib"] < 0.75 * size, (rank["grown_mib"], size)


def test_saving_gathers_one_tensor_at_a_time(found: tuple) -> None:
    ranks, _, size = found
    for rank in ranks:
        # A file of 32 MiB on rank 0, and one tensor; the other half of the model would be 0.5.
        assert rank["grown_by_saving_mib"] < 0.3 * size, (rank["grown_by_saving_mib"], size)
    assert len(ranks[0]["large-saved"]) > 10
    equal = ranks[0]["large-equal"]
    assert len(equal) == 2 + 12 * LARGE_LAYERS
    assert all(equal.values())


def test_saved_files_are_the_same_in_shards_and_whole(found: tuple) -> None:
    files = found[0][0]["sharded-saved"]
    assert files == found[0][0]["whole-saved"]
    assert "model.safetensors.index.json" in files


def test_forward_before_training_equals_that_of_the_whole_model(found: tuple) -> None:
    for rank in found[0]:
        whole, sharded = rank["logprobs"]
        for a, b in zip(whole, sharded, strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=0.0, atol=1e-5)
        assert rank["continued"] == sharded


def test_reference_of_an_online_stage_is_sharded_and_stays_the_start(found: tuple) -> None:
    for rank in found[0]:
        sharded, values = rank["reference"]
        assert sharded
        assert values == rank["logprobs"][1]


@pytest.mark.parametrize("which", [0, 1], ids=["decoder", "encoder"])
def test_learned_rewards_of_an_online_stage_are_sharded(found: tuple, which: int) -> None:
    lengths = []
    for rank in found[0]:
        scores = rank["scores"][which]
        assert scores["whole in shards"] == [False] * 3
        assert scores["sharded in shards"] == [True] * 3
        assert scores["sharded"] == scores["whole"]
        single, both = scores["whole"]
        assert both == pytest.approx(single)
        assert all(map(math.isfinite, single))
        assert len(set(single)) == len(single)
        lengths.append(len(single))
    assert lengths == [5, 2]


def test_training_is_the_same_to_the_bit(found: tuple) -> None:
    for rank in found[0]:
        assert rank["whole"]["loss"] == rank["sharded"]["loss"]
        before, after = rank["whole"]["weights"], rank["sharded"]["weights"]
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert any(not torch.equal(after[name], rank["weights"][name][0]) for name in after)


def test_other_names_are_left_to_transformers(found: tuple) -> None:
    assert [rank["refused"] for rank in found[0]] == [False, False]
