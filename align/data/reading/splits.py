"""Find the splits that a data folder has of its own, so that they are never joined by accident.

A folder written by ``datasets.save_to_disk`` lists them. A dataset repository names them in its
card (``configs`` in README.md) or by the names of its files: train, validation and test.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from align.core import bounded_yaml
from align.core.errors import DataError
from align.core.text import shown, suggest

_INDEX_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {word: split for split, words in _NAMES.items() for word in words}
"""The split that a word names."""
_UNNAMED = "other"
"""Name for the files of a folder that name no split when other files do."""
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
CARD_LIMITS = bounded_yaml.Limits(characters=2**24, values=1_000_000)
"""Limits of a card's header; those of large collections have thousands of configurations."""

Splits = dict[str, list[Path]]


def files_of(
    folder: Path, found: Sequence[Path], *, name: str, config: str | None, split: str | None
) -> list[Path]:
    """Return the data files of a folder, or those of one split if it has several.

    Args:
        folder: the folder.
        found: all files in it that may contain data.
        name: the source as the user wrote it.
        config: the configuration that the user selected, or None.
        split: the split that the user selected, or None.

    Raises:
        DataError: several splits or configurations and none is selected, or it does not exist.
    """
    splits = splits_of(folder, found, name=name, config=config)
    if split is not None:
        if split not in splits:
            known = f"it has {', '.join(splits)}" if splits else "it has no splits of its own"
            raise DataError(
                f"{name}: no split '{split}'; {known}{suggest(split, splits)}", code="D013"
            )
        return splits[split]
    if len(splits) > 1:
        raise several_splits(name, list(splits))
    return next(iter(splits.values()), [path for path in found if not _is_index(path)])


def several_splits(name: str, splits: Sequence[str]) -> DataError:
    """Return the error for a source whose splits would be joined."""
    return DataError(
        f"{name}: has the splits {', '.join(splits)}, which are never joined; choose one with "
        f"'split: {splits[0]}' in the recipe, or by the name {name}:{splits[0]}",
        code="D013",
    )


def splits_of(folder: Path, found: Sequence[Path], *, name: str, config: str | None) -> Splits:
    """Return the files of each split that a folder has of its own; empty if there are none.

    Raises:
        DataError: the folder's index or card is broken, or none of its configurations is selected.
    """
    if (index := folder / "dataset_dict.json").is_file():
        listed = [_inside(split, index) for split in _index(index, "splits")]
        return {split: _saved_files(folder / split) for split in listed}
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return {"all": _saved_files(folder)}
    configs = _configs(folder)
    if configs:
        return _of_config(folder, configs, found=found, name=name, config=config)
    if config is not None:
        raise DataError(f"{name}: no configuration '{config}': the folder has none", code="D013")
    return _by_name(folder, [path for path in found if not _is_index(path)])


def is_hidden(path: Path, folder: Path) -> bool:
    """Return whether the name of a file, or of a folder that it is in, begins with a dot.

    Such files are copies of others: Jupyter keeps some in ``.ipynb_checkpoints``, macOS in ``._*``.
    """
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _is_index(path: Path) -> bool:
    if path.name == "state.json":
        return (path.parent / "dataset_info.json").is_file()
    return path.name in _INDEX_FILES


def _index(path: Path, key: str) -> list[Any]:
    """Return the list under a key of an index file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: broken index of a saved dataset: {error}", code="D013") from error
    listed = found.get(key) if isinstance(found, dict) else None
    if not isinstance(listed, list):
        raise DataError(
            f"{path}: broken index: expected an object with a list '{key}'", code="D013"
        )
    return listed


def _inside(name: object, index: Path) -> str:
    """Return a name or pattern of files from an index, which may name files of its folder only.

    Raises:
        DataError: it is not text, or leads out of the folder.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(f"{index}: found {shown(name)}, expected the name of a file", code="D013")
    path = PurePath(name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(
            f"{index}: names {name}, which is outside of {index.parent}. Nothing outside of a data "
            "set's folder is read; correct the name, or move the file into the folder",
            code="D013",
        )
    return name


def _saved_files(folder: Path) -> list[Path]:
    index = folder / "state.json"
    entries = _index(index, "_data_files")
    named = [entry.get("filename") if isinstance(entry, dict) else entry for entry in entries]
    listed = [folder / _inside(name, index) for name in named]
    missing = [path for path in listed if not path.is_file()]
    if missing:
        raise DataError(f"{missing[0]}: no such file, but {index} lists it", code="D002")
    return listed


def _configs(folder: Path) -> list[dict[str, Any]]:
    """Return the configurations that the card of a dataset repository lists."""
    card = folder / "README.md"
    if not card.is_file():
        return []
    # Only names of files matter here; one with a replaced byte is reported as missing.
    matter = _FRONT_MATTER.search(card.read_text(encoding="utf-8", errors="replace"))
    if matter is None:
        return []
    try:
        found = bounded_yaml.load(matter.group(1), CARD_LIMITS)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(
            f"{card}: the card's header is not valid YAML: {error}", code="D013"
        ) from error
    configs = found.get("configs") if isinstance(found, dict) else None
    listed = configs if isinstance(configs, list) else []
    return [c for c in listed if isinstance(c, dict) and (c.get("data_files") or c.get("data_dir"))]


def _of_config(
    folder: Path,
    configs: Sequence[dict[str, Any]],
    *,
    found: Sequence[Path],
    name: str,
    config: str | None,
) -> Splits:
    names = [str(entry.get("config_name", "default")) for entry in configs]
    chosen = config
    if chosen is None:
        # As `datasets` does: the marked one, the one named default, or the only one.
        default = [n for n, entry in zip(names, configs, strict=True) if entry.get("default")]
        chosen = (default or [n for n in names if n == "default" or len(names) == 1] or [""])[0]
    if chosen not in names:
        asked = f"no configuration '{config}'; it" if config else "it"
        hint = suggest(config or "", names)
        raise DataError(
            f"{name}: {asked} has the configurations {', '.join(names)}{hint}; "
            f"choose one with 'config: {names[0]}' in the recipe, or by the name {name}#{names[0]}",
            code="D013",
        )
    entry = configs[names.index(chosen)]
    root = folder / _inside(entry.get("data_dir") or ".", folder / "README.md")
    if not entry.get("data_files"):
        inside = [path for path in found if path.is_relative_to(root) and not _is_index(path)]
        if not inside:
            raise DataError(
                f"{name}: the card names the folder {entry['data_dir']}, but no data file is there",
                code="D002",
            )
        return _by_name(root, inside) or {"all": inside}
    splits: Splits = {}
    for split, pattern in _patterns(entry["data_files"]):
        files = _matching(root, _inside(pattern, folder / "README.md"))
        if not files:
            raise DataError(
                f"{name}: the card names {pattern} for split {split}, but no such file is here",
                code="D002",
            )
        splits.setdefault(split, []).extend(files)
    return splits


def _patterns(given: object) -> Iterator[tuple[str, object]]:
    """Yield the split and the pattern of each entry of a card's ``data_files``.

    It is a pattern, a list of patterns, a list of {split, path}, or a mapping of splits.
    """
    if isinstance(given, dict):
        given = [{"split": split, "path": path} for split, path in given.items()]
    for entry in given if isinstance(given, list) else [given]:
        split, path = "train", entry
        if isinstance(entry, dict):
            split, path = str(entry.get("split", "train")), entry.get("path")
        for pattern in path if isinstance(path, list) else [path]:
            yield split, pattern


def _matching(folder: Path, pattern: str) -> list[Path]:
    try:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        return [path for path in found if not is_hidden(path, folder)]
    except ValueError as error:  # such as a**b
        raise DataError(f"{folder / 'README.md'}: {pattern}: {error}", code="D013") from error


def _by_name(folder: Path, found: Sequence[Path]) -> Splits:
    """Return the files by the splits in their names or folders; empty if all are in one split."""
    splits: Splits = {}
    for path in found:
        # train-00000-of-00002.parquet and test/part.jsonl both name their split by a whole word.
        words = set(re.split(r"[^a-z]+", str(path.relative_to(folder)).lower()))
        named = [split for split, names in _NAMES.items() if words & set(names)]
        splits.setdefault(named[0] if len(named) == 1 else _UNNAMED, []).append(path)
    return splits if len(splits) > 1 else {}
