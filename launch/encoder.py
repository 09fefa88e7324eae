"""Import an encoder such as BERT.

Reads a folder or hub id in the format of transformers. Writes an encoder with its tokenizer.

    python launch/encoder.py --recipe R [--stage NAME] [--run-dir DIR] [--set K=V ...] [--force]

The folder of the runs, in which RUN/STAGE is looked up, is runs/ or that of --runs DIR.

Exit codes: 0 done, 1 failed, 2 invalid recipe.
"""

from align.stages.entry import become

if __name__ == "__main__":
    become("align.stages", "encoder")
