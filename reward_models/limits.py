"""Limits on the time and memory of programs that come with a model or a data set: its templates."""

import ctypes
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FrameType
from typing import Any

TEMPLATE_S = 10.0
"""Largest time for one row, in seconds of processor time; a template takes milliseconds."""
TEMPLATE_MIB = 2048
"""Largest memory that one row may add, in MiB."""
MAX_TEXT = 2**26
"""Largest rendered text of one row, in characters."""
AGAIN_S = 1.0
"""The time limit is raised again after this time, for a program that catches it."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


class LimitError(RuntimeError):
    """A program exceeded a limit; the message says which."""


class _OutOfTimeError(LimitError):
    """Raised inside a program that runs for too long."""

    def __init__(self) -> None:
        super().__init__("it ran for too long")


def render_chat(tokenizer: Any, turns: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    """Return what ``apply_chat_template`` returns, within the limits of a template.

    Raises:
        LimitError: names the template's folder, and says for how long it ran or what it took.
    """
    with template_limits(f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"):
        found = tokenizer.apply_chat_template(list(turns), **options)
        if isinstance(found, str):
            check_length(found)
        return found


def check_length(text: str) -> None:
    """Raise LimitError if a rendered text is too long to be a row."""
    if len(text) > MAX_TEXT:
        raise LimitError(f"it wrote {len(text):,} characters, expected at most {MAX_TEXT:,}")


def template_limits(name: str) -> AbstractContextManager[None]:
    """Limit the time and memory of the block, in which a template renders one row.

    Raises:
        LimitError: begins with ``name``.
    """
    block = _block if threading.current_thread() is threading.main_thread() else None
    return _Named(name, _one_row() if block is None else block)


class _Named:
    """Limits whose errors begin with a name; a class, since a generator takes three times as long.

    Args:
        name: of the template. limits: of one row.
    """

    __slots__ = ("_limits", "_name")

    def __init__(self, name: str, limits: AbstractContextManager[None]) -> None:
        self._name, self._limits = name, limits

    def __enter__(self) -> None:
        self._limits.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._limits.__exit__(kind, error, trace)
        if isinstance(error, _OutOfTimeError):
            raise LimitError(
                f"{self._name} ran for {TEMPLATE_S:g} s on one row without an end; expected "
                "milliseconds. Correct its loops, or use another template"
            ) from None
        if isinstance(error, MemoryError):
            raise LimitError(
                f"{self._name} takes more than {TEMPLATE_MIB:,} MiB of memory for one row; correct "
                "it, or use another template"
            ) from None
        if isinstance(error, LimitError):
            advice = "correct it, or use another template"
            raise LimitError(f"{self._name}: {error}; {advice}") from None


@contextmanager
def _one_row() -> Iterator[None]:
    with memory_limit(TEMPLATE_MIB), time_limit(TEMPLATE_S):
        yield


class _Block:
    """Limits that are set up once for the rows of a block, and entered for each; ``many_rows``.

    A timer ticks as long as the block is open. That costs less than a timer for each row.
    """

    def __init__(self) -> None:
        self._count, self._memory = 0, ExitStack()
        self._ticks, self._is_inside = 0, False

    def __enter__(self) -> None:
        """Limit the time of one row; its memory counts from that of a few rows before."""
        if self._count % _ROWS_PER_LIMIT == 0:
            self._memory.close()
            self._memory.enter_context(memory_limit(TEMPLATE_MIB))
        self._count += 1
        self._ticks, self._is_inside = 0, True

    def __exit__(self, *_: object) -> None:
        self._is_inside = False

    def tick(self, _signum: int, _frame: FrameType | None) -> None:
        """Count a tick of the timer, of which the first may follow at once on a row's start."""
        self._ticks += 1
        if self._is_inside and self._ticks > _TICKS:
            raise _OutOfTimeError

    def close(self) -> None:
        """Restore the limit on memory."""
        self._memory.close()


_TICKS = 100
"""Ticks in the time of one row."""
_ROWS_PER_LIMIT = 64
"""Number of rows after which a block reads the size of the process again."""
_block: _Block | None = None


@contextmanager
def many_rows() -> Iterator[None]:
    """Set up the limits of templates once for the rows of the block, in the main thread.

    Setting them up for each row takes longer than rendering it. A row may run for a hundredth more.
    """
    global _block
    if _block is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _block = _Block()
    try:
        with _timer(TEMPLATE_S / _TICKS, TEMPLATE_S / _TICKS, _block.tick):
            yield
    finally:
        _block.close()
        _block = None


@contextmanager
def _timer(
    first_s: float, then_s: float, call: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Call a function after a time and then again and again, in seconds of processor time."""
    handler = signal.signal(signal.SIGVTALRM, call)
    timer = signal.setitimer(signal.ITIMER_VIRTUAL, first_s, then_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, handler)
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)


@contextmanager
def memory_limit(mib: int) -> Iterator[None]:
    """Raise MemoryError inside the block before this process has grown by ``mib``.

    The limit is the process's: what other threads take meanwhile counts too. Blocks of several
    threads share the largest of their limits, and the last one to end restores the limit before.
    """
    global _memory_before
    with open("/proc/self/statm", "rb") as f:
        size = int(f.read().split()[0]) * _PAGE + mib * 2**20
    with _memory_lock:
        if not _memory_sizes:
            _memory_before = resource.getrlimit(resource.RLIMIT_AS)
        _memory_sizes.append(size)
        _limit_memory()
    try:
        yield
    finally:
        with _memory_lock:
            _memory_sizes.remove(size)
            _limit_memory()


_memory_lock = threading.Lock()
_memory_sizes: list[int] = []
"""Limits of the blocks of ``memory_limit`` that are open, in bytes."""
_memory_before = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


def _limit_memory() -> None:
    """Limit this process to the largest of the open limits, or to the limit before them."""
    soft, hard = _memory_before
    if _memory_sizes:
        limits = [max(_memory_sizes), soft, hard]
        soft = min(limit for limit in limits if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise an exception inside the block after ``seconds`` of this process's processor time.

    In other threads than the main one the time is that of the clock.
    """
    if threading.current_thread() is not threading.main_thread():
        with _time_limit_in_thread(seconds):
            yield
        return
    # A signal also ends arithmetic on huge numbers, which takes hours within one bytecode.
    with _timer(seconds, AGAIN_S, _out_of_time):
        yield


def _out_of_time(_signum: int, _frame: FrameType | None) -> None:
    raise _OutOfTimeError


@contextmanager
def _time_limit_in_thread(seconds: float) -> Iterator[None]:
    """Set an exception in this thread from another one; Python handles signals in the main one."""
    thread, lock, done = ctypes.c_ulong(threading.get_ident()), threading.Lock(), False
    set_exception = ctypes.pythonapi.PyThreadState_SetAsyncExc

    def stop() -> None:
        with lock:
            if not done:
                set_exception(thread, ctypes.py_object(_OutOfTimeError))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            done = True
            set_exception(thread, None)  # one that was set, but not raised yet
        timer.cancel()
