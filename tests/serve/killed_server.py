"""A server in a process of its own, for tests that kill it.

Usage: python -m tests.serve.killed_server RUNS PORT MODEL
"""

import sys
from pathlib import Path

import uvicorn

from align.serve.app import create_app
from align.serve.settings import Settings

FAKE = str(Path(__file__).with_name("fake_run.py"))


def main() -> None:
    """Serve until killed."""
    runs, port, model = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    settings = Settings(
        runs=runs, port=port, models={"tiny": model}, devices=("", " "), command=(FAKE,)
    )
    uvicorn.run(create_app(settings), port=port, log_level="warning")


if __name__ == "__main__":
    main()
