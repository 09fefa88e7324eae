"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="folder of the runs")]
MODEL_HELP = "RUN/STAGE, a folder or a hub id"
