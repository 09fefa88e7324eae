"""Deep check of a recipe: the preflight of each stage whose inputs are there; nothing is trained.

    python launch/check.py --resolved R --run-dir RUN --cards FILE [--done STAGE ...] [--only STAGE]

``align check R --deep`` starts this and prints the cards. Exit codes: 0 no line failed, 2 one did.
"""

from align.stages.entry import become

if __name__ == "__main__":
    become("align.stages.tools.deep_check")
