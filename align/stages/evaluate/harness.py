"""Run lm-evaluation-harness on the models of an evaluate stage and compare the results."""

import logging
import shutil
from collections.abc import Mapping
from typing import Any

from align.core import distributed
from align.core.artifacts import Artifact
from align.core.errors import AlignError
from align.evaluation.compare import Record
from align.evaluation.harness import check_harness, harness_argv, read_harness, run_harness
from align.evaluation.verdict import Responses, task_block
from align.recipe.schema import EvaluateStage
from align.stages.base import StageContext

log = logging.getLogger(__name__)


def harness_blocks(
    spec: EvaluateStage, artifacts: Mapping[str, Artifact], context: StageContext
) -> dict[str, dict[str, Any]]:
    """Return the block of summary.json for each harness task; rank 0 runs the harness."""
    if spec.harness is None:
        return {}
    return distributed.on_first_rank(lambda: _ask_all(spec, artifacts, context))


def _ask_all(
    spec: EvaluateStage, artifacts: Mapping[str, Artifact], context: StageContext
) -> dict[str, dict[str, Any]]:
    assert spec.harness is not None
    version = check_harness(spec.harness.python)
    found: dict[str, dict[str, list[Record]]] = {}
    for name, artifact in artifacts.items():
        out = context.out / "harness" / name
        # An interrupted run may have left results of other models there.
        shutil.rmtree(out, ignore_errors=True)
        options = spec.harness.model_dump(exclude={"python"})
        argv = harness_argv(
            spec.harness.python,
            artifact.model_dir.resolve(),
            out / "results",
            dtype=spec.dtype,
            device="cpu" if distributed.device().type == "cpu" else None,
            **options,
        )
        run_harness(argv, out / "log.txt")
        for task, records in read_harness(out / "results", what=name).items():
            found.setdefault(task, {})[name] = records
        log.info("%s: lm-eval %s answered %s", name, version, ", ".join(spec.harness.tasks))
    return {f"lm_eval:{task}": _block(spec, task, models) for task, models in found.items()}


def _block(spec: EvaluateStage, task: str, models: Mapping[str, list[Record]]) -> dict[str, Any]:
    baseline = spec.label(spec.baseline)
    # The harness may skip a task for one model only.
    missing = [spec.label(m) for m in spec.models if spec.label(m) not in models]
    if missing:
        raise AlignError(
            f"lm-eval task {task}: no responses of {', '.join(missing)} in its results"
        )
    answered = {name: Responses(records) for name, records in models.items()}
    metrics = list(models[baseline][0]["scores"])
    block = task_block(answered, baseline=baseline, metrics=metrics, judged={})
    return {"description": "lm-evaluation-harness", **block}
