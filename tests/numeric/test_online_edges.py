"""Edges of the online step: infinite scores, mini-batches without signal, dynamic sampling."""

import logging
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from online_parts import LORA, grpo_spec, policy_of, run_of, sampled, scored, weights

from align.core import distributed
from align.core.errors import DataError, TrainingError
from align.core.types import Completion, Example, PromptRow
from align.data.store.source import Loaded
from align.online import loop
from align.online.algorithms import build_algorithm
from align.online.annotate import annotate
from align.online.loop import update
from align.online.scoring import Scores, score_answers
from align.online.summary import summarize
from align.preflight.checks import spread
from align.preflight.offline import balance
from align.recipe.schema import EarlyStoppingSpec, KtoStage, TaskSpec
from align.sampling.rollout import gather_experience
from align.stages import rollouts
from align.stages.evaluate.measure import wants_kl
from align.stages.online import without_copies
from align.stages.reward.normalize import normalization
from align.stages.rollouts import fitted
from align.training.offline import total_steps
from align.training.stopping import EarlyStopping
from reward_models import build_reward
from reward_models.base import Rule


def said(*texts: str) -> list[Completion]:
    return [Completion((5, 1), (-1.0, -1.0), "stop", text, 0) for text in texts]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_score_that_is_not_finite_is_no_score_of_any_reward(value: float) -> None:
    def rewards(*, prompts, completions, **columns):
        return [value if text == "bad" else 1.0 for text in completions]

    rewards.name, rewards.weight = "own", 1.0
    rule = Rule(lambda answer, _: value if answer == "bad" else 1.0, name="rule")
    prompts = [PromptRow((1,), "", {})] * 2
    for reward in (rewards, rule):
        found = score_answers(prompts, said("bad", "good"), [reward])  # type: ignore[list-item]
        assert found.total == [None, 1.0]
    assert rule.invalid == {"score is not finite": 1}
    experience = scored(sampled(((3, 4),)), [value, 1.0])
    assert experience.scores.isnan().tolist() == [True, False]
    assert experience.mask.any(1).tolist() == [False, True]


def test_a_total_is_the_weighted_sum_of_all_rewards_or_none() -> None:
    def reward(name: str, weight: float, values: list[float | None]) -> Any:
        def rewards(*, prompts, completions, **columns):
            return values

        rewards.name, rewards.weight = name, weight
        return rewards

    first = reward("a", 0.5, [1.0, 2.0, None, 4.0])
    second = reward("b", -2.0, [0.25, None, 1.0, 0.0])
    prompts = [PromptRow((1,), "", {})] * 4
    found = score_answers(prompts, said("", "", "", ""), [first, second])
    assert found.total == [0.0, None, None, 2.0]
    assert found.by_name == {"a": [1.0, 2.0, None, 4.0], "b": [0.25, None, 1.0, 0.0]}


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
def test_a_response_the_sampler_calls_impossible_is_left_out(value: float, caplog) -> None:
    spec = grpo_spec()
    prompts = [PromptRow((5, 6), "", {}), PromptRow((7, 8, 9), "", {})]
    good = [Completion((5, 1), (-1.0, -2.0), "stop", "", 0) for _ in range(3)]
    odd = Completion((5, 1), (value, -2.0), "length", "", 0)
    laid_out = gather_experience(prompts, [[good[0], odd], good[1:]])
    experience = scored(laid_out, [0.0, 5.0, 1.0, 3.0], truncated_score=-1.0)
    assert experience.mask.any(1).tolist() == [True, False, True, True]
    found = summarize(experience, Scores([0.0, 5.0, 1.0, 3.0], {}), spec)
    assert found["reward/invalid_frac"] == 0.25
    assert found["reward/mean"] == pytest.approx(4.0 / 3.0)  # of 0, 1 and 3
    assert "1 of 4 responses are left out" in caplog.text


def test_a_mini_batch_without_signal_is_known_before_any_weight_moves(model_dir) -> None:
    """The second of two mini-batches is cut whole: the first is learned from, as if alone."""
    spec = grpo_spec(truncation="mask", minibatches=2)
    whole = sampled(((3, 4), (5, 2), (3, 3), (4, 4)), length=(4, 5, 6, 7))
    answers = list(whole.completions)
    half = gather_experience(whole.prompts[:4:2], [answers[:2], answers[2:4]])
    moved = []
    for experience, minibatches in ((whole, 2), (half, 1)):
        scores = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0][: len(experience.lengths)]
        experience = scored(experience, scores, mask_truncated=True)
        policy = policy_of(model_dir)
        stage = grpo_spec(truncation="mask", minibatches=minibatches)
        experience = annotate(experience, policy, spec, old=True, reference=None, critic=None)
        estimate = build_algorithm(stage).estimate
        update(run_of(stage, policy), estimate(experience, 0.0), step=0, kl_coef=0.0)
        moved.append(weights(policy))
    for a, b in zip(*moved, strict=True):
        assert torch.equal(a, b)


def test_a_step_without_any_signal_moves_nothing(model_dir) -> None:
    spec = grpo_spec(truncation="mask", minibatches=2)
    experience = scored(
        sampled(((3, 4), (5, 2)), length=(0, 1, 2, 3)), [1.0] * 4, mask_truncated=True
    )
    policy = policy_of(model_dir)
    before = weights(policy)
    experience = annotate(experience, policy, spec, old=True, reference=None, critic=None)
    with pytest.raises(TrainingError, match="no response of this step"):
        update(run_of(spec, policy), experience, step=0, kl_coef=0.0)
    for a, b in zip(before, weights(policy), strict=True):
        assert torch.equal(a, b)


def test_dynamic_sampling_looks_at_rewards_before_length_penalties(model_dir) -> None:
    spec = grpo_spec(algorithm="dapo", group_size=4, overlong={"buffer_frac": 0.5})
    prompt = PromptRow((3, 4), "", {})
    group = [
        Completion((*[5] * (n - 1), 1), (-1.0,) * n, "stop", text, 0)
        for n, text in ((2, "a"), (4, "b"), (5, "c"), (6, "d"))
    ]
    for right, live in (("", False), ("abcd", False), ("b", True), ("abc", True)):
        reward = Rule(
            lambda answer, _, right=right: float(answer in right and bool(right)), name="r"
        )
        run = run_of(spec, policy_of(model_dir), rewards=[reward])
        assert loop._has_signal(run, prompt, group) is live


def test_dynamic_sampling_keeps_the_same_groups_on_any_number_of_ranks(
    model_dir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks are played one after the other; what each gathers is what all of them found."""
    spec = grpo_spec(
        algorithm="dapo", group_size=2, prompts_per_step=4, dynamic_sampling=True, max_draws=4
    )
    prompts = [PromptRow((10 + i, 4), str(i), {}) for i in range(16)]
    live = {3, 5, 8, 9, 13, 14}

    def groups(engine: Any, rows: Any, *, n: int, step: int, **rest: Any) -> Any:
        return [said(f"{row.prompt} {step}", "other") for row in rows]

    def signal(run: Any, prompt: PromptRow, group: Any) -> bool:
        return int(prompt.prompt) in live

    monkeypatch.setattr(loop, "sample_groups", groups)
    monkeypatch.setattr(loop, "_has_signal", signal)

    def kept(ranks: int) -> list[str]:
        """Replay each rank with what all ranks had found in each draw, one pass a draw."""
        known: list[list[Any]] = []
        while True:
            found: list[list[Any]] = []
            parts, short = [], False
            for rank in range(ranks):
                calls = iter(range(100))

                def gather(mine: Any, calls: Any = calls, found: Any = found) -> list[Any]:
                    call = next(calls)
                    if call < len(known):
                        return known[call]
                    found.append(mine)
                    raise StopIteration

                monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
                monkeypatch.setattr(distributed, "world_size", lambda: ranks)
                monkeypatch.setattr(distributed, "gather_objects", gather)
                try:
                    run = run_of(spec, policy_of_none, prompts=prompts)
                    samples = loop.sample(run, 0)
                    parts.append([group[0].text for _, group in samples.groups])
                except StopIteration:
                    short = True
            if not short:
                # Each rank has every n-th prompt.
                return [text for row in zip(*parts, strict=True) for text in row]
            known.append(found)

    policy_of_none: Any = None
    one = kept(1)
    assert len(one) == 4
    assert sum(int(text.split()[0]) in live for text in one) == 4
    assert kept(2) == one
    assert kept(4) == one


def test_dynamic_sampling_passes_over_no_prompt_and_counts_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In two steps of two draws each of 16 prompts is drawn once, whatever max_draws allows."""
    drawn: list[str] = []

    def groups(engine: Any, rows: Any, **rest: Any) -> Any:
        drawn.extend(row.prompt for row in rows)
        return [said("a", "b") for _ in rows]

    monkeypatch.setattr(loop, "sample_groups", groups)
    monkeypatch.setattr(loop, "_has_signal", lambda run, prompt, group: int(prompt.prompt) % 2 == 0)
    for max_draws in (4, 9):
        drawn.clear()
        spec = grpo_spec(
            algorithm="dapo",
            group_size=2,
            prompts_per_step=4,
            dynamic_sampling=True,
            max_draws=max_draws,
        )
        prompts = [PromptRow((10 + i, 4), str(i), {}) for i in range(16)]
        run = run_of(spec, cast("Any", None), prompts=prompts)
        counts, before = [], 0
        while len(drawn) < 16:
            samples = loop.sample(run, len(counts))
            new, before = drawn[before:], len(drawn)
            assert samples.counts == {
                "prompts/drawn": len(new),
                "prompts/live": sum(int(text) % 2 == 0 for text in new),
            }
            counts.append(samples.counts["prompts/drawn"])
        assert sorted(map(int, drawn[:16])) == list(range(16))
        assert run.draws == sum(counts) / 4


def test_copies_of_watched_prompts_are_left_out_with_a_word(caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("align"), "propagate", True)
    rows = [PromptRow((i, 4), str(i), {"answer": a}) for i, a in ((3, 1), (5, 1), (3, 1), (3, 2))]
    assert without_copies(rows) == [rows[0], rows[1], rows[3]]
    assert "1 of 4 rows repeat another one" in caplog.text


def test_a_rank_without_prompts_lays_out_nothing() -> None:
    empty = gather_experience([], [])
    assert empty.input_ids.shape == (0, 0)
    assert empty.truncated.dtype == torch.bool


def test_a_scorer_of_one_score_is_not_blown_up() -> None:
    scores = torch.stack([torch.full((8,), 0.3), torch.arange(8) * 1.0], 1)
    mean, std = normalization(scores)
    assert mean == pytest.approx([0.3, 3.5])
    assert std == pytest.approx([1.0, 5.25**0.5])  # mean of (i - 3.5)^2 over 0..7 is 5.25


def test_the_sample_of_a_sorted_file_reaches_to_its_end() -> None:
    assert spread(range(10), 5) == [0, 2, 4, 6, 8]
    assert spread(range(3), 5) == [0, 1, 2]
    assert len(set(spread(range(101), 64))) == 64


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("eval/loss", (3.0, 1.0, 2.0), 2),
        ("eval/kl", (3.0, 1.0, 2.0), 2),
        ("eval/bad_reward", (3.0, 1.0, 2.0), 2),
        ("eval/good_reward", (1.0, 3.0, 2.0), 2),
        ("eval/accuracy", (1.0, 3.0, 2.0), 2),
    ],
)
def test_early_stopping_knows_which_way_is_better(metric, values, best) -> None:
    spec = EarlyStoppingSpec(metric=metric)
    stopping = EarlyStopping(
        spec, save=lambda step: None, prune=lambda steps: None, keep_checkpoints=1
    )
    for step, value in enumerate(values, start=1):
        stopping.look(step, {metric: value})
    assert stopping.best_step == best


def test_kl_is_not_reported_from_a_cut_distribution() -> None:
    def task(**sampling: float) -> TaskSpec:
        return TaskSpec(
            name="t",
            prompts=[{"path": "x"}],  # type: ignore[list-item]
            grader=[{"kind": "regex", "pattern": "x"}],  # type: ignore[list-item]
            sampling=sampling,  # type: ignore[arg-type]
            metrics=["kl"],
        )

    assert wants_kl(task(temperature=1.0))
    for cut in ({"temperature": 0.7}, {"temperature": 1.0, "top_p": 0.9}):
        with pytest.raises(ValueError, match=r"temperature: 1.0 and top_p: 1.0"):
            task(**cut)
    given = task(temperature=1.0)
    cut_off = given.sampling.model_copy(update={"top_p": 0.9})
    assert not wants_kl(given.model_copy(update={"sampling": cut_off}))


def test_prompts_beyond_the_models_positions_are_lost_at_loading(tmp_path: Path) -> None:
    class Chat:
        """A renderer whose prompts have as many tokens as they have words."""

        tokenizer = SimpleNamespace(name_or_path=str(tmp_path))

        def prompt_row(self, example: Example) -> PromptRow:
            text = str(example.prompt)
            return PromptRow(tuple(range(len(text.split()))), text, {}, source=example.source)

    examples = [Example(prompt="a " * n, source=f"p.jsonl:{n}") for n in (10, 58, 59, 200)]
    spec = grpo_spec(max_length=256, max_lost_frac=0.9)  # max_new_tokens 6
    context: Any = SimpleNamespace(name="grpo", ledger=tmp_path / "ledger.jsonl")
    chat: Any = Chat()
    assert len(fitted(Loaded(examples), spec, chat, context=context, what="prompts")) == 4
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    kept = fitted(Loaded(examples), spec, chat, context=context, what="prompts")
    assert [len(row.input_ids) for row in kept] == [10, 58]
    lost = context.ledger.read_text().splitlines()
    assert ["p.jsonl:59" in line or "p.jsonl:200" in line for line in lost] == [True, True]


def test_scores_of_a_prompt_do_not_depend_on_what_else_is_in_its_batch(tmp_path: Path) -> None:
    """A row without the reward's column has no valid score, also in a batch of such rows only."""

    class Chat:
        tokenizer = SimpleNamespace(name_or_path=str(tmp_path))

        def prompt_row(self, example: Example) -> PromptRow:
            return PromptRow((2, 3), str(example.prompt), dict(example.columns))

    examples = [Example("a", columns={"answer": "4", "level": 1}), Example("b"), Example("c")]
    context: Any = SimpleNamespace(name="grpo", ledger=tmp_path / "ledger.jsonl")
    chat: Any = Chat()
    rows = fitted(Loaded(examples), grpo_spec(), chat, context=context, what="prompts")
    assert [row.columns for row in rows] == [
        {"answer": "4", "level": 1},
        *[{"answer": None, "level": None}] * 2,
    ]
    answers = [Completion((5,), (-1.0,), "stop", "4", 0)] * 3
    rewards = [build_reward({"kind": "exact_match", "column": "answer"})]
    assert score_answers(rows, answers, rewards).total == [1.0, None, None]
    assert score_answers(rows[1:], answers[1:], rewards).total == [None, None]
    # A column that no row has is an error of the data, and exits with 2.
    other = [build_reward({"kind": "exact_match", "column": "solution"})]
    with pytest.raises(DataError, match="column 'solution' is missing") as caught:
        score_answers(rows, answers, other)
    assert caught.value.exit_code == 2


def test_a_saved_policy_that_does_not_fit_beside_the_trained_one_is_not_checked(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its weights are saved: an error here would end the stage again at every attempt."""
    monkeypatch.setattr(logging.getLogger("align"), "propagate", True)

    def load(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rollouts, "load_tuned_policy", load)
    policy = policy_of(model_dir, LORA)
    rollouts.check_saved(policy, (1, 2, 3), model_dir=model_dir, spec=grpo_spec(tuning=LORA))
    assert "its difference to the policy is not measured" in caplog.text


def test_an_imbalance_of_good_and_bad_answers_names_the_weight_that_balances() -> None:
    def spec(**weights: float) -> KtoStage:
        return KtoStage(kind="kto", init="x", data=[{"path": "x"}], steps=1, **weights)

    few_good = [True] + [False] * 39
    found = balance(spec(), few_good)
    assert found.verdict == "warn"
    assert "desirable_weight: 39'" in found.remedy
    assert balance(spec(desirable_weight=39.0), few_good).verdict == "ok"
    many_good = [True] * 30 + [False] * 10
    assert "'undesirable_weight: 3'" in balance(spec(), many_good).remedy
    assert balance(spec(undesirable_weight=3.0), many_good).verdict == "ok"
    assert balance(spec(), [True, False, True]).verdict == "ok"
    assert balance(spec(), [True, True]).verdict == "warn"


@pytest.mark.parametrize(
    ("rows", "batch", "steps", "said"),
    [
        (10, 4, 2, "2 rows are left out"),
        (48, 32, 2, "16 rows are repeated"),
        (6, 8, 1, "larger than the 6 rows"),
        (8, 4, 2, ""),
    ],
)
def test_rounding_to_whole_batches_is_said(rows, batch, steps, said, caplog) -> None:
    with caplog.at_level("WARNING"):
        assert total_steps(rows, batch_size=batch, epochs=1.0, steps=None) == steps
    assert (said in caplog.text) if said else not caplog.text
