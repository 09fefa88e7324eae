"""Compare models on held-out prompts.

Reads the policies that `models` names and the reward models to measure. Writes summary.json
and the responses side by side.

    python launch/evaluate.py --recipe R [--stage NAME] [--run-dir DIR] [--set K=V ...] [--force]
    deepspeed --num_gpus 8 launch/evaluate.py --recipe R --stage NAME
    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 launch/evaluate.py --recipe R --stage NAME

The folder of the runs, in which RUN/STAGE is looked up, is runs/ or that of --runs DIR.

Exit codes: 0 done, 1 failed, 2 invalid recipe or data, 75 stopped by a signal after a checkpoint;
run the same command again to resume.
"""

from align.stages.entry import become

if __name__ == "__main__":
    become("align.stages", "evaluate")
