"""What README shows is what the suite takes."""

import re
from pathlib import Path

from align.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]


def test_readme_recipe_is_right(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    path = tmp_path / "my.yaml"
    path.write_text(block, encoding="utf-8")
    overrides = [w for w in re.findall(r"--set (\S+)", text) if w.startswith("stages.")]
    assert overrides
    for override in ["", *overrides]:
        recipe = load_recipe(path, [override] if override else [])
        assert list(recipe.stages) == ["base", "sft", "dpo", "evaluate"]


def test_recipe_table_names_every_recipe() -> None:
    table = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert f"]({path.name})" in table


def test_readme_names_only_commands_and_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"(?:launch|recipes|tests|scripts)/[\w/.]+\.(?:py|sh|yaml|md)", text):
        assert (ROOT / name).is_file(), name
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"[`\n]make ([a-z]+)", text):
        assert f"\n{target}:" in makefile, target
