"""Train a Bradley-Terry reward model on preference pairs.

Reads the policy that `init` names and pairs. Writes a reward model that knows its own
mean and standard deviation on reference samples.

    python launch/reward.py --recipe R [--stage NAME] [--run-dir DIR] [--set K=V ...] [--force]
    deepspeed --num_gpus 8 launch/reward.py --recipe R --stage NAME
    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 launch/reward.py --recipe R --stage NAME

Exit codes: 0 done, 1 failed, 2 the recipe or the data is wrong, 75 stopped by a signal after a
checkpoint; the same command goes on from there.
"""

from align.stages.entry import become

if __name__ == "__main__":
    become("align.stages", "reward")
