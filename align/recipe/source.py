"""Read recipe files into plain data, and record the place of each value.

Worked example. Line 4 of r.yaml is ``    coef: 0.1`` below ``kl:`` below ``ppo:`` below
``stages:``; then ``data["stages"]["ppo"]["kl"]["coef"] == 0.1`` and
``marks[("stages", "ppo", "kl", "coef")]`` contains ``r.yaml``, line 4 and both columns.
"""

import os
import re
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from align.core.bounded_yaml import Limits, compose
from align.core.errors import RecipeError
from align.core.text import is_secret_name, keep_secret, shown
from align.recipe.recipe_text import foreign_file, not_a_recipe, read_text
from align.recipe.yaml_problems import place_of, yaml_problem

Key = tuple[str | int, ...]

_VARIABLE = re.compile(r"\$?\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}|[^}]*\}?)")


@dataclass(frozen=True, slots=True)
class Mark:
    """The place of a value; ``file`` is ``--set`` for a value from the command line."""

    file: str
    line: int = 0
    key_column: int = 0
    column: int = 0

    def at_key(self) -> str:
        """Return ``file:line:column`` of the key."""
        return self._text(self.key_column)

    def at_value(self) -> str:
        """Return ``file:line:column`` of the value."""
        return self._text(self.column)

    @property
    def origin(self) -> str:
        """Return ``file:line``, or ``--set``."""
        return f"{self.file}:{self.line}" if self.line else self.file

    def _text(self, column: int) -> str:
        return f"{self.file}:{self.line}:{column}" if self.line else self.file


@dataclass(slots=True)
class Source:
    """Parsed data with the place of every value, and the errors found while reading."""

    data: dict[str, Any] = field(default_factory=dict)
    marks: dict[Key, Mark] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Loader(_SafeLoader):
    """A YAML 1.2 loader for plain scalars: ``no`` is text, ``1e-5`` a number, ``010`` is 10."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


_TAG = "tag:yaml.org,2002:"
for _kind, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$",
        list("-+.0123456789"),
    ),
    ("merge", r"^<<$", ["<"]),
):
    Loader.add_implicit_resolver(_TAG + _kind, re.compile(_pattern), _first)


def _int(text: str) -> int:
    value = int(text)
    if abs(value) >= 2**63:
        raise ValueError("expected a number below 2^63")
    return value


def _float(text: str) -> float:
    value = float(text)
    if not abs(value) < 2**63:
        raise ValueError("expected a finite number below 2^63")
    return value


_READERS: dict[str, Callable[[str], Any]] = {
    "null": lambda _: None,
    "bool": lambda t: t.lower() == "true",
    "int": _int,
    "float": _float,
}

MAPPING_AS_KEY = "found a list or mapping as a key; expected a name. Put {{ }} in quotes"
LIMITS = Limits()
"""Limits of a recipe file."""


_BRACED = re.compile(r"(?<=\$)\{([A-Za-z_][^{}\n]*)\}")
_OPEN, _CLOSE = "\ue000", "\ue001"
"""Stand-ins for the braces of ``${NAME}``, which would open a mapping inside ``{}`` or ``[]``."""


def _restore_braces(node: yaml.Node | None) -> None:
    """Write the braces of ``${NAME}`` back into every scalar below a node."""
    queue, seen = [node] if node else [], set()
    while queue:
        part = queue.pop()
        if id(part) in seen:  # an alias
            continue
        seen.add(id(part))
        if isinstance(part, yaml.ScalarNode):
            part.value = part.value.replace(_OPEN, "{").replace(_CLOSE, "}")
        elif isinstance(part, yaml.MappingNode):
            queue += [side for pair in part.value for side in pair]
        else:
            queue += part.value


def compose_recipe(text: str) -> yaml.Node | None:
    """Return the YAML node of a text; ``${NAME}`` needs no quotes, also in ``{}`` and ``[]``.

    Raises:
        yaml.MarkedYAMLError: the text is not YAML, too long or nested too deeply.
    """
    # Replace character by character, so that every mark keeps its line and column.
    if _OPEN not in text and _CLOSE not in text:
        text = _BRACED.sub(rf"{_OPEN}\1{_CLOSE}", text)
    root = compose(text, Loader, LIMITS)
    _restore_braces(root)
    return root


SHIPPED = Path(__file__).parents[1] / "recipes"
"""Recipes that are shipped with the package; in a checkout, a link to the top-level folder."""


def find_recipe(name: Path | str) -> Path:
    """Return the file of a recipe, given a path or the name of a shipped recipe.

    A path that exists comes first. Names are those of ``shipped_recipes``.
    """
    path = Path(name)
    shipped = SHIPPED / f"{path}.yaml"
    named = not path.suffix and not path.is_absolute() and ".." not in path.parts
    return shipped if named and not path.exists() and shipped.is_file() else path


def shipped_recipes() -> dict[str, str]:
    """Return the description of each shipped recipe by its name, such as ``smollm2/chain``."""
    found = {}
    for path in sorted(SHIPPED.rglob("*.yaml")):
        line = re.search(r"^description: *(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        found[path.relative_to(SHIPPED).with_suffix("").as_posix()] = line[1] if line else ""
    return found


def read_source(path: Path | str) -> Source:
    """Read a recipe and all the recipes that it extends.

    Args:
        path: the recipe; ``extends`` is relative to its folder.

    Returns:
        Merged data, marks and errors.

    Raises:
        RecipeError: a file is missing or not YAML, or ``extends`` is circular.
    """
    return _read(Path(path), chain=())


def _read(path: Path, *, chain: tuple[Path, ...]) -> Source:
    real = path.resolve()
    if real in chain:
        circle = " -> ".join(p.name for p in (*chain[chain.index(real) :], real))
        raise RecipeError(f"{path}: 'extends' is circular: {circle}; remove one of them")
    source = parse_file(path)
    if "extends" not in source.data:
        return source
    name, mark = source.data.pop("extends"), source.marks.pop(("extends",))
    if not isinstance(name, str):
        source.errors.append(
            f"{mark.at_value()}: extends: found {shown(name)}; expected the path of one recipe"
        )
        return source
    parent = path.parent / name
    if not parent.is_file():
        raise RecipeError(
            f"{mark.at_value()}: extends: no file {parent}; the path is relative to {path}"
        )
    base = _read(parent, chain=(*chain, real))
    # The extending recipe takes precedence over the one that it extends.
    _merge(base, source)
    return base


def parse_file(path: Path) -> Source:
    """Return the data of one file, with places and errors; ``extends`` is not followed."""
    try:
        text = read_text(path, limit=LIMITS.characters)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe{_near_files(path)}") from None
    try:
        node = compose_recipe(text)
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError(foreign_file(path, text) or not_a_recipe(path, node))
    except yaml.MarkedYAMLError as e:
        if problem := foreign_file(path, text):
            raise RecipeError(problem) from e
        at = place_of(e)
        where = f"{path}:{at.line + 1}:{at.column + 1}" if at else str(path)
        raise RecipeError(f"{where}: not valid YAML: {yaml_problem(e)}") from e
    except yaml.YAMLError as e:
        raise RecipeError(f"{path}: not valid YAML: {e}") from e
    source = Source()
    reader = Reader(str(path), source)
    source.data = reader.value(node, ())
    return source


def _near_files(path: Path) -> str:
    from difflib import get_close_matches

    folder = path.parent if path.parent.is_dir() else Path("recipes")
    places = {shipped.stem: shipped.stem for shipped in SHIPPED.glob("*.yaml")}
    places |= {near.stem: str(near) for near in folder.glob("*.yaml")}
    close = get_close_matches(path.stem, places, n=1)
    return f"; did you mean '{places[close[0]]}'?" if close else ""


class Reader:
    """A converter from YAML nodes to data that records marks and errors in a ``Source``."""

    def __init__(self, file: str, source: Source) -> None:
        self.file = file
        self.source = source
        self.open: list[yaml.Node] = []

    def value(self, node: yaml.Node, key: Key, *, key_node: yaml.Node | None = None) -> Any:
        """Return the data of a node at a key path, and record its place."""
        at = node.start_mark
        named = (key_node or node).start_mark
        # A block value may start on the line after its key; an error should show the key's line.
        line = named.line if key_node is not None else at.line
        column = at.column if at.line == line else named.column
        self.source.marks[key] = Mark(self.file, line + 1, named.column + 1, column + 1)
        # YAML aliases can make a node its own descendant.
        if any(node is n for n in self.open):
            self.problem(key, "an alias that contains itself; write the value out")
            return None
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, key)
        self.open.append(node)
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.value(child, (*key, i)) for i, child in enumerate(node.value)]
            assert isinstance(node, yaml.MappingNode)
            return self.mapping(node, key)
        finally:
            self.open.pop()

    def mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        """Return a mapping's data, with '<<' merged."""
        found: dict[str, Any] = {}
        merged: list[yaml.Node] = []
        seen: list[yaml.Node] = []
        for key_node, child in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.problem(key, MAPPING_AS_KEY)
            elif key_node.tag == _TAG + "merge":
                merged += child.value if isinstance(child, yaml.SequenceNode) else [child]
            elif key_node.value in found:
                first = self.source.marks[(*key, key_node.value)]
                at = key_node.start_mark
                name = dotted((*key, key_node.value))
                self.source.errors.append(
                    f"{self.file}:{at.line + 1}:{at.column + 1}: {name}: duplicate key; "
                    f"the first is on line {first.line}; remove one"
                )
            else:
                name = key_node.value
                found[name] = self.value(child, (*key, name), key_node=key_node)
        # Merged mappings ('<<') come last: the mapping's own keys take precedence.
        while merged:
            other = merged.pop(0)
            if not isinstance(other, yaml.MappingNode):
                self.problem(key, "'<<' merges a mapping; found something else")
            elif any(other is node for node in self.open):
                self.problem(key, "an alias that contains itself; write the value out")
            elif all(other is not node for node in seen):
                seen.append(other)
                # Its own '<<' come before the mappings that were named after it.
                merged = self.merge(other, found, key) + merged
        return found

    def merge(self, other: yaml.MappingNode, found: dict[str, Any], key: Key) -> list[yaml.Node]:
        """Add what is missing from a merged mapping, and return the mappings that it merges."""
        inner: list[yaml.Node] = []
        for key_node, child in other.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.problem(key, MAPPING_AS_KEY)
            elif key_node.tag == _TAG + "merge":
                inner += child.value if isinstance(child, yaml.SequenceNode) else [child]
            elif key_node.value not in found:
                name = key_node.value
                found[name] = self.value(child, (*key, name), key_node=key_node)
        return inner

    def scalar(self, node: yaml.ScalarNode, key: Key) -> Any:
        """Return the value of a scalar, with variables replaced."""
        if node.tag == _TAG + "str":
            text, changed = self.expanded(node.value, key)
            # An unquoted ${STEPS} may be a number; a quoted one stays text.
            if changed and not node.style:
                return self.read(plain_scalar, text, key)
            return text
        return self.typed(node.tag, node.value, key)

    def typed(self, tag: str, text: str, key: Key) -> Any:
        """Return a text as the value of its YAML tag."""
        read = _READERS.get(tag.removeprefix(_TAG))
        if read is None:
            self.problem(key, f"YAML tag '{tag}' is not used in recipes; remove it")
            return None
        return self.read(read, text, key)

    def read(self, read: Callable[[str], Any], text: str, key: Key) -> Any:
        """Return what ``read`` makes of a text; report its ValueError."""
        try:
            return read(text)
        except ValueError as error:
            bound = str(error) if "expected" in str(error) else "expected what its tag says"
            self.problem(key, f"found {shown(text)}; {bound}")
            return None

    def expanded(self, text: str, key: Key) -> tuple[str, bool]:
        """Return the text with its variables replaced, and whether it changed.

        ``${NAME}`` and ``${NAME:-default}`` are environment variables, ``${RECIPE_DIR}`` is the
        folder of the recipe's file, and ``$${NAME}`` is a literal ``${NAME}``.
        """
        known = ChainMap({"RECIPE_DIR": str(Path(self.file).parent)}, os.environ)

        def replace(match: re.Match[str]) -> str:
            name, default = match.group(1), match.group(2)
            if match.group(0).startswith("$$"):
                return match.group(0)[1:]
            if name is None:
                self.problem(
                    key,
                    f"found '{match.group(0)}'; expected ${{NAME}} or ${{NAME:-default}}; "
                    "a literal '${' is written '$${'",
                )
                return ""
            value = known.get(name, default)
            if value is None:
                self.problem(
                    key,
                    f"the environment variable {name} is not set; run with {name}=... or write "
                    f"${{{name}:-default}}",
                )
                return ""
            # A secret by its name, or by its place in a URL (query or user:password@).
            in_address = "?" in text[: match.start()] or "@" in text[match.end() :]
            if name in os.environ and (is_secret_name(name) or ("://" in text and in_address)):
                keep_secret(name, value)
            return value

        replaced = _VARIABLE.sub(replace, text)
        return replaced, replaced != text

    def problem(self, key: Key, what: str) -> None:
        """Add an error about the value at a key path."""
        where = self.source.marks[key].at_value()
        name = f"{dotted(key)}: " if key else ""
        self.source.errors.append(f"{where}: {name}{what}")


def parse_value(text: str, name: str, errors: list[str]) -> Any:
    """Return the value of ``--set name=text``, parsed as YAML; errors are added to ``errors``."""
    node = compose_recipe(text)
    if node is None:
        return None
    source = Source()
    value = Reader("--set", source).value(node, (name,))
    errors += ["--set: " + line.split(": ", 1)[1] for line in source.errors]
    return value


def plain_scalar(text: str) -> Any:
    """Return a text parsed as an unquoted YAML value."""
    tag = Loader("").resolve(yaml.ScalarNode, text, (True, False))
    return _READERS.get(tag.removeprefix(_TAG), str)(text)


def _merge(base: Source, child: Source) -> None:
    """Merge ``child`` over ``base`` by key; lists and stages of another kind are replaced."""
    base.errors += child.errors
    _merge_at(base, child, (), into=base.data, new=child.data)


def _merge_at(
    base: Source, child: Source, key: Key, *, into: dict[str, Any], new: Mapping[str, Any]
) -> None:
    for name, value in new.items():
        here = (*key, name)
        old = into.get(name)
        if value is None and key == ("stages",) and name in into:  # removes the stage
            del into[name]
            forget(base.marks, here)
        elif isinstance(old, dict) and isinstance(value, dict) and not _other_kind(old, value):
            base.marks[here] = child.marks[here]
            _merge_at(base, child, here, into=old, new=value)
        else:
            into[name] = value
            forget(base.marks, here)
            base.marks |= {k: m for k, m in child.marks.items() if k[: len(here)] == here}


def _other_kind(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return any(t in old and t in new and old[t] != new[t] for t in ("kind", "method"))


def forget(marks: dict[Key, Mark], key: Key) -> None:
    """Remove the marks of a value and of everything inside it."""
    for k in [k for k in marks if k[: len(key)] == key]:
        del marks[k]


def dotted(key: Sequence[str | int]) -> str:
    """Return a key path in dotted form: ``stages.ppo.rewards.0.model``."""
    return ".".join(str(k) for k in key)
