"""Migration tables: a key of another tool is read by its converter; one of align's exists."""

import re
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import RecipeError
from align.recipe import reference
from align.recipe.algorithms import ALGORITHMS
from align.recipe.foreign.convert import TOOLS
from align.recipe.foreign.keys import Keys, Note
from align.recipe.source import Mark
from tests.foreign_configs import Config, configs

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migrate.md").read_text(encoding="utf-8")
EXAMPLES = {  # A real key for each group of keys that a table abbreviates.
    "lora_*": "lora_r",
    "lr_scheduler_*": "lr_scheduler_type",
    "warmup_*": "warmup_ratio",
    "adam_*": "adam_beta2",
}
METHODS: dict[str, list[Config]] = {
    "axolotl": [{"rl": name} for name in ("dpo", "ipo", "simpo", "orpo", "kto", "grpo")],
    "llamafactory": [
        *({"stage": name} for name in ("rm", "dpo", "kto", "ppo")),
        {"stage": "dpo", "pref_loss": "simpo"},
    ],
    "trl": [
        *({"output_dir": name} for name in ("sft", "orpo", "kto", "reward", "grpo", "ppo")),
        {"output_dir": "dpo", "beta": 2.0, "loss_type": "simpo", "max_seq_length": None},
    ],
}
FACTORY_ALIASES = {"lora_*": "lora_rank"}


def read_keys() -> list[tuple[str, str]]:
    """Return (tool, key) of every key that the tables of docs/import.md list as converted."""
    found = []
    for tool, module in TOOLS.items():
        own = FACTORY_ALIASES if tool == "llamafactory" else {}
        for keys in module.EQUIVALENTS:
            found += [(tool, own.get(key) or EXAMPLES.get(key, key)) for key in keys.split(", ")]
    return found


def is_read(tool: str, key: str) -> bool:
    """Whether the converter looks at a key in an example configuration of any method."""
    found = [config for name, _, config in configs() if name == tool]
    found += [found[0] | method for method in METHODS[tool]]
    return any(
        _reads(tool, config | {key: value}, key)
        for config in found
        for value in (config.get(key), 1, True, "a", ["a"], [{"path": "a"}], {"a": 1})
        if value is not None
    )


def _reads(tool: str, config: Config, key: str) -> bool:
    notes: list[Note] = []
    keys = Keys(config, {(): Mark("c.yaml", 1)}, at=(), notes=notes)
    try:
        TOOLS[tool].convert(keys, None)
    except RecipeError as error:
        return f": {key}" in str(error)  # its value is refused
    return key in keys.taken


@pytest.mark.parametrize(("tool", "key"), read_keys())
def test_every_key_of_the_tables_is_read_by_its_converter(tool: str, key: str) -> None:
    assert is_read(tool, key)


def test_a_key_that_no_converter_reads_is_noticed() -> None:
    assert not any(is_read(tool, "lora_rankk") for tool in TOOLS)


def tables() -> list[tuple[str, str, str]]:
    """Return (heading, key there, key here) of every line of the tables of docs/migrate.md."""
    found = []
    for part in PAGE.split("\n## ")[1:]:
        heading = part.splitlines()[0]
        if heading in ("OpenRLHF", "verl"):
            for line in re.findall(r"^\|( `.*)\|$", part, re.M):
                there, here, _ = line.split("|")
                found.append((heading, there.strip(), here.strip()))
    return found


def properties(schema: Any) -> set[str]:
    if isinstance(schema, dict):
        inside = [properties(value) for value in schema.values()]
        return set(schema.get("properties", {})).union(*inside)
    return set().union(*map(properties, schema)) if isinstance(schema, list) else set()


KNOWN = properties(reference.json_schema()) | {"base"}


@pytest.mark.parametrize(("heading", "there", "here"), tables())
def test_every_key_of_align_in_the_tables_is_in_the_schema(
    heading: str, there: str, here: str
) -> None:
    for quoted in re.findall(r"`([^`]+)`", here):
        path, _, value = quoted.partition(":")
        unknown = set(path.split(".")) - KNOWN
        assert not unknown, f"{heading}, {there}: {sorted(unknown)}"
        if path == "algorithm" and value:
            assert value.strip() in ALGORITHMS


def test_the_tables_are_long_enough_to_migrate_with() -> None:
    headings = [heading for heading, _, _ in tables()]
    assert headings.count("OpenRLHF") >= 50
    assert headings.count("verl") >= 40
    # Each key has one place: a key that is listed twice would have two answers.
    keys = [
        (heading, key) for heading, there, _ in tables() for key in re.findall(r"`([^`]+)`", there)
    ]
    assert len(keys) == len(set(keys))
