"""Modules that register kinds: where they are named, and that their code identifies a stage."""

import subprocess
import sys
from pathlib import Path

import pytest

from align.core.artifacts import spec_hash
from align.core.sources import EXTENSIONS
from align.recipe.load import load_recipe

REWARD = """\
from typing import ClassVar, Literal
from reward_models.specs import RewardSpec

class ShoutSpec(RewardSpec):
    '''Score the fraction of capital letters.'''
    builder: ClassVar[str] = "MODULE:build"
    kind: Literal["NAME"]

def build(spec):
    raise NotImplementedError
"""
RECIPE = """\
name: x
stages:
  base: {kind: base, path: gone}
  grpo: {kind: grpo, init: base, prompts: [{path: p.jsonl}], rewards: [{kind: NAME}], steps: 1}
"""


def module(folder: Path, name: str) -> None:
    (folder / f"{name}.py").write_text(
        REWARD.replace("MODULE", name).replace("NAME", f"{name}_kind")
    )


def package(folder: Path, name: str, module: str) -> None:
    """Install a package whose entry point names a module."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[align.extensions]\n{name} = {module}\n")


def test_an_installed_package_registers_its_kinds_by_an_entry_point(tmp_path: Path):
    module(tmp_path, "shouting")
    package(tmp_path, "shouting", "shouting")
    (tmp_path / "r.yaml").write_text(RECIPE.replace("NAME", "shouting_kind"))
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r});"
        "from align.recipe.load import load_recipe;"
        f"print(load_recipe({str(tmp_path / 'r.yaml')!r}).stages['grpo'].rewards[0].kind)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "shouting_kind\n", done.stderr


def test_a_changed_extension_makes_another_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = spec_hash({"kind": "sft"}, seed=0, inputs={})
    monkeypatch.syspath_prepend(tmp_path)
    module(tmp_path, "whispering")
    monkeypatch.setenv(EXTENSIONS, "whispering")
    before = spec_hash({"kind": "sft"}, seed=0, inputs={})
    with (tmp_path / "whispering.py").open("a") as f:
        f.write("# changed\n")
    after = spec_hash({"kind": "sft"}, seed=0, inputs={})
    assert len({plain, before, after}) == 3


def test_an_extension_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch):
    from align.core.errors import RecipeError

    monkeypatch.setenv(EXTENSIONS, "no_such_module_here")
    with pytest.raises(RecipeError, match=r"extension 'no_such_module_here' cannot be imported"):
        load_recipe("quickstart")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("raise RuntimeError('wrong driver')", "RuntimeError: wrong driver"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("def f(:", "SyntaxError: "),
    ],
)
def test_a_broken_plug_in_is_named_with_its_package(
    code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from align.core.errors import RecipeError
    from align.core.sources import installed_extensions

    (tmp_path / "broken_kinds.py").write_text(code)
    package(tmp_path, "my-plugin", "broken_kinds")
    monkeypatch.syspath_prepend(tmp_path)
    installed_extensions.cache_clear()
    try:
        with pytest.raises(RecipeError) as caught:
            load_recipe("quickstart")
    finally:
        installed_extensions.cache_clear()
    found = str(caught.value)
    assert "extension 'broken_kinds' of the installed package 'my-plugin' cannot be" in found
    assert reason in found
    assert found.endswith("Install what it needs, or remove it: pip uninstall my-plugin")
