"""Run the preflight checks of each stage whose inputs exist, without training.

    python launch/check.py --resolved R --run-dir RUN --cards FILE [--done STAGE ...] [--only STAGE]

``align check R --deep`` runs this and prints the results. Exit codes: 0 all checks passed,
2 a check failed.
"""

from align.stages.entry import become

if __name__ == "__main__":
    become("align.stages.tools.deep_check")
