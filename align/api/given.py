"""Turn what Python code passes (datasets, rows, models, functions, runs) into a plain recipe.

Data, models and functions are written to files in the folder of the run. Their names contain a
hash of the content, so that the same objects passed again are the same files and the run resumes.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from pydantic import BaseModel

from align.api.code import python_reward, reference
from align.api.result import Run
from align.core.artifacts import MANIFEST, find_model
from align.core.errors import DataError, RecipeError
from align.recipe.schema.formats import FORMATS
from reward_models.base import a_type

FOLDER = "from.python"
"""Folder of these files below the run's; the dot keeps it apart from the stages."""
_SOURCES = frozenset(("path", "stage", "labels", "world"))
_CONTENT = frozenset().union(*(form.used for form in FORMATS.values())) - _SOURCES


def sources(data: object) -> list[Any]:
    """Return data as the list of data sources of a recipe, whose ``path`` may be rows.

    Args:
        data: rows, a dataset, a DataFrame, a path or hub id, a source as in recipes, or a list of
            these.
    """
    data = _of_frame(data)
    if isinstance(data, str | Path):
        return [{"path": str(data)}]
    if isinstance(data, Mapping):
        return [data]
    if isinstance(data, list | tuple) and data:
        if all(isinstance(item, Mapping) and not _is_source(item) for item in data):
            return [{"path": data}]
        return [source for item in data for source in sources(item)]
    if _dataset(data):
        return [{"path": data}]
    raise DataError(
        f"data: found {'an empty list' if isinstance(data, list | tuple) else _what(data)}; "
        "expected a datasets.Dataset, a DataFrame, a list of rows (dictionaries), a path or a "
        "hub id"
    )


def _what(value: object) -> str:
    return "nothing (None)" if value is None else a_type(value)


def _of_frame(value: Any) -> Any:
    """Return a pandas DataFrame as rows, in which a missing value is None; any other as it is."""
    pandas = sys.modules.get("pandas")
    if pandas is None or not isinstance(value, pandas.DataFrame):
        return value
    return value.astype(object).where(value.notna(), None).to_dict("records")


def _is_source(item: Mapping[str, Any]) -> bool:
    return bool(_SOURCES & item.keys()) and not _CONTENT & item.keys()


def _dataset(value: Any) -> TypeGuard[Iterable[Any]]:
    """Return whether a value is a Dataset; the other classes of the library are refused."""
    library = sys.modules.get("datasets")
    if library is None:
        return False
    if isinstance(value, library.DatasetDict):
        name = next(iter(value), "train")
        raise DataError(
            f"data: found a DatasetDict with the splits {', '.join(map(str, value))}; pass one of "
            f"them, such as data[{name!r}]"
        )
    if isinstance(value, library.IterableDataset | library.IterableDatasetDict):
        raise DataError(
            "data: found an IterableDataset, which may be endless; pass a Dataset, or a list of "
            "its first rows: list(data.take(1000))"
        )
    return isinstance(value, library.Dataset)


def rewards(given: object, runs: Path = Path("runs")) -> list[Any]:
    """Return rewards as the list of a recipe; a text names a kind, a function or a reward model.

    Args:
        given: one reward or a list of them.
        runs: folder in which RUN/STAGE is looked up.
    """
    entries = given if isinstance(given, list | tuple) else [given]
    return [_reward(entry, runs) for entry in entries]


def _reward(entry: object, runs: Path) -> Any:
    if isinstance(entry, Run):
        return {"kind": "scalar", "model": entry}
    if not isinstance(entry, str | Path):
        return entry
    name = str(entry)
    if isinstance(entry, str) and ":" in name:
        return {"kind": "python", "path": name}
    # No kind has a name with a slash.
    if isinstance(entry, Path) or "/" in name or (Path(name) / MANIFEST).is_file():
        return {"kind": "scalar", "model": str(find_model(name, runs))}
    return {"kind": name}


class Writer:
    """Convert values to plain data; what needs a file gets one below the folder of the run."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / FOLDER

    def plain(self, value: object, key: str = "") -> Any:
        """Return a value as plain data.

        Args:
            value: anything that a recipe, or its equivalent in Python, may contain.
            key: the key of the value in the mapping around it.
        """
        if isinstance(value, Mapping):
            return self._mapping(value)
        if key == "path":
            return self._path(value)
        if isinstance(value, list | tuple):
            return [self._item(item) for item in value]
        if _dataset(value):
            return [{"path": self._rows(value)}]
        return self._scalar(value)

    def _mapping(self, value: Mapping[str, Any]) -> dict[str, Any]:
        path = value.get("path")
        if value.get("kind") == "python" and callable(path):
            block = python_reward(path, self.folder)
            given = {name: inner for name, inner in value.items() if name != "path"}
            args = {**block.get("args", {}), **given.pop("args", {})}
            return block | self._mapping(given) | ({"args": args} if args else {})
        return {name: self.plain(inner, str(name)) for name, inner in value.items()}

    def _item(self, item: object) -> Any:
        if _dataset(item):
            return {"path": self._rows(item)}
        if callable(item) and not isinstance(item, BaseModel):
            return python_reward(item, self.folder)
        return self.plain(item)

    def _path(self, value: Any) -> Any:
        """Return the path of a file with the value, if it is not a path itself."""
        value = _of_frame(value)
        if _dataset(value):
            return self._rows(value)
        if isinstance(value, list | tuple):
            pair = len(value) == 2 and hasattr(value[0], "save_pretrained")
            return self._model(*value) if pair else self._rows(value)
        if hasattr(value, "save_pretrained"):
            return self._model(value, None)
        return self._scalar(value)

    def _scalar(self, value: Any) -> Any:
        if isinstance(value, BaseModel):
            return self.plain(value.model_dump(mode="json", exclude_unset=True))
        if isinstance(value, Run):
            return str(value.last_model().resolve())
        if isinstance(value, Path):
            return str(value)
        if callable(value) and hasattr(value, "__name__"):
            return reference(value, self.folder)
        if type(value).__module__ == "torch" and not hasattr(value, "item"):
            return str(value).removeprefix("torch.")  # a dtype
        return value.item() if _is_scalar(value) else value

    def text(self, text: str, name: str, suffix: str) -> str:
        """Write a text to a file whose name contains its hash, and return the path."""
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        file = self.folder.resolve() / f"{name}-{digest}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return str(file)

    def _rows(self, rows: Iterable[Any]) -> str:
        """Write rows as JSON Lines, and return the path, which contains the hash of the content."""
        from align.data.reading.readers import plain_row

        self.folder.mkdir(parents=True, exist_ok=True)
        typed = _dataset(rows)
        digest, count = hashlib.sha256(), 0
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            file = Path(place) / "rows"
            with file.open("wb") as out:
                for count, row in enumerate(rows, start=1):
                    line = _line(plain_row(row) if typed else row, count)
                    digest.update(line)
                    out.write(line)
            if not count:
                raise DataError("data: it has no rows")
            target = self.folder.resolve() / f"data-{digest.hexdigest()[:12]}.jsonl"
            # An existing file keeps its time, and need not be hashed again.
            if not target.is_file():
                file.rename(target)
        return str(target)

    def _model(self, model: Any, tokenizer: Any) -> str:
        """Save a loaded model and its tokenizer, and return the folder."""
        _check_model(model)
        tokenizer = _tokenizer_of(model) if tokenizer is None else tokenizer
        self.folder.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            model.save_pretrained(str(place))
            tokenizer.save_pretrained(str(place))
            digest = hashlib.sha256()
            for file in sorted(place.rglob("*")):
                if file.is_file():
                    digest.update(f"{file.relative_to(place)}\0".encode())
                    with file.open("rb") as f:
                        digest.update(hashlib.file_digest(f, "sha256").digest())
            target = self.folder.resolve() / f"model-{digest.hexdigest()[:12]}"
            if not target.is_dir():
                place.chmod(0o755)
                place.rename(target)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        return str(target)


def _line(row: object, number: int) -> bytes:
    if not isinstance(row, Mapping):
        raise DataError(f"data: row {number} is {a_type(row)}; expected a dictionary")
    try:
        text = json.dumps(dict(row), ensure_ascii=False, allow_nan=False, default=_number)
        return (text + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        bad = next((name for name, value in row.items() if not _is_json(value)), "")
        raise DataError(
            f"data: row {number}: '{bad}' cannot be written as JSON ({error}); expected text, "
            "finite numbers, lists and dictionaries"
        ) from error


def _is_scalar(value: object) -> bool:
    """Return whether a value is a single number of numpy or torch."""
    return hasattr(value, "item") and getattr(value, "ndim", 1) == 0


def _number(value: Any) -> Any:
    """Return a scalar of numpy or torch as a number, for ``json``."""
    if _is_scalar(value):
        return value.item()
    raise TypeError(f"found {a_type(value)}")


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False, default=_number).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _check_model(model: object) -> None:
    """Raise unless a loaded model is one that can be saved whole, or an adapter of a named one."""
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        raise RecipeError(
            f"model: the weights of this {type(model).__name__} are quantized and cannot be "
            "trained; pass the original weights (tuning={'method': 'qlora'} quantizes them itself)"
        )
    # Of a model of peft only the adapter is saved; the base stage merges it into the named model.
    adapters = getattr(model, "peft_config", None) or {}
    if adapters and not all(adapter.base_model_name_or_path for adapter in adapters.values()):
        raise RecipeError(
            f"model: a {type(model).__name__} on a model without a name, so the adapter alone "
            "would be saved; pass model=(model.merge_and_unload(), tokenizer)"
        )


def _tokenizer_of(model: object) -> Any:
    from transformers import AutoTokenizer

    name = str(getattr(model, "name_or_path", "") or "")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"model: a loaded {type(model).__name__} whose tokenizer is not in {name or 'a folder'}"
            "; pass both: model=(model, tokenizer)"
        ) from error


def base_stage(
    model: object, tokenizer: object, runs: Path = Path("runs")
) -> tuple[dict[str, Any], Any]:
    """Return the base stage that imports a model ({} if an artifact needs none), and ``init``.

    Args:
        model: a hub id, a folder, RUN/STAGE, a loaded model (with its tokenizer as a pair), a run,
            or the keys of a ``base`` stage.
        tokenizer: settings of the base stage, or the tokenizer of a loaded model.
        runs: folder in which RUN/STAGE is looked up.

    Raises:
        RecipeError: the tokenizer does not belong to such a model.
        ArtifactError: there is no such model.
    """
    if isinstance(model, str | Path) and "/" in str(model):  # 'gpt2' may be a hub id too
        model = str(find_model(str(model), runs))
    # A finished stage: it is an artifact already.
    if isinstance(model, Run) or (
        isinstance(model, str | Path) and (Path(model) / MANIFEST).is_file()
    ):
        if tokenizer is not None:
            raise RecipeError(
                "tokenizer: the model of a finished stage has its tokenizer, which training keeps; "
                "remove tokenizer="
            )
        return {}, model if isinstance(model, Run) else str(model)
    # A hub id, a folder or keys; also a loaded model, whose folder has the tokenizer.
    if tokenizer is None or isinstance(tokenizer, Mapping):
        settings = {} if tokenizer is None else {"tokenizer": tokenizer}
        keys = model if isinstance(model, Mapping) else {"path": model}
        return {"kind": "base", **keys, **settings}, "base"
    # A loaded model with its loaded tokenizer.
    if not hasattr(model, "save_pretrained"):
        raise RecipeError(
            f"tokenizer: found {a_type(tokenizer)} beside a model that is not loaded; "
            "expected settings such as {'chat_template': 'plain'}, or load the model and pass "
            "model=(model, tokenizer)"
        )
    if not hasattr(tokenizer, "save_pretrained"):
        raise RecipeError(
            f"tokenizer: found {a_type(tokenizer)}; expected the model's tokenizer, or "
            "settings such as {'chat_template': 'plain'}"
        )
    return {"kind": "base", "path": (model, tokenizer)}, "base"
