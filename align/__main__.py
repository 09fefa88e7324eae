"""``python -m align`` is the command ``align``."""

from align.cli import app

app()
