"""Interpolate the weights of a model and of what was fine-tuned from it.

Reads the policies that `base` and `tuned` name; scores each of `alphas` on held-out prompts and
writes the chosen one, a policy, with the curve in its manifest.

    python launch/merge.py --recipe R [--stage NAME] [--run-dir DIR] [--set K=V ...] [--force]
    deepspeed --num_gpus 8 launch/merge.py --recipe R --stage NAME
    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 launch/merge.py --recipe R --stage NAME

Exit codes: 0 done, 1 failed, 2 the recipe or the data is wrong, 75 stopped by a signal after a
checkpoint; the same command goes on from there.
"""

from align.stages.entry import become

if __name__ == "__main__":
    become("align.stages", "merge")
