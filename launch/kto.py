"""Learn from single answers judged good or bad (KTO).

Reads the policy that `init` names, which is also the reference, and judged answers.
Writes a policy.

    python launch/kto.py --recipe R [--stage NAME] [--run-dir DIR] [--set K=V ...] [--force]
    deepspeed --num_gpus 8 launch/kto.py --recipe R --stage NAME
    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 launch/kto.py --recipe R --stage NAME

Exit codes: 0 done, 1 failed, 2 the recipe or the data is wrong, 75 stopped by a signal after a
checkpoint; the same command goes on from there.
"""

from align.stages.entry import become

if __name__ == "__main__":
    become("align.stages", "kto")
