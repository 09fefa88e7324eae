"""Run one stage of a recipe: ``python -m align.stages KIND --recipe R``."""

from align.stages.base import main

if __name__ == "__main__":
    main()
