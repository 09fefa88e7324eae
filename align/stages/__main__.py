"""Run one stage of a recipe: ``python -m align.stages KIND --recipe R``."""

import logging
import os

from align.core.extras import without_collections
from align.core.log import setup_logging

if __name__ == "__main__":
    # Before the imports, which take seconds: libraries read their settings then.
    setup_logging(int(os.environ.get("RANK", "0")))
    logging.getLogger("align").info("importing torch and the libraries of the stage")

    with without_collections():
        from align.stages.base import main

    main()
