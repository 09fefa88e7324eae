"""Causes for which a run does not learn: planted ones are named, healthy runs raise no alarm."""

import json
import logging
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import alone
from online_parts import grpo_spec, ppo_spec

from align.core.errors import TrainingError
from align.core.log import MetricsLog
from align.core.types import Alarm, PairRow, TokenRow
from align.recipe.schema import OptimSpec, SftStage
from align.stages.kto import KtoRow
from align.stages.reward.tasks import WeightedPair
from align.training.diagnosis import Diagnosis
from align.training.evidence import row_facts
from benchmarks.not_learning import Workshop
from benchmarks.not_learning_cases import CAUSES, HEALTHY, SHORT, Case

OFFLINE = {"init": "x", "data": [{"path": "x"}]}
RATE = OptimSpec(learning_rate=1e-3, schedule="constant", warmup_frac=0.0)
OPTIM = {
    "grad_norm": 0.5,
    "learning_rate": 1e-3,
    "update_ratio": 1e-2,
    "update_per_rate": 1.0,
    "weight_rms": 0.1,
}
"""What a healthy optimizer step logs."""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory):
    with alone.world_of_one():
        yield Workshop(tmp_path_factory.mktemp("not_learning"))


@pytest.mark.parametrize("case", [c for c in CAUSES if c.name in SHORT], ids=lambda c: c.name)
def test_a_planted_cause_is_the_first_that_is_named(workshop: Workshop, case) -> None:
    found = workshop.run(case)
    assert found.named, (found.alarms, found.error)
    assert found.alarms[0][0] <= 6


@pytest.mark.parametrize("case", [c for c in HEALTHY if c.name in SHORT], ids=lambda c: c.name)
def test_a_healthy_run_raises_no_alarm(workshop: Workshop, case) -> None:
    found = workshop.run(case)
    assert not found.alarms
    assert not found.error
    better = (
        found.after > found.before if case.measure == "reward/mean" else found.after < found.before
    )
    assert better


def test_stop_ends_the_stage_with_the_cause(workshop: Workshop) -> None:
    case = next(c for c in CAUSES if c.name == "grpo: constant reward")
    case.changes["not_learning"] = "stop"
    try:
        found = workshop.run(case)
    finally:
        del case.changes["not_learning"]
    assert "step 5: the run does not learn (constant_reward: every response got" in found.error
    assert not (workshop.folder / "runs" / "case" / "model").exists()
    assert TrainingError.exit_code == 1


def test_a_policy_that_never_stops_is_saved_before_its_stage_ends(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    alarm = Alarm("never_stops", "the policy practically never stops", "train longer")
    monkeypatch.setattr("align.stages.offline.never_stops", lambda found: alarm)
    case = Case("stops", "sft", changes={"not_learning": "stop", "steps": 2})
    found = workshop.run(case)
    assert "the run does not learn (never_stops: " in found.error
    folder = workshop.folder / "runs" / "case"
    assert (folder / "model" / "model.safetensors").is_file()
    assert not (folder / "manifest.json").exists()


def names(diagnosis: Diagnosis, rows: list[dict[str, float]], *, start: int = 1) -> list[str]:
    found: dict[str, None] = {}
    for step, row in enumerate(rows, start=start):
        found |= dict.fromkeys(alarm.name for alarm in diagnosis.look(step, row))
    return list(found)


def offline_row(**changed: float) -> dict[str, float]:
    return {f"optim/{k}": v for k, v in (OPTIM | changed).items()} | {"train/loss": 2.0}


def online_row(**changed: float) -> dict[str, float]:
    row = {f"policy/{k}": v for k, v in OPTIM.items()}
    row |= {"reward/mean": 0.5, "reward/std": 0.5, "reward/dead_group_frac": 0.0}
    row |= {"reward/invalid_frac": 0.0, "length/truncated_frac": 0.0, "policy/entropy": 1.0}
    row |= {"policy/clip_frac_last": 0.0, "sampler/logprob_gap": 1e-6, "advantage/rms": 1.0}
    return row | changed


def sft(total_steps: int = 20, **changed) -> Diagnosis:
    spec = SftStage(kind="sft", **({"optim": RATE} | OFFLINE | changed))
    return Diagnosis(spec, total_steps=total_steps, num_trained=10_000)


def grpo(**changed) -> Diagnosis:
    spec = grpo_spec(**({"steps": 20, "optim": RATE} | changed))
    return Diagnosis(spec, total_steps=20, num_trained=10_000)


def test_healthy_steps_raise_nothing() -> None:
    assert names(sft(), [offline_row()] * 20) == []
    assert names(grpo(), [online_row()] * 20) == []


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        # 20 steps at 4e-9 add up to 8e-8, which is 8e-7 of weights of 0.1; at 6e-9 it is 1.2e-6.
        ({"learning_rate": 4e-9}, "learning_rate"),
        ({"learning_rate": 6e-9}, None),
        ({"grad_norm": 0.0, "update_ratio": 0.0, "update_per_rate": 0.0}, "zero_gradient"),
        ({"grad_norm": 0.0, "update_ratio": 0.0, "weight_rms": 0.0}, "zero_adapter"),
        ({"update_ratio": 0.0}, "frozen_weights"),
        # 5e-8 over 10,000 weights is 5e-10 each, below Adam's 1e-8; 5e-6 is above.
        ({"grad_norm": 5e-8, "update_per_rate": 0.05}, "adam_epsilon"),
        ({"grad_norm": 5e-6, "update_per_rate": 0.8}, None),
    ],
)
def test_causes_in_the_optimizer(changed: dict[str, float], name: str | None) -> None:
    spec = OptimSpec(
        **(RATE.model_dump() | {"learning_rate": changed.get("learning_rate") or 1e-3})
    )
    found = names(sft(optim=spec), [offline_row(**changed)] * 5)
    assert found == ([] if name is None else [name])


def test_clipping_below_the_epsilon_is_told_from_a_small_gradient() -> None:
    # A norm of 2 is 0.02 a weight; clipped to 1e-7 it is 1e-9, below the 1e-8 of eps.
    diagnosis = sft(optim=RATE.model_copy(update={"max_grad_norm": 1e-7}))
    rows = [offline_row(grad_norm=2.0, update_per_rate=0.05)] * 5
    assert names(diagnosis, rows) == ["clipped_gradient"]


def test_a_gradient_that_vanishes_after_learning_is_no_alarm() -> None:
    still = offline_row(grad_norm=0.0, update_ratio=0.0, update_per_rate=0.0)
    assert names(sft(), [offline_row()] * 3 + [still] * 10) == []


def test_a_cause_takes_five_steps_or_a_whole_short_run() -> None:
    still = offline_row(grad_norm=0.0, update_ratio=0.0, update_per_rate=0.0)
    assert names(sft(), [still] * 4) == []
    assert names(sft(), [still] * 5) == ["zero_gradient"]
    assert names(sft(total_steps=3), [still] * 2) == []
    assert names(sft(total_steps=3), [still] * 3) == ["zero_gradient"]


def test_a_schedule_that_ends_before_the_run() -> None:
    rows = [offline_row()] * 10 + [offline_row(learning_rate=0.0)] * 5
    diagnosis = sft()
    assert names(diagnosis, rows[:14]) == []
    assert names(diagnosis, rows[14:], start=15) == ["learning_rate"]


def test_solved_tasks_are_no_alarm_but_dead_ones_are() -> None:
    dead = {"reward/std": 0.0, "reward/dead_group_frac": 1.0}
    assert names(grpo(), [online_row(**{"reward/mean": 0.0}, **dead)] * 5) == ["constant_reward"]
    varied = [
        online_row(**{"reward/mean": x / 10, "reward/std": 0.3, "reward/dead_group_frac": 1.0})
        for x in range(5)
    ]
    assert names(grpo(), varied) == ["dead_groups"]
    by_step = [online_row(**{"reward/mean": x / 10}, **dead) for x in range(5)]
    assert names(grpo(), by_step) == ["dead_groups"]
    solved = online_row(**{"reward/mean": 1.0}, **dead)
    assert names(grpo(), [online_row()] * 5 + [solved] * 10) == []
    # A gain of 0.1 is within the first step's spread of 0.5: nothing was solved.
    same = online_row(**{"reward/mean": 0.6}, **dead)
    assert names(grpo(), [online_row()] * 5 + [same] * 5) == ["constant_reward"]
    # The same after a fall of the reward: the policy has collapsed.
    fallen = online_row(**{"reward/mean": 0.1}, **dead)
    assert names(grpo(), [online_row()] * 5 + [fallen] * 5) == ["constant_reward"]


def test_truncation_comes_first_unless_some_responses_ended() -> None:
    dead = {"reward/mean": 0.0, "reward/std": 0.0, "reward/dead_group_frac": 1.0}
    all_cut = online_row(**dead, **{"length/truncated_frac": 1.0})
    assert names(grpo(), [all_cut] * 5) == ["truncated", "constant_reward"]
    most_cut = online_row(**dead, **{"length/truncated_frac": 0.92})
    assert names(grpo(), [most_cut] * 5) == ["constant_reward", "truncated"]
    # A length limit alone is no fault: the rewards still tell the responses apart.
    assert names(grpo(), [online_row(**{"length/truncated_frac": 1.0})] * 10) == []


def test_kl_in_the_loss_is_compared_with_the_advantages() -> None:
    # k3 of 0.005 is a log-ratio of sqrt(2 * 0.005) = 0.1: times 20 two advantages, times 5 half.
    row = online_row(**{"kl/reference_k3": 0.005, "kl/coef": 20.0})
    kl = {"coef": 20.0, "place": "loss", "estimator": "k3"}
    assert names(grpo(kl=kl), [row] * 6) == ["kl_dominates"]
    assert names(grpo(kl=kl | {"coef": 5.0}), [row] * 6) == []
    # A policy that is far away has been moved by the reward, whatever the penalty is now.
    far = row | {"kl/reference_k3": 0.5}
    assert names(grpo(kl=kl | {"coef": 5.0}), [far] * 6) == []


def test_kl_in_the_reward_is_compared_with_the_spread_of_the_rewards() -> None:
    # A response is 0.4 nats from the reference: a penalty of 1.2 with 3, against a spread of 0.5.
    row = online_row(**{"kl/reference_rms": 0.4, "kl/reference_k3": 0.01, "kl/coef": 3.0})
    spec = ppo_spec(kl={"coef": 3.0}, steps=20, optim=RATE)
    assert names(Diagnosis(spec, total_steps=20, num_trained=9), [row] * 6) == ["kl_dominates"]
    spec = ppo_spec(kl={"coef": 0.05}, steps=20, optim=RATE)
    assert names(Diagnosis(spec, total_steps=20, num_trained=9), [row] * 6) == []


def test_facts_of_rows() -> None:
    def row(*ids: int) -> TokenRow:
        return TokenRow(ids, (False, *(True for _ in ids[1:])), source=f"a.jsonl:{ids[-1]}")

    pair, other = (WeightedPair(PairRow(row(1, 2), row(1, x), 1), (1.0,)) for x in (3, 4))
    assert row_facts([pair, pair]).equal
    assert not row_facts([pair, other]).equal
    assert row_facts(
        [KtoRow((1, 2), (False, True), good=good) for good in (True, True)]
    ).labels == (True,)
    assert row_facts([row(1, 2), row(1, 2)]).equal
    untrained = TokenRow((1, 2), (False, False))
    weightless = TokenRow((1, 2), (False, True), weights=(1.0, 0.0))
    assert row_facts([untrained, weightless, row(1, 2)]).untrained == 2


def test_the_state_of_a_checkpoint_gives_the_same_alarms() -> None:
    rows = [offline_row(grad_norm=0.0, update_ratio=0.0, update_per_rate=0.0)] * 6
    whole, first, second = sft(), sft(), sft()
    expected = [whole.look(i, row) for i, row in enumerate(rows, start=1)]
    found = [first.look(i, row) for i, row in enumerate(rows[:3], start=1)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [second.look(i, row) for i, row in enumerate(rows[3:], start=4)]
    assert found == expected
    assert found[4][0].name == "zero_gradient"


def ends_with_nothing_learned(diagnosis: Diagnosis, rows: list[dict[str, float]]) -> bool:
    for step, row in enumerate(rows, start=1):
        diagnosis.look(step, row)
    try:
        diagnosis.finish()
    except TrainingError as e:
        return "learned nothing" in str(e)
    return False


STILL = {"grad_norm": 0.0, "update_ratio": 0.0, "update_per_rate": 0.0}
DEAD = {"reward/dead_group_frac": 1.0, "reward/std": 0.0}


@pytest.mark.parametrize(
    ("rows", "ends"),
    [
        ([online_row(**DEAD)] * 20, True),
        # One group with unequal rewards, in one step, is something to learn from.
        ([online_row()] + [online_row(**DEAD)] * 19, False),
        ([online_row(**DEAD)] * 19 + [online_row(**{"reward/dead_group_frac": 0.9})], False),
        ([online_row()] * 20, False),
        # Rewards that tell responses apart, but a policy that no step moved.
        ([online_row(**{f"policy/{k}": 0.0 for k in STILL})] * 20, True),
        # Two steps are too few to name a cause.
        ([online_row(**DEAD)] * 2, False),
    ],
)
def test_a_policy_that_no_step_taught_anything_ends_its_stage(rows, ends: bool) -> None:
    assert ends_with_nothing_learned(grpo(), rows) == ends
    assert not ends_with_nothing_learned(grpo(not_learning="ignore"), rows)


@pytest.mark.parametrize(
    ("rows", "ends"),
    [
        ([offline_row(**STILL)] * 20, True),
        ([offline_row(learning_rate=0.0, update_ratio=0.0)] * 20, True),
        ([offline_row()] + [offline_row(**STILL)] * 19, False),
        # The rate is too small to matter, but the weights moved: an alarm, and no error.
        ([offline_row(learning_rate=4e-9)] * 20, False),
        ([offline_row()] * 20, False),
    ],
)
def test_rows_that_taught_nothing_end_their_stage(rows, ends: bool) -> None:
    assert ends_with_nothing_learned(sft(), rows) == ends


def test_ppo_learns_from_rewards_that_differ_between_prompts_only() -> None:
    same = online_row(**{"reward/mean": 0.7, "reward/std": 1e-9})
    del same["reward/dead_group_frac"]
    for rows, ends in (([same] * 20, True), ([same | {"reward/std": 0.1}] + [same] * 19, False)):
        diagnosis = Diagnosis(ppo_spec(steps=20, optim=RATE), total_steps=20, num_trained=9)
        assert ends_with_nothing_learned(diagnosis, rows) == ends


def test_a_resumed_run_that_learned_nothing_ends_with_the_same_error() -> None:
    first, second = grpo(), grpo()
    for step in range(1, 21):
        first.look(step, online_row(**DEAD))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    errors = []
    for diagnosis in (first, second):
        with pytest.raises(TrainingError) as found:
            diagnosis.finish()
        errors.append(str(found.value))
    assert errors[0] == errors[1]
    assert errors[0].startswith("the model has learned nothing in 20 steps (constant_reward: ")


def test_ignore_does_not_look_and_warn_writes_each_alarm_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("align"), "propagate", True)
    rows = [offline_row(learning_rate=0.0)] * 8
    for mode, expected in (("ignore", 0), ("warn", 1)):
        log = MetricsLog(tmp_path / mode, total_steps=20)
        diagnosis = sft(not_learning=mode)
        for step, row in enumerate(rows, start=1):
            log.log(step, row)
            diagnosis.report(step, row, log)
        log.close()
        path = tmp_path / mode / "alarms.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        assert len(lines) == expected
        # Not a count: pytest may hear a logger that does not propagate by itself, then twice.
        assert ("step 5: learning_rate:" in caplog.text) == bool(expected)
        assert "step 6: learning_rate:" not in caplog.text
    assert json.loads(lines[0])["remedy"] == "lengthen the schedule or raise min_lr_frac"
    log = MetricsLog(tmp_path / "warn", total_steps=20)
    log.rewind(4)
    log.close()
    assert path.read_text() == ""


@pytest.mark.parametrize("num", [1, 127, 128, 129, 200, 255, 256, 1000])
def test_the_probe_sees_the_first_and_the_last_layers(num: int) -> None:
    import torch
    from torch import nn

    from align.training.probe import MAX_TENSORS, WeightProbe

    probe = WeightProbe([nn.Parameter(torch.tensor([float(i)])) for i in range(num)], sharded=False)
    seen = probe.read().tolist()
    assert len(seen) == min(num, MAX_TENSORS)
    # No stretch of unseen tensors is longer than an even spacing leaves.
    longest = max(b - a for a, b in zip([-1.0, *seen], [*seen, float(num)], strict=True))
    assert longest <= -(-num // MAX_TENSORS) + (num > MAX_TENSORS)


def test_the_probe_measures_the_movement_of_the_weights() -> None:
    import torch
    from torch import nn

    from align.training.probe import WeightProbe

    weights = [nn.Parameter(torch.full((2, 3), 3.0)), nn.Parameter(torch.full((4,), 1.0))]
    probe = WeightProbe(weights, sharded=False)
    before = probe.read()
    with torch.no_grad():
        weights[0][0, 0] += 0.5
        weights[1] -= 0.25
    # Changes 0.5 and four of 0.25; the weights are then 3.5, five of 3 and four of 0.75.
    after = 3.5**2 + 5 * 9 + 4 * 0.75**2
    found = probe.movement(before, rate=0.1)
    assert found["update_ratio"] == pytest.approx(math.sqrt((0.25 + 4 * 0.0625) / after))
    assert found["update_per_rate"] == pytest.approx(5.0)
    assert found["weight_rms"] == pytest.approx(math.sqrt(after / 10))
