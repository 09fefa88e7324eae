"""Reward for programs: run the answer's Python program against the tests of its row, in a sandbox.

The layouts of several data sets are read: HumanEval (``test``, ``entry_point``), MBPP
(``test_list``), APPS and verl (``input_output`` or ``ground_truth`` with ``inputs`` and
``outputs``), LiveCodeBench (lists of ``input`` and ``output``), and files of ``test_*`` functions.
"""

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from reward_models.base import (
    InvalidScoreError,
    MissingColumnError,
    Text,
    check_rows,
    completion_text,
    plain_text,
)
from reward_models.sandbox import Limits, SandboxError, missing_isolation, run_program, run_tests
from reward_models.specs import CodeSpec

log = logging.getLogger(__name__)
COLUMNS = (
    *("test", "tests", "test_list", "input_output", "test_cases", "public_test_cases"),
    *("ground_truth", "reward_model", "verification_info", "answer"),
)
"""Columns that may contain a row's tests; the first that the row has is used."""
SETUPS = ("test_setup_code", "test_imports", "setup")
"""Columns with code that runs before the tests."""
_THOUGHTS = re.compile(r"<(/?)(?:think|thinking|reasoning|thought)>")
_PYTHON = ("", "python", "python3", "py")
_ENTRY = re.compile(r"[A-Za-z_]\w*(?:\(\)\.[A-Za-z_]\w*)?")
_LEETCODE = """
import bisect, collections, functools, heapq, itertools, math, random, re, string
from typing import *
from collections import *
from functools import *
from itertools import *
from bisect import *
from heapq import *
from math import *
from builtins import *
"""
"""What LeetCode imports; the last line restores functions such as ``pow``."""
_CALLER = """
def _same(found, expected):
    if isinstance(found, tuple):
        found = list(found)
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(_same, found, expected))
    return found == expected
"""
"""Compares results with expected ones that were read from JSON, which has no tuples."""


@dataclass(frozen=True, slots=True)
class Tests:
    """The tests of a row: either sources that call functions, or inputs with expected outputs."""

    sources: Sequence[str] = ()
    setup: Sequence[str] = ()
    entry_point: str | None = None
    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()


def program_of(text: str, entry_point: str | None = None) -> str | None:
    """Return the program in a response: its last block of Python, or all of a text without blocks.

    Text before the end of a ``<think>`` block is ignored. Of several blocks, one that defines
    ``entry_point`` is preferred: the last may be an example of its use.
    """
    thoughts = list(_THOUGHTS.finditer(text))
    if thoughts and not thoughts[-1][1]:  # cut off while still thinking
        return None
    text = text[thoughts[-1].end() :] if thoughts else text
    blocks = [body for language, body in _blocks(text) if language.lower() in _PYTHON]
    if blocks:
        defining = [body for body in blocks if entry_point and _defines(body, entry_point)]
        return (defining or blocks)[-1]
    # A response that was cut off has no program.
    return None if "```" in text or not text.strip() else text


def _defines(program: str, name: str) -> bool:
    start = rf"^(?:(?:async )?def|class) {re.escape(name)}\b|^{re.escape(name)}\s*="
    return re.search(start, program, re.M) is not None


def _blocks(text: str) -> list[tuple[str, str]]:
    """Return language and content of each closed block between lines of three backticks."""
    found: list[tuple[str, str]] = []
    language, body = None, []
    # Line by line: a pattern takes quadratic time on many open blocks.
    for line in text.split("\n"):
        mark = line.strip()
        if not mark.startswith("```"):
            body.append(line)
        elif language is None:
            language, body = (mark[3:].split() or [""])[0], []
        else:
            found.append((language, "\n".join([*body, ""])))
            language = None
    return found


def _asked(prompt: str) -> str:
    """Return the code of a prompt: its last block, or all of it."""
    return next((body for _, body in reversed(_blocks(prompt))), prompt)


def _tests_of(row: Mapping[str, Any], column: str | None) -> Tests:
    """Return the tests of a row.

    Args:
        row: columns of the row, by name. column: the one with the tests; None finds it.

    Raises:
        InvalidScoreError: the row has no tests, or they have an unknown form.
    """
    names = (column,) if column is not None else COLUMNS
    value = next((row[name] for name in names if row.get(name)), None)
    entry = _entry_point(row)
    setup = [text for name in SETUPS for text in _texts(row.get(name))]
    if isinstance(value, Mapping) and "ground_truth" in value:  # verl's reward_model
        value = value["ground_truth"]
    if isinstance(value, Mapping) and "test_cases" in value:  # open-r1's verification_info
        value = value["test_cases"]
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except ValueError:
            raise InvalidScoreError("tests begin like JSON and are none") from None
    # One test, the fields of several, or a list of either.
    if not value:
        raise InvalidScoreError(f"no tests in column {column}" if column else "no tests in the row")
    if isinstance(value, str):
        return Tests([value], setup, entry)
    if isinstance(value, Mapping):
        return _from_mapping(value, setup)
    if isinstance(value, Sequence) and all(isinstance(item, str) for item in value):
        return Tests(list(value), setup, entry)
    if isinstance(value, Sequence) and all(_is_case(item) for item in value):
        return _from_cases(value, setup, entry)
    raise InvalidScoreError("tests of an unknown form")


def _entry_point(row: Mapping[str, Any]) -> str | None:
    """Return the name of the function that the tests of a row call, if the row names it.

    Raises:
        InvalidScoreError: it is neither a name nor of the form ``Solution().name``.
    """
    more = _value(row.get("metadata"))
    found = row.get("entry_point") or (more.get("func_name") if isinstance(more, Mapping) else None)
    if not isinstance(found, str):
        return None
    if not _ENTRY.fullmatch(found):
        raise InvalidScoreError("entry_point is not the name of a function")
    return found


def _texts(value: object) -> list[str]:
    found = [value] if isinstance(value, str) else value
    return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []


def _is_case(value: object) -> bool:
    return isinstance(value, Mapping) and "input" in value and "output" in value


def _from_cases(cases: Sequence[Mapping[str, Any]], setup: list[str], entry: str | None) -> Tests:
    """Return the tests of a list of cases, which all write input or all call one function."""
    names = {_called(case, entry) for case in cases}
    if len(names) > 1:
        raise InvalidScoreError("tests of several functions, or of a function and of input")
    # In APPS and TACO the text of an input is the list of arguments.
    whole = [_value(c["input"]) if c.get("fn_name") else c["input"] for c in cases]
    outputs = [c["output"] for c in cases]
    return _from_mapping({"inputs": whole, "outputs": outputs, "fn_name": names.pop()}, setup)


def _called(case: Mapping[str, Any], entry: str | None) -> str | None:
    """Return the function that a case calls, or None if the program reads its input.

    Raises:
        InvalidScoreError: it calls a function that neither the case nor the row names.
    """
    more = _value(case.get("metadata"))
    named = case.get("fn_name") or (more.get("func_name") if isinstance(more, Mapping) else None)
    if named or not {case.get("testtype"), case.get("type")} & {"functional", "function_call"}:
        return named
    if entry is None:
        raise InvalidScoreError("the tests call a function that the row does not name")
    return entry.rpartition(".")[2]


def _from_mapping(value: Mapping[str, Any], setup: list[str]) -> Tests:
    """Return the tests of ``inputs`` with ``outputs``, or of ``assert_case``."""
    if asserts := _texts(value.get("assert_case")):
        return Tests(asserts, setup, value.get("fn_name"))
    inputs, outputs = value.get("inputs"), value.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs:
        raise InvalidScoreError("tests without 'inputs' and 'outputs'")
    if len(inputs) != len(outputs):
        raise InvalidScoreError(f"{len(inputs)} inputs for {len(outputs)} outputs")
    name = value.get("fn_name")
    if name is None:
        return Tests(inputs=[_lines(x) for x in inputs], outputs=[_lines(x) for x in outputs])
    if not str(name).isidentifier():
        raise InvalidScoreError("fn_name is not the name of a function")
    target = f"(Solution().{name} if '{name}' not in globals() else {name})"
    sources = []
    for given, expected in zip(inputs, outputs, strict=True):
        args, wanted = _arguments(given), _value(expected)
        # APPS wraps a result in a list; a result that is a list itself is compared first.
        also = f" or _same(found, {wanted[0]!r})" if isinstance(wanted, list) and wanted else ""
        call = f"found = {target}(*{args!r})\nassert _same(found, {wanted!r}){also}"
        sources.append(call)
    return Tests(sources, [*setup, _CALLER], str(name))


def _lines(value: object) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _arguments(given: object) -> list[Any]:
    """Return the arguments of a call: a list, or text with one value of JSON per line."""
    if isinstance(given, list):
        return given
    return [_value(line) for line in str(given).split("\n") if line.strip()]


def _value(text: object) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _whole_program(prompt: str, program: str, entry_point: str | None) -> str:
    """Return the program with what the prompt begins, as HumanEval's responses continue it.

    A response that defines the function itself only needs the prompt's imports, and the class
    ``Solution`` those that LeetCode provides.
    """
    asked = _asked(prompt)
    if _defines(program, "Solution"):
        program = f"{_LEETCODE}\n{program}"
    if entry_point is None or not re.search(rf"\b(?:def|class) {entry_point}\b", asked):
        return program
    if _defines(program, entry_point):
        imports = re.findall(r"^(?:import|from) [^\n]+", asked, re.M)
        return "\n".join([*imports, program])
    return f"{asked}\n{program}" if not asked.endswith("\n") else asked + program


def _same_output(found: str, expected: str) -> bool:
    """Return whether two outputs are equal, whatever blanks end their lines and the output."""
    one, other = (
        [line.rstrip() for line in text.rstrip().split("\n")] for text in (found, expected)
    )
    return one == other


def _owner(tests: Tests) -> str | None:
    """Return what a program must define: the function that is tested, or the class of a method."""
    return tests.entry_point.partition("(")[0] if tests.entry_point else None


class CodeReward:
    """Score responses by the tests of their rows that their programs pass."""

    def __init__(self, spec: CodeSpec) -> None:
        self.name = self.__name__ = spec.label
        self.weight, self.column, self.partial = spec.weight, spec.column, spec.partial
        self.invalid: Counter[str] = Counter()
        self.limits = Limits(spec.timeout_s, spec.memory_gib, spec.isolation == "required")
        # The ranks of a machine share its processors.
        share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.workers = spec.workers or max(1, share)

    def __call__(
        self, *, prompts: Sequence[Text], completions: Sequence[Text], **columns: Sequence[Any]
    ) -> list[float | None]:
        """Score each response.

        Raises:
            MissingColumnError: no column contains tests.
        """
        check_rows(prompts, completions, reward=self.name)
        wanted = COLUMNS if self.column is None else (self.column,)
        if not any(name in columns for name in wanted):
            raise MissingColumnError(
                f"reward '{self.name}': no column with tests ({', '.join(wanted)}); the data have "
                f"{sorted(columns) or 'no columns'}. Rename a column or set 'column' of the reward."
            )
        rows = [
            {name: values[i] for name, values in columns.items()} for i in range(len(completions))
        ]
        # Threads are enough: each of them waits for a process of the sandbox.
        with ThreadPoolExecutor(self.workers) as pool:
            found = list(pool.map(self._row, prompts, completions, rows))
        for _, reason in found:
            if reason is not None:
                self.invalid[reason] += 1
        return [score for score, _ in found]

    def _row(
        self, prompt: Text, completion: Text, row: Mapping[str, Any]
    ) -> tuple[float | None, str | None]:
        """Return a score, or None and the reason."""
        try:
            tests = _tests_of(row, self.column)
            program = program_of(completion_text(completion), _owner(tests))
            return (0.0 if program is None else self._score(program, tests, prompt)), None
        except InvalidScoreError as error:
            return None, str(error)
        except (SandboxError, OSError) as error:
            return None, f"sandbox: {error}"

    def _score(self, program: str, tests: Tests, prompt: Text) -> float:
        if tests.inputs:
            runs = run_program(program, tests.inputs, self.limits)
            return self._share(
                [
                    status == 0 and _same_output(output, expected)
                    for (status, output), expected in zip(runs, tests.outputs, strict=False)
                ],
                len(tests.inputs),
            )
        # Of a conversation, the last turn asks.
        asked = prompt if isinstance(prompt, str) else plain_text(prompt[-1:])
        found = run_tests(
            _whole_program(asked, program, _owner(tests)),
            tests.sources,
            self.limits,
            prompt=_asked(asked),
            setup=tests.setup,
            entry_point=tests.entry_point,
            stop=not self.partial,
        )
        if "unsupported" in found:
            raise InvalidScoreError(found["unsupported"])
        if any(found.get("passed", ())) and not found["calls"]:
            raise InvalidScoreError("the tests call no function of the program")
        passed = found.get("passed", [])
        # A package that this machine lacks is not a fault of the response.
        if "setup" in found and sum(passed) < len(tests.sources):
            raise InvalidScoreError(f"the setup of the row's tests fails: {found['setup']}")
        return self._share(passed, len(tests.sources))

    def _share(self, results: Sequence[bool], count: int) -> float:
        return sum(results) / count if self.partial else float(sum(results) == count)


def build_code(spec: CodeSpec) -> CodeReward:
    """Build the reward, if this machine can isolate programs.

    Raises:
        ValueError: it cannot, and the spec does not do without.
    """
    why = missing_isolation() if spec.isolation == "required" else None
    if why is not None:
        raise ValueError(
            f"reward '{spec.label}': this machine cannot isolate programs ({why}). Allow user "
            "namespaces (docker: --security-opt seccomp=unconfined; Ubuntu: sysctl "
            "kernel.apparmor_restrict_unprivileged_userns=0), or write isolation: limits, which "
            "leaves the machine's files readable to them and runs them as your user"
        )
    if spec.isolation == "limits":
        log.warning(
            "reward %s: programs run as your user and can read and write your files", spec.label
        )
    return CodeReward(spec)
