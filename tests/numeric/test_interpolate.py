"""Interpolated weights against numpy; alpha 0 and 1 byte for byte; the rule that chooses alpha."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from engine_models import save_tiny, tiny_model

from align.core.errors import ArtifactError
from align.core.identity import record_begun
from align.core.types import Completion, PromptRow
from align.recipe.schema import MergeStage, SamplingSpec
from align.recipe.schema.tuning import LoraTuning
from align.stages import merge
from align.stages.merge import AlphaScores, answer, choose, curve_of
from align.tuning.export import full_weights
from align.tuning.interpolate import check_alike, interpolated, mix, write_interpolated
from align.tuning.wrap import add_tuner
from reward_models import build_reward


@pytest.fixture(scope="module", params=["tied", "untied"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Save two models; the second in several files, the first in one."""
    folder, tied = tmp_path_factory.mktemp("pair"), request.param == "tied"
    first = save_tiny(tiny_model(1, tied=tied), folder / "a")
    model = tiny_model(2, tied=tied)
    model.save_pretrained(folder / "b", max_shard_size="60KB")
    save_tiny(tiny_model(1, tied=tied), folder / "b2")
    for file in (folder / "b2").glob("tokenizer*"):
        file.rename(folder / "b" / file.name)
    assert len(list((folder / "b").glob("*.safetensors"))) > 2
    return first, folder / "b"


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("alpha", [0.25, 0.9])
def test_written_weights_are_the_weighted_mean(pair, tmp_path: Path, alpha: float) -> None:
    a, b = (weights(folder) for folder in pair)
    check_alike(*pair)
    write_interpolated(*pair, alpha=alpha, out=tmp_path / "out")
    found = weights(tmp_path / "out")
    assert found.keys() == b.keys()
    for name, x in found.items():
        expected = (1 - alpha) * a[name].astype(np.float64) + alpha * b[name].astype(np.float64)
        np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-8)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in found.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, framework="pt") as tensors:
            assert name in tensors.keys()  # noqa: SIM118 (not a dict)
    assert dict(interpolated(*pair, alpha)).keys() == found.keys()


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_ends_are_byte_equal_to_the_inputs(pair, tmp_path: Path, alpha: float) -> None:
    source = pair[int(alpha)]
    write_interpolated(*pair, alpha=alpha, out=tmp_path / "out")
    files = {p.name: p.read_bytes() for p in source.iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == files
    for name, tensor in interpolated(*pair, alpha):
        assert tensor.numpy().tobytes() == weights(source)[name].tobytes(), name


def test_written_model_answers_as_the_mean_of_the_weights(pair, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_interpolated(*pair, alpha=0.5, out=tmp_path / "out")
    models = [AutoModelForCausalLM.from_pretrained(p) for p in (*pair, tmp_path / "out")]
    state = {k: (v + models[1].state_dict()[k]) / 2 for k, v in models[0].state_dict().items()}
    models[0].load_state_dict(state)
    ids = torch.tensor([[5, 9, 17, 33, 2]])
    with torch.no_grad():
        torch.testing.assert_close(models[2](ids).logits, models[0](ids).logits)


def test_interpolating_a_merged_lora_scales_its_update(tmp_path: Path) -> None:
    """W + s B A merged, then mixed with W at alpha, is W + s (alpha B) A merged."""
    source = save_tiny(tiny_model(1, tied=True), tmp_path / "base")
    tuned = add_tuner(tiny_model(1, tied=True), LoraTuning(method="lora", rank=4))
    torch.manual_seed(0)
    updates = [p for name, p in tuned.named_parameters() if "lora_B" in name]
    for p in updates:
        torch.nn.init.normal_(p, std=0.1)
    state = {name: x.clone() for name, x in full_weights(tuned)}
    tiny = tiny_model(1, tied=True)
    tiny.load_state_dict(state, strict=False)
    tiny.save_pretrained(tmp_path / "tuned")
    for p in updates:
        p.data.mul_(0.3)
    expected = dict(full_weights(tuned))
    for name, tensor in interpolated(source, tmp_path / "tuned", 0.3):
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)


def test_low_precision_is_mixed_in_float32_and_keeps_the_sign_of_zero() -> None:
    """In bfloat16 0.75 * 1 and 0.25 * 1.0078125 would round before they are added."""
    a, b = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0078125]).bfloat16()
    exact = 0.25 * 1.0 + 0.75 * 1.0078125
    assert mix(a, b, 0.75, name="x").item() == torch.tensor(exact).bfloat16().item()
    assert str(mix(torch.ones(1), torch.tensor([-0.0]), 1.0, name="x").item()) == "-0.0"
    with pytest.raises(ArtifactError, match=r"steps: torch\.int64 values differ"):
        mix(torch.tensor([1]), torch.tensor([2]), 0.5, name="steps")


def test_models_that_are_not_alike_are_refused(pair, tmp_path: Path) -> None:
    from transformers import Qwen2ForCausalLM

    tied, untied = (save_tiny(tiny_model(1, tied=t), tmp_path / str(t)) for t in (True, False))
    with pytest.raises(
        ArtifactError, match="the head is tied to the embeddings in only one of them"
    ):
        check_alike(tied, untied)
    tensors = {k: torch.tensor(v) for k, v in weights(tied).items()}
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, tied / "model.safetensors", metadata={"format": "pt"})
    other = save_tiny(tiny_model(1, tied=True), tmp_path / "other")
    with pytest.raises(ArtifactError, match=r"model.norm.weight: shape \[3\] in"):
        check_alike(tied, other)
    tensors["surplus"] = tensors.pop("model.norm.weight")
    save_file(tensors, tied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="2 weights exist in only one of them, such as"):
        check_alike(tied, other)
    assert Qwen2ForCausalLM.from_pretrained(other).config.tie_word_embeddings


def curve_from(*points: tuple[float, float | None, float | None]) -> list[dict[str, Any]]:
    """Return the curve of one prompt in each set, from (alpha, score on prompts, on shifted)."""
    found = {
        alpha: {
            "prompts": AlphaScores([prompts], [0]),
            "shifted": AlphaScores([shifted], [0]),
        }
        for alpha, prompts, shifted in points
    }
    return curve_of(found, seed=0)


def test_rule_takes_the_best_shifted_score_that_keeps_what_was_learnt() -> None:
    curve = curve_from((0.0, 0.1, 0.9), (0.5, 0.79, 0.8), (0.75, 0.8, 0.7), (1.0, 0.8, 0.4))
    assert choose(curve, tolerance=0.02) == 0.5
    assert choose(curve, tolerance=0.0) == 0.75
    assert choose(curve, tolerance=1.0) == 0.0
    equal = curve_from((0.5, 0.8, 0.7), (0.75, 0.9, 0.7), (1.0, 0.8, 0.4))
    assert choose(equal, tolerance=0.0) == 0.75
    assert choose(curve_from((0.5, None, 0.7), (1.0, 0.8, None)), tolerance=0.0) == 1.0
    no_shifted = curve_from((0.25, 0.8, 0.6), (0.5, 0.8, 0.7), (0.75, 0.8, None), (1.0, 0.8, None))
    assert choose(no_shifted, tolerance=0.0) == 0.5
    with pytest.raises(ArtifactError, match="no response of the fine-tuned model could be scored"):
        choose(curve_from((0.5, 0.5, 0.7), (1.0, None, None)), tolerance=0.1)


def test_rule_compares_the_responses_that_both_alphas_have_a_score_for() -> None:
    """Alpha 0.5 is worse on every prompt that it scores, and has no score for the hard ones."""
    tuned, part, best = ([1.0, 1.0, 0.0, 0.0], [0.9, 0.9, None, None], [1.0, 1.0, 1.0, 1.0])
    for prompts, shifted in ((part, best), (tuned, part)):
        found = {
            alpha: {
                name: AlphaScores(scores, [*range(4)])
                for name, scores in zip(("prompts", "shifted"), sets, strict=True)
            }
            for alpha, sets in ((0.5, (prompts, shifted)), (1.0, (tuned, tuned)))
        }
        assert choose(curve_of(found, seed=0), tolerance=0.01) == 1.0


def test_rows_with_one_prompt_have_one_number() -> None:
    class Engine:
        def generate(self, prompts: Any, *, n: int, **_: Any) -> list[list[Completion]]:
            return [[Completion((7,), (-1.0,), "stop", "a", 0)] * n for _ in prompts]

    rows = [PromptRow(ids, "", {}) for ids in ((1, 2), (3,), (1, 2))]
    spec: Any = SimpleNamespace(samples=2, sampling=SamplingSpec())
    rewards = [build_reward({"kind": "regex", "pattern": "a"})]
    context: Any = SimpleNamespace(seed=0)
    engine: Any = Engine()
    found = answer(engine, rows, rewards, spec=spec, stop_token_ids=(7,), context=context)
    assert found.prompts == [0, 0, 1, 1, 0, 0]


def test_weights_that_a_killed_merge_left_are_removed_by_its_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be hashed, and stay in the artifact for ever."""
    monkeypatch.setattr(merge, "write", lambda *_, out, **__: out.mkdir())
    spec, context, sources = (
        SimpleNamespace(method="ties"),
        SimpleNamespace(out=tmp_path, seed=0),
        [SimpleNamespace(model_dir=tmp_path)] * 2,
    )
    weights: Any = merge._merged_weights(spec, sources, alpha=0.5, context=context)  # type: ignore
    weights.__enter__()  # killed here
    (left,) = tmp_path.iterdir()
    assert (left / "model").is_dir()
    record_begun(tmp_path, {"spec_hash": "0"})
    assert [path.name for path in tmp_path.iterdir()] == ["begun.json"]


def test_curve_holds_means_and_differences_to_the_tuned_model() -> None:
    """Answers without a score leave with their partner: gains are over prompts 0 and 2 only."""
    tuned = AlphaScores([1.0, None, 1.0], [0, 1, 2])
    half = AlphaScores([0.0, 0.5, 1.0], [0, 1, 2])
    found = {1.0: {"prompts": tuned, "shifted": tuned}, 0.5: {"prompts": half, "shifted": half}}
    first, last = curve_of(found, seed=0)
    assert (first["alpha"], last["alpha"]) == (0.5, 1.0)
    assert first["prompts"][0] == 0.5
    assert first["prompts_gain"][0] == -0.5
    assert last["shifted_gain"] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "give prompts, shifted, scores"),
        ({"alphas": [0.5], "prompts": [{"path": "x"}]}, "a single alpha is not scored; remove"),
        ({"alphas": [0.5, 0.5]}, "contains a duplicate"),
        (
            {
                "alphas": [0.0, 0.5],
                "prompts": [{"path": "x"}],
                "shifted": [{"path": "x"}],
                "scores": [{"kind": "math"}],
            },
            "alphas must contain 1.0",
        ),
    ],
)
def test_settings_without_sense_are_refused(keys: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MergeStage.model_validate({"kind": "merge", "base": "a", "tuned": "b", **keys})
