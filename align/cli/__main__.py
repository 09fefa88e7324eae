"""Let ``python -m align.cli`` be the command ``align``."""

from align.cli import app

app()
