"""``align check``: look at the files that a valid recipe names, without loading a model."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from align.core.accelerator import list_gpus, missing_device
from align.core.errors import AlignError, DataError
from align.core.extras import TRAINING
from align.core.references import CONFIGS
from align.core.text import is_hub_id
from align.pipeline.processes import num_cores
from align.recipe.load import Resolved
from align.recipe.schema import DataSpec, Spec, StageSpec
from align.recipe.schema.formats import Kind

ROWS_OF_KEY: dict[str, Kind] = {
    "prompts": "prompts",
    "shifted": "prompts",
    "answers": "sft",
    "seeds": "sft",
    "pairs": "preference",
}
"""Kind of the rows of a key, for keys whose stage does not tell."""


@dataclass(slots=True)
class FirstLook:
    """What was found; every text is one line.

    Attributes:
        problems: what will fail when the stage starts, with the place in the recipe.
        warnings: what may be meant.
        unseen: what was not looked at, and why.
        num_sources: data sources whose first row was read.
        num_models: model folders that were found.
    """

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    num_sources: int = 0
    num_models: int = 0

    def closing_lines(self) -> Iterator[str]:
        """Yield what was checked, and what was not."""
        seen = ["keys and values", "references between stages"]
        if self.num_sources:
            seen.append(
                f"the first row of {self.num_sources} data source{'s'[: self.num_sources > 1]}"
            )
        if self.num_models:
            seen.append(f"the files of {self.num_models} model{'s'[: self.num_models > 1]}")
        yield f"checked: {', '.join(seen)}, packages, devices"
        unseen = "".join(f"{text}; " for text in dict.fromkeys(self.unseen))
        yield f"not checked: {unseen}all other rows, models and rewards (use --deep)"


def first_look(resolved: Resolved) -> FirstLook:
    """Return what the files, packages and devices of a recipe's stages look like."""
    found = FirstLook()
    num_gpus = len(list_gpus())
    if (problem := missing_device(resolved.recipe.device)) is not None:
        found.problems.append(f"{resolved.places.get('device', 'recipe')}: {problem}")
    for name, spec in resolved.recipe.stages.items():
        for key, owner, source in _sources(spec, f"stages.{name}"):
            try:
                _look_at(source, _kind(key, owner), found)
            except AlignError as error:
                found.problems.append(f"{_place(resolved, key)}{error}")
        _look_at_model(spec, f"stages.{name}.path", resolved, found=found)
        found.warnings += _devices(spec, f"stages.{name}.ranks", num_gpus)
    missing = [name for name in TRAINING if find_spec(name) is None]
    if missing:
        found.warnings.append(
            f"no stage can run here: {', '.join(missing)} not installed (pip install "
            "'align-suite[train]')"
        )
    return found


def _sources(part: object, key: str) -> Iterator[tuple[str, Spec, DataSpec]]:
    """Yield every data source of a specification with its key and the specification it is in."""
    if not isinstance(part, Spec):
        return
    for name in type(part).model_fields:
        value = getattr(part, name)
        for i, item in enumerate(value if isinstance(value, list) else [value]):
            at = f"{key}.{name}.{i}" if isinstance(value, list) else f"{key}.{name}"
            if isinstance(item, DataSpec):
                yield at, part, item
            else:
                yield from _sources(item, at)


def _kind(key: str, owner: Spec) -> Kind | None:
    """Return the kind of the rows of a key, None if unknown."""
    name = next(part for part in reversed(key.split(".")) if not part.isdigit())
    return ROWS_OF_KEY.get(name) or getattr(owner, "rows", None) or getattr(owner, "of", None)


def _look_at(source: DataSpec, kind: Kind | None, found: FirstLook) -> None:
    """Read the first row of a local data source as its stage will.

    Raises:
        DataError: nothing is there, it has no row, or the row is of another kind.
    """
    from align.data.formats.detect import FormatDetector, to_examples
    from align.data.load import rename_fields, source_of, with_labels_file
    from align.data.reading.sources import find_files, read_rows

    source = with_labels_file(source, kind or "prompts")
    if source.path is None:
        return
    if not find_files(source.path):
        if not is_hub_id(source.path):
            next(read_rows(source.path), None)  # raises: nothing is there
        found.unseen.append(f"data of the hub ({source.path})")
        return
    name, _ = source_of(source)
    first = list(islice(read_rows(name), 1))
    if not first:
        raise DataError(f"{source.path}: no row in it")
    found.num_sources += 1
    if source.map or source.templates or kind is None:  # other code decides what the row becomes
        found.unseen.append(f"what becomes of the rows of {source.path}")
        return
    row, place = first[0]
    row = rename_fields(row, source.rename, source=place)
    wanted = "preference" if source.answers else kind
    form = FormatDetector(source.format, kind=wanted).format_of(row, place)
    to_examples(row, kind=wanted, format=form, source=place)


def _look_at_model(spec: StageSpec, key: str, resolved: Resolved, *, found: FirstLook) -> None:
    """Find the folder of a model that a stage imports."""
    path = getattr(spec, "path", None)
    if not isinstance(path, str):
        return
    folder = Path(path).expanduser()
    if folder.is_dir():
        found.num_models += 1
        if not any((folder / name).is_file() for name in CONFIGS):
            expected = " or ".join(CONFIGS)
            found.problems.append(f"{_place(resolved, key)}{path}: no {expected} in this folder")
    elif is_hub_id(path):
        found.unseen.append(f"models of the hub ({path})")
    else:
        told = "no such folder, and not a hub id ORG/NAME"
        found.problems.append(f"{_place(resolved, key)}{path}: {told}")


def _devices(spec: StageSpec, key: str, num_gpus: int) -> list[str]:
    """Return a warning if a stage has more processes than this machine has devices."""
    num, what = (num_gpus, "GPUs") if num_gpus else (num_cores(), "CPU cores")
    told = f"{key}: {spec.ranks} ranks, but this machine has {num} {what}"
    return [told] if spec.ranks > num else []


def _place(resolved: Resolved, key: str) -> str:
    """Return the place of a key in the recipe as the start of a message."""
    keys = (f"{key}.path", f"{key}.labels", key)
    place = next((resolved.places[k] for k in keys if k in resolved.places), None)
    return f"{key}: " if place is None else f"{place}: {key}: "
