"""Run a recipe: start each stage as its own process, skip finished stages, resume the others.

The state of a run is stored on disk: a stage is done if its manifest.json contains the hash of the
stage in the current recipe.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from align.core.accelerator import has_gpu, require_device
from align.core.artifacts import LOCK, MANIFEST, read_manifest, write_json_atomic
from align.core.errors import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_PREEMPTED,
    EXIT_USER,
    ArtifactError,
    DeviceError,
    RecipeError,
)
from align.core.extras import TRAINING, require
from align.core.identity import GONE, check_is_stage_folder
from align.core.lock import RUN_LOCK, StageLock, refuse_if_held, wait_for_sign
from align.core.seats import Seat, int_of, seat_of, without_launcher
from align.core.serving import installed_command, serve_line
from align.core.storage import naming
from align.pipeline.first_look import refuse_missing
from align.pipeline.follow import follow
from align.pipeline.following import begin_log, end_log, last_messages
from align.pipeline.hosts import Host, read_hostfile, seat_of_hosts
from align.pipeline.nodes import Party, refuse_other_number, together
from align.pipeline.planning import plan
from align.pipeline.processes import (
    POLL_S,
    STAGE_MODULE,
    Signals,
    StageProcess,
    ended_by_signal,
    exit_reason,
    stage_argv,
    stage_env,
)
from align.pipeline.selection import Choice, Work, work_of
from align.pipeline.spread import Order, SpreadStage
from align.pipeline.summary import add_seconds, forget_seconds, measured_seconds, summarize
from align.pipeline.terminal import Terminal
from align.recipe.load import RECIPE_FILE, Resolved, load_resolved, write_resolved
from align.recipe.schema import Recipe
from align.recipe.schema.tuning import METHODS

GRACE_S = 120.0
"""Seconds that ranks have after a signal to finish their step and save a checkpoint."""
LOG_TAIL = 200
"""Lines of a failed stage's log in which its own message is searched."""
MEMORY_EVERY_S = 2.0
WITHOUT_CHECKPOINTS = ("encoder", "evaluate", "merge", "curate", "weak_label")
"""Kinds of stages that start over after a signal."""


def run(
    recipe_path: Path | str | Recipe | Resolved,
    *,
    overrides: Sequence[str] = (),
    runs: Path | str = "runs",
    run_dir: Path | str | None = None,
    force: bool = False,
    only: str | None = None,
    from_: str | None = None,
    until: str | None = None,
    redo: Sequence[str] = (),
    dry: bool = False,
    module: str = STAGE_MODULE,
    terminal: Terminal | None = None,
    signals: Signals | None = None,
    grace_s: float = GRACE_S,
    hostfile: Path | None = None,
) -> int:
    """Run the stages of a recipe that are not done.

    Args:
        recipe_path: the YAML file, or a loaded recipe; errors of stages show the places in a
            ``Resolved`` one. overrides: ``--set`` texts.
        runs: folder of all runs. run_dir: that of the run; None means ``<runs>/<recipe name>``.
        force: rerun changed stages, those of ``only`` or ``from_``, and all that depend on them.
        only: run only these stages, separated by commas. from_: skip the stages before this one.
        until: skip the stages after this one. dry: show what would run, and start nothing.
        redo: stages that ``force`` reruns too, although nothing selects or changed them.
        module: module that is started for a stage, with its kind and the resolved recipe.
        terminal: where progress is shown; None: standard output. signals: a counter to share.
        grace_s: seconds between forwarding a signal and killing the stage.
        hostfile: machines that run the ranks; None means this one, or those of a launcher.

    Returns:
        The exit code: 0 done, 1 failed, 2 an error that the user can fix, 75 preempted. Every
        process of a launcher returns that of the run.

    Raises:
        AlignError: nothing was started, for the reason in the message.
    """
    seat, others = _seat(None if dry else hostfile)
    if seat is not None and seat.rank > 0:
        return follow(seat)
    with signals or Signals() as signals, together(seat, signals, others) as party:
        recipe, places = _loaded(recipe_path, overrides, runs=Path(runs))
        folder = Path(run_dir or Path(runs) / recipe.name)
        shown = terminal or Terminal()
        given = _Run(recipe, places, folder, shown, signals, module, grace_s, party)
        choice = Choice.of(only=only, from_=from_, until=until, force=force, redo=redo)
        return _run_chosen(given, choice, dry=dry)


def _loaded(
    given: Path | str | Recipe | Resolved, overrides: Sequence[str], *, runs: Path
) -> tuple[Recipe, Mapping[str, str]]:
    """Return the recipe, and the place of each of its values in a file."""
    if isinstance(given, Recipe):
        return given, {}
    found = given if isinstance(given, Resolved) else load_resolved(given, overrides, runs=runs)
    return found.recipe, found.places


def _seat(hostfile: Path | None) -> tuple[Seat | None, list[Host]]:
    """Return the place of this process among those of the ranks, and the hosts to start others on.

    Of several processes that a launcher started, the first (rank 0) runs the recipe.

    Raises:
        DeviceError: a launcher has started the ranks, and there is a hostfile too.
    """
    seat = seat_of(os.environ)
    if hostfile is None or (seat is not None and seat.rank > 0):
        return seat, []
    if seat is not None:
        raise DeviceError(f"--hostfile: {seat.launcher} has started the ranks already. Remove it")
    hosts = read_hostfile(hostfile)
    return seat_of_hosts(hosts), hosts[1:]


def _run_chosen(given: "_Run", choice: Choice, *, dry: bool) -> int:
    """Run or show the chosen stages; the other processes learn the exit code, which is returned."""
    code = _run_dry(given, choice) if dry else _run_locked(given, choice)
    if given.party is not None:
        given.party.code = code
    return code


@dataclass(frozen=True, slots=True)
class _Run:
    """A run in progress: its locked folder, and what every one of its stages is started with."""

    recipe: Recipe
    places: Mapping[str, str]
    folder: Path
    terminal: Terminal
    signals: Signals
    module: str
    grace_s: float
    party: Party | None


def _run_dry(run: _Run, choice: Choice) -> int:
    """Show what the run would do."""
    require_device(run.recipe.device)
    work = work_of(run.recipe, plan(run.recipe, run.folder), choice)
    _look_first(run, work)
    run.terminal.dry_run(run.recipe.name, run.folder, work)
    return EXIT_OK


def _run_locked(run: _Run, choice: Choice) -> int:
    """Lock the run's folder, then run."""
    require_device(run.recipe.device)
    if run.party is not None:
        refuse_other_number(run.recipe, run.party.seat)
    if run.module == STAGE_MODULE:
        require("align run", *TRAINING)
    with naming(run.folder), _locked(run):
        return _run_choice(run, choice)


def _run_choice(run: _Run, choice: Choice) -> int:
    """Plan a run whose folder is locked, run the chosen stages, and finish it."""
    planned = plan(run.recipe, run.folder)
    work = work_of(run.recipe, planned, choice)
    _look_first(run, work)
    left_out = [stage.name for stage, action in work if action == "left out"]
    chosen = [stage for stage in planned if stage.name not in left_out]
    run.terminal.plan(run.recipe, run.folder, chosen, left_out=left_out, places=run.places)
    if (line := _header(run)) is not None:
        run.terminal.line(line)
    code = _run_stages(run, work)
    return code if code != EXIT_OK else _finish(run.recipe, run.folder, run.terminal)


def _look_first(run: _Run, work: Sequence[Work]) -> None:
    """Raise RecipeError if files of a stage that will start are missing, also of the last one."""
    refuse_missing(run.recipe, run.places, run.folder, stages=_starting(work))


def _starting(work: Sequence[Work]) -> list[str]:
    """Return the stages that will start."""
    return [stage.name for stage, action in work if action not in ("keep", "left out")]


def _header(run: _Run) -> str | None:
    """Return which processes train and what has started them; None for a single one."""
    if run.party is not None:
        return run.party.header(run.recipe)
    most = max(spec.ranks for spec in run.recipe.stages.values())
    nodes = int_of(os.environ, "SLURM_JOB_NUM_NODES", 1)
    parts = [f"up to {most} ranks on this machine, started by deepspeed"] if most > 1 else []
    if nodes > 1:
        parts.append(
            f"Slurm has given this job {nodes} machines, of which this run uses one. To use all: "
            "srun align run"
        )
    return "; ".join(parts) or None


def _run_stages(run: _Run, work: Sequence[Work]) -> int:
    """Run the chosen stages in order and return the first exit code that is not 0, else 0."""
    count = len(work)
    # Before any folder is emptied: how long the stages took with the same settings.
    measured = measured_seconds(run.folder, run.recipe)
    waiting = _starting(work)
    for position, (stage, action) in enumerate(work, start=1):
        if action == "left out":
            continue
        if action == "keep":
            run.terminal.skip(stage.name, stage.reason, position=position, count=count)
            continue
        if run.signals.count:
            run.terminal.line(
                f"stopped by a signal before {stage.name}; run the same command again to resume"
            )
            return EXIT_PREEMPTED
        waiting.remove(stage.name)
        later = [measured.get(name) for name in waiting]
        known = None if None in later else sum(s for s in later if s is not None)
        run.terminal.expect(measured.get(stage.name) if action != "resume" else None, known)
        folder = run.folder / stage.name
        _make_ready(run, folder, afresh=action != "resume")
        run.terminal.begin(stage.name, stage.kind, folder, position=position, count=count)
        code = _run_stage(run, stage.name)
        if code != EXIT_OK:
            return code
    return EXIT_OK


def _make_ready(run: _Run, folder: Path, *, afresh: bool) -> None:
    """Write the resolved recipe into a stage's folder, which is emptied if it starts ``afresh``."""
    # Until the run is complete again, no summary is better than an outdated one.
    (run.folder / "summary.json").unlink(missing_ok=True)
    check_is_stage_folder(folder)
    wait_for_sign(folder / LOCK, run.terminal.line, lambda: run.signals.count)
    refuse_if_held(folder)
    if afresh:
        _set_aside(folder)
        forget_seconds(run.folder, folder.name)
    write_resolved(run.recipe, folder / RECIPE_FILE)


def _set_aside(folder: Path) -> None:
    """Make room: a finished artifact is kept as ``<stage>.old`` until the new one is complete."""
    old = folder.with_name(folder.name + ".old")
    if (folder / MANIFEST).is_file():
        _remove(old)
        folder.rename(old)
    else:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a stage's folder, but never one that this suite did not create."""
    if folder.exists():
        check_is_stage_folder(folder)
        shutil.rmtree(folder)


def _run_stage(run: _Run, name: str) -> int:
    spec, terminal, signals = run.recipe.stages[name], run.terminal, run.signals
    folder = run.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    began = time.monotonic()
    begin_log(log, spec.ranks)
    process = _start(run, name, log)
    try:
        code = _watch(process, terminal, signals, grace_s=run.grace_s)
    finally:
        process.close()
    if not folder.is_dir():
        terminal.line(f"{folder}: {GONE}")
        return EXIT_FAILED
    seconds = time.monotonic() - began
    add_seconds(run.folder, name, seconds)
    if code == EXIT_OK and not (folder / MANIFEST).is_file():
        # The launcher exits with 0 if a signal killed its child, so only the manifest is proof.
        code = EXIT_PREEMPTED if signals.count else EXIT_FAILED
    if code == EXIT_OK:
        _remove(folder.with_name(name + ".old"))
        terminal.end(seconds)
        return EXIT_OK
    if code == EXIT_PREEMPTED or (signals.count and ended_by_signal(code)):
        kept = any((folder / "checkpoints").glob("*-*[0-9]"))
        saves = code == EXIT_PREEMPTED and spec.kind not in WITHOUT_CHECKPOINTS
        terminal.preempted(name, saved=kept or saves, code=EXIT_PREEMPTED)
        return EXIT_PREEMPTED
    ended = code if code in (EXIT_FAILED, EXIT_USER) else EXIT_FAILED
    tail = _tail(log, process.log_start)
    reason = process.place + exit_reason(code)
    if not last_messages(tail):
        end_log(log, reason)
    terminal.failed(name, reason, log=log, tail=tail, code=ended)
    return ended


def _start(run: _Run, name: str, log: Path) -> StageProcess | SpreadStage:
    """Start a stage: on every machine of the run, or here if it has one rank."""
    spec, on_gpu, resolved = run.recipe.stages[name], has_gpu(), str(log.parent / RECIPE_FILE)
    arguments = [spec.kind, "--resolved", resolved, "--stage", name]
    arguments += ["--run-dir", str(run.folder)]
    if run.party is not None and spec.ranks > 1:
        share = run.party.seat.local_world
        env = stage_env(ranks=share, threads=spec.threads, on_gpu=on_gpu)
        order = Order(tuple(arguments), spec.ranks, run.module, spec.threads, resolved)
        return SpreadStage(run.party, order, log=log, env=env)
    argv = stage_argv(arguments, ranks=spec.ranks, on_gpu=on_gpu, module=run.module)
    env = stage_env(ranks=spec.ranks, threads=spec.threads, on_gpu=on_gpu)
    env = env if run.party is None else without_launcher(env)
    return StageProcess(argv, env=env, log=log, module=run.module)


def _watch(
    process: StageProcess | SpreadStage, terminal: Terminal, signals: Signals, *, grace_s: float
) -> int:
    """Show progress until the stage ends; forward the first signal and kill on the second.

    A stage whose folder was removed is stopped too.
    """
    deadline = looked = 0.0
    while True:
        code = process.wait(POLL_S)
        if code is None and time.monotonic() - looked > MEMORY_EVERY_S:
            looked = time.monotonic()
            terminal.use_memory(process.memory_gib())
        terminal.update()
        if code is not None:
            return code
        if signals.count or not process.folder.is_dir():
            if not deadline:
                deadline = time.monotonic() + grace_s
                terminal.stopping(grace_s)
            process.ask_to_stop()
        if signals.count > 1 or (deadline and time.monotonic() > deadline):
            process.kill()


def _tail(log: Path, start: int) -> list[str]:
    with log.open("rb") as f:
        f.seek(start)
        return f.read().decode(errors="replace").splitlines()[-LOG_TAIL:]


def _finish(recipe: Recipe, run_dir: Path, terminal: Terminal) -> int:
    """Write summary.json and the report, and show the results of the stages that are done.

    Returns:
        The exit code: 1 if an expectation of the recipe is not met.
    """
    missing = [name for name in recipe.stages if not (run_dir / name / MANIFEST).is_file()]
    summary = summarize(run_dir, done=[x for x in recipe.stages if x not in missing])
    if missing:
        terminal.line(f"not run yet: {', '.join(missing)}")
        if "tasks" not in summary and "expectations" not in summary:
            return EXIT_OK
    write_json_atomic(run_dir / "summary.json", summary)
    from align.report import build_report

    report = build_report(run_dir)
    if line := _serve_line(recipe, run_dir):
        terminal.line(f"serve: {line}")
    terminal.summary(summary, report, order=list(recipe.stages))
    kept = all(entry["holds"] for entry in summary.get("expectations", []))
    return EXIT_OK if kept else EXIT_FAILED


def _serve_line(recipe: Recipe, run_dir: Path) -> str | None:
    """Return the command that serves the last trained policy, None if vLLM could not read one."""
    trained = [name for name, spec in recipe.stages.items() if spec.kind != "base"]
    for name in reversed([name for name in trained if (run_dir / name / MANIFEST).is_file()]):
        manifest = read_manifest(run_dir / name)
        if manifest.get("kind") != "policy":
            continue
        method = (manifest.get("spec", {}).get("tuning") or {}).get("method", "full")
        # With some methods only the weights and the adapter together are the model.
        if method not in METHODS or METHODS[method].peft_type:
            return None
        named = ("--served-model-name", f"{run_dir.resolve().name}-{name}")
        return serve_line(run_dir / name / "model", *named, command=installed_command())
    return None


@contextmanager
def _locked(run: _Run) -> Iterator[None]:
    """Prevent two runs from using one folder, on one machine or on several."""
    run_dir = run.folder
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("w")
    except OSError as e:
        raise ArtifactError(
            f"{run_dir}: cannot be created or written ({e.strerror}). Use another folder with "
            "--runs, or fix its permissions."
        ) from e
    with lock as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(
                f"{run_dir}: another 'align run' is using this folder. Wait for it or use --runs."
            ) from None
        except OSError:  # no such locks on this file system
            pass
        # Such locks may also hold on their own machine only.
        wait_for_sign(run_dir / RUN_LOCK, run.terminal.line, lambda: run.signals.count)
        try:
            held = StageLock(run_dir, RUN_LOCK)
        except ArtifactError:
            raise
        except OSError as e:
            raise ArtifactError(
                f"{run_dir / RUN_LOCK}: cannot be written ({e.strerror}). Make room for it, or use "
                "another folder with --runs."
            ) from e
        try:
            yield
        finally:
            held.release()
