"""Stand in for ``align.stages.tools.generate``: three words for each request, without a model.

Requests that say "wait", which have an empty part at once, and the first of two that say "both" are
answered together with the next one, a word of each in turn. "after N" is answered once N others
are there too. "slow" has no part for longer than the server looks at its clock, and "die" ends the
process. With the argument ``broken`` nothing loads.
"""

import json
import os
import sys
import time
from collections.abc import Collection
from typing import Any

WORDS = ("a", "b", "c")
SLOW_S = 1.5


def emit(part: dict[str, Any]) -> None:
    """Write one part of an answer."""
    sys.stdout.write(json.dumps(part) + "\n")
    sys.stdout.flush()


def is_due(text: str, held: Collection[str]) -> bool:
    """Return whether a request that has come is answered, and with it all that are held."""
    after = [int(said.removeprefix("after ")) for said in held if said.startswith("after ")]
    if after:
        return len(held) > max(after)
    return text != "wait" and not (text == "both" and len(held) < 2)


def main() -> None:
    """Answer the lines of standard input."""
    if sys.argv[1:] == ["broken"]:
        emit({"error": "no such model", "code": "model_not_loaded"})
        return
    emit({"ready": "fake"})
    held: dict[int, str] = {}
    cancelled: list[int] = []
    for line in sys.stdin:
        asked = json.loads(line)
        if "cancel" in asked:
            cancelled.append(asked["cancel"])
            continue
        text = asked["messages"][0]["content"]
        if text == "die":
            os._exit(1)
        if text == "slow":
            time.sleep(SLOW_S)
        if text == "wait":
            emit({"id": asked["id"], "index": 0, "text": ""})
        if text == "cancelled?":
            text += ":" + ",".join(map(str, cancelled))
        held[asked["id"]] = text
        if not is_due(text, held.values()):
            continue
        for word in WORDS:
            for number, said in held.items():
                emit({"id": number, "index": 0, "text": f"{said}-{word} "})
        for number in held:
            emit({"id": number, "done": True, "prompt_tokens": 1, "completion_tokens": 3})
        held = {}


if __name__ == "__main__":
    main()
