"""Turn a Python function into the ``FILE.py:NAME`` that a recipe names.

A function of an imported module is named by its file. One of a notebook, of a script or inside
another function is written to a file of its own, with the imports, constants and functions that it
uses: importing the script itself in the worker would run the script again.
"""

import ast
import builtins
import hashlib
import inspect
import linecache
import math
import re
import symtable
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from align.core.errors import RecipeError
from align.core.sources import source_file
from reward_models.base import a_type

_LAMBDA = "from_lambda"
"""Name of a lambda in its file."""
_INSTEAD = "write it to a file and give 'FILE.py:NAME'"
_HEAD = '"""Written by align from a function of a notebook or script."""\n\n'
_FUTURE = "from __future__ import annotations\n\n"


def python_reward(function: Callable[..., Any], folder: Path) -> dict[str, Any]:
    """Return the ``kind: python`` block of a function, a class or a ``partial`` of one.

    Args:
        function: the function; keyword arguments of a partial become ``args``.
        folder: where a function without an importable file is written.

    Raises:
        RecipeError: its source cannot be found, or uses a value that cannot be written to a file.
    """
    if not isinstance(function, partial):
        return {"kind": "python", "path": reference(function, folder)}
    if function.args:
        raise RecipeError(
            f"{_name(function.func)}: a partial with positional arguments; name each argument"
        )
    block = python_reward(function.func, folder)
    return block | {"args": {**block.get("args", {}), **function.keywords}}


def reference(function: Callable[..., Any], folder: Path) -> str:
    """Return ``FILE.py:NAME`` or ``MODULE:NAME`` of a function or class; see ``python_reward``.

    A lambda is written to a file too, and so is an object that is called, with its attributes.
    """
    if (named := _in_module(function)) is not None:
        return named
    if inspect.isfunction(function) or inspect.isclass(function):
        name = function.__name__ if function.__name__.isidentifier() else _LAMBDA
        text = _Writer(name).module_of(function)
    elif inspect.isroutine(function) or not inspect.isfunction(type(function).__call__):
        raise RecipeError(
            f"{_name(function)}: found {a_type(function)}; expected a function, or a "
            f"class whose instances are called; or {_INSTEAD}"
        )
    else:
        name = _object_name(function)
        text = _Writer(name).module_of_object(function)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    file = folder.resolve() / f"{name}-{digest}.py"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return f"{file}:{name}"


def _object_name(value: object) -> str:
    """Return its ``__name__``, as TRL shows it, or that of its class in small letters."""
    kind, own = type(value).__name__, getattr(value, "__name__", None)
    if isinstance(own, str) and own.isidentifier() and own != kind:
        return own
    return kind.lower() if kind.lower() != kind else f"{kind}_object"


def _name(function: object) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _in_module(function: object) -> str | None:
    """Return the reference of a top-level name of an imported module, None for any other."""
    # An object has the module of its class; it may be a variable there.
    within = function.__module__
    module = sys.modules.get(within)
    file = getattr(module, "__file__", None)
    if within == "__main__" or file is None or not file.endswith(".py"):
        return None
    name = next((n for n, value in vars(module).items() if value is function), None)
    if name is None:
        return None
    named = f"{within}:{name}"
    found = source_file(named)
    # A module of a package imports its neighbors by the package's name; any other by its folder.
    if "." in within and found is not None and found.samefile(file):
        return named
    return f"{Path(file).resolve()}:{name}"


class _Writer:
    """Collect the source of a function and of everything that it uses, as one module."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.imports: dict[str, None] = {}
        self.folders: dict[str, None] = {}
        self.definitions: dict[str, str] = {}
        self.values: dict[str, Any] = {}

    def module_of(self, function: object) -> str:
        """Return the text of the module."""
        self._define(self.name, function)
        return self._text()

    def module_of_object(self, value: object) -> str:
        """Return the text of a module with an object, its class and its attributes."""
        kind = type(value)
        try:
            object.__new__(kind)
        except TypeError:  # its content is not in its attributes
            built_in = next(base for base in kind.__mro__ if base.__module__ == "builtins")
            raise RecipeError(
                f"{self.name}: the class {kind.__name__} extends {built_in.__name__}, so its "
                f"objects have content beside their attributes; {_INSTEAD}"
            ) from None
        self._bind(kind.__name__, kind)
        # A dictionary, or the pair of it (or None) and the values in slots; None if there are none.
        found: Any = object.__getstate__(value)
        parts = found if isinstance(found, tuple) else (found,)
        state = {name: inner for part in parts for name, inner in (part or {}).items()}
        lines = [f"{self.name} = object.__new__({kind.__name__})"]
        for attribute, inner in state.items():
            text = self._written(f"{kind.__name__}.{attribute}", inner)
            lines.append(f"object.__setattr__({self.name}, {attribute!r}, {text})")
        self.definitions[self.name] = "\n".join(lines)
        return self._text()

    def _text(self) -> str:
        folders = "".join(f"sys.path.append({folder!r})\n" for folder in self.folders)
        lines = [_HEAD, _FUTURE, f"import sys\n\n{folders}" if folders else "", *self.imports]
        return "".join([*lines, "\n", *(f"\n{text}\n" for text in self.definitions.values())])

    def _is_new(self, name: str, value: object) -> bool:
        """Return whether a name is not bound yet; to another value is an error."""
        known = self.values.setdefault(name, value)
        if known is not value and not _same_text(known, value):
            raise RecipeError(
                f"function '{self.name}': what it uses has two values of the name '{name}'; rename "
                f"one, or {_INSTEAD}"
            )
        return name not in self.definitions

    def _define(self, name: str, function: object) -> None:
        if not self._is_new(name, function):
            return
        text = _source(function, self.name, name=name)
        # Reserve the name first: functions may call each other.
        self.definitions[name] = ""
        outside = _outside(function, self.name)
        for used in sorted(_free_names(text, self.name)):
            if used in outside and used != name:
                self._bind(used, outside[used])
        self._import_parts(text, outside)
        # Last, since decorators and defaults need what is above.
        del self.definitions[name]
        self.definitions[name] = text

    def _bind(self, name: str, value: object) -> None:
        """Make a name of the function's surroundings known in the module."""
        if not self._is_new(name, value):
            return
        if isinstance(value, ModuleType):
            self._import(value.__name__)
            whole = value.__name__ == name
            self.imports[f"import {value.__name__}" + ("\n" if whole else f" as {name}\n")] = None
        elif (place := _importable(value)) is not None:
            self._import(place[0])
            self.imports[f"from {place[0]} import {place[1]} as {name}\n"] = None
        elif inspect.isfunction(value) or inspect.isclass(value):
            own = value.__name__ if value.__name__.isidentifier() else name
            self._define(own, value)
            if own != name:
                self.definitions[name] = f"{name} = {own}"
        else:
            self.definitions[name] = f"{name} = {self._written(name, value)}"

    def _import_parts(self, text: str, outside: Mapping[str, Any]) -> None:
        """Import ``a.b`` of ``import a.b``, which binds only ``a``."""
        for node in ast.walk(ast.parse(text)):
            dotted = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            whole = outside.get(top := dotted.partition(".")[0])
            if dotted in sys.modules and getattr(whole, "__name__", None) == top:
                self.imports[f"import {dotted}\n"] = None

    def _import(self, module: str) -> None:
        """Make sure that the worker finds a module; the text changes with the module's file."""
        file = getattr(sys.modules.get(module), "__file__", None)
        if file is None or _is_installed(Path(file).resolve()):
            return
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        self.imports[f"# {module}: sha256 {digest[:16]}\n"] = None
        depth = module.count(".") + (Path(file).name == "__init__.py")
        folder = Path(file).resolve().parents[depth]
        if folder != Path.cwd().resolve():
            self.folders[str(folder)] = None

    def _written(self, name: str, value: object) -> str:
        """Return a constant as Python text."""
        try:
            text = _literal(value)
        except (ValueError, RecursionError):
            raise RecipeError(
                f"function '{self.name}': it uses '{name}' ({type(value).__name__}), a value of "
                f"the notebook or script that cannot be written to a file; make it inside the "
                f"function, or {_INSTEAD}"
            ) from None
        if "_re.compile(" in text:
            self.imports["import re as _re\n"] = None
        if "_pathlib.Path(" in text:
            self.imports["import pathlib as _pathlib\n"] = None
        return text


def _same_text(one: object, other: object) -> bool:
    """Return whether two values are written as the same text."""
    try:
        return _literal(one) == _literal(other)
    except (ValueError, RecursionError):
        return False


def _literal(value: Any) -> str:
    """Return a plain value as Python text, the same in every process; else raise ValueError."""
    if isinstance(value, re.Pattern):
        return f"_re.compile({_literal(value.pattern)}, {int(value.flags)})"
    if isinstance(value, Path):
        return f"_pathlib.Path({str(value)!r})"
    if type(value) in (list, tuple, set, frozenset):
        inside = [_literal(item) for item in value]
        # The order of a set differs between processes.
        inside = inside if type(value) in (list, tuple) else sorted(inside)
        return f"{type(value).__name__}([{', '.join(inside)}])"
    if type(value) is dict:
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    finite = not isinstance(value, float) or math.isfinite(value)
    if type(value) in (str, bytes, int, float, bool, type(None)) and finite:
        return repr(value)
    raise ValueError("not a plain value")


def _source(function: Any, root: str, *, name: str) -> str:
    """Return the source of a function or class, without the indentation of its surroundings.

    Args:
        function: what to write. root: the function that the user passed.
        name: what a lambda is assigned to.
    """
    try:
        if inspect.isclass(function):
            text = _class_source(function)
        elif function.__name__ == "<lambda>":
            return f"{name} = {_lambda_source(function)}"
        else:
            text = textwrap.dedent(inspect.getsource(function))
        tree = ast.parse(text)
    except (OSError, TypeError, SyntaxError) as error:
        what = f"the source of '{_name(function)}' cannot be found ({error})"
        raise RecipeError(f"function '{root}': {what}; {_INSTEAD}") from error
    if not isinstance(tree.body[0], ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        raise RecipeError(f"function '{root}': '{_name(function)}' is not a 'def'; write it as one")
    return text.strip()


def _class_source(kind: type) -> str:
    """Return the source of a class; ``inspect`` does not find those of notebooks."""
    methods = [m for m in vars(kind).values() if inspect.isfunction(m)]
    if not methods:
        raise OSError("it has no method")
    lines = linecache.getlines(inspect.unwrap(methods[0]).__code__.co_filename)
    nodes = ast.walk(ast.parse("".join(lines)))
    same = [n for n in nodes if isinstance(n, ast.ClassDef) and n.name == kind.__name__]
    if not same:
        raise OSError("its file has no such class")
    first = min([same[-1].lineno, *(d.lineno for d in same[-1].decorator_list)])
    return textwrap.dedent("".join(lines[first - 1 : same[-1].end_lineno]))


def _lambda_source(function: FunctionType) -> str:
    """Return the source of a lambda, which ``inspect`` finds only with the lines around it."""
    own = function.__code__
    lines = linecache.getlines(own.co_filename)
    nodes = [n for n in ast.walk(ast.parse("".join(lines))) if isinstance(n, ast.Lambda)]
    same = set()
    for node in nodes:
        if node.lineno != own.co_firstlineno:
            continue
        # Inside a function that has the variables which it closes over, or its code would differ.
        around = ast.parse(f"lambda {', '.join(own.co_freevars)}: 0", mode="eval")
        assert isinstance(around.body, ast.Lambda)
        around.body.body = node
        made = compile(around, own.co_filename, "eval")
        for _ in range(2):
            # Values of defaults are constants too, and come first.
            made = next(value for value in made.co_consts if isinstance(value, CodeType))
        if made.co_code == own.co_code:
            same.add(ast.unparse(node))
    if len(same) != 1:
        raise OSError(f"line {own.co_firstlineno} has {len(same)} such functions; use 'def'")
    return same.pop()


def _outside(function: object, root: str) -> Mapping[str, Any]:
    """Return the names that a function or the methods of a class can see outside of themselves."""
    members = vars(function).values() if inspect.isclass(function) else [function]
    found: dict[str, Any] = {}
    for member in members:
        wrapped: Any = getattr(member, "__func__", member)
        inner = inspect.unwrap(wrapped)
        if not inspect.isfunction(inner):
            continue
        found |= inner.__globals__
        for name, cell in zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True):
            try:
                found[name] = cell.cell_contents
            except ValueError:
                raise RecipeError(
                    f"function '{root}': it uses '{name}', which has no value yet; define it "
                    f"before passing the function, or {_INSTEAD}"
                ) from None
    # Not by value: a table or an array compares its elements.
    return {n: value for n, value in found.items() if getattr(builtins, n, ...) is not value}


def _free_names(text: str, root: str) -> set[str]:
    """Return the names that a definition reads and does not define, at any depth."""
    try:
        top = symtable.symtable(text, "<function>", "exec")
    except SyntaxError as error:  # a nonlocal name is bound outside of the text
        raise RecipeError(
            f"function '{root}': it assigns a variable of the function around it ({error.msg}), "
            "which another process cannot do; keep the value in a class whose instances are "
            f"called, or {_INSTEAD}"
        ) from None
    found = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_referenced()}
    tables = top.get_children()
    while tables:
        table = tables.pop()
        found |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        tables += table.get_children()
    return found


def _importable(value: object) -> tuple[str, str] | None:
    """Return the module and the name under which a value can be imported anywhere."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    name = name or getattr(value, "__name__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module == "__main__":
        return None
    known = sys.modules.get(module)
    return (module, name) if getattr(known, name, None) is value else None


def _is_installed(file: Path) -> bool:
    """Return whether a module's file belongs to Python, to an installed package or to align."""
    installed = [Path(place).resolve() for place in sysconfig.get_paths().values()]
    return any(file.is_relative_to(place) for place in [*installed, Path(__file__).parents[1]])
