"""Grow a set of instructions from a few by a model (Self-Instruct).

Reads the policy that `init` names and the rows of `seeds`. Writes data.jsonl and ledger.jsonl.

    python launch/self_instruct.py --recipe R [--stage NAME] [--set K=V ...] [--force]

Exit codes: 0 done, 1 failed, 2 the recipe or the data is wrong, 75 stopped by a signal; the same
command goes on from there.
"""

from align.stages.entry import become

if __name__ == "__main__":
    become("align.stages", "self_instruct")
