"""Formats of data rows: the fields by which each is recognized, and its importer."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from align.core.text import suggest

ASKED = ("prompt", "question", "instruction", "query", "problem", "input")
"""Fields that may contain the question of a row; the first that is present is used."""
Kind = Literal["sft", "preference", "prompts", "corpus", "unpaired", "steps", "classes"]
"""Kinds of rows that a stage needs."""
_IMPORTERS = "align.data.formats.importers"
_TREES = "align.data.formats.trees"
_PLAIN_PAIRS = ("prompt+completion", "prompt+response", "input+output")
_QUESTION_PAIRS = (
    *("question+answer", "question+response", "query+response", "query+answer"),
    *("problem+solution", "problem+answer"),
)
_ALPACA_PAIRS = ("instruction+output", "instruction+input+output", "instruction+response")
"""Fields of a question and its answer."""


@dataclass(frozen=True, slots=True)
class Format:
    """One way to read a row.

    Attributes:
        fields: alternative lists of fields, each sufficient to read a row.
        gives: the kinds of data that it produces.
        read: ``module:function`` of the importer, which returns the examples of a row, given the
            row and its ``file:line``.
        read_for: other importers, by the kind of data that the stage needs.
        uses: further fields that the importer reads if they are present.
        when: a further condition on the row; None means none.
        over: formats with the same fields over which this one takes precedence.
        last: use the format only if no other one fits.
    """

    fields: tuple[tuple[str, ...], ...]
    gives: tuple[str, ...]
    read: str
    read_for: Mapping[str, str] = field(default_factory=dict)
    uses: tuple[str, ...] = ()
    when: Callable[[Any], bool] | None = None
    over: tuple[str, ...] = ()
    last: bool = False

    @property
    def used(self) -> frozenset[str]:
        """Return every field that the importer reads."""
        return frozenset(self.uses).union(*self.fields)

    def most_fields(self, row: Collection[str]) -> frozenset[str]:
        """Return the longest list of fields that the row has completely; empty if there is none."""
        whole = [option for option in self.fields if all(field in row for field in option)]
        return frozenset(max(whole, key=len, default=()))


def _format(*fields: str, gives: str, read: str, uses: str = "", **options: Any) -> Format:
    """Return a format; each of ``fields`` is one list of fields, joined by ``+``."""
    lists = tuple(tuple(option.split("+")) for option in fields)
    return Format(
        lists,
        tuple(gives.split()),
        read if ":" in read else f"{_IMPORTERS}:{read}",
        uses=tuple(uses.split()),
        **options,
    )


def as_boolean(value: object) -> bool | None:
    """Return a rating as true or false, also if a table has it as 1, 0.0 or text; else None."""
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.lower())
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def _is_rated(row: dict[str, Any]) -> bool:
    """Return whether ``label`` rates the answer; beside a completion it can be nothing else."""
    return {"prompt", "completion"} <= set(row) or as_boolean(row["label"]) is not None


def _is_hh(row: dict[str, Any]) -> bool:
    text = row["chosen"]
    return isinstance(text, str) and "\n\nAssistant:" in text.replace("\r\n", "\n")


def _has_attempts(row: dict[str, Any]) -> bool:
    return any(isinstance(value, dict) and "is_correct" in value for value in row.values())


FORMATS: dict[str, Format] = {
    "openai_dpo": _format(
        "input+preferred_output+non_preferred_output",
        gives="preference",
        read="from_openai_dpo",
    ),
    "hh": _format(
        "chosen+rejected",
        gives="preference",
        read="from_hh",
        when=_is_hh,
        over=("preference",),
    ),
    "preference": _format(
        "chosen+rejected",
        *(f"{asked}+chosen+rejected" for asked in ASKED),
        "chosen_messages+rejected_messages",
        gives="preference",
        read="from_preference",
        uses="input history margin score_chosen score_rejected",
        over=("unpaired", "question_answer"),
    ),
    "ultrafeedback": _format(
        "instruction+completions", gives="preference", read="from_ultrafeedback"
    ),
    "model_solutions": _format(
        "question+ground_truth",
        gives="preference unpaired",
        read="from_model_solutions",
        read_for={"unpaired": f"{_IMPORTERS}:from_labeled_solutions"},
        when=_has_attempts,
    ),
    "steps": _format("prompt+steps", "prompt+completions+labels", gives="steps", read="from_steps"),
    "oasst": _format(
        "message_tree_id+prompt",
        gives="sft preference",
        read=f"{_TREES}:from_oasst_best",
        read_for={"preference": f"{_TREES}:from_oasst_pairs"},
    ),
    "sharegpt": _format(
        "conversations",
        "conversations+chosen+rejected",
        gives="sft preference unpaired",
        read="from_sharegpt",
        uses="label kto_tag margin",
    ),
    "messages": _format(
        "messages",
        gives="sft unpaired",
        read="from_messages",
        uses="label kto_tag",
        over=("question_answer",),
    ),
    "seed_tasks": _format("instruction+instances", gives="sft", read="from_seed_tasks"),
    "alpaca": _format(
        *_ALPACA_PAIRS,
        gives="sft unpaired",
        read="from_alpaca",
        uses="input history kto_tag",
        over=("question_answer",),
    ),
    "dolly": _format("instruction+context+response", gives="sft", read="from_alpaca"),
    "unpaired": _format(
        *(f"{pair}+label" for pair in (*_PLAIN_PAIRS, *_QUESTION_PAIRS, *_ALPACA_PAIRS)),
        gives="unpaired",
        read="from_unpaired",
        read_for={"prompts": f"{_IMPORTERS}:from_rated_question"},
        uses="input history",
        when=_is_rated,
        over=("question_answer", "prompt_completion", "alpaca"),
    ),
    "prompt_completion": _format(
        *_PLAIN_PAIRS,
        gives="sft",
        read="from_prompt_completion",
        uses="input",
        over=("question_answer",),
    ),
    "question_answer": _format(
        *_QUESTION_PAIRS,
        gives="sft",
        read="from_question_answer",
        read_for={"prompts": f"{_IMPORTERS}:from_question"},
        uses="input",
    ),
    "segments": _format("segments", gives="sft", read="from_segments"),
    "classes": _format(
        "text+label", "messages+label", "prompt+label", gives="classes", read="from_classes"
    ),
    "verl": _format("prompt+reward_model", gives="prompts", read="from_verl"),
    "text": _format("text", gives="corpus sft", read="from_text", last=True),
    "prompt": _format(
        "prompt", "turns", gives="prompts", read="from_prompt", uses="input", last=True
    ),
}
"""How rows are read. If several formats fit, one with a strict superset of another's fields takes
precedence. Then ``over`` and ``last`` decide, and finally the kind that the stage needs."""

ALIASES = {"openai": "messages"}
"""Alternative names of formats in a recipe."""


def _known(name: str) -> str:
    names = ["auto", *FORMATS, *ALIASES]
    if name not in names:
        known = ", ".join(names)
        raise ValueError(f"found '{name}'; expected one of {known}{suggest(name, names)}")
    return name


def _list_names(schema: dict[str, Any]) -> None:
    schema["enum"] = ["auto", *FORMATS, *ALIASES]


FormatName = Annotated[str, AfterValidator(_known), Field(json_schema_extra=_list_names)]
"""Name of a format, or ``auto`` to detect it."""
