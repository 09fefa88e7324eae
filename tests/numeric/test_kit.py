"""TIES, DARE and SLERP through mergekit, against their papers written out in numpy."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from engine_models import save_tiny, tiny_model

from align.core.errors import ArtifactError
from align.recipe.rules import idle_options
from align.recipe.schema import MergeStage
from align.tuning.interpolate import check_alike
from align.tuning.kit import check_kit, write_by_kit


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Save a base and two models that differ from it everywhere."""
    folder = tmp_path_factory.mktemp("kit")
    return [save_tiny(tiny_model(seed, tied=True), folder / str(seed)) for seed in (1, 2, 3)]


def weights(folder: Path) -> dict[str, np.ndarray]:
    found = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    found.pop("lm_head.weight", None)
    return {k: v.astype(np.float64) for k, v in found.items()}


def merged(folders: list[Path], alpha: float, out: Path, method, density: float = 0.5):
    base, *tuned = folders
    write_by_kit(base, tuned, alpha=alpha, out=out, method=method, density=density, seed=0)
    check_alike(base, out)
    assert (out / "tokenizer.json").read_bytes() == (tuned[0] / "tokenizer.json").read_bytes()
    return weights(out)


def test_ties_trims_elects_a_sign_and_averages_what_agrees(folders, tmp_path) -> None:
    found = merged(folders, 0.7, tmp_path / "out", "ties", density=0.25)
    base, *tuned = map(weights, folders)
    for name, start in base.items():
        deltas = []
        for other in tuned:
            delta = other[name] - start
            kept = np.sort(np.abs(delta).ravel())[::-1][: int(0.25 * delta.size)]
            deltas.append(
                np.where(np.abs(delta) >= kept[-1], delta, 0.0) if kept.size else 0 * delta
            )
        both = np.stack(deltas)
        agrees = (np.sign(both) == np.sign(both.sum(0))) & (both != 0.0)
        mean = (both * agrees).sum(0) / np.maximum(agrees.sum(0), 1)
        np.testing.assert_allclose(found[name], start + 0.7 * mean, atol=2e-6, err_msg=name)


def test_dare_drops_at_random_and_rescales_what_stays(folders, tmp_path) -> None:
    found = merged(folders[:2], 1.0, tmp_path / "out", "dare_linear", density=0.25)
    again = merged(folders[:2], 1.0, tmp_path / "again", "dare_linear", density=0.25)
    base, tuned = map(weights, folders[:2])
    stayed = total = 0
    for name, start in base.items():
        moved, delta = found[name] - start, tuned[name] - start
        kept = np.abs(moved) > 1e-5
        # The paper divides by the density; mergekit keeps the sum of the sizes, that in the mean.
        factor = np.abs(delta).sum() / max(np.abs(delta[kept]).sum(), 1e-9)
        np.testing.assert_allclose(moved[kept], delta[kept] * factor, atol=1e-4, err_msg=name)
        stayed, total = stayed + int(kept.sum()), total + int((np.abs(delta) > 1e-4).sum())
        np.testing.assert_array_equal(found[name], again[name])
    assert 0.2 < stayed / total < 0.3


def test_slerp_goes_along_the_arc(folders, tmp_path) -> None:
    found = merged(folders[:2], 0.3, tmp_path / "out", "slerp")
    base, tuned = map(weights, folders[:2])
    for name, a in base.items():
        b = tuned[name]
        cos = (a * b).sum() / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12)
        if not b.any():
            expected = a
        elif abs(cos) > 0.9995:  # mergekit takes the straight line there
            expected = 0.7 * a + 0.3 * b
        else:
            angle = np.arccos(cos)
            expected = (np.sin(0.7 * angle) * a + np.sin(0.3 * angle) * b) / np.sin(angle)
        np.testing.assert_allclose(found[name], expected, atol=5e-6, err_msg=name)


def test_without_the_extra_the_stage_says_how_to_install_it(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArtifactError, match=r"pip install 'align-suite\[merge\]'"):
        check_kit()


@pytest.mark.parametrize("keys", [{"others": ["c"]}, {"density": 0.3}])
def test_what_linear_and_slerp_do_not_read_is_refused(keys) -> None:
    stage = {"kind": "merge", "base": "a", "tuned": "b", "alphas": [0.5], **keys}
    for method in ("linear", "slerp"):
        ((key, reason),) = idle_options(MergeStage.model_validate({**stage, "method": method}))
        assert [key] == list(keys)
        assert f"no effect with method {method}" in reason
    assert not list(idle_options(MergeStage.model_validate({**stage, "method": "ties"})))
