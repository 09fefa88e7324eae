"""Select the stages that a run starts, keeps or leaves out; nothing is read or written here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from align.core.errors import RecipeError
from align.core.text import suggest
from align.pipeline.planning import PlannedStage
from align.recipe.schema import Recipe

Action = Literal["run", "run again", "resume", "keep", "left out"]
Work = tuple[PlannedStage, Action]
"""A stage, and what the run does with it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The options of ``align run`` that select stages.

    Attributes:
        only: run these stages; empty for all.
        from_: skip the stages before this one.
        until: skip the stages after this one.
        force: rerun changed and named stages.
        redo: stages that ``force`` reruns beside these; they select nothing.
    """

    only: tuple[str, ...] = ()
    from_: str | None = None
    until: str | None = None
    force: bool = False
    redo: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        *,
        only: str | None,
        from_: str | None,
        until: str | None,
        force: bool,
        redo: Sequence[str] = (),
    ) -> "Choice":
        """Return the choice of the options as they are written; ``only`` is ``a,b``."""
        names = tuple(name.strip() for name in (only or "").split(",") if name.strip())
        return cls(names, from_ or None, until or None, force, tuple(redo))

    @property
    def named(self) -> tuple[str, ...]:
        """Return the stages that ``force`` reruns although nothing changed."""
        return (*self.redo, *(self.only or ((self.from_,) if self.from_ else ())))


class NothingChanged(RecipeError):
    """``force`` has no effect: every selected stage is done, unchanged and not named."""


def work_of(recipe: Recipe, planned: Sequence[PlannedStage], choice: Choice) -> list[Work]:
    """Return every stage of a plan with what the run does with it.

    Raises:
        RecipeError: a stage does not exist, needs one that is neither done nor selected, or has
            changed and ``force`` is off. NothingChanged, where ``force`` has no effect.
    """
    chosen = _select(recipe, planned, choice)
    again = _redone(recipe, planned, chosen, choice=choice)
    return [(stage, _action(stage, chosen=chosen, again=again)) for stage in planned]


def _action(stage: PlannedStage, *, chosen: Sequence[str], again: set[str]) -> Action:
    if stage.name not in chosen:
        return "left out"
    if stage.name in again:
        return "run again"
    return "keep" if stage.status == "done" else "run" if stage.status == "to do" else "resume"


def _select(recipe: Recipe, planned: Sequence[PlannedStage], choice: Choice) -> list[str]:
    names = list(recipe.stages)
    if choice.only and (choice.from_ or choice.until):
        raise RecipeError(
            "--only cannot be combined with --from or --until. Use --only, or the other two."
        )
    for named in (*choice.only, choice.from_, choice.until):
        if named and named not in names:
            raise RecipeError(
                f"no stage '{named}'; stages are {', '.join(names)}{suggest(named, names)}"
            )
    first = names.index(choice.from_) if choice.from_ else 0
    last = names.index(choice.until) if choice.until else len(names) - 1
    if first > last:
        raise RecipeError(
            f"--from {choice.from_} comes after --until {choice.until}, so no stage is left. "
            "Exchange them."
        )
    chosen = [n for n in names if n in choice.only] if choice.only else names[first : last + 1]
    done = {stage.name for stage in planned if stage.status == "done"}
    for name in chosen:
        for key, reference in recipe.inputs(name).items():
            if reference in names and reference not in chosen and reference not in done:
                raise RecipeError(
                    f"stages.{name}.{key}: needs '{reference}', which is not done. "
                    f"Remove --only or --from, or use --from {reference}."
                )
    return chosen


def _redone(
    recipe: Recipe, planned: Sequence[PlannedStage], chosen: Sequence[str], *, choice: Choice
) -> set[str]:
    """Return the stages whose earlier results are to be replaced."""
    changed = [s for s in planned if s.name in chosen and s.status == "changed"]
    if not choice.force:
        if changed:
            lines = [f"{s.name}: changed since it ran: {s.reason}" for s in changed]
            advice = (
                "to replace these results, add --force (in Python: force=True); to keep them, "
                "change the recipe's name (in Python: out=)"
            )
            raise RecipeError("\n".join([*lines, advice]))
        return set()
    # A stage is also rerun if any stage it depends on is rerun.
    again = {s.name for s in changed} | set(choice.named)
    for name in chosen:
        if any(reference in again for reference in recipe.inputs(name).values()):
            again.add(name)
    if not again and all(s.status == "done" for s in planned if s.name in chosen):
        first = next(iter(recipe.stages))
        raise NothingChanged(
            f"--force: no stage changed. Select one with --only STAGE, or all with --from {first}."
        )
    return again
