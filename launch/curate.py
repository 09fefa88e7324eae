"""Select few, good and diverse rows, with a ledger of the removed rows and the reasons.

Reads the rows of `data`. Writes data.jsonl and ledger.jsonl.

    python launch/curate.py --recipe R [--stage NAME] [--run-dir DIR] [--set K=V ...] [--force]

The folder of the runs, in which RUN/STAGE is looked up, is runs/ or that of --runs DIR.

Exit codes: 0 done, 1 failed, 2 invalid recipe or data, 75 stopped by a signal; run the same
command again to resume.
"""

from align.stages.entry import become

if __name__ == "__main__":
    become("align.stages", "curate")
