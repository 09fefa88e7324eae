"""The best weights of a stage stay on disk until nothing can resume it any more."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import alone

from align.core.artifacts import read_artifact
from align.stages import base
from align.stages.best import BestWeights, tidy_after


def test_other_weights_are_deleted_only_after_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sft"
    best = BestWeights(lambda out: (out / "model").mkdir(parents=True), out)
    for step in (5, 9):
        best.save(step)
        (best.folder(step) / "model" / "config.json").write_text(str(step))
    delete = tidy_after(SimpleNamespace(best_step=9), best)  # pyright: ignore[reportArgumentType]
    assert delete is not None
    seen: list[bool] = []

    def tidy() -> None:
        # A process that is killed before this line leaves what its successor resumes with.
        seen.append((out / "manifest.json").is_file())
        assert best.folder(5).is_dir()
        delete()

    def trained(spec: object, context: object) -> base.StageResult:
        best.restore(9)
        return base.StageResult({}, tidy=tidy)

    monkeypatch.setattr(base, "prepare_and_train", trained)
    monkeypatch.setattr(base, "write_card", lambda *args: None)
    monkeypatch.setattr(base.checkpoints, "check_stage_is_ours", lambda out: None)
    recipe: Any = SimpleNamespace(stages={"sft": SimpleNamespace(imports_model=False)})
    context = base.StageContext(recipe, "sft", tmp_path, 0)
    with alone.world_of_one():
        manifest = {"kind": "policy", "identity": {"files": {}}}
        base._run("sft", context, manifest=manifest, began=0.0)
    base._release()
    assert seen == [True]
    assert [path.name for path in (out / "best").iterdir()] == ["step-00000009"]
    # The manifest does not promise weights that are deleted: the artifact is whole.
    assert (read_artifact(out, "policy").model_dir / "config.json").read_text() == "9"
    assert tidy_after(None, best) is None
