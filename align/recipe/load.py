"""Load a recipe: read, lay ``--set`` over it, validate, check its references. Never torch."""

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
from align.core.text import hidden, keep_secret, secret_names, suggest
from align.recipe.algorithms import defaults_of, known_rates
from align.recipe.messages import describe, locate
from align.recipe.overrides import apply_overrides
from align.recipe.own_code import place_own_code
from align.recipe.rules import adapter_problems, encoder_problems, idle_options
from align.recipe.schema import (
    STAGES,
    AnyStage,
    Recipe,
    StageSpec,
    TrainingStage,
    ref_of,
    reference_kinds,
    references,
)
from align.recipe.schema.common import Spec
from align.recipe.source import Key, Mark, Source, find_recipe, read_source

SHIPPED = Path(__file__).parents[1] / "evaluation" / "tasks"


def shipped_tasks() -> list[str]:
    """Name the tasks that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def find_task(name: str) -> Path:
    """Find the file of a task: one that is shipped, by name, or any by path.

    Raises:
        RecipeError: there is none.
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
    """Read a task; its paths that begin with ``./`` or ``../`` are taken from its own folder.

    Raises:
        RecipeError: there is no such task, or it is not YAML.
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
    """Replace each name in ``tasks`` of an evaluate stage by what stands in the task's file."""
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


def complete_blocks(source: Source) -> None:
    """Write into every stage, where the recipe says nothing, what more than one class decides.

    That is what the stage's algorithm sets, the rate of its tuning method, and in a block that is
    given in part what the stage's own default sets beside it.
    """
    stages = source.data.get("stages")
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        kind = _class_of(stage.get("kind")) if isinstance(stage, dict) else None
        if kind is None:
            continue
        if "algorithm" in kind.model_fields:
            algorithm = stage.get("algorithm")
            mark = Mark(f"algorithm: {algorithm}")
            _lay_in(source, ("stages", name), stage, defaults_of(algorithm), mark)
        if issubclass(kind, TrainingStage):
            _lay_in_rate(source, name, stage, kind)
        _complete(stage, kind)


def _lay_in(
    source: Source, key: Key, given: dict[str, Any], below: Mapping[str, Any], mark: Mark
) -> None:
    """Write into ``given``, which stands at ``key``, what ``below`` has and it has not."""
    for name, value in below.items():
        here = (*key, name)
        if name not in given:
            source.marks[here] = mark
            given[name] = {} if isinstance(value, Mapping) else value
        if isinstance(value, Mapping) and isinstance(given[name], dict):
            _lay_in(source, here, given[name], value, mark)


def _lay_in_rate(
    source: Source, name: str, stage: dict[str, Any], kind: type[TrainingStage]
) -> None:
    """Write the learning rate of the stage's tuning method where the recipe leaves it out."""
    tuning = stage.get("tuning", {"method": "full"})
    method = tuning.get("method") if isinstance(tuning, dict) else None
    known = known_rates(kind.family, method) if isinstance(method, str) else None
    if known is not None:
        below = {"optim": {"learning_rate": known.default}}
        mark = Mark(f"default of {method} in {stage['kind']}")
        _lay_in(source, ("stages", name), stage, below, mark)


def _complete(given: dict[str, Any], kind: type[Spec]) -> None:
    """Complete the blocks of ``given`` in place by what the default of each sets."""
    for name, field in kind.model_fields.items():
        block, default = given.get(name), field.default
        # A default of one of several classes (tuning) belongs to another method than is given.
        if not isinstance(block, dict) or field.annotation is not type(default):
            continue
        for key in sorted(default.model_fields_set - set(block)):
            block[key] = default.model_dump(mode="json", include={key})[key]
        _complete(block, type(default))


_STAGE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_PLACE = re.compile(r"^(.*?):(\d+):(\d+): ")


RECIPE_FILE = "recipe.yaml"
_SECRETS = "# secrets from the environment: "
"""The resolved recipe in the folder of each stage that was begun."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """Hold a valid recipe with where each value comes from.

    Attributes:
        recipe: the validated recipe.
        origins: dotted key of every value to ``file:line``, ``--set`` or ``default``.
        data: the recipe as plain data, every default written out.
    """

    recipe: Recipe
    origins: Mapping[str, str]
    data: Mapping[str, Any]


def write_resolved(recipe: Recipe, path: Path) -> None:
    """Write a recipe with every default, for the process of a stage and for the report.

    Secrets are written as ``${NAME}``; the first line says which, for ``read_resolved``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = recipe.model_dump(mode="json")
    names = secret_names(plain)
    text = yaml.safe_dump(hidden(plain), sort_keys=False)
    if names:
        text = f"{_SECRETS}{' '.join(names)}\n{text}"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)


def read_resolved(path: Path | str) -> Recipe:
    """Read what ``write_resolved`` wrote: checked as data, no file is extended, nothing laid over.

    Raises:
        RecipeError: it is not there, or not a recipe of this version.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        plain = yaml.safe_load(text)
        if text.startswith(_SECRETS):
            for name in text.partition("\n")[0].removeprefix(_SECRETS).split():
                plain = _revealed(plain, name, os.environ[name])
        return Recipe.model_validate_json(json.dumps(plain), strict=True)
    except KeyError as error:
        raise RecipeError(f"{path}: the environment variable {error} is not set") from error
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise RecipeError(
            f"{path}: cannot be read as a resolved recipe ({error}); run the stage again"
        ) from error


def _revealed(value: Any, name: str, secret: str) -> Any:
    """Put a secret back where ``write_resolved`` has left its name."""
    keep_secret(name, secret)
    if isinstance(value, dict):
        return {key: _revealed(inside, name, secret) for key, inside in value.items()}
    if isinstance(value, list):
        return [_revealed(inside, name, secret) for inside in value]
    return value.replace("${" + name + "}", secret) if isinstance(value, str) else value


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Load and check a recipe.

    Args:
        path: the YAML file, or the name of a shipped recipe.
        overrides: ``stages.ppo.kl.coef=0.1`` texts, laid over the file in order.

    Raises:
        RecipeError: all mistakes found, one ``file:line:column: dotted.path: what`` line each.
    """
    return load_resolved(path, overrides).recipe


def load_resolved(path: Path | str, overrides: Sequence[str] = ()) -> Resolved:
    """Load and check a recipe, keeping the origin of each value.

    Raises:
        RecipeError: as ``load_recipe``.
    """
    source = read_source(find_recipe(path))
    expand_tasks(source)
    apply_overrides(source, overrides)
    expand_tasks(source)
    place_own_code(source, Path(path).parent)
    complete_blocks(source)
    errors = list(source.errors)
    recipe = None
    try:
        # Validated as JSON: strict about types, yet a list is a fine tuple.
        recipe = Recipe.model_validate_json(json.dumps(source.data), strict=True)
    except ValidationError as e:
        errors += describe(e.errors(include_url=False), source.marks)
    specs = dict(recipe.stages) if recipe else _valid_stages(source.data)
    errors += _stage_name_errors(source)
    errors += _reference_errors(specs, source)
    errors += _start_errors(specs, source)
    errors += _idle_errors(specs, source)
    if recipe is None or errors:
        raise RecipeError("\n".join(sorted(dict.fromkeys(errors), key=_by_place)))
    data = recipe.model_dump(mode="json")
    return Resolved(recipe, _origins(data, source.marks), data)


def _by_place(line: str) -> tuple[str, int, int]:
    match = _PLACE.match(line)
    return (match[1], int(match[2]), int(match[3])) if match else ("~", 0, 0)


def _valid_stages(data: Mapping[str, Any]) -> dict[str, Any]:
    """Validate each stage by itself, so that one bad stage does not hide another's mistakes."""
    stages = data.get("stages")
    if not isinstance(stages, dict):
        return {}
    adapter: TypeAdapter[Any] = TypeAdapter(AnyStage)
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
        "a stage's name is a folder's: expected letters, digits, '_' and '-' only"
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
        named = references(spec) if spec is not None else _raw_init(raw, stage)
        wanted = reference_kinds(spec) if spec is not None else _init_kinds(kinds[stage])
        for key, name in named.items():
            problem = _reference_problem(stage, name, wanted.get(key, ("policy",)), kinds)
            if problem:
                where = locate(_place(stage, key), "reference", source.marks)
                found.append(f"{where}: stages.{stage}.{key}: {problem}")
    return found


def _idle_errors(specs: Mapping[str, Any], source: Source) -> list[str]:
    found = []
    for stage, spec in specs.items():
        for key, reason in idle_options(spec) if spec is not None else ():
            where = locate(_place(stage, key), "extra_forbidden", source.marks)
            found.append(f"{where}: stages.{stage}.{key}: {reason}")
    return found


def _start_errors(specs: Mapping[str, Any], source: Source) -> list[str]:
    return [
        f"{locate(_place(name, key), 'reference', source.marks)}: stages.{name}.{key}: {problem}"
        for (name, key), problem in (adapter_problems(specs) | encoder_problems(specs)).items()
    ]


def _place(stage: str, key: str) -> Key:
    """Give the place in the file of a dotted key below a stage."""
    return ("stages", stage, *(int(part) if part.isdigit() else part for part in key.split(".")))


def _raw_init(stages: Any, stage: str) -> dict[str, str]:
    init = stages[stage].get("init") if isinstance(stages[stage], dict) else None
    return {"init": init} if isinstance(init, str) else {}


def _init_kinds(kind: Any) -> dict[str, tuple[str, ...]]:
    stage = _class_of(kind)
    field = stage.model_fields.get("init") if stage is not None else None
    mark = ref_of(field) if field is not None else None
    return {"init": mark.kinds} if mark is not None else {}


def _class_of(kind: Any) -> type[StageSpec] | None:
    """Return the class of what a recipe names as a kind, None where there is none."""
    return STAGES.get(kind) if isinstance(kind, str) else None


def _reference_problem(
    stage: str, name: str, wanted: Sequence[str], kinds: Mapping[str, Any]
) -> str | None:
    names = list(kinds)
    earlier = names[: names.index(stage)]
    fitting = [n for n in earlier if (made := _class_of(kinds[n])) and made.produces in wanted]
    expected = f"expected an earlier stage that writes a {' or '.join(wanted)}"
    listed = f" ({', '.join(fitting)})" if fitting else ""
    if name == stage:
        return f"a stage cannot name itself; {expected}{listed}"
    if name in kinds and name not in earlier:
        return f"stage '{name}' comes later; {expected}{listed}, or move '{name}' before '{stage}'"
    if name in kinds:
        made_by = _class_of(kinds[name])
        if made_by is None or made_by.produces in wanted:
            return None
        return f"stage '{name}' ({kinds[name]}) writes a {made_by.produces}; {expected}{listed}"
    return _path_problem(name, wanted, f"{expected}{listed}", fitting)


def _path_problem(
    name: str, wanted: Sequence[str], expected: str, fitting: Sequence[str]
) -> str | None:
    folder = Path(name)
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        if (folder / "config.json").is_file() or ("/" in name and not folder.exists()):
            advice = "; bring a Hugging Face model in with a stage 'kind: base, path: ...'"
        else:
            advice = suggest(name, fitting)
        state = "a folder without manifest.json" if folder.is_dir() else "no stage and no folder"
        return f"'{name}' is {state}; {expected} or an artefact's folder{advice}"
    try:
        kind = json.loads(manifest.read_text(encoding="utf-8")).get("kind")
    except (ValueError, AttributeError):
        return f"{manifest} is not a JSON mapping; run the stage that wrote it again"
    if kind not in wanted:
        return f"'{name}' holds a {kind}; expected a {' or '.join(wanted)}"
    return None


def _origins(data: Any, marks: Mapping[Key, Mark], key: Key = ()) -> dict[str, str]:
    found: dict[str, str] = {}
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for name, value in items:
        here = (*key, name)
        if isinstance(value, dict | list) and value:
            found |= _origins(value, marks, here)
        else:
            found[".".join(map(str, here))] = marks[here].origin if here in marks else "default"
    return found
