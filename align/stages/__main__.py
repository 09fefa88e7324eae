"""One stage of a recipe as this process: ``python -m align.stages KIND --recipe R``."""

from align.stages.base import main

if __name__ == "__main__":
    main()
