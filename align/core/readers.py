"""Other programs that read a saved model, each in a process of its own: vLLM and llama.cpp.

Such a process is a module of this project. It writes one line for its answer among what the program
prints, and ends with the program if that fails.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

Reading = tuple[list[int], list[dict[int, float]]]
"""Token ids of a greedy response, and the log-probabilities of the likeliest tokens at each."""
TOP = 20
"""Likeliest tokens whose log-probabilities are returned."""
_MARK = "READING "


class ReaderError(RuntimeError):
    """The program gave no answer; the message is the last line that it wrote."""


def ask_reader(
    module: str,
    *words: str,
    given: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Return what ``python -m module`` answers.

    Args:
        module: calls ``answer``. words: its command line.
        given: its standard input, as JSON.
        environment: its variables; None for those of this process.

    Raises:
        ReaderError: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        input=json.dumps(given),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    # Libraries print as well: the answer is the marked line.
    lines = [x for x in done.stdout.splitlines() if x.startswith(_MARK)]
    if done.returncode or not lines:
        said = [x for x in (done.stderr or done.stdout).splitlines() if x.strip()]
        raise ReaderError(
            " ".join(said[-1].split())[:300] if said else f"exit code {done.returncode}"
        )
    return json.loads(lines[-1].removeprefix(_MARK))


def answer(found: object) -> None:
    """Write the answer of this process, whatever the program has printed before."""
    sys.stdout.write(f"\n{_MARK}{json.dumps(found)}\n")
    sys.stdout.flush()


def readings(found: Sequence[Any]) -> list[Reading]:
    """Return responses from JSON, whose keys are texts."""
    return [
        (tokens, [{int(token): value for token, value in at.items()} for at in tops])
        for tokens, tops in found
    ]
