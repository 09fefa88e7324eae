"""The command line: check, show, run, eval, report, chat, doctor. It imports nothing heavy."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperOption
from typer.models import CommandInfo, TyperInfo

from align.cli.cache import cache
from align.cli.data import data, explain
from align.cli.errors import fit_to_locale, print_error
from align.cli.evaluate import calibrate, eval_
from align.cli.examples import EXAMPLES
from align.cli.export import export, push
from align.cli.labels import labels
from align.cli.options import MODEL_HELP, Runs
from align.cli.reward import reward
from align.cli.runs import logs, open_, runs_
from align.cli.serve import serve
from align.cli.start import import_, init, recipes
from align.core.errors import EXIT_FAILED, EXIT_USER, AlignError, RecipeError
from align.core.failure import last_words, path_problem
from align.core.text import visible

EPILOG = """\
A first run: align run quickstart

Your model and data: align init --model ORG/NAME --data rows.jsonl, then align check, align run and
align open
"""
"""Examples below the list of commands."""

cli = typer.Typer(
    name="align",
    help="Post-training for language models: SFT, reward models, DPO, PPO, GRPO from one recipe.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    from align import __version__

    if wanted:
        typer.echo(f"align {__version__}")
        raise typer.Exit


@cli.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="print the version"),
    ] = False,
) -> None:
    """Post-training for language models: SFT, reward models, DPO, PPO, GRPO from one recipe."""


cli.add_typer(data, name="data")
cli.add_typer(reward, name="reward")
cli.add_typer(labels, name="labels")
cli.command()(explain)
cli.command("import")(import_)
cli.command()(init)
cli.command()(recipes)
cli.command()(cache)

RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="YAML file, or name of a shipped recipe")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="such as ppo.kl.coef=0.1; repeatable"),
]


@cli.command()
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="print the page docs/recipe-keys.md instead")
    ] = False,
) -> None:
    """Print the JSON schema of recipes, for editors and other tools."""
    from align.recipe import reference

    shown = json.dumps(reference.json_schema(), indent=1) + "\n"
    typer.echo(reference.markdown() if markdown else shown, nl=False)


@cli.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="also test rows, models and rewards, without training")
    ] = False,
    only: Annotated[
        str | None, typer.Option("--only", metavar="STAGE", help="deep check of this stage only")
    ] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Validate a recipe and list every error with its line number."""
    from align.pipeline.first_look import first_look
    from align.recipe.advice import warnings
    from align.recipe.load import load_resolved

    resolved = load_resolved(recipe, overrides or (), runs=runs)
    loaded = resolved.recipe
    look = first_look(loaded, resolved.places, runs / loaded.name)
    if look.problems:
        raise RecipeError("\n".join(look.problems))
    names = ", ".join(loaded.stages)
    typer.echo(visible(f"{recipe}: valid, {len(loaded.stages)} stages: {names}"))
    for line in (*warnings(loaded), *look.warnings):
        typer.echo(visible(f"{recipe}: warning: {line}"))
    for line in look.closing_lines():
        typer.echo(visible(line))
    if deep or only:
        from align.cli.deep import check_deeply

        check_deeply(loaded, resolved.places, runs / loaded.name, only=only)


@cli.command()
def show(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Print a recipe with all defaults, their origins and the plan, or all results of a RUN."""
    if recipe.is_dir():
        from align.pipeline.terminal import read_results, show_results

        if as_json:
            typer.echo(json.dumps(read_results(recipe), indent=2))
        else:
            show_results(recipe)
        return
    from align.pipeline.planning import plan
    from align.pipeline.terminal import plan_lines
    from align.recipe.load import load_resolved
    from align.recipe.show import resolved_json, resolved_yaml

    resolved = load_resolved(recipe, overrides or (), runs=runs)
    run_dir = runs / resolved.recipe.name
    if as_json:
        planned = [asdict(stage) for stage in plan(resolved.recipe, run_dir)]
        shown = {**resolved_json(resolved), "run_dir": str(run_dir), "plan": planned}
        typer.echo(json.dumps(shown, indent=2))
        return
    typer.echo(visible(resolved_yaml(resolved)))
    typer.echo(visible(f"plan for {run_dir}:"))
    for line in plan_lines(plan(resolved.recipe, run_dir)):
        typer.echo(visible("  " + line))


@cli.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    force: Annotated[
        bool, typer.Option("--force", help="rerun changed or named stages, and all later ones")
    ] = False,
    only: Annotated[
        str | None, typer.Option("--only", metavar="A,B", help="run these stages only")
    ] = None,
    from_: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="start at this stage")
    ] = None,
    until: Annotated[
        str | None, typer.Option("--until", metavar="STAGE", help="end after this stage")
    ] = None,
    dry: Annotated[
        bool,
        typer.Option("--dry-run", help="show what would run, without starting or writing anything"),
    ] = False,
    grace: Annotated[
        float,
        typer.Option(
            "--grace", metavar="S", min=1.0, help="seconds that stages have to save after a signal"
        ),
    ] = 120.0,
    hostfile: Annotated[
        Path | None,
        typer.Option("--hostfile", metavar="FILE", help="machines, one per line: node1 slots=8"),
    ] = None,
) -> None:
    """Run all unfinished stages; an interrupted stage resumes from its checkpoint."""
    from align.pipeline.running import run as run_recipe

    code = run_recipe(
        recipe,
        overrides=overrides or (),
        runs=runs,
        force=force,
        only=only,
        from_=from_,
        until=until,
        dry=dry,
        grace_s=grace,
        hostfile=hostfile,
    )
    raise typer.Exit(code)


@cli.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", min=1, help="ranks of every stage (default: the recipe's)"),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option("--memory", min=0.1, help="GiB of one GPU (default: this machine's)"),
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", metavar="STAGE", help="plan this stage only")
    ] = None,
    runs: Runs = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Predict memory and disk space of each training stage; exit code 2 if one does not fit."""
    from align.pipeline.processes import run_tool

    options = ["--runs", str(runs), *(word for text in overrides or () for word in ("--set", text))]
    options += [] if gpus is None else ["--gpus", str(gpus)]
    options += [] if memory is None else ["--memory", str(memory)]
    options += [] if only is None else ["--only", only]
    raise typer.Exit(run_tool("plan", [str(recipe), *options, *(["--json"] if as_json else [])]))


@cli.command(hidden=True)
def stages(recipe: RecipePath, overrides: Overrides = None, runs: Runs = Path("runs")) -> None:
    """Print the recipe's name, then 'name kind ranks' of each stage; used by launch/chain.sh."""
    from align.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or (), runs=runs)
    typer.echo(loaded.name)
    for name, spec in loaded.stages.items():
        typer.echo(f"{name} {spec.kind} {spec.ranks}")


@cli.command()
def verify(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="runs/<recipe>")],
) -> None:
    """Verify every file of every finished stage, and its inputs, against the manifest."""
    from align.pipeline.verify import verify_run

    lines, whole = verify_run(run_dir)
    for line in lines:
        typer.echo(visible(line))
    raise typer.Exit(0 if whole else EXIT_USER)


@cli.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="runs/<recipe>")],
    others: Annotated[
        list[Path] | None, typer.Argument(metavar="OTHER", help="runs to compare with it")
    ] = None,
) -> None:
    """Rebuild report.html of a run, or build a page that compares runs."""
    from align.report import build_comparison, build_report

    page = build_comparison(run_dir, *others) if others else build_report(run_dir)
    typer.echo(visible(str(page)))


@cli.command()
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    temperature: Annotated[
        float, typer.Option(min=0.0, help="sampling temperature; 0 is greedy")
    ] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens per response")] = 256,
    seed: Annotated[int, typer.Option(help="random seed for sampling")] = 0,
    runs: Runs = Path("runs"),
) -> None:
    """Chat with a model; /reset starts a new conversation, /quit exits."""
    from align.core.artifacts import find_model
    from align.pipeline.processes import run_tool

    options = ["--temperature", str(temperature), "--max-new-tokens", str(max_new_tokens)]
    place = str(find_model(model, runs))
    raise typer.Exit(run_tool("chat", [place, *options, "--seed", str(seed)]))


@cli.command(name="serve-reward")
def serve_reward(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to listen on")] = 8765,
    combine: Annotated[
        str, typer.Option(help="how several heads are combined: mean, min, mean_minus_std")
    ] = "mean",
    runs: Runs = Path("runs"),
) -> None:
    """Serve a reward model over HTTP, for rewards of kind remote."""
    from align.core.artifacts import find_model
    from align.pipeline.processes import become_tool

    options = ["--host", host, "--port", str(port), "--combine", combine]
    become_tool("serve", [str(find_model(model, runs)), *options])


@cli.command()
def doctor(
    report: Annotated[
        bool, typer.Option("--report", help="also write align-report.txt, for bug reports")
    ] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Print versions, devices, compiler and engine, with a fix for anything missing."""
    from align import doctor as machine

    findings = machine.examine()
    for finding in findings:
        typer.echo(finding.line())
    if report:
        Path(machine.REPORT).write_text(machine.report(findings, runs), encoding="utf-8")
        typer.echo(f"{machine.REPORT}: written, without secrets; read it before you send it")
    raise typer.Exit(1 if any(f.state == "missing" for f in findings) else 0)


cli.command()(serve)
cli.command("runs")(runs_)
cli.command()(logs)
cli.command("open")(open_)
cli.command("eval")(eval_)
cli.command()(calibrate)
cli.command()(export)
cli.command()(push)

PANELS = {
    "Start": ("init", "import", "recipes", "doctor"),
    "Train": ("check", "show", "plan", "run", "verify"),
    "Inspect": ("runs", "logs", "report", "open"),
    "Evaluate": ("eval", "calibrate", "reward"),
    "Data": ("data", "labels", "cache"),
    "Use and share": ("chat", "export", "push", "serve-reward", "serve"),
    "Help": ("explain", "schema"),
}
"""The commands in the order of ``align --help``, under the title of each group."""


def _arrange() -> None:
    """Put the commands into the panels and the order of ``PANELS``."""
    panel = {name: title for title, names in PANELS.items() for name in names}
    order = list(panel)

    def place(info: CommandInfo | TyperInfo) -> int:
        name = info.name or info.callback.__name__  # pyright: ignore[reportOptionalMemberAccess]
        info.rich_help_panel = panel.get(name)
        return order.index(name) if name in panel else len(order)

    cli.registered_commands.sort(key=place)
    cli.registered_groups.sort(key=place)


def _add_examples(app: typer.Typer, path: str = "") -> None:
    """Write the examples of each command below its options."""
    for info in app.registered_commands:
        name = info.name or info.callback.__name__  # pyright: ignore[reportOptionalMemberAccess]
        # An empty line between two of them, or the help would join them.
        info.epilog = "\n\n".join(("Examples:", *EXAMPLES.get(path + name, ())))
    for group in app.registered_groups:
        inner = group.typer_instance
        if inner is not None:
            _add_examples(inner, f"{path}{group.name} ")


def _hide_types_of_flags() -> None:
    """Show ``--deep`` in the help instead of ``--deep <bool>``, which asks for a value."""
    shown = getattr(TyperOption, "display_type_rich", None)
    if shown is None:  # a version that shows no types
        return

    def without_flags(self: TyperOption, ctx: object) -> str | None:
        return None if self.is_bool_flag else shown(self, ctx)

    TyperOption.display_type_rich = without_flags


_arrange()
_add_examples(cli)
_hide_types_of_flags()


def app() -> None:
    """Run the command line; a user error prints its message instead of a traceback."""
    fit_to_locale()
    try:
        cli()
    except AlignError as e:
        print_error(str(e))
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        typer.echo(f"\nstopped by Ctrl+C, exit code {EXIT_USER}", err=True)
        sys.exit(EXIT_USER)
    except Exception as e:
        if (problem := path_problem(e)) is not None:
            typer.echo(problem, err=True)
            sys.exit(EXIT_USER)
        typer.echo(last_words(e), err=True)
        sys.exit(EXIT_FAILED)
