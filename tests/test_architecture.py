"""Hold every source file to the layers, the homes of heavy libraries and the size limits."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import structure

ROOT = Path(__file__).resolve().parents[1]
TOPS = ("align", "reward_models", "launch")
MAX_FUNCTION_LINES, MAX_FILE_LINES = 80, 450

L0 = ("align.core", "align.losses", "reward_models")
L2 = (*L0, "align.recipe.schema")
L3 = (*L0, "align.recipe", "align.data", "align.models", "align.tuning")
L4 = (*L3, "align.training")
L5 = (*L4, "align.sampling", "align.online", "align.evaluation")
# The longest prefix of a module's name says what it may import of this project besides its own
# package. A module that no line fits fails the test: a new package is given its layer here.
MAY_IMPORT = {
    "align.core": (),
    "align.losses": ("align.core",),
    "reward_models": (),
    "align.recipe": (
        *("align.core.errors", "align.core.text", "align.core.sources", "align.core.bounded_yaml"),
        *("reward_models.specs", "reward_models.identity"),
    ),
    "align.data": L2,
    "align.models": L2,
    "align.tuning": (*L2, "align.recipe.starts", "align.models"),
    "align.training": L3,
    "align.sampling": L4,
    "align.online": (*L4, "align.sampling"),
    "align.evaluation": L4,
    "align.preflight": L5,
    "align.export": L4,
    "align.stages": (*L5, "align.preflight", "align.export"),
    "align.pipeline": ("align.core", "align.recipe", "align.report", "align.data"),
    "align.report": ("align.core", "align.recipe"),
    "align.__main__": ("align.cli",),
    "align.cli": ("align.core", "align.recipe", "align.pipeline", "align.report", "align.doctor"),
    "align.doctor": ("align.core", "align.recipe"),
    "align.api": (
        *("align.core", "align.recipe", "align.pipeline", "align.report"),
        *("align.cli.eval_recipe", "reward_models.base"),
    ),
    "align.rewards": ("reward_models",),
    "align.serve": (
        *("align.core", "align.recipe", "align.pipeline", "align.report", "align.data"),
        *("align.api", "reward_models"),
    ),
    "launch": ("align.stages",),
}
HOMES = {
    "vllm": (
        *("align.sampling.vllm", "align.sampling.vllm_push", "align.sampling.vllm_sampler"),
        *(
            "align.sampling.vllm_reading",
            "align.sampling.vllm_serving",
            "align.sampling.vllm_start",
        ),
    ),
    "deepspeed": (
        "align.core.distributed",
        "align.core.resharding",
        "align.models.sharding",
        "align.training.learner",
        "align.tuning.export",
    ),
    "peft": ("align.tuning",),
    "trl": ("align.stages.trl.trainers", "align.data.render.chat"),
    "openai": ("reward_models.judge",),
    "evaluate": ("reward_models.metric",),
}
TORCH_FREE = (
    "align.recipe",
    "align.pipeline",
    "align.report",
    "align.cli",
    "align.doctor",
    "align.api",
    "align.rewards",
    "align.data.check",
    "align.serve",
)
COMMANDS = ("align.cli", "align.doctor", "align.api")
HEAVY = {"torch", "transformers", "datasets", "accelerate", *HOMES}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


TREES = {
    module_name(path): ast.parse(path.read_text())
    for top in TOPS
    for path in sorted((ROOT / top).rglob("*.py"))
}


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def rule_for(module: str) -> str | None:
    return max((p for p in MAY_IMPORT if within(module, (p,))), key=len, default=None)


def nodes(tree: ast.AST, *, at_import: bool) -> Iterator[ast.AST]:
    """Walk a tree; at_import=True leaves out what does not run when the module is imported."""
    for child in ast.iter_child_nodes(tree):
        lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not (at_import and (lazy or typing_only)):
            yield child
            yield from nodes(child, at_import=at_import)


def imports(module: str, *, at_import: bool = False) -> set[str]:
    """Give the full names of the modules that a module imports."""
    found = set()
    for node in nodes(TREES[module], at_import=at_import):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in TREES else str(node.module) for name in whole}
    return found


def test_layers_import_downwards_only():
    wrong = []
    for module in TREES.keys() - set(TOPS):
        rule = rule_for(module)
        assert rule, f"{module} belongs to no layer: name its package in MAY_IMPORT"
        # A command may load the rest inside a function, once the recipe is known to be valid.
        for name in imports(module, at_import=within(module, COMMANDS)):
            if within(name, TOPS) and not within(name, (rule, *MAY_IMPORT[rule])):
                wrong.append(f"{module} -> {name}")
    assert not sorted(wrong)


def test_core_types_and_errors_need_the_standard_library_only():
    for module in ("align.core.types", "align.core.errors"):
        roots = {name.split(".")[0] for name in imports(module)}
        assert roots <= sys.stdlib_module_names


def test_heavy_libraries_stay_in_their_homes():
    wrong = [
        f"{module} -> {name}"
        for module in TREES
        for name in imports(module)
        if (home := HOMES.get(name.split(".")[0])) and not within(module, home)
    ]
    assert not sorted(wrong)


def test_a_recipe_is_checked_without_torch():
    wrong = []
    for start in (m for m in TREES if within(m, TORCH_FREE)):
        seen, queue = set(), [start]
        while queue:
            module = queue.pop()
            seen.add(module)
            for name in imports(module, at_import=True):
                if name.split(".")[0] in HEAVY:
                    wrong.append(f"{start}: {module} -> {name}")
                parts = name.split(".")
                parents = {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
                queue += (parents & TREES.keys()) - seen
    assert not sorted(set(wrong))


def test_functions_and_files_are_short():
    wrong = []
    for module, tree in TREES.items():
        path = ROOT / Path(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if (count := len(path.read_text().splitlines())) > MAX_FILE_LINES:
            wrong.append(f"{module}: {count} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = (node.end_lineno or 0) - node.lineno + 1
                if count > MAX_FUNCTION_LINES:
                    wrong.append(f"{module}.{node.name}: {count} lines")
    assert not sorted(wrong)


def test_at_most_three_parameters_are_positional():
    assert structure.many_positional() == []


def test_interfaces_of_libraries_are_still_there():
    found = {
        f"{module}.{node.name}"
        for module, (_, tree) in structure.modules().items()
        for node in structure.functions(tree)
        if structure.positional(node) > 3
    }
    assert structure.INTERFACES.keys() <= found


def test_no_import_circles():
    graph = {module: imports(module, at_import=True) & TREES.keys() - {module} for module in TREES}
    assert structure.circles(graph) == []


def test_nothing_prints():
    wrong = [
        f"{module}:{node.lineno}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print"
    ]
    assert not sorted(wrong)


def test_the_architecture_page_names_every_folder_and_no_other():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = page.partition("## Rooms")[2].partition("## ")[0]
    named = set(re.findall(r"^\| `([a-z_/]+)` \|", rows, re.MULTILINE))
    found = {
        str(path.parent.relative_to(ROOT))
        for top in TOPS
        for path in (ROOT / top).rglob("*")
        if path.suffix in (".py", ".yaml")
    }
    assert named == found - {"align"}
    paths = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", page))
    missing = {p for p in paths if not ((ROOT / "align" / p).exists() or (ROOT / p).exists())}
    assert not missing
