"""Put task files in the place of the names by which a recipe calls them."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from align.core.errors import RecipeError
from align.recipe.source import Key, Source, read_source

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
