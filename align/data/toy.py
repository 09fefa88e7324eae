"""Generate synthetic instructions with verifiable answers, determined entirely by a random seed.

There are five tasks (arithmetic, sort, reverse, count, pick) over 20 nouns and the numbers 0 to 20.
Every response says ``the answer is X`` followed by ``.`` or ``,``, so that ANSWER_PATTERN finds X.
A response also has a style; the preferred one opens politely, is brief and ends properly.
Train and held-out questions differ in their *instance* (task and items, regardless of their order
and phrasing), so a reworded training question is never held out.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from align.core.errors import DataError
from align.core.types import Example, Turn
from align.data.split import side_of

ANSWER_PATTERN = r"answer is ([a-z0-9]+(?: [a-z0-9]+)*)"
"""Group 1 is the value, which is also in the column ``answer``."""
POLITE_PATTERN = r"(?:sure|of course|gladly), the answer is [a-z0-9]+(?: [a-z0-9]+)*\."
"""Matches a whole response in the preferred style (for the reward ``format``)."""
OPENING_PATTERN = r"^(?:sure|of course|gladly), "
"""Matches a polite opening (for the reward ``regex``)."""
FINISHED_PATTERN = r"\.$"
"""Matches a proper end (for the reward ``regex``)."""
BRIEF_WORDS = 9
"""Largest number of words of a response in the preferred style (for the reward ``length``)."""

KINDS = {
    "animal": ("cat", "dog", "fox", "cow", "pig"),
    "colour": ("red", "blue", "green", "pink", "white"),
    "fruit": ("apple", "pear", "plum", "fig", "lemon"),
    "home": ("cup", "bed", "lamp", "chair", "desk"),
}
NOUNS = tuple(word for words in KINDS.values() for word in words)
NUMBERS: tuple[str, ...] = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
)
"""Numbers as words: tokenizers split figures into digits, and these models must learn quickly."""
MAX_NUMBER = len(NUMBERS) - 1
MAX_TRIES = 10_000

PREFERRED = "polite"
MANNERS = {
    "polite": (
        "sure, the answer is {x}.",
        "of course, the answer is {x}.",
        "gladly, the answer is {x}.",
    ),
    "curt": ("the answer is {x}.", "answer is {x}."),
    "rambling": (
        "well, the answer is {x}, i think, yes, i think so.",
        "hm, the answer is {x}, that is it, yes, that is it.",
    ),
    "rude": ("ugh, the answer is {x}, you fool.", "the answer is {x}, go away."),
    "unfinished": ("the answer is {x}, and", "so the answer is {x}, but"),
}
POLITE_SHARE = 0.3
"""Fraction of the preferred style in ``sft``; the other styles share the rest equally."""
CARELESS = ("rambling", "rude", "unfinished")
CARELESS_WRONG_SHARE = 0.5
"""Fraction of wrong answers in ``sft`` among the careless styles. Demonstrations are not clean, and
reinforcement learning can find out which of them to trust."""
WRONG_SHARE = 0.25
"""Fraction of preference pairs that differ in correctness instead of style."""

PHRASES = {
    "plus": (
        "what is {a} plus {b}?",
        "add {a} plus {b}.",
        "how much is {a} plus {b}?",
        "tell me {a} plus {b}.",
        "please compute {a} plus {b}.",
    ),
    "minus": (
        "what is {a} minus {b}?",
        "take {a} minus {b}.",
        "how much is {a} minus {b}?",
        "tell me {a} minus {b}.",
        "please compute {a} minus {b}.",
    ),
    "sort": (
        "sort {list}.",
        "put in order: {list}.",
        "please sort {list}.",
        "what is the order of {list}?",
        "sort this list: {list}.",
    ),
    "reverse": (
        "reverse {list}.",
        "say from the back: {list}.",
        "please reverse {list}.",
        "what is the reverse of {list}?",
        "reverse this list: {list}.",
    ),
    "count": (
        "how many {word} in {list}?",
        "count {word} in {list}.",
        "how often is {word} in {list}?",
        "please count {word} in {list}.",
    ),
    "largest": (
        "what is the largest of {list}?",
        "find the largest: {list}.",
        "which is the largest of {list}?",
        "tell me the largest of {list}.",
    ),
    "smallest": (
        "what is the smallest of {list}?",
        "find the smallest: {list}.",
        "which is the smallest of {list}?",
        "tell me the smallest of {list}.",
    ),
    "odd": (
        "what is the odd one of {list}?",
        "find the odd one: {list}.",
        "which is the odd one of {list}?",
        "pick the odd one of {list}.",
    ),
}
PROSE = {
    "plus": ("{a} plus {b} is {x}.", "add {a} plus {b}, get {x}."),
    "minus": ("{a} minus {b} is {x}.", "take {a} minus {b}, get {x}."),
    "sort": ("sort {list}, get {x}.", "the order of {list} is {x}."),
    "reverse": ("reverse {list}, get {x}.", "the reverse of {list} is {x}."),
    "count": ("count {word} in {list}, get {x}.", "{word} in {list} is {x}."),
    "largest": ("the largest of {list} is {x}.", "find the largest of {list}, get {x}."),
    "smallest": ("the smallest of {list} is {x}.", "find the smallest of {list}, get {x}."),
    "odd": ("the odd one of {list} is {x}.", "find the odd one of {list}, get {x}."),
}
MANNERS_IN_PROSE = (
    "polite people say sure, of course or gladly.",
    "rude people say ugh, you fool or go away.",
    "please tell me the answer.",
    "the answer is short, but it is so, and i go.",
    "well, i think so, yes, that is it.",
    "hm, so what is this? how much? how often? how many?",
    "put this list in order from the back.",
    "which one do you pick? say it.",
    "please compute this.",
    "User: what? Assistant: the answer.",
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Instance:
    """A question before it is worded, with its answer and a plausible wrong answer."""

    task: str
    form: str
    items: tuple[str, ...]
    slots: dict[str, str]
    answer: str
    wrong: str

    @property
    def key(self) -> str:
        """Return a name that does not depend on the order of the items or the phrasing."""
        return f"{self.task}|{' '.join(sorted(self.items))}"


class _Dice:
    """Random draws from a stream that depends only on its name.

    Only ``random.Random.random`` is used, because its sequence is guaranteed across Python
    versions.
    """

    def __init__(self, *names: object) -> None:
        digest = hashlib.sha256("|".join(map(str, names)).encode()).digest()
        self._random = random.Random(int.from_bytes(digest[:8], "big")).random

    def chance(self, share: float) -> bool:
        return self._random() < share

    def number(self, low: int, high: int) -> int:
        return low + int(self._random() * (high - low + 1))

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self._random() * len(options))]

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        left = list(options)
        return [left.pop(int(self._random() * len(left))) for _ in range(count)]


def _arithmetic(dice: _Dice) -> Instance:
    plus = dice.chance(0.5)
    b = dice.number(1, 4)
    a = dice.number(0, MAX_NUMBER - b)
    if not plus:
        a += b
    value = a + b if plus else a - b
    near = [n for n in range(value - 3, value + 4) if n != value and 0 <= n <= MAX_NUMBER]
    form = "plus" if plus else "minus"
    # Addition commutes: 5 plus 7 and 7 plus 5 are one instance; 12 minus 5 is another.
    return Instance(
        task="arithmetic",
        form=form,
        items=(form, NUMBERS[a], NUMBERS[b]),
        slots={"a": NUMBERS[a], "b": NUMBERS[b]},
        answer=NUMBERS[value],
        wrong=NUMBERS[dice.pick(near)],
    )


def _shuffled_wrong(dice: _Dice, right: list[str]) -> str:
    wrong = list(right)
    i = dice.number(0, len(right) - 2)
    wrong[i], wrong[i + 1] = wrong[i + 1], wrong[i]
    return " ".join(wrong)


def _sort(dice: _Dice) -> Instance:
    items = dice.sample(NUMBERS, 3)
    right = sorted(items, key=NUMBERS.index)
    return Instance(
        task="sort",
        form="sort",
        items=tuple(items),
        slots={"list": " ".join(items)},
        answer=" ".join(right),
        wrong=_shuffled_wrong(dice, right),
    )


def _reverse(dice: _Dice) -> Instance:
    items = dice.sample(NOUNS, dice.number(2, 3))
    right = items[::-1]
    return Instance(
        task="reverse",
        form="reverse",
        items=tuple(items),
        slots={"list": " ".join(items)},
        answer=" ".join(right),
        wrong=_shuffled_wrong(dice, right),
    )


def _count(dice: _Dice) -> Instance:
    word, *others = dice.sample(NOUNS, 3)
    times = dice.number(1, 4)
    fill = dice.number(1, 2)
    bag = [word] * times + [dice.pick(others) for _ in range(fill)]
    items = dice.sample(bag, len(bag))
    wrong = dice.pick([n for n in range(1, 6) if n != times and abs(n - times) <= 2])
    return Instance(
        task="count",
        form="count",
        items=(f"count-{word}", *items),
        slots={"word": word, "list": " ".join(items)},
        answer=NUMBERS[times],
        wrong=NUMBERS[wrong],
    )


def _pick(dice: _Dice) -> Instance:
    form = dice.pick(("largest", "smallest", "odd"))
    if form == "odd":
        kind, other = dice.sample(tuple(KINDS), 2)
        same = dice.sample(KINDS[kind], 3)
        answer = dice.pick(KINDS[other])
        items = dice.sample([*same, answer], 4)
    else:
        items = dice.sample(NUMBERS, 3)
        answer = (max if form == "largest" else min)(items, key=NUMBERS.index)
    wrong = dice.pick([item for item in items if item != answer])
    return Instance(
        task="pick",
        form=form,
        items=tuple(items),
        slots={"list": " ".join(items)},
        answer=answer,
        wrong=wrong,
    )


TASKS: dict[str, Callable[[_Dice], Instance]] = {
    "arithmetic": _arithmetic,
    "sort": _sort,
    "reverse": _reverse,
    "count": _count,
    "pick": _pick,
}


def _draw(dice: _Dice, *, split: str, heldout_frac: float, tasks: Sequence[str]) -> Instance:
    make = TASKS[dice.pick(tasks)]
    for _ in range(MAX_TRIES):
        instance = make(dice)
        if split == "all" or side_of(instance.key, heldout_frac=heldout_frac) == split:
            return instance
    raise DataError(
        f"world: no {split} instance found with heldout_frac {heldout_frac}. Change it."
    )


def _question(dice: _Dice, instance: Instance) -> str:
    return dice.pick(PHRASES[instance.form]).format(**instance.slots)


def _say(dice: _Dice, manner: str, value: str) -> str:
    return dice.pick(MANNERS[manner]).format(x=value)


def _sentence(dice: _Dice, instance: Instance) -> str:
    draw = dice.number(0, 19)
    if draw == 0:
        kind = dice.pick(tuple(KINDS))
        return f"{dice.pick(KINDS[kind])} is {kind}."
    if draw == 1:
        return dice.pick(MANNERS_IN_PROSE)
    if draw <= 4:
        # Text to copy word for word: such a small model learns copying from it, which the list
        # tasks need.
        words = " ".join(dice.sample(NOUNS, dice.number(2, 4)))
        return f"say {words}, get {words}."
    if draw <= 9:
        question = _question(dice, instance)
        return f"{question} it is {instance.answer}."
    return dice.pick(PROSE[instance.form]).format(x=instance.answer, **instance.slots)


def _turn(role: str, content: str) -> list[Turn]:
    return [Turn(role=role, content=content)]


def _answers(dice: _Dice, kind: str, instance: Instance) -> tuple[str | None, str | None]:
    """Return the response (sft), or the chosen and the rejected one (preference)."""
    if kind == "prompts":
        return None, None
    others = tuple(name for name in MANNERS if name != PREFERRED)
    if kind == "sft":
        manner = PREFERRED if dice.chance(POLITE_SHARE) else dice.pick(others)
        wrong = manner in CARELESS and dice.chance(CARELESS_WRONG_SHARE)
        return _say(dice, manner, instance.wrong if wrong else instance.answer), None
    if dice.chance(WRONG_SHARE):
        form = dice.pick(MANNERS[dice.pick(tuple(MANNERS))])
        return form.format(x=instance.answer), form.format(x=instance.wrong)
    chosen = _say(dice, PREFERRED, instance.answer)
    return chosen, _say(dice, dice.pick(others), instance.answer)


def _corpus(
    dice: _Dice, *, rows: int, split: str, heldout_frac: float, tasks: Sequence[str]
) -> Iterator[Example]:
    for i in range(rows):
        sentences = [
            _sentence(dice, _draw(dice, split=split, heldout_frac=heldout_frac, tasks=tasks))
            for _ in range(dice.number(3, 6))
        ]
        yield Example(prompt="", completion=" ".join(sentences), source=f"world:corpus:{i}")


def generate(
    kind: Literal["corpus", "sft", "preference", "prompts"],
    *,
    rows: int,
    seed: int,
    split: Literal["all", "train", "heldout"] = "all",
    heldout_frac: float = 0.1,
    tasks: Sequence[str] = tuple(TASKS),
) -> Iterator[Example]:
    """Generate rows of the synthetic tasks; the same arguments produce identical rows.

    Args:
        kind: ``corpus`` is plain prose for pretraining; ``sft`` conversations in mixed styles;
            ``preference`` pairs that differ in style or in correctness; ``prompts`` distinct
            questions. All but corpus have the columns answer, task and instance.
        rows: number of rows.
        seed: random seed; each kind and split has its own stream.
        split: side of the instances, determined by the hash of ``Instance.key``.
        heldout_frac: fraction of instances held out; use the same value for all sides of a split.
        tasks: which of ``TASKS`` are drawn.

    Raises:
        DataError: there are not that many distinct questions.
    """
    dice = _Dice("world", kind, split, seed)
    if kind == "corpus":
        yield from _corpus(dice, rows=rows, split=split, heldout_frac=heldout_frac, tasks=tasks)
        return
    seen: set[str] = set()
    tries = 0
    while len(seen) < rows if kind == "prompts" else tries < rows:
        tries += 1
        if tries > 100 * rows:
            raise DataError(
                f"world {kind} ({split}): {rows} distinct questions requested, found {len(seen)}. "
                "Request fewer rows or raise heldout_frac."
            )
        instance = _draw(dice, split=split, heldout_frac=heldout_frac, tasks=tasks)
        question = _question(dice, instance)
        if kind == "prompts" and question in seen:
            continue
        seen.add(question)
        answer, rejected = _answers(dice, kind, instance)
        yield Example(
            prompt=_turn("user", question),
            completion=None if answer is None else _turn("assistant", answer),
            rejected=None if rejected is None else _turn("assistant", rejected),
            columns={"answer": instance.answer, "task": instance.task, "instance": instance.key},
            source=f"world:{kind}:{tries - 1}",
        )
