"""Rewards of one's own: the conventions of three suites, and code that does what it should not."""

import gc
import json
import os
import re
import resource
import time
from pathlib import Path

import pytest

from align.core.artifacts import spec_hash
from align.core.errors import RecipeError
from align.recipe.load import load_recipe
from reward_models import build_reward
from reward_models.base import MissingColumnError
from reward_models.sandbox import Limits, missing_isolation, run_program
from reward_models.trial import try_reward, weaknesses

CODE = """
import asyncio, ctypes, os, sys, time
import numpy as np

# Unchanged from TRL's documentation of reward functions.
def reward_func(completions, ground_truth, **kwargs):
    import re
    matches = [re.search(r"\\\\boxed\\{(.*?)\\}", completion) for completion in completions]
    contents = [match.group(1) if match else "" for match in matches]
    return [1.0 if c == gt else 0.0 for c, gt in zip(contents, ground_truth)]

def conversational(prompts, completions, completion_ids=None, trainer_state=None, **kwargs):
    assert prompts[0][0]["role"] == "user"
    assert kwargs["log_metric"]("a", 1.0) is None
    return [float(len(c[0]["content"])) for c in completions]

async def later(completions, **kwargs):
    await asyncio.sleep(0.01)
    return [0.5 if "yes" in c else None for c in completions]

def by_ids(prompts, completions, completion_ids, answer):
    return [float(bytes(ids).decode() == a) for ids, a in zip(completion_ids, answer)]

class Weighted:
    def __init__(self, factor): self.factor = factor
    def __call__(self, prompts, completions, **kwargs):
        return [self.factor * len(c) for c in completions]

def scaled(completions, factor=1.0): return [factor for c in completions]

# verl's and OpenRLHF's signatures.
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if solution_str == "bad": raise ValueError("bad")
    return {"score": float(solution_str == ground_truth), "source": data_source}

def openrlhf(queries, prompts, labels):
    import torch
    rows = zip(queries, prompts, labels)
    return {"rewards": torch.tensor([float(q == p + l) for q, p, l in rows])}

def kinds(completions, **kwargs):
    import torch
    made = {"np": np.float32(0.5), "np0": np.array(0.25), "torch": torch.tensor(2.0), "int": 3,
            "bool": True, "none": None, "nan": float("nan"), "inf": np.inf, "text": "1.0",
            "list": [1.0], "big": 10**400}
    return [made[c] for c in completions]

def noisy(completions, **kwargs):
    print("a line on stdout"); os.write(1, b"[1, 2, 3]\\n"); sys.stdin.read()
    return np.array([1.0 for c in completions])

def short(completions, **kwargs): return [1.0]
def text(completions, **kwargs): return "1.0"
def nothing(completions, **kwargs): pass
def unordered(completions, **kwargs): return {float(ord(c)) for c in completions}
def frozen(completions, **kwargs): return frozenset(map(len, ("", "a", "bb")))

kept = []
def leaks(completions, **kwargs):
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    for c in completions: kept.extend(open("/dev/null") for _ in range(20))
    return [1.0 for c in completions]

def misbehaves(completions, **kwargs):
    for c in completions:
        if c == "raise": raise KeyError(c)
        if c == "exit": sys.exit(0)
        if c == "die": os._exit(0)
        if c == "segfault": ctypes.string_at(0)
        if c == "hang": time.sleep(600)
        if c == "spin":
            while True: pass
        if c == "eat": b"x" * (8 * 2**30)
        if c == "fork":
            if os.fork() == 0: time.sleep(600)
    return [1.0 for c in completions]
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("own") / "my_reward.py"
    file.write_text(CODE)
    return file


def own(code: Path, function: str, **more):
    return build_reward({"kind": "python", "path": f"{code}:{function}", **more})


def test_a_trl_function_runs_unchanged_on_texts(code: Path):
    reward = own(code, "reward_func")
    said = [r"so \boxed{4}", r"so \boxed{5}", "4"]
    assert reward(prompts=["?"] * 3, completions=said, ground_truth=["4"] * 3) == [1.0, 0.0, 0.0]
    assert (reward.name, reward.style) == ("reward_func", "trl")
    with pytest.raises(MissingColumnError, match="needs 'ground_truth'"):
        reward(prompts=["?"], completions=["4"], answer=["4"])


def test_conversations_come_as_trl_passes_them(code: Path):
    asked = [[{"role": "user", "content": "?"}]] * 2
    said = [[{"role": "assistant", "content": text}] for text in ("abc", "")]
    assert own(code, "conversational")(prompts=asked, completions=said) == [3.0, 0.0]


def test_async_functions_classes_and_arguments(code: Path):
    later = own(code, "later")
    assert later(prompts=["?"] * 2, completions=["yes", "no"]) == [0.5, None]
    assert later.invalid == {"no score (None)": 1}
    weighted = own(code, "Weighted", args={"factor": 2.0}, name="w")
    assert weighted(prompts=["?"], completions=["abc"]) == [6.0]
    assert own(code, "scaled", args={"factor": 3})(prompts=["?"], completions=["a"], x=[1]) == [3.0]


def test_verl_and_openrlhf_conventions(code: Path):
    verl = own(code, "compute_score")
    model = [{"ground_truth": "4", "style": "rule"}] * 3
    found = verl(prompts=["?"] * 3, completions=["4", "bad", "5"], reward_model=model)
    assert (found, verl.style) == ([1.0, None, 0.0], "verl")
    assert verl.invalid == {"raised ValueError": 1}
    other = own(code, "openrlhf")
    assert other(prompts=["a", "b"], completions=["4", "5"], answer=["4", "4"]) == [1.0, 0.0]
    assert other.style == "openrlhf"


def test_scalars_of_numpy_and_torch_count_and_what_is_no_number_does_not(code: Path):
    reward = own(code, "kinds")
    given = ["np", "np0", "torch", "int", "bool", "none", "nan", "inf", "text", "list", "big"]
    found = reward(prompts=["?"] * 11, completions=given)
    assert found == [0.5, 0.25, 2.0, 3.0, 1.0, *[None] * 6]
    assert reward.invalid == {
        "no score (None)": 1,
        "score is not finite": 3,
        "score is a str": 1,
        "score is a list": 1,
    }


def test_what_is_printed_disturbs_nothing(code: Path):
    assert own(code, "noisy")(prompts=["?"] * 2, completions=["a", "b"]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("short", "returned 1 scores for 3 responses"),
        ("text", "returned a str, not a list of scores"),
        ("nothing", "returned a NoneType, not a list of scores"),
        ("unordered", "returned a set, which has no order; expected a list"),
        ("frozen", "returned a set, which has no order; expected a list"),
    ],
)
def test_a_result_of_another_form_is_invalid_as_a_whole(code: Path, name: str, reason: str):
    reward = own(code, name)
    assert reward(prompts=["?"] * 3, completions=["a", "b", "c"]) == [None] * 3
    assert reward.invalid == {reason: 3}


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("raise", "raised KeyError"),
        ("exit", "raised SystemExit"),
        ("die", "function died"),
        ("segfault", "function died"),
        ("eat", "raised MemoryError"),
    ],
)
def test_one_bad_response_costs_only_itself(code: Path, what: str, reason: str):
    reward = own(code, "misbehaves", memory_gib=2.0)
    found = reward(prompts=["?"] * 4, completions=["a", "b", what, "c"])
    assert found == [1.0, 1.0, None, 1.0]
    assert reward.invalid == {reason: 1}
    assert reward(prompts=["?"], completions=["a"]) == [1.0]


def test_a_function_that_leaks_is_started_again_and_scores_on(code: Path):
    reward = own(code, "leaks")
    processes = set()
    # Its process has 64 files, so every third call or so is the last of a process.
    for _ in range(6):
        assert reward(prompts=["?"], completions=["a"]) == [1.0]
        processes.add(reward.worker.process.pid)
    assert len(processes) > 1
    assert not reward.invalid


@pytest.mark.parametrize("what", ["hang", "spin"])
def test_a_response_that_hangs_is_given_up_and_its_process_killed(code: Path, what: str):
    reward = own(code, "misbehaves", deadline_s=3.0)
    first = reward.worker.process.pid
    began = time.monotonic()
    found = reward(prompts=["?"] * 2, completions=["a", what])
    assert time.monotonic() - began < 60.0
    assert found[1] is None
    assert reward.invalid["function timed out"] >= 1
    with pytest.raises(ProcessLookupError):
        os.killpg(first, 0)


def test_code_that_does_not_load_is_one_clear_error(tmp_path: Path):
    for text, said in (("1 / 0", "ZeroDivisionError"), ("import sys; sys.exit(3)", "SystemExit")):
        file = tmp_path / "broken.py"
        file.write_text(text)
        with pytest.raises(ValueError, match=f"could not be loaded.*{said}"):
            own(file, "score")
    file.write_text("limit = 3\nclass Bare: pass")
    for name, said in (("limit", "limit is an int"), ("Bare", "Bare is a type")):
        with pytest.raises(ValueError, match=f"could not be loaded.*{said} that cannot be called"):
            own(file, name)


RECIPE = """
name: own
stages:
  base: {{kind: base, path: {model}}}
  grpo:
    kind: grpo
    init: base
    prompts: [{{path: p.jsonl}}]
    rewards: [{{kind: python, path: "{path}"}}]
    steps: 1
"""


def recipe_of(folder: Path, path: str) -> Path:
    file = folder / "r.yaml"
    file.write_text(RECIPE.format(model=folder, path=path))
    return file


def test_the_path_is_taken_from_the_recipes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "mine.py").write_text("def score(completions): return [1.0]\n")
    monkeypatch.chdir("/")
    recipe = load_recipe(recipe_of(tmp_path, "rewards/mine.py:score"))
    (spec,) = recipe.stages["grpo"].rewards
    assert spec.path == f"{tmp_path}/rewards/mine.py:score"
    for path, said in (
        ("rewards/mine.py:scores", "did you mean 'score'"),
        ("rewards/other.py:score", "no such file"),
        ("no_such_module_here:score", "no such module"),
    ):
        with pytest.raises(RecipeError, match=rf"r.yaml:\d+:\d+: .*rewards.0.path: .*{said}"):
            load_recipe(recipe_of(tmp_path, path))


def test_the_content_of_the_source_is_part_of_the_stages_identity(tmp_path: Path):
    def hashed(folder: str, text: str) -> str:
        file = tmp_path / folder / "mine.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        spec = {"rewards": [{"kind": "python", "path": f"{file}:score"}]}
        return spec_hash(spec, seed=0, inputs={})

    first = hashed("a", "def score(c): return 1")
    assert hashed("b", "def score(c): return 1") == first
    assert hashed("a", "def score(c): return 2") != first


def test_the_modules_that_the_source_imports_are_part_of_the_identity_too(tmp_path: Path):
    files = {
        "mine.py": "import helper\nfrom lib import deep\nimport numpy",
        "helper.py": "def lazy():\n    from lib.other import x",
        "lib/__init__.py": "",
        "lib/deep.py": "from . import near",
        "lib/near.py": "",
        "lib/other.py": "",
        "apart.py": "",
    }

    def hashed() -> str:
        spec = {"rewards": [{"kind": "python", "path": f"{tmp_path}/mine.py:score"}]}
        return spec_hash(spec, seed=0, inputs={})

    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = {"": hashed()}
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n# changed")
        found[name] = hashed()
        (tmp_path / name).write_text(text)
    # What it does not import does not count.
    assert found["apart.py"] == found[""] == hashed()
    assert len(set(found.values())) == len(files)


def test_a_weak_reward_is_found_by_its_attacks(code: Path):
    def lengths(*, prompts, completions, **columns):
        return [float(len(text)) for text in completions]

    def exact(*, prompts, completions, **columns):
        return [float(t == a) for t, a in zip(completions, columns["answer"], strict=True)]

    def constant(*, prompts, completions, **columns):
        return [1.0 for _ in completions]

    rows = ["?"] * 3, {"answer": ["4", "5", "six"]}
    assert not weaknesses(try_reward(exact, *rows))
    assert any("very long" in line for line in weaknesses(try_reward(lengths, *rows)))

    # Any boxed answer counts, so listing many pays; a reward of the last one is sound.
    def boxed(which):
        def score(*, prompts, completions, **columns):
            said = [re.findall(r"boxed\{(.*?)\}", text) for text in completions]
            pairs = zip(said, columns["answer"], strict=True)
            return [float(a in (s if which is None else s[which:])) for s, a in pairs]

        return score

    assert any("every answer boxed" in x for x in weaknesses(try_reward(boxed(None), *rows)))
    assert not weaknesses(try_reward(boxed(-1), *rows))

    def echo(*, prompts, completions, **columns):
        return [float("?" in text) for text in completions]

    assert any("the prompt again" in line for line in weaknesses(try_reward(echo, *rows)))
    assert "nothing can be learned" in weaknesses(try_reward(constant, *rows))[0]


def test_the_command_shows_scores_and_names_what_pays(code: Path, tmp_path: Path):
    from typer.testing import CliRunner

    from align.cli import cli

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in ("a4", "b5")))
    done = CliRunner().invoke(
        cli, ["reward", "test", f"{code}:compute_score", "--data", str(rows), "--rows", "2"]
    )
    assert done.exit_code == 0, done.output
    assert "no attack pays" in done.output
    done = CliRunner().invoke(cli, ["reward", "test", f"{code}:scaled", "--data", str(rows)])
    assert done.exit_code == 1
    assert "nothing can be learned" in done.output
    done = CliRunner().invoke(cli, ["reward", "test", f"{code}:by_ids", "--data", str(rows)])
    assert done.exit_code == 0, done.output
    # Rewards of the suite too, with their keys.
    rule = ["reward", "test", "exact_match", "--data", str(rows)]
    assert CliRunner().invoke(cli, rule).exit_code == 0
    keys = [*rule, "--args", '{"patern": "(.*)"}']
    wrong = CliRunner().invoke(cli, keys)
    assert "unknown key 'patern'; did you mean 'pattern'?" in str(wrong.exception)


def test_a_process_that_others_killed_leaves_nothing_open(code: Path):
    reward = own(code, "scaled")
    assert reward(prompts=["q"], completions=["x"]) == [1.0]
    gc.collect()  # what earlier tests left open is closed here, not between the two counts
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        process = reward.worker.process
        process.kill()
        process.wait()
        assert reward(prompts=["q"], completions=["x"]) == [1.0]
    assert len(os.listdir("/proc/self/fd")) <= before


def test_processes_with_more_than_1024_open_files_score(code: Path):
    # Servers have thousands of connections; select.select refuses their descriptors.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip(f"at most {hard} open files are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert own(code, "scaled")(prompts=["q"], completions=["x"]) == [1.0]
        if missing_isolation() is None:
            found = run_program("print(6 * 7)", [""], Limits())
            assert found == [(0, "42\n")]
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
