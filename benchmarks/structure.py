"""Measure the structure of the code: sizes, imports, signatures, docstrings, comments, one trace.

    python -m benchmarks.structure                       # counts over align/ and reward_models/
    python -m benchmarks.structure --trace               # runs a small chain, about a minute

The trace runs small stages of the quickstart's recipe by ``align run`` under a tracer. It prints
how many files and functions of the project the process of one GRPO prompt enters, from the recipe
to the saved model, and how often an sft stage reads the recipe and a data file of which it takes
training and held-out rows. Everything else is read from the source with `ast`.
"""

import argparse
import ast
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOPS = ("align", "reward_models")
MATHS = ("align.losses", "align.online.advantages", "align.models", "align.evaluation")
"""Packages whose functions may take more than three positional tensors or numbers."""
INTERFACES = {
    "align.sampling.vllm_sampler.forward_cpu": "vLLM's TopKTopPSampler",
    "align.stages.trl.stage.on_log": "transformers' TrainerCallback",
    "align.tuning.inserted._create_and_replace": "peft's BaseTuner",
    "align.tuning.virtual.forward": "the forward of transformers' models",
    "align.tuning.wrap.leave_out": "torch's state_dict hooks",
}
"""Functions that a library calls with positional arguments, and the interface they implement."""
ASIDE = ("_call_with_frames_removed", "read_resolved")
"""Functions of an import and of the recipe's validation, which no prompt passes."""
PURPOSES = {"file_record": "hash", "reader_of": "type"}
"""Functions inside of which a data file is opened for something else than to parse all of it."""
OPENINGS = re.compile(r"(Give|Gives|Hold|Holds|Say|Says|Tell|Take|Let|Bring)\b")
PLACE = re.compile(r"^# An? (.+), place (\d+): ", re.MULTILINE)
"""Comment in tests/seams above each place that an extension of the suite touches."""
KINDS = ("algorithm", "reward", "data format", "tuning method", "stage")
Function = ast.FunctionDef | ast.AsyncFunctionDef

TRACER = """
import atexit, json, os, sys, threading
ROOTS = ({root!r} + "/align/", {root!r} + "/reward_models/")
CALLS, OPENED = set(), []
def _ours(frame):
    return frame.f_code.co_filename.startswith(ROOTS) and not frame.f_code.co_name.startswith("<")
def _note(frame, event, arg):
    if event != "call" or not _ours(frame):
        return
    found = (frame.f_code.co_filename, frame.f_code.co_qualname)
    while found not in CALLS:
        if frame is None:
            CALLS.add(found)
        elif frame.f_code.co_name in {aside!r}:
            return
        else:
            frame = frame.f_back
def _audit(event, args):
    if event != "open":
        return
    name, frame = os.path.basename(str(args[0])), sys._getframe().f_back
    if name in {watched!r}:
        within = []
        while frame is not None:
            if _ours(frame):
                within.append(frame.f_code.co_qualname)
            frame = frame.f_back
        OPENED.append((name, within))
    elif name == {start!r} and sys.getprofile() is None:
        # Only now: the profiler would make the import of torch slow. Callers were entered before.
        while frame is not None:
            _note(frame, "call", None)
            frame = frame.f_back
        threading.setprofile(_note); sys.setprofile(_note)
def _write():
    with open({folder!r} + "/" + str(os.getpid()) + ".json", "w") as f:
        json.dump(dict(argv=sys.orig_argv, calls=sorted(CALLS), opened=OPENED), f)
_exit = os._exit
def _ending(code):
    _write(); _exit(code)
os._exit = _ending
atexit.register(_write)
sys.addaudithook(_audit)
"""
RECIPE = """\
extends: {root}/recipes/quickstart.yaml
name: traced
stages:
  base: {{steps: 2, data: [{{world: corpus, rows: 100}}]}}
  grpo:
    init: base
    prompts: [{{path: rows.jsonl, split: train}}]
    rewards: [{{kind: regex, pattern: a}}]
    steps: 1
    prompts_per_step: 1
    sampling: {{engine: hf}}
  sft:
    init: base
    data: [{{path: rows.jsonl, split: train}}]
    heldout: [{{path: rows.jsonl, split: heldout}}]
    steps: 1
"""
"""Small versions of the quickstart's stages; the others are in the recipe, but do not run."""


def modules() -> dict[str, tuple[str, ast.Module]]:
    """Return the source and tree of every module by its dotted name."""
    found = {}
    for top in TOPS:
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            text = path.read_text(encoding="utf-8")
            found[name.removesuffix(".__init__")] = (text, ast.parse(text))
    return found


def top_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run at import, without functions and typing-only blocks."""
    for child in ast.iter_child_nodes(tree):
        typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not isinstance(child, Function | ast.Lambda) and not typing_only:
            yield child
            yield from top_level(child)


def internal_imports(tree: ast.AST, known: set[str], *, at_import: bool) -> set[str]:
    """Return the project's modules that a module imports."""
    found = set()
    for node in top_level(tree) if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else node.module for name in whole}
    return found & known


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected groups of more than one module."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        queue = [start]
        while queue:
            for name in graph[queue.pop()] - seen:
                seen.add(name)
                queue.append(name)
        return seen

    reached = {name: reach(name) for name in graph}
    groups = {
        frozenset({n for n in reached[name] if name in reached[n]} | {name}) for name in graph
    }
    return sorted(sorted(group) for group in groups if len(group) > 1)


def functions(tree: ast.Module) -> list[Function]:
    """Return every function and method of a module."""
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def positional(node: Function) -> int:
    """Return the number of positional parameters, ``self`` and ``cls`` aside."""
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
    return len(names) - (1 if names[:1] in (["self"], ["cls"]) else 0)


def is_command(node: Function) -> bool:
    """Return whether a function's parameters are options of the command line.

    A command is decorated as one, or registered elsewhere and describes its parameters to typer.
    """
    return any(".command(" in ast.unparse(d) for d in node.decorator_list) or any(
        "typer." in annotation for annotation in annotations(node)
    )


def annotations(node: Function) -> list[str]:
    """Return the annotations of the parameters, ``self`` and ``cls`` aside."""
    args = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    return [
        ast.unparse(a.annotation) if a.annotation else ""
        for a in args
        if a.arg not in ("self", "cls")
    ]


def many_positional() -> list[str]:
    """Return the functions outside maths that take more than three positional parameters."""
    return [
        name
        for module, (_, tree) in modules().items()
        for node in functions(tree)
        if positional(node) > 3
        and not module.startswith(MATHS)
        and not is_command(node)
        and (name := f"{module}.{node.name}") not in INTERFACES
    ]


def comment_lines(text: str) -> int:
    """Return the number of lines that hold nothing but a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(t.type == tokenize.COMMENT and t.line.lstrip().startswith("#") for t in tokens)


def measure() -> dict[str, str]:
    """Return each figure of the table by its name."""
    found = modules()
    known = set(found)
    graph = {n: internal_imports(t, known, at_import=True) - {n} for n, (_, t) in found.items()}
    imported = sorted(
        len(internal_imports(t, known, at_import=False) - {n}) for n, (_, t) in found.items()
    )
    every = [(name, node) for name, (_, tree) in found.items() for node in functions(tree)]
    sizes = sorted((node.end_lineno or 0) - node.lineno + 1 for _, node in every)
    types = [a for _, node in every for a in annotations(node)]
    docs = [
        doc
        for _, tree in found.values()
        for node in ast.walk(tree)
        if isinstance(node, Function | ast.ClassDef) and (doc := ast.get_docstring(node))
    ]
    lines = sum(len(text.splitlines()) for text, _ in found.values())
    comments = sum(comment_lines(text) for text, _ in found.values())
    many = many_positional()
    odd = [doc for doc in docs if OPENINGS.match(doc)]
    groups = circles(graph)
    return {
        "files": str(len(found)),
        "lines, own-line comments aside": str(lines - comments),
        "longest file": str(max(len(text.splitlines()) for text, _ in found.values())),
        "function lines p50 / p90 / max": f"{sizes[len(sizes) // 2]} / "
        f"{sizes[len(sizes) * 9 // 10]} / {sizes[-1]}",
        "import circles": str(len(groups)) + "".join(f"\n    {' <-> '.join(g)}" for g in groups),
        "internal imports per module p90": str(imported[len(imported) * 9 // 10]),
        "fmt: skip": str(sum(text.count("# fmt: skip") for text, _ in found.values())),
        "parameters typed Any": f"{100 * types.count('Any') / len(types):.1f} %",
        "functions of more than 3 positional parameters outside maths": str(len(many))
        + "".join(f"\n    {name}" for name in many),
        "docstrings that open with Give, Hold, Say, ...": f"{len(odd)} of {len(docs)}",
        "own-line comments per 1,000 lines": f"{1000 * comments / lines:.1f}",
    }


def places() -> dict[str, str]:
    """Return the number of places that each extension in tests/seams touches."""
    found = [
        match
        for path in sorted((ROOT / "tests" / "seams").glob("*.py"))
        for match in PLACE.findall(path.read_text(encoding="utf-8"))
    ]
    counts = [max(int(number) for kind, number in found if kind == name) for name in KINDS]
    name = f"places to touch for a new {' / '.join(KINDS)} (tests/seams)"
    return {name: " / ".join(map(str, counts))}


def write_tracer(folder: Path, *, watched: Sequence[str], start: str = "") -> str:
    """Write a hook for Python processes into ``folder``, where each leaves a JSON file.

    Args:
        folder: made here.
        watched: names of the files whose opens are noted, with the project's functions around each.
        start: name of the file at whose opening the tracing of calls begins; "" for no tracing.

    Returns:
        PYTHONPATH of the processes.
    """
    folder.mkdir()
    hook = TRACER.format(
        root=str(ROOT), folder=str(folder), watched=list(watched), start=start, aside=ASIDE
    )
    (folder / "sitecustomize.py").write_text(hook, encoding="utf-8")
    return os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])


def read_traces(folder: Path) -> list[dict[str, Any]]:
    """Return what each process noted."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")]


def purpose(within: Sequence[str]) -> str:
    """Return why a file was opened, by the functions around the call: hash, type or parse."""
    return next((what for name, what in PURPOSES.items() if name in within), "parse")


def run_small(stage: str, folder: Path, *, path: str) -> None:
    """Run a stage of RECIPE by ``align run``."""
    command = [sys.executable, "-m", "align", "run", "traced.yaml", "--only", stage]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])


def trace() -> dict[str, str]:
    """Return the files and functions that a prompt passes, and how often files are read."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "traced.yaml").write_text(RECIPE.format(root=ROOT), encoding="utf-8")
        rows = [{"prompt": f"Say {i} again.", "completion": f"{i}"} for i in range(20)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "rows.jsonl").write_text(text, encoding="utf-8")
        run_small("base", folder, path=str(ROOT))
        path = write_tracer(folder / "grpo", watched=[], start="recipe.yaml")
        run_small("grpo", folder, path=path)
        path = write_tracer(folder / "sft", watched=["traced.yaml", "rows.jsonl"])
        run_small("sft", folder, path=path)
        (grpo,) = (p for p in read_traces(folder / "grpo") if "align.stages" in p["argv"])
        sft = Counter(
            (file, purpose(within))
            for process in read_traces(folder / "sft")
            for file, within in process["opened"]
        )
    return {
        "files and functions of the project in the process of a grpo stage": (
            f"{len({name for name, _ in grpo['calls']})} / {len(grpo['calls'])}"
        ),
        "times the recipe / a data file is read for a stage": (
            f"{sft['traced.yaml', 'parse']} / {sft['rows.jsonl', 'parse']} (the data file is also "
            f"opened {sft['rows.jsonl', 'hash']} x for its hash and {sft['rows.jsonl', 'type']} x "
            "for its type)"
        ),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trace", action="store_true", help="run two small stages under a tracer")
    args = parser.parse_args()
    figures = trace() if args.trace else measure() | places()
    for name, value in figures.items():
        sys.stdout.write(f"{name}: {value}\n")


if __name__ == "__main__":
    main()
