"""The commands ``align eval`` and ``align calibrate``."""

from pathlib import Path
from typing import Annotated

import typer

from align.cli.options import Runs
from align.core.errors import RecipeError

# The options of `align eval`, in the order of its help.
Checkpoints = Annotated[
    list[str], typer.Argument(metavar="CKPT...", help="RUN/STAGE, a folder or a hub id")
]
Tasks = Annotated[str, typer.Option(metavar="A,B", help="task names, files, or lm_eval:NAME")]
Baseline = Annotated[
    str | None, typer.Option(metavar="CKPT", help="checkpoint to compare with (default: first)")
]
Samples = Annotated[int | None, typer.Option(min=1, help="responses per prompt")]
Limit = Annotated[int | None, typer.Option(min=1, help="prompts per task")]
Judge = Annotated[
    str,
    typer.Option(metavar="WHO", help="rule, a reward model (RUN/STAGE), FILE.py:NAME, or a URL"),
]
JudgeModel = Annotated[str | None, typer.Option(metavar="NAME", help="model at the judge's URL")]
Detect = Annotated[
    float | None,
    typer.Option(min=1e-6, help="print how many prompts are needed to detect this difference"),
]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="folder of the results")]
Engine = Annotated[str, typer.Option(help="auto, vllm or hf")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or auto; by default bfloat16 on GPUs that compute it"),
]
ChatTemplate = Annotated[
    str | None, typer.Option(help="for a model folder without one: plain, chatml or a file")
]
PadToken = Annotated[str | None, typer.Option(help="for a model folder without one")]
LmEval = Annotated[
    str | None, typer.Option(metavar="PYTHON", help="Python with lm-evaluation-harness")
]
LmEvalBackend = Annotated[str, typer.Option(help="hf or vllm")]
LmEvalTasks = Annotated[
    str | None, typer.Option(metavar="DIR", help="custom task files of lm-evaluation-harness")
]
Force = Annotated[bool, typer.Option("--force", help="ignore existing results and run again")]
Pairs = Annotated[
    list[Path] | None, typer.Option(metavar="FILE", help="held-out pairs of a reward model")
]
Sets = Annotated[
    list[Path] | None, typer.Option(metavar="FILE", help="best-of-4 sets (RewardBench 2)")
]


def eval_(
    *,
    checkpoints: Checkpoints,
    tasks: Tasks = "world",
    baseline: Baseline = None,
    samples: Samples = None,
    limit: Limit = None,
    judge: Judge = "rule",
    judge_model: JudgeModel = None,
    detect: Detect = None,
    out: Out = None,
    runs: Runs = Path("runs"),
    engine: Engine = "auto",
    dtype: Dtype = None,
    chat_template: ChatTemplate = None,
    pad_token: PadToken = None,
    lm_eval: LmEval = None,
    lm_eval_backend: LmEvalBackend = "hf",
    lm_eval_tasks: LmEvalTasks = None,
    force: Force = False,
    pairs: Pairs = None,
    sets: Sets = None,
) -> None:
    """Compare checkpoints on held-out tasks, or measure reward models on held-out pairs."""
    from align.cli.eval_recipe import Question, evaluate
    from align.cli.reward_cards import measure_scorers, scorers_among

    # Reward models cannot generate: they have a card of their own.
    if scorers := scorers_among(checkpoints, runs):
        files = {"pairs": pairs or (), "sets": sets or ()}
        raise typer.Exit(measure_scorers(scorers, runs=runs, out=out, **files))
    if pairs or sets:
        raise RecipeError("--pairs and --sets measure reward models. Give a reward model's folder")
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
        tokenizer=_given(chat_template=chat_template, pad_token=pad_token),
        harness=lm_eval,
        harness_backend=lm_eval_backend,
        harness_path=lm_eval_tasks,
    )
    raise typer.Exit(evaluate(question, runs=runs, out=out, force=force, detect=detect))


def _given(**settings: str | None) -> dict[str, str]:
    """Return the settings that have a value."""
    return {name: value for name, value in settings.items() if value}


def calibrate(
    judge: Annotated[
        str,
        typer.Argument(metavar="JUDGE", help="a reward model, FILE.py:NAME, a URL, or 'longer'"),
    ],
    pairs: Annotated[Path, typer.Option(metavar="FILE", help="human preference pairs")],
    model: Annotated[str | None, typer.Option(metavar="NAME", help="model at the URL")] = None,
    rows: Annotated[int | None, typer.Option(min=2, help="pairs to judge (default: all)")] = None,
    heldout_frac: Annotated[
        float | None,
        typer.Option(
            min=1e-6,
            max=1.0,
            help="judge only held-out rows, split as in a recipe with this heldout_frac",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSON file to write")] = Path(
        "runs/calibration.json"
    ),
    runs: Runs = Path("runs"),
) -> None:
    """Measure a judge against human preferences: agreement, Cohen's kappa, position bias."""
    from align.cli.eval_recipe import calibrate as measure

    found = measure(
        judge, model=model, pairs=pairs, rows=rows, heldout_frac=heldout_frac, out=out, runs=runs
    )
    raise typer.Exit(found)
