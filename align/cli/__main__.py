"""Entry point of ``python -m align.cli``, the same as the command ``align``."""

from align.cli import app

app()
