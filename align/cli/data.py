"""The commands about data files: align data check, and align explain."""

import json
import shutil
import sys
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from align.core.errors import EXIT_USER, DataError

if TYPE_CHECKING:
    from align.data.check import Report, Request
    from align.data.render.chat import ChatFormat

data = typer.Typer(help="Check, show and convert data files.", no_args_is_help=True)

Kind = Literal["sft", "preference", "unpaired", "prompts", "math", "corpus"]
DataPath = Annotated[
    str, typer.Argument(metavar="PATH", help="file, folder, glob, hub id, or - for stdin")
]
KindOption = Annotated[
    Kind | None, typer.Option("--kind", help="what the rows are for; inferred if left out")
]
FormatOption = Annotated[
    str, typer.Option("--format", metavar="NAME", help="as 'format' in a recipe")
]
RenameOption = Annotated[
    list[str] | None, typer.Option("--rename", metavar="OLD=NEW", help="any number of times")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="DIR", help="count tokens with this tokenizer")
]
TemplateOption = Annotated[
    str | None,
    typer.Option("--template", metavar="NAME", help="plain, chatml or a Jinja file, for --model"),
]
MaxLength = Annotated[
    int | None, typer.Option("--max-length", min=1, help="tokens a row may have; needs --model")
]


@data.command()
def check(
    path: DataPath,
    kind: KindOption = None,
    form: FormatOption = "auto",
    rename: RenameOption = None,
    model: ModelOption = None,
    template: TemplateOption = None,
    max_length: MaxLength = None,
    heldout: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="prompts that must not be in PATH")
    ] = None,
    evaluation: Annotated[
        list[str] | None,
        typer.Option("--eval", metavar="PATH", help="prompts whose text must not be in PATH"),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="findings of one code that are shown")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Say what is wrong with data: each finding with its line and remedy. 2 if there are errors."""
    from align.data.check import Request

    if max_length is not None and model is None:
        raise DataError("--max-length counts tokens; give --model as well")
    if template is not None and model is None:
        raise DataError("--template has no effect without --model; give --model as well")
    request = Request(
        path=path,
        kind=kind,
        form=form,
        rename=_pairs(rename or ()),
        chat=partial(_chat, model, template) if model else None,
        max_length=max_length,
        heldout=heldout or (),
        evaluation=evaluation or (),
        limit=limit,
    )
    report = _checked(request)
    _show(report, as_json=as_json)
    raise typer.Exit(EXIT_USER if report.tally.total("error") else 0)


def _checked(request: "Request") -> "Report":
    """Check, with a bar on a terminal; standard input is kept in a file for a second reading."""
    from dataclasses import replace

    from align.data.check import check_data

    with _bar() as bar, tempfile.TemporaryDirectory() as folder:
        if request.path == "-":
            spool = Path(folder) / "stdin"
            with spool.open("wb") as f:
                shutil.copyfileobj(sys.stdin.buffer, f)
            request = replace(request, path="<stdin>", stdin=spool)
        task = bar.add_task(request.path, rows=0) if bar else None

        def advance(size: int, rows: int) -> None:
            if bar is not None and task is not None:
                seen = bar.tasks[task].fields["rows"] + rows
                bar.update(task, advance=size, rows=seen)

        return check_data(request, progress=advance)


def _bar() -> Any:
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
        typer.echo(json.dumps(show.as_json(report), indent=2, ensure_ascii=False))
    else:
        show.print_report(report, Console(highlight=False, soft_wrap=True))


def _pairs(words: list[str] | tuple[()]) -> dict[str, str]:
    """Read OLD=NEW words."""
    wrong = next((word for word in words if not all(word.partition("="))), None)
    if wrong is not None:
        raise DataError(f"--rename {wrong}: expected OLD=NEW")
    return {old: new for old, _, new in (word.partition("=") for word in words)}


def _chat(model: str, template: str | None) -> "ChatFormat":
    """Make the renderer of a model, with another chat template if one is named."""
    from align.data.render.chat import apply_tokenizer_spec
    from align.recipe.schema import TokenizerSpec
    from align.stages.base import chat_format

    chat = chat_format(Path(model))
    if template is not None:
        pad = str(chat.tokenizer.pad_token or chat.tokenizer.eos_token)
        apply_tokenizer_spec(chat.tokenizer, TokenizerSpec(chat_template=template, pad_token=pad))
    return chat


def explain(
    code: Annotated[
        str | None, typer.Argument(metavar="[CODE]", help="such as D070; all without one")
    ] = None,
) -> None:
    """Say what a finding of the data check means, why it matters and what to do."""
    from align.data.check.findings import code_of, codes

    if code is None:
        for known in codes().values():
            typer.echo(f"| {known.code} | {known.severity} | {known.title} | {known.remedy} |")
        return
    entry = code_of(code)
    typer.echo(f"{entry.code} {entry.severity}: {entry.title}\n\n{entry.why}\n\n{entry.remedy}")


@data.command()
def show(
    path: DataPath,
    model: Annotated[str, typer.Option("--model", metavar="DIR", help="whose tokens and template")],
    kind: KindOption = None,
    form: FormatOption = "auto",
    rename: RenameOption = None,
    template: TemplateOption = None,
    rows: Annotated[int, typer.Option(min=1, help="how many rows")] = 3,
    line: Annotated[str | None, typer.Option(metavar="N", help="only the row of this line")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="also write an HTML fragment")
    ] = None,
) -> None:
    """Show rows token by token: trained, masked, stop; without colours trained ones in brackets."""
    from rich.console import Console

    from align.data.check.others import examples_of
    from align.data.token_view import as_html, as_text, headline, views

    console = Console(highlight=False, soft_wrap=True)
    chat = _chat(model, template)
    shown, fragments = 0, []
    for example in examples_of(path, kind=kind, form=form, rename=_pairs(rename or ())):
        if line is not None and example.source.rpartition(":")[2].removeprefix("row ") != line:
            continue
        for view in views(example, chat):
            console.print(headline(view), style="bold", markup=False)
            console.print(as_text(view, colour=console.is_terminal))
            fragments.append(as_html(view))
        shown += 1
        if shown == rows:
            break
    if not shown:
        raise DataError(f"{path}: no such row" + (f" as line {line}" if line else ""))
    if html is not None:
        html.write_text("\n".join(fragments) + "\n", encoding="utf-8")


@data.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="as in a recipe")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help=".jsonl, .json, .csv, .parquet ...")],
    to: Annotated[
        str, typer.Option("--to", metavar="FORMAT", help="messages, preference, prompt ...")
    ],
    form: FormatOption = "auto",
    rename: RenameOption = None,
    mix: Annotated[
        list[str] | None, typer.Option("--mix", metavar="PATH=WEIGHT", help="a further input")
    ] = None,
    weight: Annotated[float, typer.Option(min=1e-9, help="weight of IN in a mixture")] = 1.0,
    heldout: Annotated[
        Path | None, typer.Option(metavar="OUT", help="write the held-out side here")
    ] = None,
    heldout_frac: Annotated[float, typer.Option(min=0.0, max=1.0, help="its share")] = 0.1,
    answers: Annotated[
        Literal["chosen", "both"] | None, typer.Option(help="make sft rows of pairs")
    ] = None,
    columns: Annotated[bool, typer.Option(help="keep the other fields of the rows")] = True,
    seed: Annotated[int, typer.Option(help="decides the rest of a mixture")] = 0,
) -> None:
    """Write data in another format, mixed and split by a stable hash of the prompt."""
    from align.data.convert import WRITERS, convert_sides
    from align.recipe.schema import DataSpec

    if to not in WRITERS:
        raise DataError(f"--to {to}: expected one of {', '.join(WRITERS)}")
    common = {"format": form, "rename": _pairs(rename or ()), "answers": answers}
    specs = [DataSpec.model_validate({"path": source, "weight": weight, **common})]
    for word in mix or ():
        path, _, share = word.rpartition("=")
        specs.append(DataSpec.model_validate({"path": path, "weight": share, **common}))
    for note in convert_sides(
        specs, out, heldout=heldout, heldout_frac=heldout_frac, to=to, seed=seed, columns=columns
    ):
        output = note["output"]
        typer.echo(f"{output['path']}: {output['rows']:,} rows of {to}")
