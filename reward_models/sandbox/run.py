"""Run an answer's program and its tests, each in a sandbox that `isolate.py` has set up.

The tests never share a process with the program: they call its functions over a pipe and get plain
data back. What the program does to itself (exit, patched builtins, objects that equal everything)
is therefore not done to its tests, and nothing that it prints is read as a verdict.
"""

import atexit
import builtins
import gc
import json
import operator
import os
import runpy
import signal
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

MAX_MESSAGE = 2**24
"""Largest reply of a program, in bytes."""
MAX_ITEMS = 100_000
"""Items that are taken from an iterator."""
Plain = Any
"""What a message consists of; see ``plain.py``, which is not in a package where this file runs."""
_plain = runpy.run_path(str(Path(__file__).with_name("plain.py")))
encode: Callable[[Any, Callable[[Any], int | str]], Plain] = _plain["encode"]
decode: Callable[[Plain, Callable[[Any], Any]], Any] = _plain["decode"]


class UnsupportedError(BaseException):
    """What no program can be judged by, such as a test that passes it something else than data.

    Tests do not catch it.
    """


def _send(stream: IO[bytes], message: Plain) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    """Return the next message.

    Raises:
        EOFError: there is none, or it is not a message.
    """
    line = stream.readline(MAX_MESSAGE)
    if not line.endswith(b"\n"):
        raise EOFError("no reply")
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise EOFError("no message") from None


def _quiet() -> None:
    """Read nothing and write nothing by the standard descriptors."""
    nothing = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module


# The side of the program.


def answer(job: Mapping[str, Any]) -> None:
    """Run the program as a module, then call its functions as the tests ask for it."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    _quiet()
    module = _module("solution")
    try:
        exec(compile(job["program"], "solution.py", "exec"), module.__dict__)
    # The program may raise anything, or exit: it then has no functions.
    except BaseException:
        _send(replies, {"names": []})
        return
    objects: list[Any] = []

    def refer(value: object) -> int:
        objects.append(value)
        return len(objects) - 1

    def find(reference: int | str) -> Any:
        return getattr(module, reference) if isinstance(reference, str) else objects[reference]

    own = dict(vars(module))
    errors = {n: _names(v) for n, v in own.items() if isinstance(v, type) and _is_error(v)}
    _send(replies, {"names": [n for n, v in own.items() if callable(v)], "errors": errors})
    while True:
        try:
            _send(replies, _done(_receive(requests), refer, find))
        except EOFError:
            return


def _is_error(kind: type) -> bool:
    return issubclass(kind, Exception)


def _names(kind: type) -> list[str]:
    """Return the names of a class and of all classes that it is derived from, itself first."""
    return [base.__name__ for base in kind.__mro__]


def _done(
    asked: Mapping[str, Any], refer: Callable[[Any], int], find: Callable[[int | str], Any]
) -> Plain:
    """Return the reply to one request: a result, what became of the arguments, or an error."""
    try:
        target = find(asked["of"])
        if asked["do"] == "get":
            return {"is": encode(getattr(target, asked["name"]), refer)}
        if asked["do"] == "items":
            items = [item for _, item in zip(range(MAX_ITEMS), target, strict=False)]
            return {"is": encode(items, refer)}
        if asked["do"] == "operate":
            other = [find(reference) for reference in asked["others"]]
            return {"is": encode(getattr(_Operators, asked["name"])(target, *other), refer)}
        args = [decode(arg, find) for arg in asked["args"]]
        named = {name: decode(arg, find) for name, arg in asked["named"].items()}
        result = encode(target(*args, **named), refer)
        return {"is": result, "args": [encode(arg, refer) for arg in args]}
    # Also an exit: the test decides whether it expects the error.
    except BaseException as error:
        plain = all(isinstance(part, str | int | float | bytes | None) for part in error.args)
        why = error.args if plain and len(str(error)) < 1000 else [str(error)[:1000]]
        return {"raised": _names(type(error)), "why": [encode(part, refer) for part in why]}


class _Operators:
    """What a test may ask of objects of the program alone."""

    eq, lt, le, gt, ge = operator.eq, operator.lt, operator.le, operator.gt, operator.ge
    add, sub, mul, matmul = operator.add, operator.sub, operator.mul, operator.matmul
    truediv, floordiv, mod = operator.truediv, operator.floordiv, operator.mod
    bool, neg, abs = bool, operator.neg, abs

    @staticmethod
    def isinstance(kind: type, value: object) -> bool:  # pyright: ignore[reportInvalidTypeForm]
        """Return whether a value is an object of a class."""
        return isinstance(value, kind)


# The side of the tests.


class _Program:
    """The connection to the program; counts what was called."""

    def __init__(self, replies: IO[bytes], requests: IO[bytes]) -> None:
        self.replies, self.requests, self.calls = replies, requests, 0
        self.names: list[str] = []
        self.errors: dict[str, type[Exception]] = {}
        try:
            first = _receive(replies)
            self.names = [str(name) for name in first["names"]]
            # Classes first from which others are derived, which have more names.
            for name, names in sorted(first["errors"].items(), key=lambda item: len(item[1])):
                if not hasattr(builtins, str(name)):
                    self.errors[str(name)] = type(str(name), (self.error_of(names),), {})
        except (EOFError, LookupError, TypeError, AttributeError):
            return

    def error_of(self, names: Sequence[object]) -> type[Exception]:
        """Return the nearest error that tests can catch, by the names of a class and its bases."""
        for name in map(str, names):
            kind = self.errors.get(name) or getattr(builtins, name, None)
            if isinstance(kind, type) and issubclass(kind, Exception) and kind is not Exception:
                return kind
        return RuntimeError if "Exception" not in names else Exception

    def ask(self, of: int | str, do: str, **more: object) -> Any:
        self.calls += do == "call"
        _send(self.requests, {"of": of, "do": do, **more})
        reply = _receive(self.replies)
        if "raised" in reply:
            raise self.error_of(reply["raised"])(*map(self.value, reply["why"]))
        return reply

    def value(self, message: Plain) -> Any:
        return decode(message, lambda reference: _Remote(self, reference))


class _Remote:
    """A function or an object of the program, which stays there; it equals only itself.

    Its reference is a number that the program gave it, or a name of the program's module.
    """

    def __init__(self, program: _Program, reference: int | str) -> None:
        self._program, self._reference = program, reference

    def __call__(self, *args: Any, **named: Any) -> Any:
        program = self._program
        reply = program.ask(
            self._reference,
            "call",
            args=[encode(arg, _reference) for arg in args],
            named={name: encode(arg, _reference) for name, arg in named.items()},
        )
        # What the program does to a list of its arguments, the test sees.
        for own, changed in zip(args, reply["args"], strict=True):
            if isinstance(own, list):
                own[:] = program.value(changed)
            elif isinstance(own, dict | set):
                after = program.value(changed)
                own.clear()
                own.update(after)
            elif getattr(own, "shape", ()):
                own[...] = program.value(changed)
        return program.value(reply["is"])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        program = self._program
        return program.value(program.ask(self._reference, "get", name=name)["is"])

    def __iter__(self) -> Iterator[Any]:
        return iter(self._program.value(self._program.ask(self._reference, "items")["is"]))

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, _Remote) and bool(self._operate("isinstance", value))

    def _operate(self, name: str, *others: "_Remote") -> Any:
        references = [other._reference for other in others]
        reply = self._program.ask(self._reference, "operate", name=name, others=references)
        return self._program.value(reply["is"])

    __hash__ = object.__hash__


def _between(name: str) -> Callable[..., Any]:
    """Return an operator between two objects of the program.

    With anything else it is not defined: an object that equals everything, or from which 4 can be
    subtracted to give 0, would pass the tests of a number.
    """

    def method(self: _Remote, *others: Any) -> Any:
        if not all(isinstance(other, _Remote) for other in others):
            return NotImplemented
        return self._operate(name, *others)

    return method


def _method(name: str) -> Callable[..., Any]:
    """Return a special method that calls the one of the program's object."""

    def method(self: _Remote, *args: object) -> Any:
        try:
            found = self._program.ask(self._reference, "get", name=name)
        except AttributeError:
            raise TypeError(f"the object has no {name}") from None
        return self._program.value(found["is"])(*args)

    return method


for _name in vars(_Operators).keys() - {"isinstance"}:
    if not _name.startswith("__"):
        setattr(_Remote, f"__{_name}__", _between(_name))
# Not __contains__, which could claim to have whatever a test looks for.
for _name in ("len", "getitem", "setitem", "delitem", "str", "repr", "next", "enter", "exit"):
    setattr(_Remote, f"__{_name}__", _method(f"__{_name}__"))


def _reference(value: object) -> int | str:
    if isinstance(value, _Remote):
        return value._reference
    raise UnsupportedError(f"a test passes a {type(value).__name__} to the program")


def tests(job: Mapping[str, Any]) -> None:
    """Run the tests of a row against the program, and write which of them passed."""
    verdicts = os.fdopen(os.dup(1), "wb")
    program = _Program(os.fdopen(job["replies"], "rb"), os.fdopen(job["requests"], "wb"))
    _quiet()
    names = _module("tests").__dict__
    # A prompt is often no whole program, so that its failure says nothing.
    _failure(job["prompt"], names)
    failures = [why for text in job["setup"] if (why := _failure(text, names)) is not None]
    own = [
        name
        for name in program.names
        if not hasattr(builtins, name) and name not in sys.stdlib_module_names
    ]
    proxies = {name: program.errors.get(name) or _Remote(program, name) for name in own}
    entry, owner = job["entry_point"], (job["entry_point"] or "").partition("(")[0]
    _module("solution").__dict__.update(proxies)
    # What the row itself defines, such as a helper of the prompt, is not the program's to define.
    names.update({n: p for n, p in proxies.items() if n == owner or n not in names})
    if owner not in proxies:
        names.pop(owner, None)
    found: dict[str, Any] = {"setup": failures[0]} if failures else {}
    passed: list[bool] = []
    for text in job["tests"]:
        try:
            passed.append(_passes(text, names, entry))
        except UnsupportedError as error:
            found["unsupported"] = str(error)
            break
        if job["stop"] and not passed[-1]:
            break
    _send(verdicts, {**found, "passed": passed, "calls": program.calls, "names": len(own)})


def _failure(text: str, names: dict[str, Any]) -> str | None:
    """Run a source before the tests; return why it failed, or None."""
    try:
        exec(compile(text, "setup.py", "exec"), names)
    except BaseException as error:
        # The names of the program are there without the import that some rows write.
        imported = isinstance(error, ImportError) and error.name == "solution"
        return None if imported else f"{type(error).__name__}: {error}"[:200]
    return None


def _passes(text: str, names: dict[str, Any], entry: str | None) -> bool:
    before = dict(names)
    try:
        exec(compile(text, "tests.py", "exec"), names)
        # By identity: the program may have functions of these names.
        made = [name for name in names if names[name] is not before.get(name)]
        if "check" in made and entry:
            names["check"](_entry(names, entry))
        else:
            for name in made:
                if name.startswith("test_"):
                    names[name]()
    except UnsupportedError:
        raise
    except ModuleNotFoundError as error:
        # A package that this machine lacks is not the program's fault. The program's own errors
        # have no name.
        if error.name and error.name.partition(".")[0] != "solution":
            raise UnsupportedError(
                f"the row's tests need the module {error.name}, which is missing"
            ) from None
        return False
    # A failing test raises AssertionError, and may raise anything else.
    except BaseException:
        return False
    return True


def _entry(names: Mapping[str, Any], entry: str) -> Any:
    """Return what tests call: a function, or a method as in LeetCode's ``Solution().name``."""
    owner, _, method = entry.partition("().")
    return getattr(names[owner](), method) if method else names[owner]


# Programs that read and write.


def program(job: Mapping[str, Any]) -> None:
    """Run the program once per input, and write the exit status and the output of each run."""
    results = os.fdopen(os.dup(1), "wb")
    gc.freeze()
    for text in job["inputs"]:
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
            given.write(text.encode("utf-8", "replace"))
            given.seek(0)
            child = os.fork()
            if child == 0:
                results.close()
                try:
                    _as_main(job["program"], given.fileno(), said.fileno())
                finally:
                    os._exit(1)
            _, status = os.waitpid(child, 0)
            # Only in a namespace of its own may the first process end all others.
            if os.getpid() == 1:
                _end_all()
            said.seek(0)
            output = said.read(MAX_MESSAGE // 8).decode("utf-8", "replace")
        _send(results, {"status": os.waitstatus_to_exitcode(status), "output": output})


def _end_all() -> None:
    try:
        os.kill(-1, signal.SIGKILL)
        while True:
            os.waitpid(-1, 0)
    except (ProcessLookupError, ChildProcessError):
        return


def _as_main(text: str, given: int, said: int) -> None:
    for descriptor, standard in ((given, 0), (said, 1)):
        os.dup2(descriptor, standard)
    nothing = os.open("/dev/null", os.O_RDWR)
    os.dup2(nothing, 2)
    os.closerange(3, 64)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(standard, mode, encoding="utf-8", errors="replace")
        for standard, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    sys.argv = ["solution.py"]
    status = 0
    module = _module("__main__")
    try:
        exec(compile(text, "solution.py", "exec"), module.__dict__)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        status = 1
    # As at the end of an interpreter: programs read and write in threads and at their exit.
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status & 0xFF)


MODES = {"answer": answer, "tests": tests, "program": program}
# Results may have more digits than Python converts by default; the time of a job is limited.
sys.set_int_max_str_digits(0)
