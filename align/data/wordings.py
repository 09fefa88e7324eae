"""Turn rows into instructions with templates, several per task (FLAN, arXiv:2109.01652).

A template file is a YAML list. Each entry has a ``name`` and the fields of the row that it creates,
as Jinja2 over the fields of the input row::

    - name: ask
      prompt: "Question: {{ question }}"
      completion: "{{ answer | trim }}"
    - name: turned            # the reverse task
      prompt: "Write a question whose answer is {{ answer }}."
      completion: "{{ question }}"
"""

import hashlib
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from align.core import bounded_yaml
from align.core.errors import DataError
from align.core.text import unexpanded
from align.core.types import Turn
from align.data.reading.read_log import note
from reward_models.limits import LimitError, check_length, template_limits

if TYPE_CHECKING:
    from jinja2 import Environment

LIMITS = bounded_yaml.Limits(characters=2**24, values=1_000_000)
"""Limits of a template file."""
MADE = ("prompt", "completion", "chosen", "rejected")
FIELDS = ({"prompt"}, {"prompt", "completion"}, {"prompt", "chosen", "rejected"})


@dataclass(frozen=True, slots=True)
class Wording:
    """One wording: a compiled template for each field of the new row."""

    name: str
    fields: Mapping[str, Any]

    def apply(self, row: Mapping[str, Any], source: str) -> dict[str, Any]:
        """Return a row of turns; the fields of the old row are kept as columns.

        Raises:
            DataError: the row lacks a field that the template uses, or a rendered text is empty.
        """
        made: dict[str, Any] = {}
        for field, template in self.fields.items():
            try:
                with template_limits(f"template '{self.name}', {field}"):
                    text = template.render(row).strip()
                    check_length(text)
            except LimitError as error:
                raise DataError(f"{source}: {error}") from error
            except Exception as error:  # code in a template may raise any exception
                said = str(error) or type(error).__name__
                raise DataError(
                    f"{source}: template '{self.name}', {field}: {said}; the row has {sorted(row)}"
                ) from error
            if not text:
                raise DataError(f"{source}: template '{self.name}' leaves {field} empty")
            role = "user" if field == "prompt" else "assistant"
            made[field] = [Turn(role=role, content=text)]
        kept = {key: value for key, value in row.items() if key not in MADE}
        return {**kept, "template": self.name, **made}


def word_row(
    row: object,
    source: str,
    *,
    templates: str,
    phrasing: Literal["one", "all"],
    seed: int,
) -> list[dict[str, Any]]:
    """Apply one wording, selected by the seed and the row's place, or all wordings to a row.

    Raises:
        DataError: the template file is invalid or does not fit the row.
    """
    wordings = read_wordings(templates)
    if not isinstance(row, Mapping):
        raise DataError(f"{source}: plain text has no fields for templates. Remove 'templates'.")
    if phrasing == "all":
        return [wording.apply(row, source) for wording in wordings]
    digest = hashlib.sha256(f"wording/{seed}/{source}".encode()).digest()
    return [wordings[int.from_bytes(digest[:8], "big") % len(wordings)].apply(row, source)]


def read_wordings(path: str) -> Sequence[Wording]:
    """Read a template file; templates run in a sandbox and cannot change their input.

    Raises:
        DataError: lists every error in the file.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(
            f"{path}: the template file does not exist (relative to {Path.cwd()}){unexpanded(path)}"
        )
    state = file.stat()
    return _wordings(file, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=32)
def _wordings(path: Path, _changed: int, _size: int) -> Sequence[Wording]:
    """Parse a template file, once for each of its states: a notebook may edit it in between."""
    content = path.read_bytes()
    note(path, hashlib.sha256(content).hexdigest())
    try:
        entries = bounded_yaml.load(content.decode("utf-8"), LIMITS)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: expected a list of templates, each with name, prompt, ...")
    # Template files may come from elsewhere: no access to attributes of Python, no changes.
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, finalize=_given
    )
    errors: list[str] = []
    found = [
        _wording(entry, f"{path}: entry {i + 1}", environment, errors=errors)
        for i, entry in enumerate(entries)
    ]
    names = [wording.name for wording in found if wording is not None]
    errors += [
        f"{path}: two templates are called '{n}'" for n in {n for n in names if names.count(n) > 1}
    ]
    if errors:
        raise DataError("\n".join(errors))
    return [wording for wording in found if wording is not None]


def _given(value: object) -> Any:
    """Raise for an empty field, which Jinja would render as the word None."""
    if value is None:
        raise ValueError("a field that it renders is empty (null)")
    return value


def _wording(
    entry: object, where: str, environment: "Environment", *, errors: list[str]
) -> Wording | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        errors.append(
            f"{where}: expected a mapping with a text 'name', found {reprlib.repr(entry)[:60]}"
        )
        return None
    fields = {key: value for key, value in entry.items() if key != "name"}
    if set(fields) not in FIELDS or not all(isinstance(v, str) for v in fields.values()):
        errors.append(
            f"{where} '{entry['name']}': has {sorted(fields)}, expected prompt, or prompt and "
            "completion, or prompt, chosen and rejected"
        )
        return None
    compiled = {}
    for key, text in fields.items():
        try:
            # Jinja already computes constant expressions here.
            with template_limits(f"template '{entry['name']}'"):
                compiled[key] = environment.from_string(text)
        except (TemplateError, LimitError) as error:
            errors.append(f"{where} '{entry['name']}', {key}: {error}")
    return Wording(entry["name"], compiled)
