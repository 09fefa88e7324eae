"""Functions for verl's batches, functions that make rewards, and what a reward may return."""

from pathlib import Path
from typing import Any

import pytest

from reward_models import build_reward

CODE = """
import numpy as np

def compute_batch(data_sources, solution_strs, ground_truths, extra_infos, bonus=0.0):
    rows = zip(data_sources, solution_strs, ground_truths, extra_infos, strict=True)
    return [{"score": bonus + (s == g) + len(e), "acc": 9.0} for d, s, g, e in rows]

async def compute_later(solution_str, ground_truth, **kwargs):
    assert kwargs == {"data_source": "", "extra_info": {}}
    return float(solution_str == ground_truth)

# As the functions of open-r1 and TRL that make a reward from its options.
def get_capped_reward(max_len=4, scale=1.0):
    def capped(completions, **kwargs):
        return [scale * min(len(c), max_len) for c in completions]
    return capped

def get_overlong_punishment(max_completion_len, soft_punish_cache):
    start = max_completion_len - soft_punish_cache
    class Punishment:
        def __call__(self, completion_ids, **kwargs):
            return [-float(len(ids) > start) for ids in completion_ids]
    return Punishment()

def get_nothing(weight=1.0): return [weight]

def column(completions, **kwargs):
    import torch
    return torch.tensor([[float(len(c))] for c in completions])

def table(completions, **kwargs):
    return np.zeros((len(completions), 2))

# Parameters that cannot be passed by name.
def placed(prompts, completions, /, answer): return length(completions, answer)
def placed_column(answer, completions, /, scale=2.0, *, sign=1):
    return [sign * scale * s for s in length(completions, answer)]
def skipped(lengths=None, completions=(), /, **columns):
    assert lengths is None and "completions" not in columns, columns
    return length(completions, columns["answer"])
def length(completions, answer):
    return [len(c) * 10.0 + len(a) for c, a in zip(completions, answer)]

# Nothing tells these what a response is.
def unnamed(*arguments): return [1.0]
def of_the_row(completion, answer): return [1.0]
def of_the_prompts(prompts): return [1.0 for _ in prompts]
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("own") / "my_reward.py"
    file.write_text(CODE)
    return file


def own(code: Path, function: str, **more: Any) -> Any:
    return build_reward({"kind": "python", "path": f"{code}:{function}", **more})


def test_verl_functions_of_a_batch_and_of_a_coroutine(code: Path):
    rows = {"prompts": ["?"] * 2, "completions": ["4", "5"], "answer": ["4", "4"]}
    batch = own(code, "compute_batch", args={"bonus": 0.5})
    assert batch(**rows, extra_info=[{}, {"index": 1}]) == [1.5, 1.5]
    assert batch.style == "verl_batch"
    assert own(code, "compute_later")(**rows) == [1.0, 0.0]


def test_a_function_that_makes_a_reward_is_called_with_the_arguments(code: Path):
    rows = {"prompts": ["?"] * 2, "completions": ["four", "eleven"]}
    assert own(code, "get_capped_reward")(**rows) == [4.0, 4.0]
    assert own(code, "get_capped_reward", args={"max_len": 5, "scale": 2.0})(**rows) == [8.0, 10.0]
    args = {"max_completion_len": 6, "soft_punish_cache": 2}
    punish = own(code, "get_overlong_punishment", args=args)
    assert punish(**rows, completion_ids=[[1] * 4, [1] * 5]) == [0.0, -1.0]
    with pytest.raises(ValueError, match=r"\(max_completion_len, .*set its parameters in 'args'"):
        own(code, "get_overlong_punishment")
    with pytest.raises(ValueError, match=r"get_nothing has no parameter for responses.* a list"):
        own(code, "get_nothing")


def test_the_rewards_that_trl_ships_run_by_their_module():
    said = [[{"role": "assistant", "content": "<think>\nsums\n</think>\n4"}]]
    rows = {"prompts": [[{"role": "user", "content": "2 + 2?"}]], "completions": said}
    path = {"kind": "python", "path": "trl.rewards:think_format_reward"}
    assert build_reward(path)(**rows) == [1.0]
    limits = {"max_completion_len": 6, "soft_punish_cache": 2}
    punish = {"path": "trl.rewards:get_soft_overlong_punishment", "args": limits}
    # 5 tokens are one beyond 6 - 2: (4 - 5) / 2 in DAPO's equation 13.
    assert build_reward({"kind": "python", **punish})(**rows, completion_ids=[[7] * 5]) == [-0.5]


def test_one_column_of_scores_counts_and_two_do_not(code: Path):
    rows = {"prompts": ["?"] * 2, "completions": ["a", "bb"]}
    assert own(code, "column")(**rows) == [1.0, 2.0]
    assert own(code, "table")(**rows) == [None, None]


@pytest.mark.parametrize(
    ("function", "scores"),
    [("placed", [23.0, 14.0]), ("placed_column", [46.0, 28.0]), ("skipped", [23.0, 14.0])],
)
def test_parameters_without_a_name_receive_what_theirs_says(
    code: Path, function: str, scores: list[float]
):
    # Ten times the length of the response, and that of the answer: 2 * 10 + 3, 1 * 10 + 4.
    rows = {"prompts": ["?"] * 2, "completions": ["ab", "c"], "answer": ["two", "four"]}
    assert own(code, function)(**rows) == scores


@pytest.mark.parametrize("function", ["unnamed", "of_the_row", "of_the_prompts"])
def test_a_function_that_sees_no_response_is_refused(code: Path, function: str):
    # The row's own column `completion` is what a data set has, not what the model wrote.
    with pytest.raises(ValueError, match=rf"{function}\(.*no parameter for responses.*completions"):
        own(code, function)
