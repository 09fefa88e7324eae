"""Generate a set of instructions from a few seeds with a model (Self-Instruct).

Reads the policy that `init` names and the rows of `seeds`. Writes data.jsonl and ledger.jsonl.

    python launch/self_instruct.py --recipe R [--stage NAME] [--set K=V ...] [--force]

Exit codes: 0 done, 1 failed, 2 invalid recipe or data, 75 stopped by a signal; run the same
command again to resume.
"""

from align.stages.entry import become

if __name__ == "__main__":
    become("align.stages", "self_instruct")
