"""Measure a judge (an endpoint or a reward model) on human preference pairs.

    python launch/calibrate.py JUDGE --pairs FILE --out FILE [--model NAME] [--rows N]

Prints and writes JSON: agreement, Cohen's kappa and position bias, with confidence intervals.
"""

from align.stages.entry import become

if __name__ == "__main__":
    become("align.stages.tools.calibrate")
