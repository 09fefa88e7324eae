"""The worker that runs a user-defined reward function: ``python -m reward_models.own_process``.

The parameter names of the function determine its convention: TRL, verl or OpenRLHF (`style_of`). It
receives one batch at a time and returns one score per response, or the reason why there is none.
"""

import asyncio
import errno
import importlib
import importlib.util
import inspect
import json
import os
import resource
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from reward_models.base import InvalidScoreError, a_type, completion_text, finite_score, plain_text
from reward_models.worker import serve

STYLES = {
    "verl": ("solution_str", "ground_truth"),
    "verl_batch": ("solution_strs", "ground_truths"),
    "openrlhf": ("queries",),
}
"""Parameters that identify the functions of other suites; any other function is TRL's."""
RESPONSES = ("completions", "completion_ids", "solution_str", "solution_strs", "queries")
"""Parameters that receive responses; a function with none of them can only make one that does."""
TRUTH = ("ground_truth", "answer", "label", "labels", "solution")
"""Columns for verl's ground_truth and OpenRLHF's labels; the first that is present is used."""


def load(path: str, args: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the function named by ``FILE.py:NAME`` or ``MODULE:NAME``, with its ``args`` bound.

    A class is instantiated with ``args``, and the instance is called.
    """
    place, _, name = path.rpartition(":")
    if place.endswith(".py"):
        file = Path(place).resolve()
        # A file named like a library must not take its place.
        free = file.stem.isidentifier() and importlib.util.find_spec(file.stem) is None
        own = file.stem if free else f"own_{file.stem}"
        sys.path.insert(0, str(file.parent))  # for modules in the same folder
        spec = importlib.util.spec_from_file_location(own, file)
        assert spec is not None, file
        assert spec.loader is not None, file
        module = importlib.util.module_from_spec(spec)
        sys.modules[own] = module
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, os.getcwd())
        module = importlib.import_module(place)
    found: Any = getattr(module, name)
    if not callable(found) or (inspect.isclass(found) and "__call__" not in dir(found)):
        raise TypeError(f"{name} is {a_type(found)} that cannot be called")
    if inspect.isclass(found):
        instance: Any = found(**args)
        return instance
    return partial(found, **args) if args else found


def load_reward(path: str, args: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the reward that ``path`` names, or that the function of this name makes.

    A function that takes no responses, and needs nothing but ``args``, makes a reward, as
    ``get_cosine_reward(max_len=1000)`` does.

    Raises:
        TypeError: what would be called takes no responses.
    """
    function, name = load(path, args), path.rpartition(":")[2]
    parameters = _parameters(function)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if takes_all or not parameters.keys().isdisjoint(RESPONSES):
        return function
    responses = f"no parameter for responses ({', '.join(RESPONSES)})"
    if any(p.default is p.empty for p in parameters.values()):
        raise TypeError(
            f"{name}({', '.join(parameters)}) has {responses}, which are passed by name; if it "
            "makes a reward, set its parameters in 'args'"
        )
    made: Any = function()
    if not callable(made):
        raise TypeError(
            f"{name} has {responses}, and what it returns, {a_type(made)}, cannot be called"
        )
    return made


def style_of(function: Callable[..., Any]) -> str:
    """Return the convention that a function follows: trl, or one of STYLES."""
    names = _parameters(function)
    # "completions" is TRL's own word, so a function that takes it is TRL's.
    fitting = [style for style, needed in STYLES.items() if names.keys() >= set(needed)]
    return fitting[0] if fitting and "completions" not in names else "trl"


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # built-in functions get all columns
        return {"columns": inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)}


class Scorer:
    """Call a function by its own convention and convert its result to plain scores."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.style = style_of(function)
        self.parameters = _parameters(function)
        kinds = [parameter.kind for parameter in self.parameters.values()]
        self.takes_all = inspect.Parameter.VAR_KEYWORD in kinds
        self.loop = asyncio.new_event_loop()

    def __call__(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``scores`` with ``reasons`` for those that are None, or a ``missing`` column."""
        rows = len(request["completions"])
        try:
            given = self._given(request)
            lacking = [
                name
                for name, p in self.parameters.items()
                if p.default is p.empty
                and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
                and name not in given
            ]
            if lacking:
                return {"missing": lacking[0]}
            if self.style == "verl":
                found = [self._result(self._call(_row(given, i))) for i in range(rows)]
                return _reply([score for score, _ in found], [reason for _, reason in found])
            return self._scores(self._call(given), rows)
        # Anything the user's code does, even exiting the process, is a reason and not a score.
        except BaseException as error:
            return _failed(error, rows)

    def _call(self, given: Mapping[str, Any]) -> Any:
        placed = [p for p in self.parameters.values() if p.kind is p.POSITIONAL_ONLY]
        named = given.keys() - {p.name for p in placed}
        result = self.function(
            *(given.get(p.name, p.default) for p in placed), **{name: given[name] for name in named}
        )
        return self.loop.run_until_complete(result) if inspect.isawaitable(result) else result

    def _given(self, request: Mapping[str, Any]) -> dict[str, Any]:
        columns = dict(request["columns"])
        prompts, completions = request["prompts"], request["completions"]
        if self.style == "trl":
            known = {
                "trainer_state": None,
                "log_extra": _ignore,
                "log_metric": _ignore,
                **columns,
                "prompts": prompts,
                "completions": completions,
            }
            hidden = {"prompt_ids"} - self.parameters.keys()
        else:
            known = _of_other_suite(self.style, prompts, completions, columns=columns)
            hidden = set()
        return {
            name: value
            for name, value in known.items()
            if name not in hidden and (self.takes_all or name in self.parameters)
        }

    def _scores(self, result: Any, rows: int) -> dict[str, Any]:
        if self.style == "openrlhf" and isinstance(result, Mapping):
            result = result.get("rewards", result.get("scores"))
        # Tensors and arrays.
        if hasattr(result, "tolist"):
            # A head's scores are often (B, 1).
            column = tuple(getattr(result, "shape", ())) == (rows, 1)
            result = (result.reshape(rows) if column else result).tolist()
        if isinstance(result, str | bytes | Mapping) or not hasattr(result, "__iter__"):
            return _all_invalid(f"returned {a_type(result)}, not a list of scores", rows)
        if isinstance(result, set | frozenset):
            return _all_invalid("returned a set, which has no order; expected a list", rows)
        given = list(result)
        if len(given) != rows:
            return _all_invalid(f"returned {len(given)} scores for {rows} responses", rows)
        found = [self._result(value) for value in given]
        return _reply([score for score, _ in found], [reason for _, reason in found])

    def _result(self, value: Any) -> tuple[float | None, str | None]:
        """Return a score, or None and the reason."""
        if self.style.startswith("verl") and isinstance(value, Mapping):
            value = value.get("score")
        if value is None:
            return None, "no score (None)"
        if getattr(value, "size", None) == 1 or callable(getattr(value, "numel", None)):
            value = value.item() if hasattr(value, "item") else value
        score = finite_score(float(value) if isinstance(value, bool) else value)
        if score is None and isinstance(value, int | float):
            return None, "score is not finite"
        return score, None if score is not None else f"score is {a_type(value)}"


def _of_other_suite(
    style: str, prompts: Sequence[Any], completions: Sequence[Any], *, columns: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments that verl or OpenRLHF passes to a function, with a value per row."""
    answers = [completion_text(completion) for completion in completions]
    rows = range(len(answers))
    truth = next((columns[name] for name in TRUTH if name in columns), None)
    if truth is None and "reward_model" in columns:
        # Files made for verl have it inside of the column `reward_model`.
        truth = [(value or {}).get("ground_truth") for value in columns["reward_model"]]
    if style == "openrlhf":
        asked = [plain_text(prompt) for prompt in prompts]
        known: dict[str, Any] = {
            "queries": [asked[i] + answers[i] for i in rows],
            "prompts": asked,
        }
        return known if truth is None else known | {"labels": truth}
    known = {
        "data_source": columns.get("data_source", ["" for _ in rows]),
        "solution_str": answers,
        "extra_info": columns.get("extra_info", [{} for _ in rows]),
    }
    if truth is not None:
        known["ground_truth"] = truth
    # A function for verl's batches has the same parameters in the plural.
    return {f"{n}s": v for n, v in known.items()} if style == "verl_batch" else known


def _row(given: Mapping[str, Any], i: int) -> dict[str, Any]:
    return {name: values[i] for name, values in given.items()}


def _ignore(*args: object, **kwargs: object) -> None:
    """Replace TRL's logging functions."""


def _reply(scores: list[float | None], reasons: list[str | None]) -> dict[str, Any]:
    return {"scores": scores, "reasons": reasons}


def _all_invalid(reason: str, rows: int) -> dict[str, Any]:
    return _reply([None] * rows, [reason] * rows)


def _failed(error: BaseException, rows: int) -> dict[str, Any]:
    if isinstance(error, InvalidScoreError):
        return _all_invalid(str(error), rows)
    said = "".join(traceback.format_exception(error, limit=-3))[-2000:]
    reply = _all_invalid(f"raised {type(error).__name__}", rows)
    # What it has leaked is given back by starting it again.
    leaked = getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.EAGAIN)
    leaked |= isinstance(error, RuntimeError) and "can't start new thread" in str(error)
    return {**reply, "raised": said, "spent": leaked or isinstance(error, MemoryError)}


def _prepare() -> tuple[Any, Callable[[Mapping[str, Any]], Any]]:
    told = json.loads(sys.argv[1])
    try:
        scorer = Scorer(load_reward(told["path"], told["args"]))
    # Loading runs the user's module, which may raise anything; the parent reports it.
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        return {"failed": f"{type(error).__name__}: {error}{where}"[:1000]}, lambda request: {}
    return {"style": scorer.style}, scorer


if __name__ == "__main__":
    size = int(json.loads(sys.argv[1])["memory_gib"] * 2**30)
    serve(_prepare, limit=(resource.RLIMIT_DATA, size))
