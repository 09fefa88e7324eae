"""Values as people write them: numbers with a unit, paths with a variable, methods as functions."""

from pathlib import Path

import pytest

from align.core.errors import ArtifactError, RecipeError
from align.core.sources import source_names
from align.models.loading import bringing_in
from align.pipeline.first_look import first_look
from align.recipe.load import load_recipe

RECIPE = """\
name: toy
stages:
  base: {{kind: base, path: {base}}}
  sft:
    kind: sft
    init: {init}
    data: [{{world: sft, rows: 100}}]
    steps: {steps}
    checkpoint_every: {every}
    optim: {{learning_rate: 1e-5, warmup_frac: {warmup}}}
  grpo:
    kind: grpo
    init: sft
    prompts: [{{world: prompts}}]
    rewards: [{{kind: python, path: '{reward}'}}]
    steps: 1
"""
GIVEN = {"base": "ORG/NAME", "init": "base", "steps": "10", "every": "auto", "warmup": "0.1"}
OWN = """
class Stat:
    @staticmethod
    def score(completions, **columns): return [0.0 for _ in completions]
    def both(self, completions): return [0.0 for _ in completions]

def both(completions):
    inner = 1
    global made_global
    return [0.0 for _ in completions]

try:
    from nowhere import fast as chosen
except ImportError:
    def chosen(completions): return both(completions)
"""


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)


def written(reward: str = "own.py:both", **values: str) -> Path:
    path = Path("r.yaml")
    path.write_text(RECIPE.format(**{**GIVEN, "reward": reward, **values}))
    return path


def problem(**values: str) -> str:
    with pytest.raises(RecipeError) as error:
        load_recipe(written(**values))
    (line,) = str(error.value).splitlines()
    return line.partition(": ")[2]


@pytest.mark.parametrize(
    ("key", "text", "hint"),
    [
        ("steps", "1_000", "write 1000"),
        ("steps", "1e3", "write 1000"),
        ("steps", "10k", "write 10000"),
        ("steps", "1.5M", "write 1500000"),
        ("steps", "0x10", "write 16"),
        ("steps", "'12'", "remove the quotes"),
        ("steps", "$STEPS", "write ${STEPS} for the value of an environment variable"),
        ("warmup", "5%", "write 0.05"),
        ("warmup", "0.5 %", "write 0.005"),
        ("warmup", "'1e-3'", "remove the quotes"),
        ("every", "1_0", "write 10"),
    ],
)
def test_a_number_in_another_notation_is_named_with_the_one_to_write(
    key: str, text: str, hint: str
):
    assert problem(**{key: text}).endswith(f"; {hint}")


@pytest.mark.parametrize(
    "text", ["5%", "many", "inf", "1.5", "1,000", "9" * 40 + "k_", "'" + "9" * 40 + "'"]
)
def test_what_is_no_whole_number_in_any_notation_has_no_hint(text: str):
    told = problem(steps=f'"{text}"' if "," in text else text)
    assert "expected a whole number" in told
    assert "write" not in told
    assert "quotes" not in told


def test_a_variable_that_nothing_expands_is_named_in_every_key_with_a_path():
    for name, written_as in (
        ("$HOME/m", "${HOME}/m"),
        ("~/m", "${HOME}/m"),
        ("'%DATA%/m'", "${DATA}/m"),
    ):
        hint = f"; write {written_as}: a recipe expands ${{NAME}} only"
        assert problem(init=name).endswith(hint)
        (told,) = first_look(load_recipe(written(base=name)), {}, Path("runs")).problems[:1]
        assert told.endswith(f"not a hub id ORG/NAME{hint}")
    assert problem(reward="$HOME/r.py:score").endswith(
        "; write ${HOME}/r.py: a recipe expands ${NAME} only"
    )
    with pytest.raises(ArtifactError, match=r"write \$\{HOME\}/m"), bringing_in("~/m"):
        raise AssertionError("a folder of this name is not looked for")


def test_a_variable_that_is_expanded_has_no_hint(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ALIGN_PLACE", "/nowhere")
    told = problem(init="${ALIGN_PLACE}/m")
    assert "'/nowhere/m'" in told
    assert "expands" not in told
    assert "expands" not in problem(init="runs/~m/$5")


def test_a_method_is_named_as_one_with_what_to_write():
    for reward in ("own.py:Stat.score", "own.py:score"):
        told = problem(reward=reward)
        assert "Stat.score is a part of a class in" in told
        assert "score = Stat.score" in told
    # A star may import any name, but none with a point.
    Path("star.py").write_text(f"from math import *\n{OWN}")
    load_recipe(written(reward="star.py:fsum"))
    assert "Stat.score is a part" in problem(reward="star.py:Stat.score")
    for reward in ("both", "chosen", "Stat"):
        load_recipe(written(reward=f"own.py:{reward}"))


def test_the_names_of_a_module_are_those_that_an_import_finds():
    names = source_names(Path("own.py"))
    assert set(names or ()) == {"Stat", "both", "chosen", "made_global"}
