"""Group-relative policy optimisation against the rewards of the recipe.

Reads the policy that `init` names and prompts; needs no critic. Answers come from vLLM where
it imports, else from transformers. Writes a policy.

    python launch/grpo.py --recipe R [--stage NAME] [--run-dir DIR] [--set K=V ...] [--force]
    deepspeed --num_gpus 8 launch/grpo.py --recipe R --stage NAME
    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 launch/grpo.py --recipe R --stage NAME

Exit codes: 0 done, 1 failed, 2 the recipe or the data is wrong, 75 stopped by a signal after a
checkpoint; the same command goes on from there.
"""

from align.stages.entry import become

if __name__ == "__main__":
    become("align.stages", "grpo")
