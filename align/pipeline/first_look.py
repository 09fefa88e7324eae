"""Look at the files that a valid recipe names, before a stage starts and without loading a model.

``align check`` looks at those of all stages, ``align run`` at those of the stages that it starts.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from glob import glob
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from align.core.accelerator import list_gpus, missing_device
from align.core.errors import AlignError, DataError, RecipeError
from align.core.extras import TRAINING
from align.core.model_folder import (
    check_files,
    is_adapter,
    lacking_of_tokenizer,
    refuse_other_form,
    refuse_unpadded,
)
from align.core.text import is_hub_id, unexpanded
from align.pipeline.processes import num_cores
from align.recipe.schema import BaseStage, DataSpec, Recipe, Spec, StageSpec
from align.recipe.schema.common import TokenizerSpec
from align.recipe.schema.evaluate import HarnessSpec
from align.recipe.schema.formats import Kind

_RECIPE_FILE = re.compile(r"(.+\.ya?ml):\d+:\d+: ")
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


def first_look(
    recipe: Recipe, places: Mapping[str, str], run_dir: Path, *, stages: Sequence[str] | None = None
) -> FirstLook:
    """Return what the files, packages and devices of a recipe's stages look like.

    Args:
        recipe: the recipe.
        places: dotted key to the place in its file, as far as known (``Resolved.places``).
        run_dir: folder of the run. What earlier stages will write there need not exist yet.
        stages: look at these only; None for all.
    """
    found = FirstLook()
    num_gpus = len(list_gpus())
    if (problem := missing_device(recipe.device)) is not None:
        found.problems.append(f"{places.get('device', 'recipe')}: {problem}")
    for name in recipe.stages if stages is None else stages:
        spec, key = recipe.stages[name], f"stages.{name}"
        for at, path, look in _looks(spec, key, found):
            if path is not None and _is_written_later(path, recipe, run_dir):
                found.unseen.append(f"what other stages write ({path})")
                continue
            try:
                look()
            except AlignError as error:
                hint = _hint_beside(path, _place(places, at))
                lines = str(error).splitlines()
                found.problems += [f"{_place(places, at)}{x}{hint}" for x in lines]
            else:
                found.warnings += _other_beside(path, _place(places, at))
        found.warnings += _devices(spec, f"{key}.ranks", num_gpus)
    missing = [name for name in TRAINING if find_spec(name) is None]
    if missing:
        found.warnings.append(
            f"no stage can run here: {', '.join(missing)} not installed (pip install "
            "'align-suite[train]')"
        )
    return found


def refuse_missing(
    recipe: Recipe, places: Mapping[str, str], run_dir: Path, *, stages: Sequence[str]
) -> None:
    """Raise RecipeError with all problems of the files of these stages, one line each."""
    problems = first_look(recipe, places, run_dir, stages=stages).problems
    if problems:
        raise RecipeError("\n".join(problems))


def _looks(
    part: Spec, key: str, found: FirstLook
) -> Iterator[tuple[str, str | None, Callable[[], None]]]:
    """Yield the files and folders that a specification names.

    Returns:
        The key of each, its path (None for other data), and what looks at it: a function that
        raises AlignError.
    """
    for name in type(part).model_fields:
        value = getattr(part, name)
        for i, item in enumerate(value if isinstance(value, list) else [value]):
            at = f"{key}.{name}.{i}" if isinstance(value, list) else f"{key}.{name}"
            if isinstance(item, DataSpec):
                yield at, item.path, partial(_look_at, item, _kind(at, part), found)
            elif isinstance(item, Spec):
                yield from _looks(item, at, found)
            elif isinstance(item, str) and (look := _look_of(part, name)) is not None:
                yield at, item, partial(look, item, found)


def _look_of(part: Spec, name: str) -> Callable[[str, FirstLook], None] | None:
    """Return what looks at the path in a field, None if the field contains none."""
    if isinstance(part, StageSpec) and name == "path":
        return partial(_look_at_model, part if isinstance(part, BaseStage) else None)
    if isinstance(part, TokenizerSpec) and name == "chat_template":
        return _look_at_template
    if isinstance(part, HarnessSpec) and name == "include_path":
        return _look_at_folder
    return None


def _is_written_later(path: str, recipe: Recipe, run_dir: Path) -> bool:
    """Return whether a path that does not exist is in the folder of one of the recipe's stages."""
    place = Path(path).expanduser().resolve()
    folders = [(run_dir / name).resolve() for name in recipe.stages]
    return not place.exists() and any(place.is_relative_to(folder) for folder in folders)


def _beside(path: str | None, place: str) -> Path | None:
    """Return what a relative path names in the folder of the recipe's file, None for nothing.

    Args:
        path: as in the recipe; data, models and templates are looked for in the current folder.
        place: ``file:line:column: key: ``, the place in the recipe.
    """
    file = _RECIPE_FILE.match(place)
    if path is None or file is None or path.startswith(("/", "~", "$")):
        return None
    found = glob(str(Path(file[1]).parent / path))
    return Path(found[0]) if found else None


def _hint_beside(path: str | None, place: str) -> str:
    """Return what to write for a path that is not in the current folder but beside the recipe."""
    beside = None if path is None or glob(path) else _beside(path, place)
    return f"; {beside} exists: write ${{RECIPE_DIR}}/{path} for it" if beside else ""


def _other_beside(path: str | None, place: str) -> list[str]:
    """Return a warning if a path also names another file or folder, beside the recipe."""
    beside = _beside(path, place)
    if path is None or beside is None:
        return []
    here = glob(path)
    # The name of a template is neither.
    if Path(here[0]).samefile(beside) if here else not is_hub_id(path):
        return []
    what = "that of the current folder is read" if here else "it is taken for a hub id"
    return [f"{place}{path}: {what}; write ${{RECIPE_DIR}}/{path} for {beside}"]


def _kind(key: str, owner: Spec) -> Kind | None:
    """Return the kind of the rows of a key, None if unknown."""
    name = next(part for part in reversed(key.split(".")) if not part.isdigit())
    return ROWS_OF_KEY.get(name) or getattr(owner, "rows", None) or getattr(owner, "of", None)


def _look_at(source: DataSpec, kind: Kind | None, found: FirstLook) -> None:
    """Read the first row of a local data source as its stage will.

    Raises:
        DataError: nothing is there, it has no row, or the row is of another kind; or the file of
            its ``templates`` cannot be read.
    """
    if source.path is None and source.labels is None:
        return
    from align.data.formats.detect import FormatDetector, to_examples
    from align.data.load import rename_fields, source_of, with_labels_file
    from align.data.reading.remote import check_url, is_remote
    from align.data.reading.sources import find_files, read_rows

    source = with_labels_file(source, kind or "prompts")
    assert source.path is not None
    if is_remote(source.path):  # seen when its stage downloads it
        check_url(source.path)
        found.unseen.append(f"data at {source.path}")
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
    if source.templates is not None:
        from align.data.wordings import read_wordings

        read_wordings(source.templates)
    if source.map or source.templates or kind is None:  # other code decides what the row becomes
        found.unseen.append(f"what becomes of the rows of {source.path}")
        return
    row, place = first[0]
    row = rename_fields(row, source.rename, source=place)
    wanted = "preference" if source.answers else kind
    form = FormatDetector(source.format, kind=wanted).format_of(row, place)
    to_examples(row, kind=wanted, format=form, source=place)


def _look_at_model(spec: BaseStage | None, path: str, found: FirstLook) -> None:
    """Read the JSON files in the folder of a model that a stage imports.

    Args:
        spec: the stage that imports a language model; None for one that imports an encoder.
        path: its folder or hub id.
        found: receives what was seen.

    Raises:
        DataError: no model is there.
        ArtifactError: the files cannot be one complete model.
        RecipeError: the tokenizer lacks something that the recipe does not set either.
    """
    folder = Path(path)
    if folder.exists():
        refuse_other_form(path)
    else:
        if not is_hub_id(path):
            raise DataError(f"{path}: no such folder, and not a hub id ORG/NAME{unexpanded(path)}")
        found.unseen.append(f"models of the hub ({path})")
        return
    found.num_models += 1
    if is_adapter(str(folder)):
        found.unseen.append(f"the base model of the adapter {path}")
        return
    check_files(str(folder), causal=spec is not None)
    lacking = lacking_of_tokenizer(str(folder))
    if spec is None:
        refuse_unpadded(path, padded="pad_token" not in lacking)
    else:
        _refuse_incomplete(spec.tokenizer, lacking)


def _refuse_incomplete(spec: TokenizerSpec, lacking: Collection[str]) -> None:
    """Raise RecipeError if a tokenizer lacks something that the recipe does not set either."""
    from align.data.render.templates import NEEDED, family_of, needs

    given = {
        "pad_token": spec.pad_token,
        "stop_token": spec.stop_token or family_of(spec.chat_template).stop,
        "chat_template": spec.chat_template,
    }
    lacks = {key.replace("eos_token", "stop_token") for key in lacking}
    if missing := [key for key in NEEDED if key in lacks and given[key] is None]:
        raise RecipeError("\n".join(needs(key) for key in missing))


def _look_at_template(name: str, _: FirstLook) -> None:
    from align.data.render.templates import template_text

    try:
        template_text(name)
    except RecipeError as error:
        raise RecipeError(str(error).removeprefix("tokenizer.chat_template: ")) from error


def _look_at_folder(path: str, _: FirstLook) -> None:
    if not Path(path).is_dir():
        raise RecipeError(f"{path}: no such folder (from {Path.cwd()}){unexpanded(path)}")


def _devices(spec: StageSpec, key: str, num_gpus: int) -> list[str]:
    """Return a warning if a stage has more processes than this machine has devices."""
    num, what = (num_gpus, "GPUs") if num_gpus else (num_cores(), "CPU cores")
    told = f"{key}: {spec.ranks} ranks, but this machine has {num} {what}"
    return [told] if spec.ranks > num else []


def _place(places: Mapping[str, str], key: str) -> str:
    """Return the place of a key in the recipe as the start of a message."""
    keys = (f"{key}.path", f"{key}.labels", key)
    place = next((places[k] for k in keys if k in places), None)
    return f"{key}: " if place is None else f"{place}: {key}: "
