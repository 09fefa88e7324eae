"""The commands eval and calibrate."""

from pathlib import Path
from typing import Annotated

import typer

from align.core.errors import RecipeError

Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="folder that holds the runs")]


def eval_(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CKPT...", help="RUN/STAGE, an artefact or model folder")
    ],
    tasks: Annotated[
        str, typer.Option(metavar="A,B", help="task names, files, or lm_eval:NAME")
    ] = "world",
    baseline: Annotated[
        str | None, typer.Option(metavar="CKPT", help="compared with; the first one by default")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="answers per prompt")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="prompts per task")] = None,
    judge: Annotated[
        str, typer.Option(metavar="WHO", help="rule, a reward model (RUN/STAGE), or a URL")
    ] = "rule",
    judge_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="model at the judge's URL")
    ] = None,
    detect: Annotated[
        float | None, typer.Option(min=1e-6, help="say how many prompts show this difference")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="where the answer goes")] = None,
    runs: Runs = Path("runs"),
    engine: Annotated[str, typer.Option(help="auto, vllm or hf")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    chat_template: Annotated[
        str | None, typer.Option(help="for a model folder without one: plain, chatml or a file")
    ] = None,
    pad_token: Annotated[str | None, typer.Option(help="for a model folder without one")] = None,
    lm_eval: Annotated[
        str | None, typer.Option(metavar="PYTHON", help="environment of lm-evaluation-harness")
    ] = None,
    lm_eval_backend: Annotated[str, typer.Option(help="hf or vllm")] = "hf",
    lm_eval_tasks: Annotated[
        str | None, typer.Option(metavar="DIR", help="own task files of lm-evaluation-harness")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="ask again")] = False,
    pairs: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="held-out pairs of a reward model")
    ] = None,
    sets: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="its best-of-4 sets (RewardBench 2)")
    ] = None,
) -> None:
    """Compare checkpoints on held-out tasks, or give the card of reward models."""
    from align.pipeline.cards import measure_scorers, scorers_among
    from align.pipeline.evaluating import Question, evaluate

    if scorers := scorers_among(checkpoints, runs):
        found = measure_scorers(scorers, pairs=pairs or (), sets=sets or (), runs=runs, out=out)
        raise typer.Exit(found)
    if pairs or sets:
        raise RecipeError("--pairs and --sets measure reward models; give the folder of one")
    lacking = {"chat_template": chat_template, "pad_token": pad_token}
    question = Question(
        checkpoints=checkpoints,
        tasks=[name for name in tasks.split(",") if name],
        baseline=baseline,
        samples=samples,
        limit=limit,
        judge=judge,
        judge_model=judge_model,
        engine=engine,
        dtype=dtype,
        tokenizer={key: value for key, value in lacking.items() if value},
        harness=lm_eval,
        harness_backend=lm_eval_backend,
        harness_path=lm_eval_tasks,
    )
    raise typer.Exit(evaluate(question, runs=runs, out=out, force=force, detect=detect))


def calibrate(
    judge: Annotated[
        str, typer.Argument(metavar="JUDGE", help="a reward model, a URL, or 'longer' (the answer)")
    ],
    pairs: Annotated[Path, typer.Option(metavar="FILE", help="preference pairs of people")],
    model: Annotated[str | None, typer.Option(metavar="NAME", help="model at the URL")] = None,
    rows: Annotated[int | None, typer.Option(min=2, help="pairs to judge; all by default")] = None,
    heldout_frac: Annotated[
        float | None,
        typer.Option(min=1e-6, max=1.0, help="only what a recipe with this share holds out"),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE")] = Path("runs/calibration.json"),
    runs: Runs = Path("runs"),
) -> None:
    """Measure a judge against people: agreement, Cohen's kappa, position bias."""
    from align.pipeline.evaluating import calibrate as measure

    found = measure(
        judge, model=model, pairs=pairs, rows=rows, heldout_frac=heldout_frac, out=out, runs=runs
    )
    raise typer.Exit(found)
