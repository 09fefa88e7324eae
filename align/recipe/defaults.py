"""Fill in the defaults of a recipe's stages that depend on other settings, before validation."""

from collections.abc import Mapping
from typing import Any

from align.recipe.algorithms import defaults_of
from align.recipe.schema import STAGES, StageSpec, TrainingStage
from align.recipe.schema.common import Spec
from align.recipe.schema.dtype import usual_dtype
from align.recipe.schema.tuning import known_rates
from align.recipe.source import Key, Mark, Source


def complete_blocks(source: Source) -> None:
    """Fill in the defaults of every stage that depend on other settings of the stage.

    These are the algorithm's defaults, the learning rate of the tuning method, the recipe's dtype,
    and the remaining keys of a partly given block whose default differs between stages.
    """
    stages = source.data.get("stages")
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        kind = class_of(stage.get("kind")) if isinstance(stage, dict) else None
        if kind is None:
            continue
        if "algorithm" in kind.model_fields:
            algorithm = stage.get("algorithm")
            mark = Mark(f"algorithm: {algorithm}")
            _lay_in(source, ("stages", name), stage, below=defaults_of(algorithm), mark=mark)
        if "dtype" in kind.model_fields and kind.model_fields["dtype"].default is not None:
            _lay_in_dtype(source, name, stage)
        if issubclass(kind, TrainingStage):
            _lay_in_rate(source, name, stage, kind=kind)
        _complete(stage, kind)


def _lay_in(
    source: Source, key: Key, given: dict[str, Any], *, below: Mapping[str, Any], mark: Mark
) -> None:
    """Add the values of ``below`` that are missing in ``given``, the mapping at ``key``."""
    for name, value in below.items():
        here = (*key, name)
        if name not in given:
            source.marks[here] = mark
            given[name] = {} if isinstance(value, Mapping) else value
        if isinstance(value, Mapping) and isinstance(given[name], dict):
            _lay_in(source, here, given[name], below=value, mark=mark)


def _lay_in_dtype(source: Source, name: str, stage: dict[str, Any]) -> None:
    """Add the recipe's dtype, or the usual one of this machine, if the stage sets none."""
    chosen = source.data.get("dtype")
    # An invalid value is reported once, at the recipe's key.
    given = chosen in ("float32", "bfloat16", "auto")
    value, why = (chosen, "dtype") if given else (usual_dtype(), "default here")
    _lay_in(source, ("stages", name), stage, below={"dtype": value}, mark=Mark(why))


def _lay_in_rate(
    source: Source, name: str, stage: dict[str, Any], *, kind: type[TrainingStage]
) -> None:
    """Add the default learning rate of the stage's tuning method if the recipe sets none."""
    tuning = stage.get("tuning", {"method": "full"})
    method = tuning.get("method") if isinstance(tuning, dict) else None
    known = known_rates(kind.family, method) if isinstance(method, str) else None
    if known is not None:
        below = {"optim": {"learning_rate": known.default}}
        mark = Mark(f"default of {method} in {stage['kind']}")
        _lay_in(source, ("stages", name), stage, below=below, mark=mark)


def _complete(given: dict[str, Any], kind: type[Spec]) -> None:
    """Add the missing keys of each given block from the stage's default of that block."""
    for name, field in kind.model_fields.items():
        block, default = given.get(name), field.default
        # The default of a union (tuning) belongs to one method; the given block may be another.
        if not isinstance(default, Spec) or field.annotation is not type(default):
            continue
        if not isinstance(block, dict):
            continue
        # Of the stage's default, only what differs from the block's own defaults.
        for key in sorted(default.model_fields_set - set(block)):
            block[key] = default.model_dump(mode="json", include={key})[key]
        _complete(block, type(default))


def class_of(kind: object) -> type[StageSpec] | None:
    """Return the class of a stage kind, None for an unknown kind."""
    return STAGES.get(kind) if isinstance(kind, str) else None
