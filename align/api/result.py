"""A run folder in Python: its stages, metrics, samples, models and summary."""

import importlib.util
from collections.abc import Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from align.core.artifacts import read_json_object, read_manifest
from align.core.errors import ArtifactError
from align.core.extras import require
from align.pipeline.progress import clock, make_console, metric_text
from align.report.read import RunRecord, StageRecord, read_run
from align.report.results import result_lines

if TYPE_CHECKING:
    import pandas

MODELS = ("policy", "reward_model", "classifier", "encoder")
"""Kinds of artifacts with a model."""


class Run:
    """A run folder; its files are read again at each call, so it follows a run in progress.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        states = ", ".join(f"{stage.name} {stage.status}" for stage in self.stages.values())
        return f"Run({str(self.path)!r}: {states})"

    @property
    def stages(self) -> dict[str, StageRecord]:
        """Return the stages by name: kind, status, manifest, metrics, samples, seconds."""
        return {stage.name: stage for stage in self._record().stages}

    @property
    def summary(self) -> Mapping[str, Any]:
        """Return the evaluation's results and each stage's cost; empty until the run is done."""
        return self._record().summary

    def metrics(self, stage: str | None = None) -> "pandas.DataFrame | list[dict[str, Any]]":
        """Return the logged metrics, one row per step; the column ``stage`` names the stage.

        Args:
            stage: only this stage.

        Returns:
            A DataFrame, or a list of dictionaries if pandas is not installed.
        """
        return _table(
            {"stage": part.name, **row} for part in self._chosen(stage) for row in part.metrics
        )

    def samples(self, stage: str | None = None) -> "pandas.DataFrame | list[dict[str, Any]]":
        """Return the logged samples (prompt, completion, score ...) like ``metrics``."""
        return _table(
            {"stage": part.name, **row} for part in self._chosen(stage) for row in part.samples
        )

    def model(self, stage: str | None = None, **options: object) -> tuple[Any, Any]:
        """Load the model of a stage with transformers.

        Args:
            stage: name of the stage; None for the last one with a model.
            options: arguments of ``from_pretrained``, such as ``device_map`` or ``dtype``.

        Returns:
            The model and its tokenizer.

        Raises:
            ArtifactError: the stage has no model that transformers loads, or is not finished.
        """
        folder = self.path / self._chosen(stage)[0].name if stage else self.last_model()
        kind, place = read_manifest(folder).get("kind"), folder / "model"
        config = read_json_object(place / "config.json") or {}
        (name, *_) = config.get("architectures") or [""]
        require("Run.model", "torch", "transformers")
        import transformers

        from align.tuning.files import unmerged_adapter, with_adapter

        scores = name.endswith("ForSequenceClassification") and unmerged_adapter(place) is None
        if kind == "policy":
            loader: Any = transformers.AutoModelForCausalLM
        elif scores:
            loader = transformers.AutoModelForSequenceClassification
        else:
            raise ArtifactError(
                f"{folder}: is a {kind} that no class of transformers loads; score with a reward "
                "model by align.rewards.build(align.rewards.scalar(model=...))"
            )
        options = {"trust_remote_code": False, **options}
        model = loader.from_pretrained(str(place), **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(place), trust_remote_code=False)
        return with_adapter(model, place).eval(), tokenizer

    def last_model(self) -> Path:
        """Return the folder of the last finished stage that wrote a model.

        Raises:
            ArtifactError: no stage has one.
        """
        for stage in reversed(self._record().stages):
            if stage.manifest.get("kind") in MODELS:
                return self.path / stage.name
        raise ArtifactError(f"{self.path}: no finished stage with a model in it")

    def save_recipe(self, path: Path | str) -> Path:
        """Write the recipe of this run, which ``align run`` and ``align.run`` read.

        It contains the keys that differ from their defaults.

        Returns:
            The path.
        """
        from align.recipe.plain import write_short

        write_short(self._record().recipe, Path(path))
        return Path(path)

    def show(self) -> None:
        """Write the state of each stage and the results to standard output."""
        self._write(make_console())

    def _repr_html_(self) -> str:
        """Return the same for a notebook."""
        console = Console(file=StringIO(), record=True, width=100, force_jupyter=False)
        self._write(console)
        return console.export_html(code_format="<pre>{code}</pre>", inline_styles=True)

    def _write(self, console: Console) -> None:
        record = self._record()
        table = Table(title=str(self.path), title_justify="left", box=None, show_header=False)
        for stage in record.stages:
            seconds = "" if stage.seconds is None else clock(stage.seconds)
            last = stage.manifest.get("metrics") or (stage.metrics or [{}])[-1]
            table.add_row(stage.name, stage.kind, stage.status, seconds, metric_text(last))
        console.print(table)
        order = list(record.recipe.stages)
        if record.summary.get("stages"):
            for part in result_lines(record.summary, order=order, width=console.width):
                console.print(part)

    def _record(self) -> RunRecord:
        return read_run(self.path)

    def _chosen(self, stage: str | None) -> list[StageRecord]:
        found = self.stages
        if stage is None:
            return list(found.values())
        if stage not in found:
            raise ArtifactError(f"{self.path}: no stage '{stage}'; it has {', '.join(found)}")
        return [found[stage]]


def _table(rows: Iterable[object]) -> Any:
    found = list(rows)
    if importlib.util.find_spec("pandas") is None:
        return found
    import pandas

    return pandas.DataFrame(found)
