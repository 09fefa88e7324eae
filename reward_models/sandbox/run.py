"""Run an answer's program and its tests, each in a sandbox that `isolate.py` has set up.

The tests never share a process with the program: they call its functions over a pipe and get plain
data back. What the program does to itself (exit, patched builtins, objects that equal everything)
is therefore not done to its tests, and nothing that it prints is read as a verdict.
"""

import atexit
import builtins
import gc
import json
import os
import signal
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

MAX_MESSAGE = 2**24
"""Largest reply of a program, in bytes."""
MAX_ITEMS = 100_000
"""Items that are taken from an iterator."""
Plain = Any
"""What a message consists of: JSON, with containers other than dict tagged by their type."""
_TAGS: dict[str, Callable[[Any], Any]] = {
    **{"l": list, "t": tuple, "s": set, "f": frozenset},
    **{"d": dict, "b": lambda text: text.encode("latin-1"), "c": lambda parts: complex(*parts)},
}


class UnsupportedError(BaseException):
    """A test passes something to the program that is not plain data; not caught by a test."""


def encode(value: Any, refer: Callable[[Any], int | str]) -> Plain:
    """Return a value as plain data; ``refer`` returns references to objects that are not."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, bytes | bytearray):
        return {"b": bytes(value).decode("latin-1")}
    if isinstance(value, complex):
        return {"c": [value.real, value.imag]}
    if isinstance(value, Mapping):
        return {"d": [[encode(k, refer), encode(v, refer)] for k, v in value.items()]}
    for tag, kind in (("l", list), ("t", tuple), ("s", set), ("f", frozenset)):
        if isinstance(value, kind):
            return {tag: [encode(item, refer) for item in value]}
    # A scalar of numpy.
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return encode(value.item(), refer)
    return {"h": refer(value)}


def decode(message: Plain, find: Callable[[Any], Any]) -> Any:
    """Return the value of plain data; ``find`` returns the object of a reference."""
    if not isinstance(message, dict):
        return message
    ((tag, inner),) = message.items()
    if tag == "h":
        return find(inner)
    if tag == "d":
        return {decode(k, find): decode(v, find) for k, v in inner}
    if tag in ("l", "t", "s", "f"):
        inner = [decode(item, find) for item in inner]
    return _TAGS[tag](inner)


def _send(stream: IO[bytes], message: Plain) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    """Return the next message.

    Raises:
        EOFError: there is none, or it is no message.
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

    def refer(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    def find(reference: int | str) -> Any:
        return getattr(module, reference) if isinstance(reference, str) else objects[reference]

    _send(replies, {"names": [n for n, v in vars(module).items() if callable(v)]})
    while True:
        try:
            _send(replies, _done(_receive(requests), refer, find))
        except EOFError:
            return


def _done(asked: Any, refer: Callable[[Any], int], find: Callable[[int | str], Any]) -> Plain:
    """Return the reply to one request: a result, what became of the arguments, or an error."""
    try:
        target = find(asked["of"])
        if asked["do"] == "get":
            return {"is": encode(getattr(target, asked["name"]), refer)}
        if asked["do"] == "items":
            items = [item for _, item in zip(range(MAX_ITEMS), target, strict=False)]
            return {"is": encode(items, refer)}
        args = [decode(arg, find) for arg in asked["args"]]
        named = {name: decode(arg, find) for name, arg in asked["named"].items()}
        result = encode(target(*args, **named), refer)
        return {"is": result, "args": [encode(arg, refer) for arg in args]}
    # Also an exit: the test decides whether it expects the error.
    except BaseException as error:
        return {"raised": type(error).__name__, "why": str(error)[:1000]}


# The side of the tests.


class _Program:
    """The connection to the program; counts what was called."""

    def __init__(self, replies: IO[bytes], requests: IO[bytes]) -> None:
        self.replies, self.requests, self.calls = replies, requests, 0
        self.names: list[str] = []
        try:
            self.names = [str(name) for name in _receive(replies)["names"]]
        except (EOFError, LookupError, TypeError):
            return

    def ask(self, of: int | str, do: str, **more: Any) -> Any:
        self.calls += do == "call"
        _send(self.requests, {"of": of, "do": do, **more})
        reply = _receive(self.replies)
        if "raised" in reply:
            kind = getattr(builtins, str(reply["raised"]), None)
            if not isinstance(kind, type) or not issubclass(kind, Exception):
                kind = RuntimeError
            raise kind(str(reply["why"]))
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
        return program.value(reply["is"])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        program = self._program
        return program.value(program.ask(self._reference, "get", name=name)["is"])

    def __iter__(self) -> Iterator[Any]:
        return iter(self._program.value(self._program.ask(self._reference, "items")["is"]))


def _reference(value: Any) -> int | str:
    if isinstance(value, _Remote):
        return value._reference
    raise UnsupportedError(f"a {type(value).__name__}")


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
    proxies = {name: _Remote(program, name) for name in own}
    entry = job["entry_point"]
    _module("solution").__dict__.update(proxies)
    # What the row itself defines, such as a helper of the prompt, is not the program's to define.
    names.update({n: p for n, p in proxies.items() if n == entry or n not in names})
    if entry and entry not in proxies:
        names.pop(entry, None)
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
            names["check"](names[entry])
        else:
            for name in made:
                if name.startswith("test_"):
                    names[name]()
    except UnsupportedError:
        raise
    # A failing test raises AssertionError, and may raise anything else.
    except BaseException:
        return False
    return True


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
