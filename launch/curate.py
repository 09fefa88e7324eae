"""Keep few, good and different rows, with a ledger of what left and why.

Reads the rows of `data`. Writes data.jsonl and ledger.jsonl.

    python launch/curate.py --recipe R [--stage NAME] [--run-dir DIR] [--set K=V ...] [--force]

Exit codes: 0 done, 1 failed, 2 the recipe or the data is wrong, 75 stopped by a signal; the same
command goes on from there.
"""

from align.stages.entry import become

if __name__ == "__main__":
    become("align.stages", "curate")
