"""The reward behind HTTP: ask a server that ``align serve-reward`` started.

Only the standard library is needed. A request that fails is sent again with growing waits until the
deadline. A server that cannot be reached when the reward is built is an error before anything is
trained; one that fails later makes answers invalid, a few times, and then ends the stage.
"""

import json
import math
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from reward_models.base import Text, check_rows, column_values
from reward_models.specs import RemoteSpec

FIRST_WAIT_S = 0.2
"""Wait before the first retry; each further one waits twice as long."""
ROWS_PER_REQUEST = 256


class RemoteRewardError(RuntimeError):
    """Report a reward server that cannot be used."""


class _Refused(Exception):
    """Hold what a server said against a request; sending it again would not help."""


class RemoteReward:
    """Score answers on a server.

    Texts are sent and the server renders them with the scorer's own template. With ``token_ids``
    the sampled ids go too and are scored, which is exact where both share a tokenizer.

    Attributes:
        disagreement: of the last call, as the server gives it; NaN for a single head.
    """

    def __init__(
        self,
        url: str,
        *,
        deadline_s: float = 60.0,
        retries: int = 4,
        max_failures: int = 3,
        token_ids: bool = False,
        name: str = "remote",
        weight: float = 1.0,
    ) -> None:
        self.url = url.rstrip("/")
        self.deadline_s = deadline_s
        self.retries = retries
        self.max_failures = max_failures
        self.token_ids = token_ids
        self.name = name
        self.__name__ = name
        self.weight = weight
        self.invalid: Counter[str] = Counter()
        self.disagreement = math.nan
        self._failures = 0
        try:
            self.server = self._ask("/health", None)
        except (_Refused, OSError, ValueError) as error:
            raise RemoteRewardError(
                f"reward '{name}': no reward server at {self.url} ({_reason(error)}); start one "
                "with 'align serve-reward RUN/STAGE' and give its address as url"
            ) from error

    def __call__(
        self, *, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> list[float | None]:
        """Score each answer.

        Raises:
            RemoteRewardError: the server refuses the request, or ``max_failures`` calls in a row
                were not answered.
        """
        check_rows(prompts, completions, reward=self.name)
        body: dict[str, Sequence[Any]] = {
            "prompts": list(prompts),
            "completions": list(completions),
        }
        if self.token_ids:
            for column in ("prompt_ids", "completion_ids"):
                body[column] = column_values(
                    columns, column, reward=self.name, num_rows=len(completions)
                )
        scores: list[float | None] = []
        spreads: list[float] = []
        for start in range(0, len(completions), ROWS_PER_REQUEST):
            part = {k: list(v[start : start + ROWS_PER_REQUEST]) for k, v in body.items()}
            answer = self._scored(part)
            scores += answer["scores"]
            if answer.get("disagreement") is not None:
                spreads.append(answer["disagreement"])
        self.disagreement = sum(spreads) / len(spreads) if spreads else math.nan
        return scores

    def _scored(self, part: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Give the server's answer to one request; invalid scores where it failed."""
        num_rows = len(part["completions"])
        try:
            answer = self._ask("/score", part)
            if len(answer["scores"]) != num_rows:
                raise ValueError(f"{len(answer['scores'])} scores for {num_rows} answers")
        except _Refused as error:
            raise RemoteRewardError(
                f"reward '{self.name}': {self.url} refused the request: {error}"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._failures += 1
            reason = f"server: {type(error).__name__}"
            self.invalid[reason] += num_rows
            if self._failures >= self.max_failures:
                raise RemoteRewardError(
                    f"reward '{self.name}': {self.url} did not answer {self._failures} times in a "
                    f"row ({_reason(error)}); look at the server, then run the stage again"
                ) from error
            return {"scores": [None] * num_rows}
        self._failures = 0
        self.invalid["server: invalid"] += sum(score is None for score in answer["scores"])
        self.invalid += Counter()  # forgets reasons counted 0 times
        return answer

    def _ask(self, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        """Send a request until it is answered, ``retries`` or the deadline are used up."""
        data = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        request = urllib.request.Request(
            self.url + path, data=data, headers={"Content-Type": "application/json"}
        )
        end = time.monotonic() + self.deadline_s
        for attempt in range(self.retries + 1):
            left = end - time.monotonic()
            try:
                with urllib.request.urlopen(request, timeout=max(left, 0.01)) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                said = error.read(2000).decode(errors="replace")
                if error.code < 500 and error.code != 429:
                    raise _Refused(f"{error.code}: {said}") from error
                failure: OSError = error
            except OSError as error:
                failure = error
            wait = FIRST_WAIT_S * 2**attempt
            if attempt == self.retries or time.monotonic() + wait >= end:
                raise failure
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def build_remote(spec: RemoteSpec) -> RemoteReward:
    """Reach the server of a spec.

    Raises:
        RemoteRewardError: it cannot be reached.
    """
    return RemoteReward(
        spec.url,
        deadline_s=spec.deadline_s,
        retries=spec.retries,
        max_failures=spec.max_failures,
        token_ids=spec.token_ids,
        name=spec.label,
        weight=spec.weight,
    )
