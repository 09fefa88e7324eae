"""Schema of the classifier stages: bring an encoder in, and put a classifying head on a model."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from align.recipe.offline_schema import OfflineStage, StageSpec


class EncoderStage(StageSpec):
    """Bring in an encoder such as BERT, which cannot generate: for classify and reward stages."""

    kind: Literal["encoder"]
    path: str
    """Folder or hub id in the format of transformers."""


class ClassifyStage(OfflineStage):
    """Sort texts into classes with a new head on a decoder or an encoder."""

    new_head: ClassVar[str | None] = "classify"
    kind: Literal["classify"]
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of each target spread evenly over the classes (arXiv:1512.00567 section 7)."""
