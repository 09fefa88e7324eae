"""The stage process: read the recipe, join the ranks, run the stage, write the manifest last."""

import argparse
import logging
import resource
import shutil
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from align.core import checkpoints, distributed
from align.core.artifacts import (
    FAILURE,
    MANIFEST,
    Artifact,
    file_sha256,
    read_artifact,
    read_manifest,
    spec_hash,
    write_manifest,
)
from align.core.errors import EXIT_FAILED, EXIT_OK, EXIT_PREEMPTED, AlignError, ArtifactError
from align.core.extras import without_collections
from align.core.identity import (
    changed_file,
    check_is_stage_folder,
    plain,
    record_begun,
)
from align.core.lock import StageLock
from align.core.log import MetricsLog, setup_logging
from align.core.model_card import write_card
from align.core.rank_failures import LOST, announce, announced, stop_watching, watch_ranks
from align.core.sinks import Tracking
from align.core.storage import storage_problem
from align.core.text import hidden, visible
from align.data.reading import read_log
from align.data.reading.provenance import file_records, hub_revisions, named_files, shared_files
from align.data.reading.sources import parse_once
from align.data.render.chat import ChatFormat
from align.data.token_view import View
from align.preflight.checks import Check, keep_card, run_checks
from align.recipe.load import RECIPE_FILE, load_recipe, read_resolved, write_resolved
from align.recipe.schema import DataSpec, EvaluateStage, Recipe, Spec, StageSpec
from align.stages.earlier import LAYOUT, is_finished, may_reshard, refuse_other_checkpoints
from align.tuning.files import refuse_unmerged
from align.tuning.light_peft import import_peft

log = logging.getLogger(__name__)
DATA_FILE = "data.jsonl"
"""Output of a data stage, one row per line."""
LEDGER_FILE = "ledger.jsonl"
"""One line per dropped row: its source, the reason and the value that decided."""


@dataclass(frozen=True, slots=True)
class StageContext:
    """Context of a stage: its recipe, output folder, inputs and seed."""

    recipe: Recipe
    name: str
    run_dir: Path
    seed: int
    scratch: Path | None = None
    """Output folder when only the preflight runs; None for a real run."""
    resources: ExitStack = field(default_factory=ExitStack)
    """Resources of the stage, such as its engine; closed when the stage ends for any reason."""

    @property
    def out(self) -> Path:
        """Output folder of the stage."""
        return self.scratch or self.run_dir / self.name

    @property
    def check_only(self) -> bool:
        """Whether only the preflight runs (``align check --deep``)."""
        return self.scratch is not None

    @property
    def ledger(self) -> Path | None:
        """File for dropped rows; None if this process does not write one."""
        return None if self.check_only or distributed.rank() else self.out / LEDGER_FILE

    def folder_of(self, reference: str) -> Path:
        """Return the folder that a reference of the recipe names."""
        return self.recipe.folder_of(reference, self.run_dir)

    def artifact(self, reference: str, kind: str, *, with_adapter: bool = False) -> Artifact:
        """Load and verify an artifact that the recipe refers to by stage or by path.

        Args:
            reference: stage name or folder. kind: what the artifact must be.
            with_adapter: True if the caller adds the adapter that ``model/`` may need (see
                align.tuning.files); otherwise an artifact that needs one is an error.
        """
        found = read_artifact(self.folder_of(reference), kind)
        if not with_adapter:
            refuse_unmerged(found.model_dir, f"stage {self.name}")
        return found

    def metrics(self, total_steps: int) -> MetricsLog:
        """Return the metrics log of the stage."""
        found = self.recipe.sinks
        # The models of label noise train as "stage/noise-1", with the settings of their stage.
        config = hidden(self.recipe.stages[self.name.partition("/")[0]].model_dump(mode="json"))
        tracking = Tracking(found.project, found.group, found.tags, config, found.names)
        given = {"sinks": found.chosen, "tracking": tracking, "rank": distributed.rank()}
        return MetricsLog(self.out, total_steps=total_steps, **given)


@dataclass(frozen=True, slots=True)
class StageResult:
    """Results of a finished stage for its manifest."""

    metrics: Mapping[str, float]
    data: Sequence[Mapping[str, Any]] = field(default_factory=list)
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of the manifest."""
    tidy: Callable[[], None] | None = None
    """Deletes what only an unfinished stage needs; rank 0 calls it after the manifest."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A stage whose inputs are loaded and whose parts are built, before training.

    Attributes:
        train: trains, writes the stage's files and returns its results.
        checks: the preflight checks, in order.
        views: returns a few rows token by token, for the report.
        notes: entries of the manifest that are known before the first step.
    """

    train: Callable[[], StageResult]
    checks: Sequence[Check] = ()
    views: Callable[[], Sequence[View]] | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


def chat_format(model_dir: Path) -> ChatFormat:
    """Return the chat format of a saved model: its tokenizer, template and stop tokens."""
    from align.models.loading import load_tokenizer, stop_token_ids

    return ChatFormat(load_tokenizer(model_dir), stop_token_ids=stop_token_ids(model_dir))


def main() -> NoReturn:
    """Run the stage named on the command line and exit with its code."""
    args = _arguments()
    distributed.install()
    try:
        code = run_stage(args.kind, args)
    except (distributed.StoppedNow, Exception) as e:
        if isinstance(e, Exception):
            announce(e)
        code = _ended(e, args)
    stop_watching()
    distributed.defer_stop()
    if code == EXIT_OK:
        distributed.shutdown()
    distributed.end_process(code)


def _ended(error: BaseException, args: argparse.Namespace) -> int:
    # Libraries in C and Rust (torch, pydantic) replace StoppedNow by errors of their own.
    if distributed.is_stopping():
        log.warning("%s: stopped by a signal. Run the same command again to resume", args.kind)
        return EXIT_PREEMPTED
    if isinstance(error, AlignError):
        setup_logging(distributed.rank())
        # By this level, align runs tells a stop by a signal from a failure.
        (log.warning if error.exit_code == EXIT_PREEMPTED else log.error)("%s", error)
        return error.exit_code
    log.error("%s", _last_words(error, args))
    return EXIT_FAILED


def _last_words(error: BaseException, args: argparse.Namespace) -> str:
    """Return one line for an unexpected error; its traceback is written to a file."""
    folder = Path(args.run_dir or args.runs) / (args.stage or args.kind)
    if (problem := storage_problem(error, folder)) is not None:
        return problem
    told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if distributed.lost_a_rank(error):
        return f"{LOST} ({told})"
    text = "".join(traceback.format_exception(error))
    place = folder / FAILURE
    try:
        place.write_text(visible(text), encoding="utf-8", errors="backslashreplace")
    except OSError:
        return text
    remedy = "'align doctor --report' writes what a bug report needs"
    if type(error).__name__ == "OutOfMemoryError":
        remedy = "lower micro_tokens; docs/how-to/memory.md has more"
    return f"stage {args.stage or args.kind} failed: {told}. The traceback is in {place}; {remedy}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m align.stages", description="Run one stage.")
    parser.add_argument("kind", help="kind of the stage, such as sft")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--recipe", help="YAML file, or the name of a shipped recipe")
    source.add_argument("--resolved", help="resolved recipe, as written by align run")
    parser.add_argument("--stage", help="stage name; default: the only one of this kind")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--run-dir", help="folder of the run; default: RUNS/<recipe name>")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--force", action="store_true", help="run a finished stage again")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by the launcher")
    return parser.parse_args()


def run_stage(kind: str, args: argparse.Namespace) -> int:
    """Run one stage in this process and return the exit code; call it once per process."""
    began = time.monotonic()
    handed = args.resolved is not None
    given = (args.recipe, args.overrides)
    recipe = read_resolved(args.resolved) if handed else load_recipe(*given, runs=args.runs)
    name = args.stage or _only_stage(recipe, kind)
    spec = recipe.stages.get(name)
    if spec is None or spec.kind != kind:
        found = f"kind '{spec.kind}'" if spec else f"only {', '.join(recipe.stages)}"
        raise ArtifactError(f"{recipe.name}: stage '{name}' of kind '{kind}' expected, {found}")
    # From here on all ranks take part.
    distributed.init_process_group(deterministic=recipe.deterministic, device=recipe.device)
    distributed.check_ranks(name, spec.ranks)
    watch_ranks()
    setup_logging(distributed.rank())
    run_dir = Path(args.run_dir or args.runs / recipe.name)
    context = StageContext(recipe, name, run_dir, recipe.seed_of(name))
    manifest = _manifest_head(context, spec)
    # A finished stage with the same identity is skipped.
    identity = distributed.on_first_rank(lambda: _begin(context, manifest, force=args.force))
    if identity is None:
        return EXIT_OK
    if not handed and distributed.rank() == 0:
        write_resolved(recipe, context.out / RECIPE_FILE)
    try:
        _run(kind, context, manifest=manifest | {"identity": identity}, began=began)
    finally:
        _release()
    return EXIT_OK


def _run(kind: str, context: StageContext, *, manifest: Mapping[str, Any], began: float) -> None:
    """Run the stage, and write its manifest last."""
    spec, identity = context.recipe.stages[context.name], manifest["identity"]
    checkpoints.belong_to(identity, any_layout=may_reshard(spec))
    read_log.expect({path: record["sha256"] for path, record in identity["files"].items()})
    distributed.seed_everything(context.seed)
    result = prepare_and_train(spec, context)
    distributed.barrier()
    peak = distributed.gather_objects(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)

    def finish() -> None:
        # While the stage ran, its folder may have been removed or taken over by another process.
        checkpoints.check_stage_is_ours(context.out)
        if spec.imports_model:
            _refuse_changes(context, identity)
        found = {**manifest, **result.notes, "metrics": dict(result.metrics)}
        if changes := checkpoints.resharded():
            found["resharded"] = changes
        found["data"], found["peak_rss_gib"] = list(result.data), round(sum(peak), 3)
        write_card(context.out, found, context.folder_of)
        found["seconds"] = round(time.monotonic() - began, 2)
        write_manifest(context.out, found)
        if result.tidy is not None:
            result.tidy()
        log.info("%s: done in %.0f s", context.name, time.monotonic() - began)

    distributed.on_first_rank(finish)


def _refuse_changes(context: StageContext, identity: Mapping[str, Any]) -> None:
    """Raise ArtifactError if the stage's model folder or template changed since it started."""
    spec = context.recipe.stages[context.name]
    found = named_files(spec, context.recipe.inputs(context.name))
    difference = changed_file(identity["files"], found)
    if difference is not None:
        raise ArtifactError(f"{context.name}: {difference} the stage began; run it again")


def _only_stage(recipe: Recipe, kind: str) -> str:
    names = [name for name, spec in recipe.stages.items() if spec.kind == kind]
    if len(names) != 1:
        raise ArtifactError(
            f"recipe '{recipe.name}' has {len(names)} stages of kind '{kind}' "
            f"({', '.join(names) or 'none'}). Choose one with --stage"
        )
    return names[0]


def _manifest_head(context: StageContext, spec: StageSpec) -> dict[str, Any]:
    inputs, hashes = {}, {}
    for key, reference in context.recipe.inputs(context.name).items():
        path = context.folder_of(reference)
        upstream = read_manifest(path)
        inputs[key] = {
            "path": str(reference),
            "spec_hash": upstream.get("spec_hash", ""),
            "manifest_sha256": file_sha256(path / MANIFEST),
        }
        is_stage = reference in context.recipe.stages
        hashes[key] = inputs[key]["spec_hash"] if is_stage else reference
    settings = spec.settings()
    free = {key: value for key, value in settings.items() if key not in LAYOUT}
    return {
        "kind": spec.produces,
        "stage": context.name,
        "stage_kind": spec.kind,
        "spec": hidden(spec.model_dump(mode="json")),
        "spec_hash": spec_hash(settings, seed=context.seed, inputs=hashes),
        "layout_free": spec_hash(free, seed=context.seed, inputs=hashes),
        "inputs": inputs,
        "seed": context.seed,
        "ranks": distributed.world_size(),
    }


_lock: StageLock | None = None


def _begin(
    context: StageContext, manifest: Mapping[str, Any], *, force: bool
) -> dict[str, Any] | None:
    """Lock the stage's folder and record the identity of its inputs; only rank 0 calls this.

    Returns:
        The stage's identity; None if it is finished.

    Raises:
        ArtifactError: the folder is not a stage folder, another process is using it, or it
            contains results of a different recipe.
    """
    global _lock
    check_is_stage_folder(context.out)
    context.out.mkdir(parents=True, exist_ok=True)
    _lock = StageLock(context.out)
    try:
        inputs, spec = context.recipe.inputs(context.name), context.recipe.stages[context.name]
        identity = plain(
            {key: manifest[key] for key in ("spec_hash", "layout_free", "inputs")}
            | {
                "files": file_records(named_files(spec, inputs)),
                "hub": hub_revisions(spec),
            }
        )
        if force:
            (context.out / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(context.out / "checkpoints", ignore_errors=True)
        elif is_finished(context.out, identity):
            _release()
            return None
        else:
            refuse_other_checkpoints(context.out, identity, any_layout=may_reshard(spec))
        # Rows are appended to the ledger, and those of the attempt before would stand in it twice.
        (context.out / LEDGER_FILE).unlink(missing_ok=True)
        record_begun(context.out, identity)
    except BaseException:
        _release()
        raise
    return identity


def _release() -> None:
    """Release the lock, and what binds this process to the stage's files and checkpoints."""
    global _lock
    read_log.expect(None)
    checkpoints.belong_to(None)
    if _lock is not None:
        _lock.release()
        _lock = None


def with_data_of_stages(spec: object, context: StageContext) -> Any:
    """Return the spec with each data source's ``stage`` replaced by the path of its data."""
    if isinstance(spec, DataSpec):
        if spec.stage is None:
            return spec
        path = context.artifact(spec.stage, "data").path / DATA_FILE
        return spec.model_copy(update={"stage": None, "path": str(path)})
    if isinstance(spec, list):
        return [with_data_of_stages(item, context) for item in spec]
    if not isinstance(spec, Spec):
        return spec
    found = {name: getattr(spec, name) for name in type(spec).model_fields}
    return spec.model_copy(update={k: with_data_of_stages(v, context) for k, v in found.items()})


def prepare_stage(spec: StageSpec, context: StageContext) -> Prepared:
    """Call ``prepare`` of the stage kind's module, which loads inputs and builds the parts."""
    spec = with_data_of_stages(spec, context)
    # Prompts of evaluate stages are compared with the training rows.
    others = [s for n, s in context.recipe.stages.items() if n != context.name]
    evaluated = [s for s in others if isinstance(s, EvaluateStage)]
    # Imported by name: one kind must not load the libraries of all others.
    log.info("reading data and building the %s stage", spec.kind)
    with without_collections():
        import_peft()
        module = import_module(spec.module)
    with parse_once(shared_files([spec, *evaluated])):
        return module.prepare(spec, context)


def prepare_and_train(spec: StageSpec, context: StageContext) -> StageResult:
    """Prepare a stage, run its preflight checks, write their card, and train.

    Raises:
        PreflightError: a check failed; nothing was trained.
    """
    with context.resources, announced():
        prepared = prepare_stage(spec, context)
        if prepared.checks:
            card = run_checks(context.name, spec.kind, prepared.checks)
            keep_card(card, context.out, views=prepared.views)
        result = prepared.train()
    return replace(result, notes={**prepared.notes, **result.notes})
