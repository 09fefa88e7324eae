"""What must not depend on the number of ranks, with ranks played by threads: 1, 2, 4 agree."""

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from engine_models import VOCAB
from online_parts import grpo_spec, ppo_spec, run_of, sampled, scored
from played_ranks import play

from align.core import distributed
from align.core.card import Card
from align.core.types import Completion, PromptRow
from align.models.loading import load_policy
from align.models.logprobs import LogprobModel
from align.online import loop
from align.online.algorithms import build_algorithm
from align.online.scoring import Scores
from align.online.summary import summarize
from align.preflight.checks import Check, Finding, run_checks
from align.recipe.schema import KtoStage
from align.sampling.rollout import Experience, gather_experience
from align.stages import kto

LENGTHS = ((3, 4), (5, 2), (3, 3), (4, 4))
SCORES: list[float | None] = [0.0, 1.0, 4.0, 0.5, None, 2.0, -3.0, 1.0]


class Echo:
    """An engine that answers with the first token of the prompt and its seed."""

    def generate(self, prompts: Any, *, n: int, seeds: Any, **_: Any) -> list[list[Completion]]:
        return [
            [Completion((ids[0], 1), (-1.0, -1.0), "stop", f"{ids[0]} {seed}", 0)] * n
            for ids, seed in zip(prompts, seeds, strict=True)
        ]


class Learnt:
    """A policy that notes the prompts of each mini-batch instead of a step."""

    def __init__(self) -> None:
        self.seen: dict[int, list[list[int]]] = {}

    def step(self, micro: Any, _: Any) -> dict[str, float]:
        starts = [
            int(token)
            for part in micro
            if part.num
            for token in part.input_ids[part.position_ids == 0].tolist()
        ]
        self.seen[distributed.rank()].append(starts)
        return {}


@pytest.mark.parametrize("step", [0, 3])
def test_ranks_take_all_prompts_of_a_step_with_the_same_seeds(monkeypatch, step) -> None:
    prompts = [PromptRow((i, 4), str(i), {}) for i in range(16)]
    engine: Any = Echo()
    policy: Any = None

    def texts(rank: int) -> list[str]:
        run = run_of(grpo_spec(prompts_per_step=8), policy, prompts=prompts, engine=engine)
        return [group[0].text for _, group in loop.sample(run, step).groups]

    one = play(monkeypatch, 1, texts)[0]
    assert len({text.split()[0] for text in one}) == 8
    for ranks in (2, 4):
        parts = play(monkeypatch, ranks, texts)
        assert [x for row in zip(*parts, strict=True) for x in row] == one


@pytest.mark.parametrize("dynamic", [False, True], ids=["as drawn", "dynamic sampling"])
def test_a_mini_batch_has_the_same_prompts_on_any_number_of_ranks(monkeypatch, dynamic) -> None:
    spec = grpo_spec(
        algorithm="dapo",
        prompts_per_step=8,
        minibatches=2,
        update_epochs=3,
        dynamic_sampling=dynamic,
        max_draws=3,
    )
    prompts = [PromptRow((i, 4), str(i), {}) for i in range(16)]
    engine: Any = Echo()
    learner: Any = Learnt()
    monkeypatch.setattr(loop, "_has_signal", lambda run, prompt, group: prompt.input_ids[0] % 3)

    def batches(rank: int) -> list[list[int]]:
        """Return the first tokens of the prompts of each mini-batch, over all epochs."""
        learner.seen[rank] = []
        run = run_of(spec, learner, prompts=prompts, engine=engine)
        samples = loop.sample(run, 2)
        experience = gather_experience(
            [p for p, _ in samples.groups],
            [g for _, g in samples.groups],
            group_numbers=samples.positions,
        )
        loop.update(run, experience, step=2, kl_coef=0.0)
        return learner.seen[rank]

    def sets(ranks: int) -> list[list[int]]:
        parts = play(monkeypatch, ranks, batches)
        return [sorted(x for part in at for x in part) for at in zip(*parts, strict=True)]

    one = sets(1)
    assert len(one) == 6
    assert all(len(set(batch)) == 4 for batch in one)
    assert one[0] + one[1] != one[2] + one[3] != one[4] + one[5]
    # In the order of the batch each mini-batch is as large on every rank.
    assert [len(part[0]) for part in play(monkeypatch, 2, batches)] == [len(one[0]) // 2] * 2
    for ranks in (2, 4):
        assert sets(ranks) == one


def part_of(rank: int, ranks: int) -> tuple[Experience, list[float | None]]:
    """Return a rank's groups with their scores and made-up log-probabilities."""
    whole = sampled(LENGTHS)
    answers, size = list(whole.completions), len(LENGTHS) // ranks
    mine = range(rank * size, (rank + 1) * size)
    found = gather_experience(
        [whole.prompts[2 * g] for g in mine],
        [answers[2 * g : 2 * g + 2] for g in mine],
        group_numbers=mine,
    )
    scores = SCORES[2 * mine[0] : 2 * mine[-1] + 2]
    found = scored(found, scores)
    draws = []
    for row, prompt in zip(found.completions, found.prompts, strict=True):
        draw = random.Random(str((row.token_ids, prompt.input_ids)))
        draws.append([draw.uniform(-3.0, 0.0) for _ in range(3 * 40)])
    width = found.input_ids.shape[1]
    old, ref, values = (
        torch.tensor([row[40 * i : 40 * i + width] for row in draws]) for i in range(3)
    )
    return found.with_tokens(old_logprobs=old, ref_logprobs=ref, values=values), scores


def flat(experience: Experience, name: str) -> list[float]:
    return experience.per_token[name][experience.completion].tolist()


@pytest.mark.parametrize(
    "spec",
    [
        grpo_spec(algorithm="reinforce++-baseline", group_size=2),
        grpo_spec(algorithm="reinforce++", group_size=2),
        ppo_spec(group_size=2, whiten_rewards=True),
    ],
    ids=["batch scale", "whitened rewards to go", "ppo"],
)
def test_advantages_are_scaled_by_the_batch_of_all_ranks(monkeypatch, spec) -> None:
    def advantages(rank: int, ranks: int) -> list[float]:
        experience, _ = part_of(rank, ranks)
        return flat(build_algorithm(spec).estimate(experience, 0.1), "advantages")

    (one,) = play(monkeypatch, 1, lambda rank: advantages(rank, 1))
    for ranks in (2, 4):
        parts = play(monkeypatch, ranks, lambda rank, ranks=ranks: advantages(rank, ranks))
        assert [x for part in parts for x in part] == pytest.approx(one, abs=1e-5)
        assert torch.tensor(one).abs().max() > 0.5


def test_metrics_of_a_step_are_over_all_ranks(monkeypatch) -> None:
    """By hand: 8 responses, 7 of them scored, 28 tokens."""
    spec = grpo_spec(group_size=2)

    def metrics(rank: int, ranks: int) -> dict[str, float]:
        experience, scores = part_of(rank, ranks)
        return summarize(experience, Scores(scores, {"r": scores}), spec)

    (one,) = play(monkeypatch, 1, lambda rank: metrics(rank, 1))
    known = [x for x in SCORES if x is not None]
    mean = sum(known) / 7
    assert one["answers/num"] == 8
    assert one["reward/mean"] == one["reward/r"] == pytest.approx(mean)
    assert one["reward/std"] == pytest.approx((sum(x * x for x in known) / 7 - mean**2) ** 0.5)
    assert one["reward/invalid_frac"] == pytest.approx(1 / 8)
    assert one["length/mean"] == pytest.approx(28 / 8)
    # Without a score, and its partner alone: neither can be learned from.
    assert one["reward/dead_group_frac"] == pytest.approx(2 / 8)
    experience, _ = part_of(0, 1)
    gap = sum(
        a - b
        for a, b in zip(
            flat(experience, "old_logprobs"), flat(experience, "ref_logprobs"), strict=True
        )
    )
    assert one["kl/reference"] == pytest.approx(gap / 28, rel=1e-5)
    assert one["kl/reference_per_answer"] == pytest.approx(gap / 8, rel=1e-5)
    for found in play(monkeypatch, 2, lambda rank: metrics(rank, 2)):
        assert found == pytest.approx(one)


def test_kto_measures_its_reference_point_on_all_ranks(model_dir, monkeypatch) -> None:
    draw = random.Random(3)
    rows = []
    for n in (3, 6, 2, 5, 4):
        ids = tuple(draw.choices(range(2, VOCAB), k=2 + n))
        rows.append(kto.KtoRow(ids, (False,) * 2 + (True,) * n, good=True))
    rows = [
        kto.replace(row, ref_mismatched=-2.0 * len(row.input_ids) - 9.0 * i)
        for i, row in enumerate(kto.mismatch(rows, max_length=16))
    ]
    spec = KtoStage(kind="kto", init="x", data=[{"path": "x"}], micro_tokens=8)  # type: ignore[list-item]
    module = LogprobModel(load_policy(model_dir, dtype="float32"))

    def point(rank: int) -> float:
        return kto.mismatched_kl(spec, module, rows)["kl"]

    # By hand: the mean over rows of log p of the mismatched response minus the reference's.
    total = 0.0
    for row in rows:
        other = kto.other(row)
        ids = torch.tensor([other.input_ids])
        logprobs = module.eval()(ids, torch.arange(ids.shape[1])[None]).logprobs[0]
        total += float(logprobs[torch.tensor(other.trained)].sum()) - row.ref_mismatched
    assert total > 0.0
    for ranks in (1, 2, 3):
        for found in play(monkeypatch, ranks, point):
            assert found == pytest.approx(total / 5, rel=1e-5)


def test_a_check_that_fails_on_one_rank_fails_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equally bad lines the first rank's is shown; numbers of seconds differ."""
    verdicts = {"sampler": ("ok", "fail"), "start": ("ok", "ok"), "greedy": ("warn", "warn")}

    def card_of(rank: int) -> Card:
        def check(name: str) -> Check:
            return name, lambda: Finding(f"of {rank}", "", verdicts[name][rank])  # type: ignore

        return run_checks("grpo", "grpo", [check(name) for name in verdicts])

    first, second = play(monkeypatch, 2, card_of)
    assert first == second
    assert [(line.name, line.verdict, line.value) for line in first.lines] == [
        ("sampler", "fail", "rank 1: of 1"),
        ("start", "ok", "of 0"),
        ("greedy", "warn", "of 0"),
    ]
