"""Merge models by TIES, DARE and SLERP with mergekit, an optional dependency."""

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.core.artifacts import SCRATCH
from align.core.errors import ArtifactError
from align.recipe.schema import MergeMethod
from align.tuning.interpolate import INDEX, weight_files


def check_kit() -> None:
    """Raise ArtifactError if mergekit is not installed."""
    if importlib.util.find_spec("mergekit") is None:
        raise ArtifactError(
            "merge: ties, dare_ties, dare_linear and slerp need mergekit, which is not installed. "
            "Run pip install 'align-suite[merge]', or use method linear."
        )


def _kit_config(
    base: Path, tuned: Sequence[Path], alpha: float, *, method: MergeMethod, density: float
) -> dict[str, Any]:
    """Return mergekit's configuration.

    Alpha is the position between base and tuned (slerp), or the factor of the mean of the pruned
    task vectors before they are added to the base (other methods).

    Reference:
        TIES arXiv:2306.01708, DARE arXiv:2311.03099.
    """
    dtype = json.loads((tuned[0] / "config.json").read_text(encoding="utf-8")).get("dtype")
    config: dict[str, Any] = {
        "merge_method": method,
        "base_model": str(base),
        "dtype": "float32",
        "out_dtype": dtype or "float32",
    }
    if method == "slerp":
        models = [{"model": str(base)}, {"model": str(tuned[0])}]
        return config | {"models": models, "parameters": {"t": alpha}}
    # Equal weights, normalized: the mean of the pruned task vectors, scaled by alpha.
    part = {"weight": 1.0, "density": density}
    models = [{"model": str(folder), "parameters": part} for folder in tuned]
    return config | {"models": models, "parameters": {"normalize": True, "lambda": alpha}}


def write_by_kit(
    base: Path,
    tuned: Sequence[Path],
    *,
    alpha: float,
    out: Path,
    method: MergeMethod,
    density: float,
    seed: int,
) -> None:
    """Write a model folder with mergekit's weights; everything else is as in ``tuned[0]``."""
    from mergekit.config import MergeConfiguration  # pyright: ignore[reportMissingImports]
    from mergekit.merge import run_merge  # pyright: ignore[reportMissingImports]
    from mergekit.options import MergeOptions  # pyright: ignore[reportMissingImports]

    config = _kit_config(base, tuned, alpha, method=method, density=density)
    options = MergeOptions(
        copy_tokenizer=False, write_model_card=False, random_seed=seed, quiet=True
    )
    shutil.rmtree(out, ignore_errors=True)
    old = {file.name for file in weight_files(tuned[0])} | {INDEX}
    shutil.copytree(tuned[0], out, ignore=lambda _, names: old & set(names))
    # mergekit writes a whole model folder, of which only the weights are used.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=SCRATCH) as place:
        run_merge(MergeConfiguration.model_validate(config), place, options)
        for file in [*weight_files(Path(place)), *Path(place).glob(INDEX)]:
            shutil.move(file, out / file.name)
