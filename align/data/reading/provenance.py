"""Find the files that the spec of a stage refers to."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.core.artifacts import file_record
from align.core.errors import DataError
from align.data.labels import snapshot_files
from align.data.reading.bounds import is_large
from align.data.reading.remote import is_remote
from align.data.reading.sources import find_files, hub_revision, named_source
from align.recipe.schema import DataSpec, Spec

_FOLDER_KEYS = ("path", "include_path")
"""Keys whose folders are read: an imported model, or a folder of task files."""


def named_files(spec: Spec, references: Mapping[str, str]) -> dict[str, Path]:
    """Return every file that a stage's spec refers to, by its path as shown in messages.

    These are data files, template files, code files (``rules.py:score``), and the files of a model
    folder. Artifacts of other stages are excluded, because their manifests are hashed.

    Args:
        spec: the stage.
        references: its inputs, from ``Recipe.inputs``.
    """
    found: dict[str, Path] = {}
    # Stages and artifacts are identified by their manifests, not by their files.
    inputs = set(references.values())

    def walk(part: object, key: str) -> None:
        if isinstance(part, DataSpec):
            found.update(_data_files(part))
            walk(part.templates, "templates")
        elif isinstance(part, Spec):
            for name in type(part).model_fields:
                walk(getattr(part, name), name)
        elif isinstance(part, dict):
            for name, value in part.items():
                walk(value, str(name))
        elif isinstance(part, list | tuple):
            for value in part:
                walk(value, key)
        elif isinstance(part, str) and part not in inputs:
            found.update(_files_of_text(part, key))

    walk(spec, "")
    return dict(sorted(found.items()))


def shared_files(specs: Sequence[Spec]) -> list[Path]:
    """Return the data files that two or more data sources of these specifications refer to.

    Large ones are left out: their parsed rows would not fit into memory.
    """
    files = [file for spec in data_specs(specs) for file in _data_files(spec).values()]
    return [file for file, n in Counter(files).items() if n > 1 and not is_large([file])]


def hub_revisions(spec: Spec) -> dict[str, str]:
    """Return the commit of every data set of the hub that a stage reads, where it can be found."""
    found = {}
    for data in data_specs(spec):
        if data.path is not None and not _data_files(data):
            name = data.path + (f"@{data.revision}" if data.revision else "")
            try:
                revision = None if find_files(name) else hub_revision(name)
            except DataError:  # the reader will report the error
                continue
            if revision is not None:
                found[name] = revision
    return found


def data_specs(part: object) -> Iterator[DataSpec]:
    """Yield every data source in a specification or a list of them, at any depth."""
    if isinstance(part, DataSpec):
        yield part
    elif isinstance(part, Spec):
        for name in type(part).model_fields:
            yield from data_specs(getattr(part, name))
    elif isinstance(part, list):
        for inner in part:
            yield from data_specs(inner)


def _data_files(spec: DataSpec) -> dict[str, Path]:
    if spec.path is None and spec.labels is None:
        return {}
    try:
        if spec.labels is not None:
            return {str(file): file for file in snapshot_files(spec.labels)}
        name = str(spec.path)
        if is_remote(name) or Path(os.path.expanduser(os.path.expandvars(name))).is_dir():
            choice = {"config": spec.config, "revision": spec.revision, "split": spec.split}
            name, _ = named_source(name, **choice)
        return {str(file): file for file in find_files(name)}
    except (DataError, OSError):  # the reader will report the error
        return {}


def _files_of_text(text: str, key: str) -> dict[str, Path]:
    """Return the file that a value refers to, or the files of a folder if ``key`` accepts one."""
    # FILE.py:NAME is a function in a file.
    code = text.rpartition(":")[0]
    path = Path(code if code.endswith(".py") else text)
    # Longer texts and those of several lines are prompts or templates in the recipe itself.
    looks_like_path = len(text) < 1024 and "\n" not in text and ("/" in text or "." in text)
    if key not in _FOLDER_KEYS and not looks_like_path:
        return {}
    try:
        if path.is_file():
            return {str(path): path}
        if key in _FOLDER_KEYS and path.is_dir():
            inside = (p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
            return {str(p): p for p in inside}
    except (OSError, ValueError):
        return {}
    return {}


def file_records(files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Return the record (sha256, size, time) of each file; unreadable files are left out."""
    found = {}
    for name, path in files.items():
        try:
            found[name] = file_record(path)
        except OSError:  # the reader will report the error
            continue
    return found
