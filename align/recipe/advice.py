"""Warnings about a valid recipe: settings outside the range that is known to work."""

from pathlib import Path
from typing import Any

from align.recipe.schema import Recipe, TrainingStage
from align.recipe.schema.tuning import known_rates
from align.recipe.starts import read_mapping

SMALL_WIDTH = 512
"""Published learning rates do not apply below this hidden size; small models need larger rates."""


def warnings(recipe: Recipe) -> list[str]:
    """Return one line for each unusual setting of a valid recipe."""
    found = []
    for name, spec in recipe.stages.items():
        if isinstance(spec, TrainingStage) and not _is_small(recipe, spec.init):
            found += _rate(name, spec)
    return found


def _rate(name: str, spec: TrainingStage) -> list[str]:
    known, rate = known_rates(spec.family, spec.tuning.method), spec.optim.learning_rate
    if known is None or known.low <= rate <= known.high or not spec.optim.warn_rate:
        return []
    return [
        f"stages.{name}.optim.learning_rate: {rate:g} is outside of {known.low:g} to "
        f"{known.high:g} for {spec.tuning.method} in {spec.kind}: {known.source}. "
        f"If it is meant, set optim.warn_rate: false"
    ]


def _is_small(recipe: Recipe, init: str) -> bool:
    """Return whether the model behind ``init`` is small; an unknown model counts as large."""
    # Follow the chain of `init` to the stage that imports or builds the model.
    seen: set[str] = set()
    while init in recipe.stages and init not in seen:
        seen.add(init)
        spec: Any = recipe.stages[init]
        if spec.kind not in ("base", "encoder"):
            init = getattr(spec, "init", "")
        elif getattr(spec, "build", None) is not None:
            return spec.build.hidden_size < SMALL_WIDTH
        else:
            init = spec.path
    # A transformers folder, or the model inside an artifact.
    for folder in (Path(init), Path(init) / "model"):
        if (folder / "config.json").is_file():
            width = read_mapping(folder / "config.json").get("hidden_size")
            return isinstance(width, int) and width < SMALL_WIDTH
    return False
