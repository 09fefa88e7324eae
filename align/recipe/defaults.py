"""Lay a block that a recipe gives in part over the default of its stage, not over the class's.

An evaluate stage samples at temperature 0 unless told otherwise; ``sampling: {max_new_tokens: 32}``
there changes the length alone. Without this the block would be read by itself, and every key that
is left out would fall back to what the class of the block says (temperature 1).

The learning rate has no default of a class: it is that of the stage's tuning method.
"""

from collections.abc import Mapping
from typing import Any, get_args

from align.recipe.algorithms import PRESETS
from align.recipe.parts import Spec
from align.recipe.rates import known_rates
from align.recipe.schema import AnyStage
from align.recipe.source import Mark, Source

STAGES: dict[str, type[Spec]] = {
    get_args(stage.model_fields["kind"].annotation)[0]: stage
    for stage in get_args(get_args(AnyStage)[0])
}


def complete_blocks(source: Source) -> None:
    """Write into the blocks of every stage what the stage's own default sets beside them."""
    stages = source.data.get("stages")
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        if isinstance(stage, dict) and isinstance(stage.get("kind"), str):
            _complete_rate(source, name, stage)
            kind, algorithm = STAGES.get(stage["kind"]), stage.get("algorithm")
            preset = PRESETS.get(algorithm, {}) if isinstance(algorithm, str) else {}
            if kind is not None:
                _complete(stage, kind, preset)


def _complete_rate(source: Source, name: str, stage: dict[str, Any]) -> None:
    """Write the learning rate of the stage's tuning method where the recipe leaves it out."""
    tuning, optim = stage.get("tuning", {"method": "full"}), stage.get("optim", {})
    method = tuning.get("method") if isinstance(tuning, dict) else None
    known = known_rates(stage["kind"], method) if isinstance(method, str) else None
    if known is not None and isinstance(optim, dict) and "learning_rate" not in optim:
        stage["optim"] = {"learning_rate": known.default, **optim}
        key = ("stages", name, "optim", "learning_rate")
        source.marks[key] = Mark(f"default of {method} in {stage['kind']}")


def _complete(given: dict[str, Any], kind: type[Spec], preset: Mapping[str, Any]) -> None:
    """Complete the blocks of ``given`` in place; ``preset`` goes before the class's defaults."""
    for name, field in kind.model_fields.items():
        block, default = given.get(name), field.default
        # A default of one of several classes (tuning) belongs to another method than is given.
        if not isinstance(block, dict) or field.annotation is not type(default):
            continue
        above = preset.get(name, {})
        for key in sorted(default.model_fields_set - set(block) - set(above)):
            block[key] = default.model_dump(mode="json", include={key})[key]
        _complete(block, type(default), above)
