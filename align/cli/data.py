"""The commands ``align data check``, ``show`` and ``convert``, and ``align explain``."""

import json
import math
import shutil
import sys
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from align.cli.options import Runs
from align.core.errors import EXIT_USER, DataError
from align.core.extras import require
from align.core.text import suggest, visible

if TYPE_CHECKING:
    from align.data.check import Report, Request
    from align.data.render.chat import ChatFormat

data = typer.Typer(help="Check, show and convert data files.", no_args_is_help=True)

Kind = Literal["sft", "preference", "unpaired", "prompts", "math", "corpus"]
DataPath = Annotated[
    str, typer.Argument(metavar="PATH", help="file, folder, glob, URL, hub id, or - for stdin")
]
KindOption = Annotated[
    Kind | None, typer.Option("--kind", help="purpose of the rows (default: detected)")
]
FormatOption = Annotated[
    str, typer.Option("--format", metavar="NAME", help="row format, as 'format' in a recipe")
]
RenameOption = Annotated[
    list[str] | None, typer.Option("--rename", metavar="OLD=NEW", help="rename a field; repeatable")
]
MapOption = Annotated[
    str | None,
    typer.Option("--map", metavar="FILE.py:NAME", help="function applied to each row first"),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="count tokens with its tokenizer")
]
TemplateOption = Annotated[
    str | None,
    typer.Option("--template", metavar="NAME", help="plain, chatml or a Jinja file, for --model"),
]
MaxLength = Annotated[
    int | None, typer.Option("--max-length", min=1, help="maximum tokens per row; needs --model")
]


@data.command()
def check(
    path: DataPath,
    kind: KindOption = None,
    form: FormatOption = "auto",
    rename: RenameOption = None,
    own: MapOption = None,
    model: ModelOption = None,
    runs: Runs = Path("runs"),
    template: TemplateOption = None,
    max_length: MaxLength = None,
    heldout: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="held-out prompts, to check for overlap"),
    ] = None,
    evaluation: Annotated[
        list[str] | None,
        typer.Option("--eval", metavar="PATH", help="test prompts, to check for contamination"),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="findings to show per code")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Check data and print each finding with its line and fix; exit code 2 if there are errors."""
    from align.data.check import Request

    if max_length is not None and model is None:
        raise DataError("--max-length counts tokens; add --model DIR")
    if template is not None and model is None:
        raise DataError("--template has no effect without --model; add --model DIR")
    request = Request(
        path=path,
        kind=kind,
        form=form,
        rename=_pairs(rename or ()),
        map=_function(own),
        chat=partial(_chat, model, template, runs) if model else None,
        max_length=max_length,
        heldout=heldout or (),
        evaluation=evaluation or (),
        limit=limit,
    )
    report = _checked(request)
    _show(report, as_json=as_json)
    raise typer.Exit(EXIT_USER if report.tally.total("error") else 0)


def _checked(request: "Request") -> "Report":
    """Return the report of a check, with a progress bar on a terminal."""
    from dataclasses import replace

    from rich.markup import escape

    from align.data.check import check_data

    with _bar() as bar, tempfile.TemporaryDirectory() as folder:
        # The check reads the rows twice, so standard input goes through a file.
        if request.path == "-":
            spool = Path(folder) / "stdin"
            with spool.open("wb") as f:
                shutil.copyfileobj(sys.stdin.buffer, f)
            request = replace(request, path="<stdin>", stdin=spool)
        task = bar.add_task(escape(visible(request.path)), rows=0) if bar else None

        def advance(size: int, rows: int) -> None:
            if bar is not None and task is not None:
                seen = bar.tasks[task].fields["rows"] + rows
                bar.update(task, advance=size, rows=seen)

        return check_data(request, progress=advance)


def _bar() -> Any:
    # No bar in logs and pipes.
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rows]:,} rows"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _show(report: "Report", *, as_json: bool) -> None:
    from rich.console import Console

    from align.data.check import show

    if as_json:
        typer.echo(json.dumps(show.as_json(report), indent=2))
    else:
        show.print_report(report, Console(highlight=False, soft_wrap=True))


def _pairs(words: list[str] | tuple[()]) -> dict[str, str]:
    """Return the mapping of ``OLD=NEW`` arguments.

    Raises:
        DataError: an argument has another form.
    """
    wrong = next((word for word in words if not all(word.partition("="))), None)
    if wrong is not None:
        raise DataError(f"--rename {wrong}: expected OLD=NEW")
    return {old: new for old, _, new in (word.partition("=") for word in words)}


def _function(path: str | None) -> str | None:
    """Return the function of ``--map``.

    Raises:
        DataError: it is not a function of a file or module that exists.
    """
    from align.recipe.own_code import problem_of

    if path is not None and (problem := problem_of(path)):
        raise DataError(f"--map {path}: {problem}")
    return path


def _mixed(word: str) -> tuple[str, float]:
    """Return the path and the weight of a ``PATH=WEIGHT`` argument.

    Raises:
        DataError: the argument has another form.
    """
    # Paths may contain "=", weights may not.
    path, _, text = word.rpartition("=")
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not path or not 0.0 < weight < math.inf:
        raise DataError(f"--mix {word}: expected PATH=WEIGHT with a weight above 0")
    return path, weight


def _chat(model: str, template: str | None, runs: Path) -> "ChatFormat":
    """Return the chat renderer of a model, with another chat template if one is given."""
    require("--model", "torch", "transformers")
    from align.core.artifacts import artifact_kind, find_model
    from align.data.render.chat import apply_tokenizer_spec
    from align.models.bringing import one_line
    from align.models.loading import bringing_in
    from align.recipe.schema import TokenizerSpec
    from align.stages.base import chat_format

    place = find_model(model, runs)
    folder = place / "model" if artifact_kind(place) else place
    with one_line(model, "a tokenizer") if folder.exists() else bringing_in(model):
        chat = chat_format(folder)
    if template is not None:
        pad = str(chat.tokenizer.pad_token or chat.tokenizer.eos_token)
        apply_tokenizer_spec(chat.tokenizer, TokenizerSpec(chat_template=template, pad_token=pad))
    return chat


def explain(
    code: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="such as D070 or kl/reference (default: all codes)"),
    ] = None,
) -> None:
    """Explain a finding of the data check (cause and fix) or a metric (unit and meaning)."""
    from align.core.metrics import described, metrics, page
    from align.data.check.findings import code_of, codes

    if code == "metrics":
        typer.echo("\n".join(page()))
        return
    if code is not None and (metric := described(code)) is not None:
        typer.echo(f"{code}" + (f" ({metric.unit})" if metric.unit else "") + f": {metric.meaning}")
        return
    if code is not None and "/" in code:
        raise DataError(
            f"{code}: unknown metric{suggest(code, metrics())}\nSee align explain metrics"
        )
    if code is None:
        for known in codes().values():
            typer.echo(f"| {known.code} | {known.severity} | {known.title} | {known.remedy} |")
        return
    entry = code_of(code)
    typer.echo(f"{entry.code} {entry.severity}: {entry.title}\n\n{entry.why}\n\n{entry.remedy}")


@data.command()
def show(
    path: DataPath,
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="model whose tokenizer is used")
    ],
    runs: Runs = Path("runs"),
    kind: KindOption = None,
    form: FormatOption = "auto",
    rename: RenameOption = None,
    own: MapOption = None,
    template: TemplateOption = None,
    rows: Annotated[int, typer.Option(min=1, help="number of rows to show")] = 3,
    line: Annotated[str | None, typer.Option(metavar="N", help="only the row on this line")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="also write an HTML fragment")
    ] = None,
) -> None:
    """Show rows token by token: trained, masked or stop (without color, brackets mark trained)."""
    from rich.console import Console

    from align.data.check.others import examples_of
    from align.data.token_view import as_html, as_text, headline, views

    console = Console(highlight=False, soft_wrap=True)
    chat = _chat(model, template, runs)
    shown, fragments = 0, []
    pairs = _pairs(rename or ())
    for example in examples_of(path, kind=kind, form=form, rename=pairs, map=_function(own)):
        if line is not None and example.source.rpartition(":")[2].removeprefix("row ") != line:
            continue
        for view in views(example, chat):
            console.print(visible(headline(view)), style="bold", markup=False)
            console.print(as_text(view, colour=console.is_terminal))
            fragments.append(as_html(view))
        shown += 1
        if shown == rows:
            break
    if not shown:
        raise DataError(f"{path}: no rows found" + (f" on line {line}" if line else ""))
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text("\n".join(fragments) + "\n", encoding="utf-8")


@data.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="file, folder, glob, URL or hub id, as in a recipe")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help=".jsonl, .json, .csv, .parquet ...")],
    to: Annotated[
        str, typer.Option("--to", metavar="FORMAT", help="messages, preference, prompt ...")
    ],
    form: FormatOption = "auto",
    rename: RenameOption = None,
    own: MapOption = None,
    mix: Annotated[
        list[str] | None,
        typer.Option("--mix", metavar="PATH=WEIGHT", help="another input; repeatable"),
    ] = None,
    weight: Annotated[float, typer.Option(min=1e-9, help="weight of IN in a mixture")] = 1.0,
    heldout: Annotated[
        Path | None, typer.Option(metavar="OUT", help="file for the held-out rows")
    ] = None,
    heldout_frac: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="fraction of held-out prompts")
    ] = 0.1,
    answers: Annotated[
        Literal["chosen", "both"] | None, typer.Option(help="convert pairs to sft rows")
    ] = None,
    columns: Annotated[bool, typer.Option(help="keep the other fields of the rows")] = True,
    seed: Annotated[int, typer.Option(help="random seed of the mixture")] = 0,
) -> None:
    """Convert data to another format, mix files, and split off held-out rows by prompt hash."""
    from align.data.convert import WRITERS, convert_sides
    from align.recipe.schema import DataSpec

    if to not in WRITERS:
        raise DataError(f"--to {to}: expected one of {', '.join(WRITERS)}")
    common = {"format": form, "rename": _pairs(rename or ()), "answers": answers}
    common["map"] = _function(own)
    specs = [DataSpec.model_validate({"path": source, "weight": weight, **common})]
    for path, factor in map(_mixed, mix or ()):
        specs.append(DataSpec.model_validate({"path": path, "weight": factor, **common}))
    for note in convert_sides(
        specs, out, heldout=heldout, heldout_frac=heldout_frac, to=to, seed=seed, columns=columns
    ):
        output = note["output"]
        typer.echo(visible(f"{output['path']}: {output['rows']:,} rows of {to}"))
