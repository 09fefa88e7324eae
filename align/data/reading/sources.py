"""Read rows from files, globs, folders and hub datasets, each with its place of origin."""

import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.core.errors import DataError
from align.core.extras import require
from align.core.text import is_hub_id, suggest
from align.data.reading import bounds
from align.data.reading.json import Item, Row
from align.data.reading.read_log import note, note_rows, num_rows, parsed_sha256
from align.data.reading.readers import plain_row, scan
from align.data.reading.remote import is_remote, local_copy
from align.data.reading.splits import files_of, is_hidden, several_splits, splits_of

logger = logging.getLogger(__name__)

_PLAIN = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
_SUFFIXES = (*_PLAIN, *(f"{s}.gz" for s in _PLAIN if s not in (".parquet", ".arrow")))
_PACKED = (".zst", ".bz2", ".xz", ".lz4", ".zip", ".7z")
_CHOICE = re.compile(
    r"^(?P<path>.+?)(?:@(?P<revision>[\w./-]+?))?(?:#(?P<config>[\w.-]+))?(?::(?P<split>[\w.-]+))?$"
)
_UNSET = re.compile(r"\$(?:\{\w+\}|[A-Za-z_]\w*)")
_REMOTE_CHOICE = re.compile(r"^(?P<path>.+?)(?:#(?P<config>[\w.-]+))?(?::(?P<split>[\w.-]+))?$")
HUB_TIMEOUT_S = 10.0
SIDES = ("all", "train", "heldout")
"""Values of ``split`` for data without its own splits; see align/data/split.py."""
_shared: dict[str, list[Item] | None] = {}
"""Files whose rows are kept once they are parsed; None until then."""
_opened: dict[str, Any] | None = None
"""Data sets of the hub that are open, by name; None outside of ``open_once``."""


@contextmanager
def parse_once(files: Iterable[Path]) -> Iterator[None]:
    """Keep the parsed rows of these files inside the block, for every further reading of them."""
    _shared.update(dict.fromkeys(map(str, files)))
    try:
        yield
    finally:
        _shared.clear()


@contextmanager
def open_once() -> Iterator[None]:
    """Keep the data sets of the hub open inside the block, so that each is asked for once."""
    global _opened
    before, _opened = _opened, {}
    try:
        yield
    finally:
        _opened = before


def named_source(
    path: str, *, config: str | None = None, revision: str | None = None, split: str = "all"
) -> tuple[str, str]:
    """Return the name under which a source is read, and the side of its hash split.

    A name is ``path@revision#config:split``, of which all but the path are optional. If the data
    has its own splits, ``split`` selects one of them, which is used completely.

    Raises:
        DataError: the split does not exist.
    """
    if revision and is_remote(path):
        raise DataError(f"{path}: 'revision' is for hub ids; write it into the URL", code="D013")
    name = path + (f"@{revision}" if revision else "") + (f"#{config}" if config else "")
    if split == "all":
        return name, split
    # The data's own splits take precedence over a split by hash.
    own = own_splits(name)
    if split in own:
        return f"{name}:{split}", "all"
    if split in SIDES and len(own) <= 1:
        return name, split
    if own:
        hint = f"; 'path: {path}:{own[0]}' with 'split: {split}' divides {own[0]} by its prompts"
        raise DataError(
            f"{name}: no split '{split}'; it has {', '.join(own)}{hint if split in SIDES else ''}",
            code="D013",
        )
    raise DataError(
        f"{name}: split '{split}': the data has no splits of its own; expected one of "
        f"{', '.join(SIDES)}{suggest(split, SIDES)}",
        code="D013",
    )


def own_splits(name: str) -> list[str]:
    """Return the names of a source's own splits, unless its name already selects one."""
    path, config, revision, split = _choice(name)
    if split is not None or (glob.glob(path) and not Path(path).is_dir()):
        return []
    if Path(path).is_dir():
        return list(splits_of(Path(path), _data_files(Path(path)), name=name, config=config))
    if not is_hub_id(path):
        return []
    import datasets

    try:
        return list(datasets.get_dataset_split_names(path, config, revision=revision))
    except Exception:  # reading the data reports the error, as for every hub id
        logger.info("%s: its splits could not be listed", name)
        return []


def _choice(name: str) -> tuple[str, str | None, str | None, str | None]:
    """Return the path, configuration, revision and split from the name of a source."""
    expanded = os.path.expanduser(os.path.expandvars(name))
    if is_remote(expanded):
        return _remote_choice(expanded)
    # A file whose name contains @, # or : is taken literally.
    if Path(expanded).exists() or (found := _CHOICE.match(expanded)) is None:
        return expanded, None, None, None
    path = found["path"]
    if Path(path).is_dir() or is_hub_id(path):
        return path, found["config"], found["revision"], found["split"]
    return expanded, None, None, None


def _remote_choice(url: str) -> tuple[str, str | None, str | None, str | None]:
    """Return the parts of a URL's name, with the path of the copy instead of the URL."""
    found = _REMOTE_CHOICE.match(url)
    assert found is not None
    copy = local_copy(found["path"], wanted=suffix_of)
    if Path(copy).is_dir():
        return copy, found["config"], None, found["split"]
    # What follows the name of a file would choose in it, which only folders allow.
    return copy + url[len(found["path"]) :], None, None, None


def read_rows(path: str) -> Iterator[tuple[Row, str]]:
    """Yield every row of a data source together with its ``file:line`` (or ``file:row N``).

    Args:
        path: a file, a folder, a glob, a URL of one of these (see ``remote``), or a hub id
            ``owner/name`` if no file or folder has that name. Files are jsonl, json, csv or tsv
            with any separator, parquet, arrow or txt; text files may be gzipped. The file type is
            detected from the content, not the name. For a folder, all such files in it are read
            that are not hidden, sorted by name; if it has several splits, one must be selected.
            Folders and hub ids accept ``@revision``, ``#config`` and ``:split`` after the name,
            folders at a URL the last two. Environment variables are expanded.

    Returns:
        Dictionaries, or strings for .txt files. Their documents end at lines with only
        ``<|endoftext|>``, or at blank lines if the file has no such mark.

    Raises:
        DataError: nothing is found, or a file or one of its rows cannot be read.
    """
    for row, source in scan_rows(path):
        if isinstance(row, DataError):
            raise row
        yield row, source


def scan_rows(path: str) -> Iterator[Item]:
    """Yield rows as ``read_rows`` does, with an error in place of each row that cannot be read."""
    files = find_files(path)
    for file in files or [Path(path)]:
        count = 0
        for row, source in _items(file) if files else _read_hub(path):
            count += not isinstance(row, DataError)
            yield row, source
        note_rows(file, count)


def _items(file: Path) -> Iterator[Item]:
    """Yield the items of a file, those that were kept if it was parsed before."""
    name = str(file)
    kept = _shared.get(name)
    if kept is not None:
        yield from kept
        return
    parsed: list[Item] = []
    for item in scan(file, name=name, suffix=suffix_of(file)):
        if name in _shared:
            parsed.append(item)
        yield item
    # Only here is the file read to its end: a reader may stop at an error.
    if name in _shared:
        _shared[name] = parsed


def find_files(path: str) -> list[Path]:
    """Return the files that a path refers to, in a fixed order; an empty list means a hub id.

    Raises:
        DataError: the path does not exist and does not look like ``owner/name``.
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    if (unset := _UNSET.search(expanded)) and not os.path.lexists(expanded):
        raise DataError(f"{path}: the environment variable {unset[0]} is not set", code="D001")
    plain, config, _, split = _choice(path)
    if is_remote(expanded):
        expanded = plain
    here = Path(plain)
    if here.is_file() or (here.is_symlink() and not here.exists()):
        return [_known(here)]
    if here.is_dir():
        found = _data_files(here)
        packed = [p for p in here.rglob("*") if _is_packed(p) and not is_hidden(p, here)]
        # Most programs keep the packed file beside the one that they unpack.
        if left := sorted(p for p in packed if not p.with_suffix("").is_file()):
            raise _packed(left[0])
        if not found:
            raise DataError(f"{path}: the folder contains no {', '.join(_PLAIN)} file", code="D004")
        return files_of(here, found, name=path, config=config, split=split)
    found = sorted(Path(p) for p in glob.glob(expanded, recursive=True) if Path(p).is_file())
    if found:
        return [_known(p) for p in found]
    if is_hub_id(plain) and not suffix_of(here) and not here.parent.is_dir():
        return []
    raise DataError(f"{path}: no such file, folder or glob (from {Path.cwd()})", code="D001")


def data_fingerprint(path: str) -> list[dict[str, Any]]:
    """Return the path, sha256 and number of rows of every file of a data source, for manifests.

    The hash covers the bytes that were parsed, and for a hub id its rows. What was not read yet is
    read here.
    """
    prints = []
    for file in find_files(path) or [Path(path)]:
        # Normally the rows were read before training; the log then has hash and count.
        if num_rows(file) is None:
            for _ in read_rows(str(file)):
                pass
        entry = {"path": str(file), "sha256": parsed_sha256(file), "rows": num_rows(file)}
        prints.append(entry)
    return prints


def hub_revision(path: str) -> str | None:
    """Return the commit that a hub id resolves to now; None if neither hub nor cache tells."""
    from huggingface_hub import HfApi, constants

    name, _, revision, _ = _choice(path)
    try:
        return HfApi().dataset_info(name, revision=revision, timeout=HUB_TIMEOUT_S).sha
    except Exception:  # no network, or no such data set, which the reader reports
        folder = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "refs"
        reference = folder / (revision or "main")
        return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None


def _data_files(folder: Path) -> list[Path]:
    found = (p for p in folder.rglob("*") if suffix_of(p) and not p.is_dir())
    return sorted(p for p in found if not is_hidden(p, folder))


def suffix_of(path: Path) -> str:
    """Return the suffix that determines the file type, without ``.gz``; "" if it is unknown."""
    name = path.name.lower()
    suffix = next((s for s in _SUFFIXES if name.endswith(s)), "").removesuffix(".gz")
    return ".jsonl" if suffix == ".ndjson" else suffix


def _is_packed(path: Path) -> bool:
    """Return whether a name such as train.jsonl.zst is that of a data file, packed."""
    return path.suffix.lower() in _PACKED and bool(suffix_of(path.with_suffix("")))


def _packed(path: Path) -> DataError:
    return DataError(f"{path}: a packed file. Decompress it first, or use gzip.", code="D008")


def _known(path: Path) -> Path:
    if _is_packed(path):
        raise _packed(path)
    if not suffix_of(path):
        raise DataError(
            f"{path}: unknown file type; save its rows as one of {', '.join(_PLAIN)}", code="D005"
        )
    return path


def hub_files(path: str) -> list[Path]:
    """Return the Arrow files with the rows of a hub id, which the datasets library keeps.

    Raises:
        DataError: as for its rows.
    """
    return [Path(entry["filename"]) for entry in _open_hub(path).cache_files]


def _read_hub(path: str) -> Iterator[Item]:
    try:
        data = _open_hub(path)
    except DataError as error:
        yield error, path
        return
    digest = hashlib.sha256()
    for number, given in enumerate(data, start=1):
        row = plain_row(dict(given))
        digest.update(json.dumps(row, sort_keys=True, default=str).encode("utf-8"))
        yield row, f"{path}:row {number}"
    note(Path(path), digest.hexdigest())


def _open_hub(path: str) -> Any:
    """Return a data set of the hub; its rows stay in the files of the datasets library.

    Raises:
        DataError: it cannot be loaded, or it has several splits and none is selected.
    """
    if _opened is not None and path in _opened:
        return _opened[path]
    require(f"{path}: reading a hub id", "datasets")
    import datasets

    name, config, revision, split = _choice(path)
    try:
        if split is None:
            known = list(datasets.get_dataset_split_names(name, config, revision=revision))
            if len(known) > 1:
                raise several_splits(path, known)
            split = known[0]
        _check_unpacking(name, config=config, revision=revision)
        data = datasets.load_dataset(name, config, split=split, revision=revision)
    except DataError:
        raise
    except Exception as error:  # the hub client raises types of several libraries
        told = " ".join(str(error).split())
        message = (
            f"{path}: no such file or folder, and it cannot be loaded from the hub: {told} Correct "
            "the name, log in if it is private (hf auth login), or download the dataset on a "
            "machine with network access and use its folder"
        )
        raise DataError(message, code="D011") from error
    if _opened is not None:
        _opened[path] = data
    return data


def _check_unpacking(name: str, *, config: str | None, revision: str | None) -> None:
    """Check that the files of a data set of the hub unpack within the limits of data files.

    The datasets library unpacks without limits, so each file is first read here. Nothing is read
    where the library has its own copy of the rows already.

    Raises:
        DataError: a file unpacks to too much, or is of a kind whose size cannot be limited.
    """
    import datasets
    from datasets.config import DATASET_INFO_FILENAME

    try:
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        copied = (Path(builder.cache_dir) / DATASET_INFO_FILENAME).is_file()
        named = None if copied else builder.config.data_files
        files = [file for listed in (named or {}).values() for file in listed]
        download = datasets.DownloadManager(dataset_name=name).download
        brought = {file: Path(str(download(file))) for file in files}
    except Exception:  # loading the data set ends with the same error
        logger.info("%s: its files could not be listed", name)
        return
    for file, path in brought.items():
        for row, _ in scan(path, name=f"{name}: {Path(file).name}", suffix=suffix_of(Path(file))):
            if isinstance(row, DataError) and row.code == bounds.CODE:
                raise row
            if isinstance(row, DataError) and row.code == "D008" and not bounds.is_set():
                raise bounds.too_large(f"{name}: {Path(file).name}", "its unpacked size is unknown")
