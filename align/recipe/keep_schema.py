"""Schema of the keep block: what a training stage does against forgetting and over-fitting."""

from typing import Annotated

from pydantic import Field

from align.recipe.parts import Count, DataSpec, Positive, Spec, refuse_answers

Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
WATCHED = {
    "sft": ("eval/loss",),
    "dpo": ("eval/loss", "eval/accuracy", "eval/margin", "eval/chosen_logprob"),
    "kto": ("eval/loss", "eval/kl", "eval/good_reward", "eval/bad_reward"),
    "reward": ("eval/loss", "eval/accuracy"),
    "classify": ("eval/loss", "eval/accuracy"),
}
"""Numbers that each kind of stage measures on its held-out rows."""


class EarlyStoppingSpec(Spec):
    """End the stage when a held-out number no longer gets better; the best weights are kept."""

    metric: str = "eval/loss"
    """A loss is better when lower, everything else when higher."""
    patience: Count = 3
    """Evaluations in a row without a gain, after which the stage ends."""
    min_delta: Annotated[float, Field(ge=0.0)] = 0.0
    """Smallest gain that counts, in the metric's unit."""


class EwcSpec(Spec):
    """Pull weights that an old task needs back to where they were (arXiv:1612.00796 eq. 3)."""

    coef: Positive
    """Lambda. The Fisher information is scaled to mean 1, so 1 is a plain L2 pull of 1/2."""
    data: list[DataSpec] = Field(min_length=1)
    """Supervised rows of the old task; each costs one backward pass before the first step."""
    cap: Annotated[float, Field(gt=1.0)] = 10.0
    """Largest Fisher information of a weight, in units of the mean."""


class AugmentSpec(Spec):
    """Reword what the user says, anew in each epoch; answers are never touched."""

    word_dropout: Rate = 0.0
    """Chance of each word of a user turn to be left out; one word always stays."""
    templates: list[str] = []
    """Frames around a user turn, each with ``{text}`` once; one is drawn for each row."""


class KeepSpec(Spec):
    """Gather what keeps a model from forgetting and from over-fitting; all off by default."""

    dropout: Rate = 0.0
    early_stopping: EarlyStoppingSpec | None = None
    ewc: EwcSpec | None = None
    augment: AugmentSpec | None = None


def refuse_unfit(keep: KeepSpec, kind: str, *, method: str, watched: bool) -> None:
    """Raise ValueError for a setting that has no effect, or a wrong one, in this kind of stage.

    Args:
        keep: the block. kind: ``sft``, ``reward``, ``classify``, ``dpo``, ``kto`` or ``online``.
        method: of ``tuning``. watched: the stage looks at held-out rows while it trains.
    """
    if kind in ("dpo", "kto", "online") and keep.dropout > 0.0:
        raise ValueError("keep.dropout would make the policy differ from its reference by chance")
    if keep.early_stopping is not None:
        _refuse_stopping(keep.early_stopping, kind, watched=watched)
    if keep.ewc is not None:
        _refuse_ewc(keep.ewc, kind, method)
    if keep.augment is not None:
        _refuse_augment(keep.augment, kind)


def _refuse_stopping(stopping: EarlyStoppingSpec, kind: str, *, watched: bool) -> None:
    if kind not in WATCHED:
        raise ValueError(
            "keep.early_stopping watches held-out rows; an online stage is watched and stopped by "
            "'watch' with 'guard'"
        )
    if stopping.metric not in WATCHED[kind]:
        raise ValueError(
            f"keep.early_stopping.metric: found '{stopping.metric}'; a {kind} stage measures "
            + ", ".join(WATCHED[kind])
        )
    if not watched:
        raise ValueError("keep.early_stopping needs 'heldout' rows and 'eval_every' of 1 or more")


def _refuse_ewc(ewc: EwcSpec, kind: str, method: str) -> None:
    if kind in ("reward", "classify"):
        raise ValueError(
            f"keep.ewc protects what a language model says; a {kind} stage gives it up for a score"
        )
    if method != "full":
        raise ValueError(
            f"keep.ewc pulls the weights of the model back, which {method} tuning leaves as they "
            "are; use full tuning, or remove it"
        )
    refuse_answers(ewc.data, "ewc")


def _refuse_augment(augment: AugmentSpec, kind: str) -> None:
    if kind != "sft":
        raise ValueError(
            f"keep.augment rewords the rows of an sft stage anew in each epoch; a {kind} stage "
            "takes its rows as they stand; remove it"
        )
    if augment == AugmentSpec():
        raise ValueError("keep.augment changes nothing; give word_dropout or templates")
    for template in augment.templates:
        if template.count("{text}") != 1:
            raise ValueError(f"keep.augment.templates: {template!r} must hold {{text}} once")
