"""Bring one row of each data format into canonical examples: one function a format.

Each takes ``(row, source)`` and gives the examples that stand in the row; an empty list means a
row that is well formed but holds no example (all answers of an UltraFeedback row score the same).
"""

import re
from collections.abc import Mapping
from typing import Any

from align.core.errors import DataError
from align.core.types import Example, Text, Turn
from align.data.formats.pairs import as_turns, explicit_pair, implicit_pair, make_pair
from align.data.formats.turns import not_text, shown, to_text, to_turns

Row = dict[str, Any]

_END_MARK = "<|endoftext|>"
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def from_messages(row: Row, source: str) -> list[Example]:
    """Read ``messages``; with a ``label`` the last turn is judged (unpaired)."""
    turns = to_turns(row["messages"], field="messages", source=source)
    rest = _rest(row, "messages")
    if "label" in row:
        return [_judged(turns[:-1], turns[-1:], row, _rest(row, "messages", "label"), source)]
    return [Example(prompt=[], completion=turns, columns=rest, source=source)]


def from_prompt_completion(row: Row, source: str) -> list[Example]:
    """Read ``prompt`` and ``completion``, both text or both turns."""
    prompt, completion = _prompt_and(row, "completion", source=source)
    return [
        Example(
            prompt=prompt,
            completion=completion,
            columns=_rest(row, "prompt", "completion"),
            source=source,
        )
    ]


def from_unpaired(row: Row, source: str) -> list[Example]:
    """Read ``prompt``, ``completion`` and the judgement ``label``."""
    prompt, completion = _prompt_and(row, "completion", source=source)
    return [_judged(prompt, completion, row, _rest(row, "prompt", "completion", "label"), source)]


def from_prompt(row: Row, source: str) -> list[Example]:
    """Read ``prompt`` alone, or the first of MT-bench's ``turns``."""
    if "prompt" in row:
        prompt = to_text(row["prompt"], field="prompt", source=source)
        return [Example(prompt=prompt, columns=_rest(row, "prompt"), source=source)]
    turns = row["turns"]
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
        raise DataError(
            f"{source}: turns: expected a list of texts, found {shown(turns)}", code="D055"
        )
    prompt = [Turn(role="user", content=turns[0])]
    return [Example(prompt=prompt, columns=dict(row), source=source)]


def from_preference(row: Row, source: str) -> list[Example]:
    """Read ``chosen`` and ``rejected`` with an explicit or implicit ``prompt``."""
    chosen = to_text(row["chosen"], field="chosen", source=source)
    rejected = to_text(row["rejected"], field="rejected", source=source)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(f"{source}: chosen and rejected: one is text, the other turns", code="D073")
    rest = _rest(row, "prompt", "chosen", "rejected", "margin")
    if "prompt" not in row:
        return [implicit_pair(chosen, rejected, row, rest, source)]
    prompt = to_text(row["prompt"], field="prompt", source=source)
    return [explicit_pair(prompt, chosen, rejected, row, rest, source)]


def from_hh(row: Row, source: str) -> list[Example]:
    r"""Read ``chosen`` and ``rejected`` dialogues of "\n\nHuman: ... \n\nAssistant: ..."."""
    sides = [_hh_turns(row[side], field=side, source=source) for side in ("chosen", "rejected")]
    return [
        implicit_pair(sides[0], sides[1], row, _rest(row, "chosen", "rejected", "margin"), source)
    ]


def from_openai_dpo(row: Row, source: str) -> list[Example]:
    """Read OpenAI's preference rows: ``input.messages`` and the two outputs."""
    given = row["input"]
    if not isinstance(given, dict) or "messages" not in given:
        raise DataError(
            f"{source}: input: expected an object with 'messages', {shown(given)}", code="D050"
        )
    names = ("preferred_output", "non_preferred_output")
    chosen, rejected = (to_turns(row[name], field=name, source=source) for name in names)
    prompt = to_turns(given["messages"], field="input.messages", source=source)
    return [make_pair(prompt, chosen, rejected, row, _rest(row, "input", *names), source)]


def from_alpaca(row: Row, source: str) -> list[Example]:
    """Read ``instruction``, ``input``, ``output`` (or ``response``), ``system``, ``history``."""
    output = "output" if "output" in row else "response"
    used = ("instruction", "input", "system", "history", output)
    prompt = [Turn(role="system", content=_str(row, "system", source))] if row.get("system") else []
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(
                f"{source}: history: expected [question, answer], {shown(pair)}", code="D050"
            )
        prompt.append(Turn(role="user", content=str(pair[0])))
        prompt.append(Turn(role="assistant", content=str(pair[1])))
    asked = _with_input(_str(row, "instruction", source), row.get("input"), source)
    prompt.append(Turn(role="user", content=asked))
    answer = [Turn(role="assistant", content=_str(row, output, source))]
    return [Example(prompt, answer, columns=_rest(row, *used), source=source)]


def from_sharegpt(row: Row, source: str) -> list[Example]:
    """Read ``conversations`` of from/value turns; chosen/rejected make it a preference row."""
    turns = to_turns(row["conversations"], field="conversations", source=source)
    if row.get("system"):
        turns = [Turn(role="system", content=_str(row, "system", source)), *turns]
    used = ("conversations", "system", "chosen", "rejected", "label", "margin")
    rest = _rest(row, *used)
    if "chosen" in row and "rejected" in row:
        sides = [to_turns(row[s], field=s, source=source) for s in ("chosen", "rejected")]
        return [make_pair(turns, sides[0], sides[1], row, rest, source)]
    if "label" in row:
        return [_judged(turns[:-1], turns[-1:], row, rest, source)]
    return [Example(prompt=[], completion=turns, columns=rest, source=source)]


def from_ultrafeedback(row: Row, source: str) -> list[Example]:
    """Read ``instruction`` and scored ``completions``: best against worst, gap as margin."""
    scored = []
    for i, entry in enumerate(row["completions"]):
        keys = ("overall_score", "score", "fine-grained_score")
        key = next((k for k in keys if isinstance(entry.get(k), int | float)), None)
        if key is None or not isinstance(entry.get("response"), str):
            raise DataError(
                f"{source}: completions[{i}]: expected 'response' and one of {keys}, "
                f"found {sorted(entry)}",
                code="D040",
            )
        scored.append((float(entry[key]), entry["response"]))
    if len(scored) < 2:
        return []
    best, worst = max(scored, key=lambda s: s[0]), min(scored, key=lambda s: s[0])
    if best[0] == worst[0]:
        return []
    prompt = [Turn(role="user", content=_str(row, "instruction", source))]
    sides = [[Turn(role="assistant", content=side[1])] for side in (best, worst)]
    rest = _rest(row, "instruction", "completions")
    return [make_pair(prompt, sides[0], sides[1], {"margin": best[0] - worst[0]}, rest, source)]


def from_text(row: Row | str, source: str) -> list[Example]:
    """Read plain text: a paragraph of a .txt file or the field ``text``."""
    text = row if isinstance(row, str) else _str(row, "text", source)
    rest = {} if isinstance(row, str) else _rest(row, "text")
    return [Example(prompt="", completion=text, columns=rest, source=source)]


def from_seed_tasks(row: Row, source: str) -> list[Example]:
    """Read self-instruct seed tasks: ``instruction`` and ``instances`` of input and output."""
    rest = _rest(row, "instruction", "instances")
    examples = []
    for instance in row["instances"]:
        asked = _with_input(_str(row, "instruction", source), instance.get("input"), source)
        answer = [Turn(role="assistant", content=_str(instance, "output", source))]
        prompt = [Turn(role="user", content=asked)]
        examples.append(Example(prompt, answer, columns=rest, source=source))
    return examples


def from_oasst_best(row: Row, source: str) -> list[Example]:
    """Read the best-ranked branch of an OASST tree, up to its last assistant turn."""
    turns: list[Turn] = []
    node = row["prompt"]
    while node is not None:
        turns.append(_oasst_turn(node, source))
        node = next(iter(_ranked(node)), None)
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    rest = _rest(row, "prompt")
    return [Example(prompt=[], completion=turns, columns=rest, source=source)] if turns else []


def from_oasst_pairs(row: Row, source: str) -> list[Example]:
    """Read best against worst reply at every ranked assistant branching of an OASST tree."""
    rest = _rest(row, "prompt")
    pairs: list[Example] = []
    branches: list[tuple[list[Turn], Row]] = [([], row["prompt"])]
    while branches:
        before, node = branches.pop(0)
        turns = [*before, _oasst_turn(node, source)]
        replies = _ranked(node)
        said = [r for r in replies if r["role"] == "assistant" and r.get("rank") is not None]
        if len(said) > 1:
            best, worst = ([_oasst_turn(said[i], source)] for i in (0, -1))
            if best != worst:
                pairs.append(make_pair(turns, best, worst, {}, rest, source))
        branches += [(turns, reply) for reply in replies]
    return pairs


def from_model_solutions(row: Row, source: str) -> list[Example]:
    """Read nested ``{"solution", "is_correct"}``: the first right one against each wrong one."""
    tried = {k: v for k, v in row.items() if isinstance(v, dict) and "is_correct" in v}
    right = [v["solution"] for v in tried.values() if v["is_correct"] is True]
    wrong = [v["solution"] for v in tried.values() if v["is_correct"] is False]
    prompt = [Turn(role="user", content=_str(row, "question", source))]
    rest = _rest(row, "question", *tried)
    if not right:
        return []
    chosen = [Turn(role="assistant", content=right[0])]
    sides = [[Turn(role="assistant", content=text)] for text in dict.fromkeys(wrong)]
    return [make_pair(prompt, chosen, side, {}, rest, source) for side in sides]


def _ranked(node: Row) -> list[Row]:
    """Give the replies that may be used, best first; unranked ones keep their order at the end."""
    replies = [r for r in node.get("replies", []) if not r.get("deleted")]
    return sorted(replies, key=lambda r: r["rank"] if r.get("rank") is not None else 10**6)


def _oasst_turn(node: Row, source: str) -> Turn:
    role = {"prompter": "user", "assistant": "assistant"}.get(node.get("role", ""))
    if role is None:
        raise DataError(
            f"{source}: role {node.get('role')!r}: expected prompter or assistant", code="D053"
        )
    return Turn(role=role, content=_str(node, "text", source))


def _rest(row: Row, *used: str) -> Row:
    return {key: value for key, value in row.items() if key not in used}


def _str(row: Row, field: str, source: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise not_text(value, field=field, source=source)
    return value


def _with_input(instruction: str, given: object, source: str) -> str:
    if given is None or given == "":
        return instruction
    if not isinstance(given, str):
        raise not_text(given, field="input", source=source)
    return f"{instruction}\n\n{given}"


def _judged(prompt: Text, completion: Text, row: Row, rest: Row, source: str) -> Example:
    label = row["label"]
    if isinstance(label, str) and label.lower() in ("true", "false"):
        label = label.lower() == "true"  # a csv file has no booleans
    if not isinstance(label, bool):
        raise DataError(
            f"{source}: label: expected true or false, found {shown(label)}; a label that does "
            "not judge the answer needs another name (rename: {label: class})",
            code="D080",
        )
    return Example(prompt, completion, label=label, columns=rest, source=source)


def _prompt_and(row: Row, field: str, *, source: str) -> tuple[Text, Text]:
    prompt = to_text(row["prompt"], field="prompt", source=source)
    answer = to_text(row[field], field=field, source=source)
    if isinstance(prompt, str) and isinstance(answer, str):
        # The stop marker of old completion files; the tokenizer's own stop token takes its place.
        return prompt, answer.removesuffix(_END_MARK)
    return as_turns(prompt, "user"), as_turns(answer, "assistant")


def _hh_turns(text: object, *, field: str, source: str) -> list[Turn]:
    if not isinstance(text, str) or not text.lstrip(" ").startswith("\n\nHuman:"):
        raise DataError(
            f'{source}: {field}: expected text that begins "\\n\\nHuman:", found {shown(text)}',
            code="D055",
        )
    pieces = _HH_TURN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        Turn(role=roles[name], content=said.strip())
        for name, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


FIELDS = ("text", "messages", "prompt")
"""What may hold the text of a row, the first that is there."""


def from_classes(row: dict[str, Any], source: str) -> list[Example]:
    """Read ``text``, ``messages`` or ``prompt``, and the class ``label``: text, number or boolean.

    The example's completion is the text (no template is applied) or the conversation; its column
    ``label`` is the name of the class.
    """
    field = next(name for name in FIELDS if name in row)
    text = to_text(row[field], field=field, source=source)
    if "label_prob" in row:
        raise DataError(f"{source}: label_prob has no effect on classes; remove the column")
    columns = {key: value for key, value in row.items() if key not in (field, "label")}
    columns["label"] = class_name(row["label"], source)
    return [Example(prompt="", completion=text, columns=columns, source=source)]


def class_name(label: Any, source: str) -> str:
    """Give the name of a class: a text as it stands, a whole number or a boolean in words.

    Raises:
        DataError: it is something else, or empty.
    """
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, int) or (isinstance(label, str) and label.strip()):
        return str(label)
    raise DataError(
        f"{source}: label: expected the name or the number of a class, found {shown(label)}"
    )


def from_steps(row: Row, source: str) -> list[Example]:
    """Read ``prompt`` and ``steps`` of ``{text, label}``, or TRL's ``completions`` and ``labels``.

    The example's columns ``steps`` and ``step_labels`` hold the texts and whether each is right;
    a prompt that is a string is one turn of the user.
    """
    texts, labels = _listed(row, source) if "steps" in row else _parallel(row, source)
    if not texts:
        raise DataError(f"{source}: steps: there is none", code="D050")
    for i, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if not isinstance(text, str) or not text.strip():
            raise not_text(text, field=f"steps[{i}]", source=source)
        if not isinstance(label, bool):
            raise DataError(
                f"{source}: steps[{i}]: label: expected true or false, {shown(label)}", code="D080"
            )
    prompt: Text = to_text(row["prompt"], field="prompt", source=source)
    if isinstance(prompt, str):
        prompt = [Turn(role="user", content=prompt)]
    used = ("prompt", "steps", "completions", "labels")
    columns = {key: value for key, value in row.items() if key not in used}
    columns |= {"steps": texts, "step_labels": labels}
    answer = [Turn(role="assistant", content="\n".join(texts))]
    return [Example(prompt, answer, columns=columns, source=source)]


def _listed(row: Row, source: str) -> tuple[list[Any], list[Any]]:
    steps = row["steps"]
    if not isinstance(steps, list) or not all(isinstance(s, Mapping) for s in steps):
        raise DataError(
            f"{source}: steps: expected a list of {{text, label}}, found {shown(steps)}",
            code="D050",
        )
    return [s.get("text") for s in steps], [s.get("label") for s in steps]


def _parallel(row: Row, source: str) -> tuple[list[Any], list[Any]]:
    texts, labels = row["completions"], row["labels"]
    if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
        raise DataError(
            f"{source}: completions and labels: expected two lists of equal length", code="D050"
        )
    return texts, labels


def from_labelled_solutions(row: Row, source: str) -> list[Example]:
    """Read nested ``{"solution", "is_correct"}``: each attempt with its outcome as label."""
    tried = {k: v for k, v in row.items() if isinstance(v, dict) and "is_correct" in v}
    rest = {key: value for key, value in row.items() if key not in tried and key != "question"}
    examples = []
    seen: set[str] = set()
    for name, attempt in tried.items():
        text, good = attempt.get("solution"), attempt["is_correct"]
        if not isinstance(text, str) or not isinstance(good, bool):
            raise DataError(f"{source}: {name}: expected a solution and true or false", code="D080")
        if text in seen:
            continue
        seen.add(text)
        prompt = [Turn(role="user", content=str(row["question"]))]
        answer = [Turn(role="assistant", content=text)]
        examples.append(Example(prompt, answer, label=good, columns=rest, source=source))
    return examples
