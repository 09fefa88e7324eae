"""The JSON schema and the page of keys follow the schema classes; jsonschema validates by them."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from align.cli import cli
from align.recipe.reference import json_schema, markdown

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
RECIPES = [path for path in RECIPES if "stages:" in path.read_text()]
LINE = "# yaml-language-server: $schema=../align/recipe/recipe.schema.json\n"
SCHEMA = json.loads((ROOT / "align/recipe/recipe.schema.json").read_text())


def test_every_key_of_every_block_has_a_description() -> None:
    parts = {"Recipe": SCHEMA, **SCHEMA["$defs"]}
    bare = [
        f"{name}.{key}"
        for name, part in parts.items()
        for key, field in part.get("properties", {}).items()
        if not field.get("description")
    ]
    assert len(parts) > 60
    assert bare == []


def test_every_key_has_an_example_that_is_valid_and_no_default() -> None:
    parts = {"Recipe": SCHEMA, **SCHEMA["$defs"]}
    wrong, count = [], 0
    for name, part in parts.items():
        for key, field in part["properties"].items():
            if "const" in field or (key in ("kind", "method") and "default" not in field):
                continue
            count += 1
            place = f"{name}.{key}: add an example to align/recipe/examples.yaml"
            if len(field.get("examples", [])) != 1:
                wrong.append(place)
                continue
            (value,) = field["examples"]
            checker = jsonschema.Draft202012Validator({**field, "$defs": SCHEMA["$defs"]})
            wrong += [f"{place} ({error.message})" for error in checker.iter_errors(value)]
            if value == field.get("default", object):
                wrong.append(f"{place} ({value!r} is the default)")
    assert wrong == []
    assert count > 350


def test_every_row_of_the_tables_is_one_line() -> None:
    lines = markdown().splitlines()
    rows = [i for i, line in enumerate(lines) if line.startswith("| `")]
    # The header has six bars; one in a cell has a backslash.
    cells = {lines[i].replace("\\|", "").count("|") for i in rows}
    assert len(rows) > 350
    assert cells == {6}
    assert 'wording: {"head": "Different tasks:\\n\\n"}' in markdown()


def test_every_example_is_shown() -> None:
    parts = {"Recipe": SCHEMA, **SCHEMA["$defs"]}
    shown = {
        (key, json.dumps(value))
        for part in parts.values()
        for key, field in part["properties"].items()
        for value in field.get("examples", [])
    }
    listed = yaml.safe_load((ROOT / "align/recipe/examples.yaml").read_text())
    idle = [
        name
        for name, value in listed.items()
        if (name.rpartition(".")[2], json.dumps(value)) not in shown
    ]
    assert idle == []


def test_the_shipped_files_are_what_the_command_prints() -> None:
    assert json_schema() == SCHEMA, "run: align schema > align/recipe/recipe.schema.json"
    page = (ROOT / "docs/recipe-keys.md").read_text()
    assert page == markdown(), "run: align schema --markdown > docs/recipe-keys.md"
    shown = CliRunner().invoke(cli, ["schema"])
    assert json.loads(shown.stdout) == SCHEMA
    assert CliRunner().invoke(cli, ["schema", "--markdown"]).stdout == page


def test_links_of_the_page_lead_to_headings() -> None:
    page = markdown()
    headings = {
        "".join(c for c in line.lstrip("# ").lower().replace(" ", "-") if c.isalnum() or c in "-_")
        for line in page.splitlines()
        if line.startswith("#")
    }
    links = {part.partition(")")[0] for part in page.split("](#")[1:]}
    assert len(links) > 30
    assert links <= headings


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_follows_the_schema_and_names_it(path: Path) -> None:
    text = path.read_text()
    jsonschema.Draft202012Validator(SCHEMA).validate(yaml.safe_load(text))
    depth = len(path.relative_to(ROOT / "recipes").parts) - 1
    assert text.startswith(LINE.replace("../", "../" * (depth + 1)))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("stages", "sft", "learning_rate"), 1e-4),
        (("stages", "sft", "kind"), "stf"),
        (("stages", "sft", "batch_size"), 0),
        (("stages", "grpo", "kl", "estimator"), "k4"),
        (("stages", "grpo", "algorithm"), "gpro"),
        (("stages", "sft", "dtype"), "float16"),
        (("stage",), {}),
    ],
)
def test_the_schema_refuses_what_the_recipe_refuses(keys: tuple[str, ...], value: object) -> None:
    recipe = yaml.safe_load((ROOT / "recipes/quickstart.yaml").read_text())
    wrong = copy.deepcopy(recipe)
    place = wrong
    for key in keys[:-1]:
        place = place.setdefault(key, {})
    place[keys[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(wrong)
