"""Time and memory of loading many chat rows: ``python -m benchmarks.data_scale --rows N``.

Each line is one process. `raw` tokenizes the same texts in batches by the `tokenizers` library
alone, with as many processes as the first start has. `first` reads, checks, renders, tokenizes and
stores the rows. `second` opens the store and makes the preflight's passes over all rows; then it
draws one epoch's batches, whose time is apart. `memory` does this from rows in memory. Times are
seconds of the clock, and seconds of processor time of the process and its children.
"""

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

MODEL = Path.home() / ".cache" / "align" / "SmolLM2-135M-Instruct"
BATCH = 512
SIDES = ("raw", "first", "second", "memory")


def main() -> None:
    """Run every side in processes of its own and print one line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=1, help="raw and first alternate this often")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the tokenizer")
    parser.add_argument("--memory", action="store_true", help="also load the rows into memory")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        sys.stdout.write(json.dumps(measured(args.side, args.folder, args.model)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_rows(folder / "rows.jsonl", args.rows)
        for _ in range(args.rounds):
            show(args, folder, "raw")
            show(args, folder, "first")
        show(args, folder, "second")
        if args.memory:
            show(args, folder, "memory")


def make_rows(path: Path, num: int) -> None:
    """Write chat rows of about 150 tokens, whose words are those of the documentation."""
    draw = random.Random(0)
    pages = sorted((Path(__file__).resolve().parents[1] / "docs").glob("*.md"))
    words = re.findall(r"[A-Za-z',.]+", " ".join(page.read_text() for page in pages))
    with path.open("w", encoding="utf-8") as out:
        for i in range(num):
            asked = " ".join(draw.choices(words, k=30)) + f" {i}?"
            said = " ".join(draw.choices(words, k=62)) + "."
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            out.write(json.dumps({"messages": turns}) + "\n")


def show(args: argparse.Namespace, folder: Path, side: str) -> None:
    """Run one side in a process of its own, and print what it measured."""
    cache = folder / "cache"
    if side == "first":
        subprocess.run(["rm", "-rf", str(cache)], check=True)
    env = {**os.environ, "ALIGN_CACHE": str(cache), "ALIGN_CACHE_FROM_MIB": "0"}
    if side == "memory":
        env["ALIGN_CACHE_FROM_MIB"] = "1e9"
    command = [sys.executable, "-m", "benchmarks.data_scale", "--side", side]
    command += ["--folder", str(folder), "--model", str(args.model)]
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    cells = "  ".join(f"{name} {value:,.2f}" for name, value in found.items())
    sys.stdout.write(f"{args.rows:,} rows  {side:<7}  {cells}\n")
    sys.stdout.flush()


def measured(side: str, folder: Path, model: Path) -> dict[str, float]:
    """Return what one side takes in this process."""
    from align.stages.base import chat_format

    chat = chat_format(model)
    began, before = time.perf_counter(), _processor_s()
    if side == "raw":
        raw(folder / "rows.jsonl", model)
    else:
        rows = load(folder / "rows.jsonl", chat)
    found = {"seconds": time.perf_counter() - began, "processor_s": _processor_s() - before}
    if side in ("second", "memory"):
        began, before = time.perf_counter(), _processor_s()
        draw_epoch(rows)
        found |= {"epoch_s": time.perf_counter() - began}
        found |= {"epoch_processor_s": _processor_s() - before}
    return found | {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def _processor_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def raw(path: Path, model: Path) -> None:
    """Tokenize the rendered texts in batches, in as many processes as there are cores."""
    program = "import sys; from benchmarks.data_scale import raw_part; raw_part(*sys.argv[1:])"
    num = len(os.sched_getaffinity(0))
    parts = [
        subprocess.Popen([sys.executable, "-c", program, str(path), str(model), str(i), str(num)])
        for i in range(num)
    ]
    assert not any(part.wait() for part in parts)


def raw_part(path: str, model: str, part: str, parts: str) -> None:
    """Tokenize every ``parts``-th batch of the texts of a file."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    for number, texts in enumerate(_batches(Path(path))):
        if number % int(parts) == int(part):
            tokenizer.encode_batch(texts, add_special_tokens=False)


def _batches(path: Path) -> Iterator[list[str]]:
    texts = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            asked, said = (turn["content"] for turn in json.loads(line)["messages"])
            texts.append(
                "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
                f"Hugging Face<|im_end|>\n<|im_start|>user\n{asked}<|im_end|>\n"
                f"<|im_start|>assistant\n{said}<|im_end|>\n"
            )
            if len(texts) == BATCH:
                yield texts
                texts = []
    yield texts


def load(path: Path, chat):  # type: ignore[no-untyped-def]
    """Return the rows of a stage, after the passes that its preflight makes over all of them."""
    from align.data.store.facts import row_facts
    from align.data.store.rows import StoredRows
    from align.data.store.source import fit_loaded, load_rows
    from align.recipe.schema import DataSpec
    from align.training import evidence

    render = chat.sft_row
    loaded = load_rows([DataSpec(path=str(path))], kind="sft", seed=0, render=render)
    limits = {"max_length": 2048, "max_lost_frac": 0.0, "what": "rows", "ledger": None}
    rows, _ = fit_loaded(loaded, render=render, **limits)
    if isinstance(rows, StoredRows):
        stops = frozenset(chat.stop_token_ids)
        row_facts(rows, stops=stops, bos=chat.tokenizer.bos_token_id, unknown=-1)
        evidence.row_facts(rows)
    return rows


def draw_epoch(rows) -> None:  # type: ignore[no-untyped-def]
    """Read every row once, in the order of an epoch."""
    from align.data.sampler import batch_indices

    for step in range(len(rows) // BATCH):
        for i in batch_indices(len(rows), BATCH, seed=0, step=step):
            rows[i]


if __name__ == "__main__":
    main()
