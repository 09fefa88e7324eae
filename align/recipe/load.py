"""Load a recipe: read it, apply ``--set``, fill in defaults, validate. Never imports torch."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from align.core.errors import RecipeError
from align.core.text import hidden, keep_secret, secret_names
from align.recipe.defaults import class_of, complete_blocks
from align.recipe.elsewhere import RUNS, name_folder, path_problem, place_of, stages_of_runs
from align.recipe.foreign.tools import refuse_foreign
from align.recipe.messages import describe, locate
from align.recipe.overrides import ORIGIN, apply_overrides
from align.recipe.own_code import import_extensions, place_own_code
from align.recipe.parallel import parallel_problems
from align.recipe.rules import idle_options
from align.recipe.schema import (
    Recipe,
    StageSpec,
    ref_of,
    reference_kinds,
    references,
)
from align.recipe.source import Key, Mark, Source, find_recipe, read_source
from align.recipe.starts import adapter_problems, encoder_problems

SHIPPED = Path(__file__).parents[1] / "evaluation" / "tasks"


def shipped_tasks() -> list[str]:
    """Return the names of the tasks that are shipped with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def find_task(name: str) -> Path:
    """Return the file of a task, given the name of a shipped task or a path.

    Raises:
        RecipeError: the task does not exist.
    """
    shipped = SHIPPED / f"{name}.yaml"
    if "/" not in name and shipped.is_file():
        return shipped
    if Path(name).is_file():
        return Path(name)
    names = shipped_tasks()
    near = get_close_matches(name, names, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise RecipeError(f"no task '{name}'; expected a file or one of {', '.join(names)}{hint}")


def load_task(name: str) -> Source:
    """Return a task's data; paths that begin with ``./`` or ``../`` are relative to its file.

    Raises:
        RecipeError: the task does not exist or is not YAML.
    """
    path = find_task(name)
    source = read_source(path)
    place_own_code(source, path.parent)
    for part in ("prompts", "answers"):
        entries = source.data.get(part)
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, dict) and str(entry.get("path", "")).startswith(("./", "../")):
                entry["path"] = str(path.parent / entry["path"])
    return source


def expand_tasks(source: Source) -> None:
    """Replace every task name of the evaluate stages by the content of the task's file."""
    stages = source.data.get("stages")
    for stage, spec in stages.items() if isinstance(stages, dict) else ():
        tasks = spec.get("tasks") if isinstance(spec, dict) else None
        if not isinstance(tasks, list) or spec.get("kind") != "evaluate":
            continue
        for i, name in enumerate(tasks):
            if isinstance(name, str):
                _expand(source, tasks, ("stages", stage, "tasks", i))


def _expand(source: Source, tasks: list[Any], key: Key) -> None:
    place = int(key[-1])
    # An unknown task is reported with the other errors of the recipe.
    try:
        task = load_task(tasks[place])
    except RecipeError as error:
        mark = source.marks.get(key)
        where = f"{mark.at_value()}: " if mark else ""
        source.errors.append(f"{where}{'.'.join(map(str, key))}: {error}")
        tasks[place] = None
        return
    source.errors += task.errors
    tasks[place] = task.data
    source.marks |= {(*key, *inner): mark for inner, mark in task.marks.items()}


_STAGE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
_PLACE = re.compile(r"^(.*?):(\d+):(\d+): ")


RECIPE_FILE = "recipe.yaml"
"""Name of the resolved recipe in the folder of each started stage."""
_SECRETS = "# secrets from the environment: "
"""Start of the first line of a resolved recipe that contains secrets."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A valid recipe with the origin of each value.

    Attributes:
        recipe: the validated recipe.
        origins: dotted key of every value to ``file:line``, ``--set`` or ``default``.
        data: the recipe as plain data, including all defaults.
        places: dotted key of every value that is given to ``file:line:column``, or ``--set``.
    """

    recipe: Recipe
    origins: Mapping[str, str]
    data: Mapping[str, Any]
    places: Mapping[str, str]


def write_resolved(recipe: Recipe, path: Path) -> None:
    """Write a recipe with all defaults, for the process of a stage and for the report.

    Secrets are written as ``${NAME}``, and the first line lists their names for ``read_resolved``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = recipe.model_dump(mode="json")
    names = secret_names(plain)
    text = yaml.safe_dump(hidden(plain), sort_keys=False)
    if names:
        text = f"{_SECRETS}{' '.join(names)}\n{text}"
    # A rename is atomic: a stage that is killed here leaves no half-written recipe.
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)


def read_resolved(path: Path | str) -> Recipe:
    """Return a recipe that ``write_resolved`` wrote; ``extends`` and ``--set`` do not apply.

    Raises:
        RecipeError: the file is missing, is not a recipe of this version, or needs an environment
            variable that is not set.
    """
    import_extensions()
    try:
        text = Path(path).read_text(encoding="utf-8")
        plain = yaml.safe_load(text)
        if text.startswith(_SECRETS):
            for name in text.partition("\n")[0].removeprefix(_SECRETS).split():
                plain = _revealed(plain, name, os.environ[name])
        return Recipe.model_validate_json(json.dumps(plain), strict=True)
    except KeyError as error:
        raise RecipeError(f"{path}: the environment variable {error} is not set") from error
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        told = " ".join(str(error).split())[:200]
        raise RecipeError(
            f"{path}: cannot be read as a resolved recipe ({told}); run the stage again"
        ) from error


def _revealed(value: object, name: str, secret: str) -> Any:
    """Return the value with ``${name}`` replaced by the secret."""
    keep_secret(name, secret)
    if isinstance(value, dict):
        return {key: _revealed(inside, name, secret) for key, inside in value.items()}
    if isinstance(value, list):
        return [_revealed(inside, name, secret) for inside in value]
    return value.replace("${" + name + "}", secret) if isinstance(value, str) else value


def load_recipe(path: Path | str, overrides: Sequence[str] = (), *, runs: Path = RUNS) -> Recipe:
    """Load and validate a recipe.

    Args:
        path: the YAML file, or the name of a shipped recipe.
        overrides: ``stages.ppo.kl.coef=0.1`` texts, applied to the file in order.
        runs: folder of all runs, in which a stage may name RUN/STAGE.

    Raises:
        RecipeError: lists all errors, one ``file:line:column: dotted.path: what`` line each.
    """
    return load_resolved(path, overrides, runs=runs).recipe


def load_resolved(
    path: Path | str, overrides: Sequence[str] = (), *, runs: Path = RUNS
) -> Resolved:
    """Load and validate a recipe, and record the origin of each value.

    Raises:
        RecipeError: as ``load_recipe``.
    """
    source = read_source(find_recipe(path))
    refuse_foreign(source.data, str(path))
    return resolve(source, overrides, folder=Path(path).parent, runs=runs)


def resolve(
    source: Source, overrides: Sequence[str] = (), *, folder: Path, runs: Path = RUNS
) -> Resolved:
    """Fill in and validate a recipe that was read; code files are relative to ``folder``.

    Raises:
        RecipeError: as ``load_recipe``.
    """
    import_extensions()
    # Tasks are expanded twice: overrides may refer to keys of a task, or add tasks.
    expand_tasks(source)
    apply_overrides(source, overrides)
    expand_tasks(source)
    place_own_code(source, folder)
    complete_blocks(source)
    # Validate against the schema. A finished stage of another run is named by its folder.
    recipe, invalid = _validated(source)
    specs = dict(recipe.stages) if recipe else _valid_stages(source.data)
    if named := stages_of_runs(specs, runs):
        for key, place in named.items():
            name_folder(source.data, key, place)
        recipe, invalid = _validated(source)
        specs = dict(recipe.stages) if recipe else _valid_stages(source.data)
    # Check what spans several keys or stages, as far as the stages are valid.
    errors = [*source.errors, *invalid]
    errors += _stage_name_errors(source)
    errors += _reference_errors(specs, source)
    errors += _start_errors(specs, source)
    errors += _idle_errors(specs, source)
    if recipe is None or errors:
        raise RecipeError("\n".join(sorted(dict.fromkeys(errors), key=_by_place)))
    data = recipe.model_dump(mode="json")
    given = {k: mark for k, mark in source.marks.items() if mark.line or mark.file == ORIGIN}
    places = {".".join(map(str, key)): mark.at_value() for key, mark in given.items()}
    return Resolved(recipe, _origins(data, source.marks), data, places)


def _validated(source: Source) -> tuple[Recipe | None, list[str]]:
    """Return the recipe, None if it is invalid, and what is wrong with it."""
    try:
        # JSON mode is strict about types, but accepts a list for a tuple.
        return Recipe.model_validate_json(json.dumps(source.data), strict=True), []
    except ValidationError as e:
        # What the reader could not read is not wrong a second time.
        read = {tuple(text.split(": ", 2)[:2]) for text in source.errors}
        found = describe(e.errors(include_url=False), source.marks)
        return None, [text for text in found if tuple(text.split(": ", 2)[:2]) not in read]


def _by_place(line: str) -> tuple[str, int, int]:
    match = _PLACE.match(line)
    return (match[1], int(match[2]), int(match[3])) if match else ("~", 0, 0)


def _valid_stages(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return each stage's spec, None if invalid: one bad stage must not hide another's errors."""
    stages = data.get("stages")
    if not isinstance(stages, dict):
        return {}
    adapter: TypeAdapter[Any] = TypeAdapter(StageSpec)
    specs: dict[str, Any] = {}
    for name, raw in stages.items():
        try:
            specs[name] = adapter.validate_json(json.dumps(raw), strict=True)
        except ValidationError:
            specs[name] = None
    return specs


def _stage_name_errors(source: Source) -> list[str]:
    stages = source.data.get("stages")
    return [
        f"{locate(('stages', name), 'extra_forbidden', source.marks)}: stages.{name}: "
        "a stage name is also a folder name; expected letters, digits, '_' and '-' only, "
        "100 at most"
        for name in (stages if isinstance(stages, dict) else ())
        if not _STAGE_NAME.fullmatch(name)
    ]


def _reference_errors(specs: Mapping[str, Any], source: Source) -> list[str]:
    raw = source.data.get("stages")
    kinds = {
        name: stage.get("kind") if isinstance(stage, dict) else None
        for name, stage in (raw.items() if isinstance(raw, dict) else ())
    }
    found = []
    for stage, spec in specs.items():
        named = references(spec) if spec is not None else _raw_init(raw[stage] if raw else None)
        wanted = reference_kinds(spec) if spec is not None else _init_kinds(kinds[stage])
        for key, name in named.items():
            problem = _reference_problem(
                stage, name, wanted=wanted.get(key, ("policy",)), kinds=kinds
            )
            if problem:
                where = locate(place_of(stage, key), "reference", source.marks)
                found.append(f"{where}: stages.{stage}.{key}: {problem}")
    return found


def _idle_errors(specs: Mapping[str, Any], source: Source) -> list[str]:
    found = []
    for stage, spec in specs.items():
        for key, reason in idle_options(spec) if spec is not None else ():
            where = locate(place_of(stage, key), "extra_forbidden", source.marks)
            found.append(f"{where}: stages.{stage}.{key}: {reason}")
    return found


def _start_errors(specs: Mapping[str, Any], source: Source) -> list[str]:
    problems = adapter_problems(specs) | encoder_problems(specs) | parallel_problems(specs)
    return [
        f"{locate(place_of(name, key), 'reference', source.marks)}: stages.{name}.{key}: {problem}"
        for (name, key), problem in problems.items()
    ]


def _raw_init(stage: object) -> dict[str, str]:
    init = stage.get("init") if isinstance(stage, dict) else None
    return {"init": init} if isinstance(init, str) else {}


def _init_kinds(kind: object) -> dict[str, tuple[str, ...]]:
    stage = class_of(kind)
    field = stage.model_fields.get("init") if stage is not None else None
    mark = ref_of(field) if field is not None else None
    return {"init": mark.kinds} if mark is not None else {}


def _reference_problem(
    stage: str, name: str, *, wanted: Sequence[str], kinds: Mapping[str, Any]
) -> str | None:
    # Stages run in the order of the recipe, so only earlier ones can be referred to.
    names = list(kinds)
    earlier = names[: names.index(stage)]
    fitting = [n for n in earlier if (made := class_of(kinds[n])) and made.produces in wanted]
    expected = f"expected an earlier stage that writes a {' or '.join(wanted)}"
    listed = f" ({', '.join(fitting)})" if fitting else ""
    if name == stage:
        return f"a stage cannot refer to itself; {expected}{listed}"
    if name in kinds and name not in earlier:
        return f"stage '{name}' comes later; {expected}{listed}, or move '{name}' before '{stage}'"
    if name in kinds:
        made_by = class_of(kinds[name])
        if made_by is None or made_by.produces in wanted:
            return None
        return f"stage '{name}' ({kinds[name]}) writes a {made_by.produces}; {expected}{listed}"
    return path_problem(name, wanted, expected=f"{expected}{listed}", fitting=fitting)


def _origins(
    data: dict[str, Any] | list[Any], marks: Mapping[Key, Mark], key: Key = ()
) -> dict[str, str]:
    found: dict[str, str] = {}
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for name, value in items:
        here = (*key, name)
        if isinstance(value, dict | list) and value:
            found |= _origins(value, marks, here)
        else:
            found[".".join(map(str, here))] = marks[here].origin if here in marks else "default"
    return found
