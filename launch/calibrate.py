"""Measure a judge (an endpoint or a reward model) on preference pairs that people have ordered.

    python launch/calibrate.py JUDGE --pairs FILE --out FILE [--model NAME] [--rows N]

Prints and writes JSON: agreement, Cohen's kappa, position bias, each with its interval.
"""

from align.stages.entry import become

if __name__ == "__main__":
    become("align.stages.tools.calibrate")
