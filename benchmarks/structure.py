"""Measure the structure of the code: sizes, imports, signatures, docstrings, comments, one trace.

    python -m benchmarks.structure                       # counts over align/ and reward_models/
    python -m benchmarks.structure --trace -- python launch/grpo.py --recipe R --stage NAME

The trace runs one stage under a call tracer and prints how many files and functions of the project
it entered. Everything else is read from the source with `ast`; nothing is imported.
"""

import argparse
import ast
import io
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from pathlib import Path

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
OPENINGS = re.compile(r"(Give|Gives|Hold|Holds|Say|Says|Tell|Take|Let|Bring)\b")
PLACE = re.compile(r"^# An? (.+), place (\d+): ", re.MULTILINE)
"""Comment in tests/seams above each place that an extension of the suite touches."""
KINDS = ("algorithm", "reward", "data format", "tuning method", "stage")
Function = ast.FunctionDef | ast.AsyncFunctionDef

TRACER = """
import atexit, sys, threading
ROOTS = ({root!r} + "/align/", {root!r} + "/reward_models/")
SEEN = set()
def _trace(frame, event, arg):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(ROOTS) and code.co_name != "<module>":
        SEEN.add((code.co_filename, code.co_qualname))
def _write():
    with open({out!r}, "w") as f:
        f.writelines(f"{{a}}\\t{{b}}\\n" for a, b in sorted(SEEN))
import os
_exit = os._exit
def _ending(code):
    _write(); _exit(code)
os._exit = _ending
atexit.register(_write)
threading.setprofile(_trace); sys.setprofile(_trace)
"""


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


def trace(command: list[str]) -> dict[str, str]:
    """Run a command under the tracer; return the files and functions that it entered."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "calls.tsv")
        hook = TRACER.format(root=str(ROOT), out=out)
        (Path(folder) / "sitecustomize.py").write_text(hook, encoding="utf-8")
        path = os.pathsep.join([folder, str(ROOT), os.environ.get("PYTHONPATH", "")])
        subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True)
        calls = [line.split("\t") for line in Path(out).read_text().splitlines()]
    return {
        "files of the project entered": str(len({name for name, _ in calls})),
        "functions of the project entered": str(len(calls)),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trace", action="store_true", help="trace the command after --")
    parser.add_argument("command", nargs="*")
    args = parser.parse_args()
    figures = trace(args.command) if args.trace else measure() | places()
    for name, value in figures.items():
        sys.stdout.write(f"{name}: {value}\n")


if __name__ == "__main__":
    main()
