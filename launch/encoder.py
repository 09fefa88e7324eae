"""Import an encoder such as BERT.

Reads a folder or hub id in the format of transformers. Writes an encoder with its tokenizer.

    python launch/encoder.py --recipe R [--stage NAME] [--run-dir DIR] [--set K=V ...] [--force]

Exit codes: 0 done, 1 failed, 2 invalid recipe.
"""

from align.stages.entry import become

if __name__ == "__main__":
    become("align.stages", "encoder")
