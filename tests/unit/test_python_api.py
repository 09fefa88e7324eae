"""``import align``: names, plain recipes, functions and data written to files, errors."""

import ast
import hashlib
import io
import json
import math
import re
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy
import pytest
import yaml

import align
from align.api.code import python_reward, reference
from align.api.given import Writer, base_stage, rewards, sources
from align.api.running import load_recipe
from align.core.errors import ArtifactError, DataError, RecipeError
from align.pipeline.progress import make_console
from align.pipeline.running import Signals
from align.recipe.load import find_recipe, resolve
from align.recipe.load import load_recipe as load_file
from align.recipe.plain import read_plain, write_short
from align.recipe.source import SHIPPED, read_source
from reward_models.own_process import load
from reward_models.specs import RewardSpec

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"prompt": "say sun", "completion": "sün"}, {"prompt": "say fog", "completion": "fog"}]


def python(code: str, *, cwd: Path, seed: str = "0") -> str:
    """Run code in a process of its own, in another folder than the checkout."""
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# The names.


def test_import_align_is_light_and_recipes_are_read_without_torch(tmp_path):
    heavy = "{'torch', 'transformers', 'datasets', 'vllm', 'trl'} & set(sys.modules)"
    code = f"""
        import sys, align
        assert not {{'pydantic', 'yaml', 'rich'}} & set(sys.modules)
        align.load_recipe("quickstart"), align.sft, align.run, align.Run, align.rewards.math
        assert not {heavy}, {heavy}
    """
    python(code, cwd=tmp_path)


@pytest.mark.parametrize("module", [align, align.losses, align.rewards], ids=lambda m: m.__name__)
def test_every_public_name_resolves_and_type_checkers_see_it(module):
    for name in module.__all__:
        assert getattr(module, name) is not None
    tree = ast.parse(Path(str(module.__file__)).read_text())
    typed = next((n for n in tree.body if isinstance(n, ast.If)), tree)
    seen = {
        a.asname or a.name
        for n in ast.walk(typed)
        if isinstance(n, ast.ImportFrom)
        for a in n.names
    }
    seen |= {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    assert set(module.__all__) <= seen
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_every_function_of_a_loss_module_is_public_or_internal_by_choice():
    internal = {"PerToken", "masked_moments", "soft_labels", "tail_weights"}
    defined = set()
    for file in (ROOT / "align" / "losses").glob("*.py"):
        nodes = ast.parse(file.read_text()).body
        defined |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    public = {name for name in defined if not name.startswith("_")}
    assert public - internal == set(align.losses.__all__)


def test_rewards_score_in_python_as_their_kinds():
    kinds = {
        kind for kind, spec in RewardSpec.variants.items() if "reward_models" in spec.__module__
    }
    for kind in kinds:
        assert callable(getattr(align.rewards, kind))
    # Each is a name of the module, which completion and type checkers see.
    assert kinds <= set(align.rewards.__all__)
    assert kinds <= vars(align.rewards).keys()
    right = align.rewards.build(align.rewards.math(column="answer"))
    assert right(prompts=["1+1?", "2+2?"], completions=["2", "5"], answer=["2", "4"]) == [1.0, 0.0]


# Recipes as plain data.


@pytest.mark.parametrize("name", sorted(p.stem for p in SHIPPED.glob("*.yaml")))
def test_a_recipe_as_data_as_text_and_saved_is_the_recipe_of_the_file(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_REAL_DATA", "/data/real")
    recipe = load_file(name)
    source = read_source(find_recipe(name))
    assert resolve(read_plain(source.data, "recipe"), folder=SHIPPED).recipe == recipe
    write_short(recipe, tmp_path / "short.yaml")
    assert load_recipe((tmp_path / "short.yaml").read_text()) == recipe
    plain = yaml.safe_load((tmp_path / "short.yaml").read_text())
    assert len(str(plain)) < len(str(recipe.model_dump(mode="json")))


def reward_recipe(**block: Any) -> dict[str, Any]:
    entry = {"kind": "regex", "pattern": "x", **block}
    stage = {"kind": "grpo", "init": "base", "prompts": [{"world": "prompts", "rows": 8}]}
    stages = {
        "base": {"kind": "base", "path": "m"},
        "grpo": {**stage, "rewards": [entry], "steps": 1},
    }
    return {"name": "r", "stages": stages}


@pytest.mark.parametrize(
    "text", ["1e5", "no", "010", "a: b", "null", "x$${HOME}", "é\n\t#", "<<", ""]
)
def test_a_saved_recipe_keeps_every_text(text, tmp_path):
    recipe = load_recipe(reward_recipe(pattern=text))
    (entry,) = recipe.stages["grpo"].rewards  # pyright: ignore[reportAttributeAccessIssue]
    assert entry.pattern == text.replace("$$", "$")
    write_short(recipe, tmp_path / "short.yaml")
    assert load_file(tmp_path / "short.yaml") == recipe


def test_a_saved_recipe_names_a_secret_and_does_not_contain_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "hush-hush-123")
    judge = {"kind": "judge", "endpoint": {"url": "http://x/${MY_API_KEY}", "model": "m"}}
    recipe = reward_recipe()
    recipe["stages"]["grpo"]["rewards"] = [judge]
    loaded = load_recipe(recipe)
    write_short(loaded, tmp_path / "short.yaml")
    text = (tmp_path / "short.yaml").read_text()
    assert "hush" not in text
    assert "${MY_API_KEY}" in text
    assert load_file(tmp_path / "short.yaml") == loaded


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"name": "a", "stages": {1: {}}}, "recipe: stages: found the key 1; expected text"),
        (reward_recipe(pattern={3}), "stages.grpo.rewards.0.pattern: found a set; expected text"),
        (reward_recipe(weight=math.nan), "stages.grpo.rewards.0.weight: found nan; expected a fin"),
        ({"extends": "x.yaml", "name": "a"}, "recipe: extends: is relative to a recipe's file"),
        ("name: a\nstages: {x: {kind: sftt}}\n", "recipe:2:20: stages.x.kind: found 'sftt'"),
        ("- a\n- b\n", "recipe: expected a mapping"),
        ("a: [\n", "recipe: not valid YAML"),
    ],
)
def test_what_a_recipe_cannot_contain_is_one_line(recipe, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(recipe)


def test_errors_name_the_arguments_of_the_function(tmp_path):
    with pytest.raises(RecipeError) as caught:
        align.grpo(
            model="org/model",
            tokenizer={"pad": "x"},
            data=[{"path": "x.jsonl", "formt": "auto"}],
            rewards="mth",
            steps=0,
            grup_size=4,
            learning_rate=1e-5,
            out=tmp_path / "out",
        )
    lines = str(caught.value).splitlines()
    assert all(line.startswith("align.grpo: ") for line in lines)
    said = {line.split(": ")[1]: line for line in lines}
    assert "did you mean 'group_size'?" in said["grup_size"]
    assert "did you mean 'optim.learning_rate'?" in said["learning_rate"]
    assert "did you mean 'format'?" in said["data.0.formt"]
    assert "did you mean 'math'?" in said["rewards.0.kind"]
    assert {"tokenizer.pad", "steps"} <= said.keys()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eval_every": 2}, "align.grpo: eval_every: has no effect without heldout"),
        ({"heldout": ROWS, "watch": {}}, "align.grpo: heldout: 'watch' has prompts of its own"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments, message, tmp_path):
    given = {"model": "m", "data": ROWS, "rewards": "math", "steps": 1, "out": tmp_path}
    with pytest.raises(RecipeError, match=message):
        align.grpo(**given, **arguments)


def test_evaluate_refuses_an_unknown_option_and_an_empty_list():
    with pytest.raises(RecipeError, match="sample: unknown option; did you mean"):
        align.evaluate(["runs/x/sft"], sample=3)
    with pytest.raises(RecipeError, match="models: found an empty list"):
        align.evaluate([])


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(ArtifactError, match="no stage found"):
        align.Run(tmp_path).stages  # noqa: B018


# Data.


def rows_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_rows_and_a_dataset_become_the_same_file_and_it_is_written_once(tmp_path):
    (plain,) = Writer(tmp_path).plain({"data": sources(ROWS)})["data"]
    file = Path(plain["path"])
    assert rows_of(plain["path"]) == ROWS
    assert file.name == f"data-{hashlib.sha256(file.read_bytes()).hexdigest()[:12]}.jsonl"
    before = file.stat().st_mtime_ns
    again = Writer(tmp_path).plain({"data": datasets.Dataset.from_list(ROWS)})["data"]
    assert again == [plain]
    assert file.stat().st_mtime_ns == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_a_dataset_loses_the_fields_that_only_its_table_has(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "tool", "content": "b", "name": "f"}]
    data = datasets.Dataset.from_list([{"messages": turns}])
    (source,) = Writer(tmp_path).plain({"data": data})["data"]
    assert rows_of(source["path"]) == [{"messages": turns}]


def test_every_form_of_data_becomes_sources(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    assert sources("org/name") == [{"path": "org/name"}]
    assert sources(Path("a.jsonl")) == [{"path": "a.jsonl"}]
    assert sources({"world": "sft", "rows": 3}) == [{"world": "sft", "rows": 3}]
    assert sources(["a.jsonl", {"path": "b", "weight": 2}]) == [
        {"path": "a.jsonl"},
        {"path": "b", "weight": 2},
    ]
    # Rows that have a column of the name of a source's key are still rows.
    coded = [{"prompt": "x", "completion": "y", "path": "src/a.py"}]
    assert sources(coded) == [{"path": coded}]
    split = Writer(tmp_path).plain(
        {"data": [{"path": dataset, "split": "train"}, dataset, ROWS[0]]}
    )
    first, second, row = split["data"]
    assert first == {**second, "split": "train"}
    assert row == ROWS[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "found an empty list"),
        (7, "found an int"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}), r"data\['train'\]"),
        (datasets.Dataset.from_list(ROWS).to_iterable_dataset(), "IterableDataset"),
        (
            [{"prompt": "x", "completion": math.inf}],
            "row 1: 'completion' cannot be written as JSON",
        ),
        ([*ROWS, {"prompt": "x", "image": object()}], "row 3: 'image' cannot be written as JSON"),
        ([*ROWS, {"prompt": "\ud800"}], "row 3: 'prompt' cannot be written as JSON"),
        (datasets.Dataset.from_list([]), "it has no rows"),
    ],
)
def test_data_that_cannot_be_used_is_one_line(data, message, tmp_path):
    with pytest.raises(DataError, match=message):
        Writer(tmp_path).plain({"data": sources(data)})
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_loaded_model_is_saved_once_with_its_tokenizer(tmp_path):
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    from tests.numeric.tiny_models import tiny_llama
    from tests.unit.small_tokenizers import byte_tokenizer

    pair = (tiny_llama("sdpa"), byte_tokenizer("{{ messages }}"))
    base, init = base_stage(pair, None)
    assert (base["kind"], init) == ("base", "base")
    path = Writer(tmp_path).plain(base)["path"]
    saved = LlamaForCausalLM.from_pretrained(path, dtype="auto").state_dict()
    assert saved.keys() == pair[0].state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in pair[0].state_dict().items())
    assert AutoTokenizer.from_pretrained(path).chat_template == "{{ messages }}"
    assert Writer(tmp_path).plain(base_stage(*pair)[0])["path"] == path
    with torch.no_grad():
        pair[0].lm_head.weight.add_(1.0)
    assert Writer(tmp_path).plain(base)["path"] != path
    with pytest.raises(RecipeError, match=r"pass both: model=\(model, tokenizer\)"):
        Writer(tmp_path).plain(base_stage(pair[0], None)[0])
    assert len(list((tmp_path / "from.python").iterdir())) == 2


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"config": SimpleNamespace(quantization_config={"bits": 4})}, "are quantized and cannot"),
        (
            {"peft_config": {"default": SimpleNamespace(base_model_name_or_path="")}},
            r"on a model without a name.*merge_and_unload\(\)",
        ),
    ],
)
def test_a_model_that_cannot_be_saved_whole_is_one_line(attributes, message, tmp_path):
    model = SimpleNamespace(save_pretrained=lambda place: None, **attributes)
    base, _ = base_stage((model, model), None)
    with pytest.raises(RecipeError, match=message):
        Writer(tmp_path).plain(base)


def test_a_model_of_peft_is_an_adapter_that_names_its_base(tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    from align.core.model_folder import is_adapter
    from tests.numeric.tiny_models import tiny_llama
    from tests.unit.small_tokenizers import byte_tokenizer

    tiny_llama("sdpa").save_pretrained(tmp_path / "base")
    byte_tokenizer("{{ messages }}").save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    base, _ = base_stage(tuned, None)
    path = Writer(tmp_path).plain(base)["path"]
    assert is_adapter(path)
    named = json.loads(Path(path, "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "base")


def test_a_model_is_a_base_stage_or_an_artifact(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    assert base_stage(tmp_path, None) == ({}, str(tmp_path))
    assert base_stage("org/m", {"pad_token": "x"}) == (
        {"kind": "base", "path": "org/m", "tokenizer": {"pad_token": "x"}},
        "base",
    )
    assert base_stage({"kind": "encoder", "path": "org/bert"}, None) == (
        {"kind": "encoder", "path": "org/bert"},
        "base",
    )


@pytest.mark.parametrize(
    ("model", "tokenizer", "message"),
    [
        ("done", {"pad_token": "x"}, "the model of a finished stage has its tokenizer"),
        ("done", "object", "the model of a finished stage has its tokenizer"),
        (align.Run("runs/sft"), {"pad_token": "x"}, "a finished stage has its tokenizer"),
        ("org/name", "object", "beside a model that is not loaded; expected settings"),
        (Path("folder"), "object", "beside a model that is not loaded"),
        ({"path": "org/name"}, "object", "beside a model that is not loaded"),
        ("pair", "object", "beside a model that is not loaded"),
        ("org/name", "gpt2", "found a str beside a model that is not loaded"),
        ("loaded", "gpt2", "tokenizer: found a str; expected the model's tokenizer"),
    ],
)
def test_a_tokenizer_that_would_have_no_effect_is_one_line(model, tokenizer, message, tmp_path):
    from tests.numeric.tiny_models import tiny_llama
    from tests.unit.small_tokenizers import byte_tokenizer

    (tmp_path / "manifest.json").write_text("{}")
    own = byte_tokenizer(None)
    loaded = {"done": tmp_path, "pair": (tiny_llama("sdpa"), own), "loaded": tiny_llama("sdpa")}
    given = loaded.get(model, model) if isinstance(model, str) else model
    with pytest.raises(RecipeError, match=re.escape(message)) as error:
        align.sft(
            model=given,
            tokenizer=own if tokenizer == "object" else tokenizer,
            data=[{"prompt": "a", "completion": "b"}],
            out=tmp_path / "out",
        )
    assert len(str(error.value).splitlines()) == 1


# Functions.

WEIGHTS = {"a": 1.5, "b": {3, 1, 2}}
LETTERS = re.compile("[a-m]+", re.IGNORECASE)
UNWRITABLE = object()


def helper(text: str, weights: dict[str, Any] = WEIGHTS) -> float:
    return len(LETTERS.findall(text)) + weights["a"] + math.sqrt(4) + len(Counter(text))


def vowels(completions: list[str], **columns: Any) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def local_reward(offset: float) -> Any:
    def score(completions: list[str], *, factor: float = 1.0, **columns: Any) -> list[float]:
        def one(text: str) -> float:
            return offset + factor * helper(text) + len(WEIGHTS["b"])

        return [one(text) for text in completions]

    return score


def loaded(block: dict[str, Any]) -> Any:
    return load(block["path"], block.get("args", {}))


def test_a_function_of_a_module_is_named_by_its_file(tmp_path):
    block = python_reward(vowels, tmp_path / "out")
    place, _, name = block["path"].rpartition(":")
    assert name == "vowels"
    assert place == vowels.__module__ or Path(place) == Path(__file__).resolve()
    assert not (tmp_path / "out").exists()


def test_a_local_function_is_written_with_what_it_uses(tmp_path):
    function = partial(local_reward(10.0), factor=2.0)
    block = python_reward(function, tmp_path)
    assert block["args"] == {"factor": 2.0}
    texts = ["alpha Beta", "", "zzz"]
    # The oracle is the function itself.
    assert loaded(block)(completions=texts) == function(completions=texts)
    # Another offset is another file, the same one is the same.
    assert python_reward(local_reward(10.0), tmp_path)["path"] == block["path"]
    assert python_reward(local_reward(11.0), tmp_path)["path"] != block["path"]


def test_two_values_of_one_name_are_refused_and_one_seen_twice_is_not(tmp_path):
    def shift(k: int) -> Any:
        def part(text: str) -> int:
            return len(text) + k

        return part

    one, two = shift(1), shift(2)

    def mixes(completions: list[str]) -> list[int]:
        return [one(text) * two(text) for text in completions]

    def same(completions: list[str]) -> list[int]:
        return [one(text) + len(one.__name__) for text in completions]

    with pytest.raises(RecipeError, match=r"two values of the name '(part|k)'"):
        python_reward(mixes, tmp_path)
    assert loaded(python_reward(same, tmp_path))(completions=["ab"]) == [7]


TABLE: Any = None
"""Set to an array by a test: an unused name of the module."""


def test_arrays_beside_a_function_are_never_compared(tmp_path, monkeypatch):
    import numpy as np

    def first(completions: list[str]) -> list[int]:
        return [len(text) + limit for text in completions]

    limit = 3
    monkeypatch.setitem(globals(), "TABLE", np.zeros(3))
    block = python_reward(partial(local_reward(1.0)), tmp_path)
    assert loaded(block)(completions=["", "x"]) == local_reward(1.0)(completions=["", "x"])
    assert loaded(python_reward(first, tmp_path))(completions=["ab"]) == [5]

    def part(limit: Any) -> Any:
        def inner(text: str) -> int:
            return len(text) + len(limit)

        return inner

    # A number and an array under one name.
    measure = part(np.zeros(3))

    def mixes(completions: list[str]) -> list[int]:
        return [limit + measure(text) for text in completions]

    with pytest.raises(RecipeError, match="two values of the name 'limit'"):
        python_reward(mixes, tmp_path)


def test_equal_constants_of_two_functions_are_one(tmp_path):
    def part(words: list[Any]) -> Any:
        def count(text: str) -> int:
            return sum(bool(re.search(word, text)) for word in words)

        return count

    # Lists of the same content, once with a pattern and twice in the same order.
    one, two = part([re.compile("[ab]+", re.I), "c"]), part([re.compile("[ab]+", re.I), "c"])
    words = [re.compile("[ab]+", re.I), "c"]

    def score(completions: list[str]) -> list[int]:
        return [one(text) + len(words) for text in completions]

    assert two("A") == 1
    assert loaded(python_reward(score, tmp_path))(completions=["A", "bc", ""]) == [3, 4, 2]


def test_a_closure_over_what_is_missing_or_assigned_is_one_line(tmp_path):
    def early() -> str:
        def score(completions: list[str]) -> list[int]:
            return [later(text) for text in completions]

        with pytest.raises(RecipeError) as error:
            python_reward(score, tmp_path)

        def later(text: str) -> int:
            return len(text)

        return f"{error.value}{later('')}"

    assert "function 'score': it uses 'later', which has no value yet" in early()
    calls = 0

    def counts(completions: list[str]) -> list[int]:
        nonlocal calls
        calls += 1
        return [calls for _ in completions]

    with pytest.raises(RecipeError, match=r"assigns a variable of the function around it .*calls"):
        python_reward(counts, tmp_path)

    # One that is bound inside of the function itself is fine.
    def inside(completions: list[str]) -> list[int]:
        seen = 0

        def one() -> int:
            nonlocal seen
            seen += 1
            return seen

        return [one() for _ in completions]

    assert loaded(python_reward(inside, tmp_path))(completions=["a", "b"]) == [1, 2]


def test_numbers_of_numpy_and_a_dtype_of_torch_are_plain(tmp_path):
    import numpy as np
    import torch

    given = {
        "a": np.float64(0.5),
        "b": [np.int64(3)],
        "dtype": torch.bfloat16,
        "c": torch.tensor(2),
    }
    found = Writer(tmp_path).plain(given)
    assert json.loads(json.dumps(found)) == {"a": 0.5, "b": [3], "dtype": "bfloat16", "c": 2}
    rows = [{"prompt": "x", "completion": "y", "n": np.int64(3)}]
    (source,) = Writer(tmp_path).plain(sources(rows))
    assert rows_of(source["path"])[0]["n"] == 3
    with pytest.raises(RecipeError, match="steps: found a ndarray; expected text, a number"):
        align.sft(model="m", data="x.jsonl", steps=np.zeros(3), out=tmp_path)


SCRIPT = """
import re
import xml.sax.saxutils
from pathlib import Path
from align.api.code import python_reward
from neighbor import double

WORDS = {"sun", "moon", "star"}

class Judge:
    def __init__(self, bonus):
        self.bonus = bonus

    def __call__(self, completions, **columns):
        return [double(known(text)) + self.bonus for text in completions]

def known(text):
    text = xml.sax.saxutils.unescape(text)
    return sum(word in WORDS for word in re.findall(r"[a-z]+", text))

def score(prompts, completions, **columns) -> "Unknown":
    return [double(known(text)) for text in completions]

assert __name__ == "__main__", "the script was run again"
for thing in (score, Judge):
    print(python_reward(thing, Path("out"))["path"])
"""


def test_functions_of_a_script_are_the_same_files_in_every_process(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "main.py").write_text(SCRIPT)
    (tmp_path / "scripts" / "neighbor.py").write_text("def double(x):\n    return 2 * x\n")
    run = "import runpy, sys; sys.path.insert(0, 'scripts')\n"
    run += "runpy.run_path('scripts/main.py', {}, '__main__')"
    told = [python(run, cwd=tmp_path, seed=seed).split() for seed in ("1", "2")]
    assert told[0] == told[1]
    # A module that they import identifies them too.
    (tmp_path / "scripts" / "neighbor.py").write_text("def double(x):\n    return 2 * x + 0\n")
    assert not set(python(run, cwd=tmp_path).split()) & set(told[0])
    score, judge = told[0]
    # In a process whose path has no scripts/, and with a sun and a moon in the text.
    code = f"""
        from reward_models.own_process import load
        print(load({score!r}, {{}})(prompts=[""], completions=["sun, moon"]))
        print(load({judge!r}, {{"bonus": 0.5}})(completions=["fog", "star"]))
    """
    assert python(code, cwd=tmp_path).split("\n")[:2] == ["[4]", "[0.5, 2.5]"]


class Holds:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, completions: list[str]) -> list[Any]:
        return [self.value for _ in completions]

    def score(self, completions: list[str]) -> list[Any]:
        return self(completions)


STRANGER = """
import dataclasses
from pathlib import Path

import neighbor
from align.api.code import python_reward

HERE = Path(__file__).resolve().parent
shout = lambda text: text.upper()

class Trl:
    def __init__(self, weight):
        self.__name__, self.weight, self.seen = "brevity", weight, {"sun": HERE}

    def __call__(self, prompts, completions, **kwargs):
        return [-self.weight * len(text) for text in completions]

@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    length: int
    words: tuple = ("sun", "fog")

    def __call__(self, completions, **columns):
        return [len(text) - self.length + (text in self.words) for text in completions]

def beside(completions, **columns):
    table = (HERE / "table.txt").read_text().split()
    return [float(shout(text) in table) for text in completions]

given = [
    lambda completions, **columns: [len(text) for text in completions],
    Trl(2.0), Trl(3.0), beside, neighbor.target, neighbor.halves,
    Target(2),
]
for thing in given:
    print(python_reward(thing, Path("out"))["path"])
"""


def test_a_strangers_lambdas_objects_and_paths_score_in_another_process(tmp_path):
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "main.py").write_text(STRANGER)
    (folder / "table.txt").write_text("SUN RAIN")
    (folder / "neighbor.py").write_text(
        "class Target:\n"
        "    def __init__(self, length): self.length = length\n"
        "    def __call__(self, completions): return [len(t) - self.length for t in completions]\n"
        "target = Target(3)\n"
        "halves = lambda completions: [len(t) / 2 for t in completions]\n"
    )
    run = "import runpy, sys; sys.path.insert(0, 'scripts')\n"
    run += "runpy.run_path('scripts/main.py', {}, '__main__')"
    found = [python(run, cwd=tmp_path, seed=seed).split() for seed in ("1", "2")]
    assert found[0] == found[1]
    assert len(set(found[0])) == 7
    names = [path.rpartition(":")[2] for path in found[0]]
    assert names == ["from_lambda", "brevity", "brevity", "beside", "target", "halves", "target"]
    code = f"""
        import inspect
        from reward_models.own_process import load
        for path in {found[0]!r}:
            score, given = load(path, {{}}), {{"completions": ["sun", "moons"]}}
            if "prompts" in inspect.signature(score).parameters:
                given["prompts"] = ["", ""]
            print(score(**given))
    """
    assert python(code, cwd=tmp_path).splitlines() == [
        "[3, 5]",
        "[-6.0, -10.0]",
        "[-9.0, -15.0]",
        "[1.0, 0.0]",
        "[0, 2]",
        "[1.5, 2.5]",
        "[2, 3]",
    ]


class Slotted(Holds):
    __slots__ = ("share",)

    def __init__(self, share: float, value: Any) -> None:
        super().__init__(value)
        self.share = share

    def __call__(self, completions: list[str]) -> list[Any]:
        return [self.share * self.value for _ in completions]


class Words(dict[str, float]):
    def __call__(self, completions: list[str]) -> list[float]:
        return [self[text] for text in completions]


def test_defaults_of_a_lambda_and_slots_of_an_object_are_written(tmp_path):
    lengths = lambda completions, least=2, *, most=3: [  # noqa: E731
        min(max(len(text), least), most) for text in completions
    ]
    for given, expected in ((lengths, "[2, 3]"), (Slotted(0.5, 4), "[2.0, 2.0]")):
        path = python_reward(given, tmp_path)["path"]
        code = f"""
            from reward_models.own_process import load
            print(load({path!r}, {{}})(completions=["a", "moons"]))
        """
        assert python(code, cwd=tmp_path).strip() == expected


def test_what_cannot_become_a_file_is_one_line(tmp_path):
    def uses(completions: list[str]) -> list[bool]:
        return [UNWRITABLE is None for _ in completions]

    cases = [
        (uses, "function 'uses': it uses 'UNWRITABLE' (object)"),
        (Holds(object()), "it uses 'Holds.value' (object), a value of the notebook or script"),
        (Words(sun=1.0), "the class Words extends dict, so its objects have content beside"),
        (Holds(1).score, "found a method; expected a function, or a class"),
        (len, "found a builtin_function_or_method"),
        (partial(vowels, ["x"]), "a partial with positional arguments"),
    ]
    for function, message in cases:
        with pytest.raises(RecipeError, match=re.escape(message)):
            python_reward(function, tmp_path)
    source: dict[str, Any] = {}
    exec("def made(completions):\n    return completions\n", source)
    with pytest.raises(RecipeError, match="the source of 'made' cannot be found"):
        reference(source["made"], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_form_of_a_reward_becomes_an_entry(tmp_path):
    own = "tests/x.py:score"
    given = [vowels, align.rewards.length(target=2, limit=4), "math", own, {"kind": "regex"}]
    found = Writer(tmp_path).plain({"rewards": rewards(given)})["rewards"]
    assert found == [
        python_reward(vowels, tmp_path),
        {"kind": "length", "target": 2, "limit": 4},
        {"kind": "math"},
        {"kind": "python", "path": own},
        {"kind": "regex"},
    ]
    weighed = Writer(tmp_path).plain([{"kind": "python", "path": vowels, "weight": 2}])
    assert weighed == [{**python_reward(vowels, tmp_path), "weight": 2}]


def test_two_functions_need_no_names(tmp_path):
    (tmp_path / "r.py").write_text("def a(completions): ...\ndef b(completions): ...\n")
    recipe = reward_recipe()
    paths = [f"{tmp_path}/r.py:{name}" for name in "ab"]
    recipe["stages"]["grpo"]["rewards"] = [{"kind": "python", "path": path} for path in paths]
    assert len(load_recipe(recipe).stages["grpo"].rewards) == 2  # pyright: ignore
    recipe["stages"]["grpo"]["rewards"][1]["path"] = paths[0]
    with pytest.raises(RecipeError, match="two rewards have the name 'a'"):
        load_recipe(recipe)


def test_a_run_outside_of_the_main_thread_leaves_signals_alone():
    before = signal.getsignal(signal.SIGINT)

    def count() -> int:
        with Signals() as signals:
            assert signal.getsignal(signal.SIGINT) is before
            return signals.count

    with ThreadPoolExecutor() as pool:
        assert pool.submit(count).result() == 0
    with Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert (signals.count, signals.last) == (1, signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_notebook_gets_plain_lines_although_its_output_calls_itself_a_terminal(monkeypatch):
    class OutStream(io.StringIO):
        """Like that of ipykernel, whose ``isatty`` is True."""

        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", OutStream())
    assert make_console().is_terminal
    OutStream.__module__ = "ipykernel.iostream"
    assert not make_console().is_terminal


def test_a_dataframe_is_rows_and_an_array_is_refused(tmp_path: Path):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame(
        {"prompt": ["a", "b"], "completion": ["c", "d"], "score": [1.5, None], "n": [1, 2]}
    )
    rows = [
        {"prompt": "a", "completion": "c", "score": 1.5, "n": 1},
        {"prompt": "b", "completion": "d", "score": None, "n": 2},
    ]
    for data in (sources(frame), sources([frame]), sources({"path": frame})):
        (block,) = Writer(tmp_path).plain({"data": data})["data"]
        assert list(map(json.loads, Path(block["path"]).read_text().splitlines())) == rows
    for wrong in (numpy.array([1, 2]), numpy.array([]), frame[:0], None):
        with pytest.raises(DataError, match=r"^data: found .*; expected a datasets\.Dataset"):
            sources(wrong)


def test_a_lambda_may_use_a_variable_of_the_function_around_it(tmp_path: Path):
    target, scale = 4, 0.5
    found = python_reward(
        lambda completions, **_: [scale * abs(len(c) - target) for c in completions], tmp_path
    )
    assert load(found["path"], {})(completions=["ab", "abcdef"]) == [1.0, 1.0]
