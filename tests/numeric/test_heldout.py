"""Held-out evaluation before the first step, and the change since then with its interval."""

import json
import math
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import ttest_1samp

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
import curves
from engine_models import save_tiny, tiny_model
from online_parts import learner_of, policy_of

from align.core.log import MetricsLog
from align.core.types import PairRow, TokenRow
from align.models.logprobs import LogprobModel
from align.online.watch import Watch
from align.recipe.schema import DpoStage, KtoStage
from align.recipe.schema.tuning import FullTuning
from align.stages import dpo, kto, sft
from align.training.batch import PackedBatch
from align.training.heldout import HeldOut, change, prompt_of, random_groups
from align.training.offline import OfflineSchedule, evaluate_rows, train_offline
from align.training.task import OfflineTask
from align.tuning.loading import load_for_training


def sft_task(num_heldout: int) -> OfflineTask[Any]:
    rows = [pair.chosen for pair in curves.pairs()]
    heldout = [pair.rejected for pair in curves.pairs()][:num_heldout]
    return OfflineTask(rows, heldout, sft.length_of, sft.collate, sft.sft_loss)


def kto_task(model_dir: Path) -> OfflineTask[Any]:
    spec = KtoStage(kind="kto", beta=0.3, **curves.OFFLINE)
    judged = [
        kto.KtoRow(side.input_ids, side.trained, good=good)
        for pair in curves.pairs()
        for side, good in ((pair.chosen, True), (pair.rejected, False))
    ]
    # A reference that is another model, so that the reference point is not 0.
    other = save_tiny(tiny_model(7, tied=True), model_dir / "other")
    rows = kto.reference_rows(
        policy_of(other).module, kto.mismatch(judged, max_length=32), micro_tokens=60
    )
    return OfflineTask(
        rows,
        rows[:30],
        lambda row: len(row.input_ids),
        kto.collate,
        partial(kto.labeled_loss, spec),
        measure=partial(kto.mismatched_kl, spec),
    )


@pytest.mark.parametrize("kind", ["sft", "kto"])
@pytest.mark.parametrize("micro_tokens", [20, 400])
def test_groups_add_up_to_the_loss_over_all_rows(
    model_dir: Path, kind: str, micro_tokens: int
) -> None:
    task = sft_task(40) if kind == "sft" else kto_task(model_dir)
    model = policy_of(model_dir).module
    found = HeldOut(task, micro_tokens).start(model)
    expected = evaluate_rows(model, task, 400)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_rows_are_counted_once_however_many_passes_there_are(model_dir: Path) -> None:
    """40 rows in passes of one row: 40 x 40 counts would be more work than the passes."""
    task, counted = sft_task(40), []

    def collate(rows: Any, batch: Any) -> PackedBatch:
        counted.append(len(batch))
        return sft.collate(rows, batch)

    HeldOut(replace(task, collate=collate), 1).start(policy_of(model_dir).module)
    assert len(counted) > 40
    assert sum(counted) <= 3 * 40


def test_interval_is_that_of_a_mean_over_groups() -> None:
    first = [0.5, 0.25, 1.0, 0.75, 0.125, 0.5, 0.25, 1.5, 0.3]
    now = [0.4, 0.25, 0.5, 0.80, 0.100, 0.3, 0.20, 1.0, 0.1]
    parts = [b - a for a, b in zip(first, now, strict=True)]
    # The total is 9 times the mean, so its interval is 9 times scipy's interval of the mean.
    bounds = ttest_1samp(parts, 0.0).confidence_interval(0.95)
    found = change("loss", first, now)
    assert found["change/loss"] == pytest.approx(math.fsum(now) - math.fsum(first))
    assert found["change/loss_low"] == pytest.approx(9 * bounds.low)
    assert found["change/loss_high"] == pytest.approx(9 * bounds.high)
    assert list(change("loss", first[:7], now[:7])) == ["change/loss"]
    # A fraction that starts at 0.5 rises by 0.5 at most: the interval beyond that is cut.
    found = change("accuracy", [0.05] * 10, [0.1] * 9 + [0.0])
    assert found["change/accuracy_high"] == pytest.approx(0.5)
    assert found["change/accuracy_low"] > 0.1


def test_rows_with_the_same_prompt_are_one_cluster(caplog: pytest.LogCaptureFixture) -> None:
    prompts = [i % 50 for i in range(120)]
    groups = random_groups(prompts)
    assert sorted(place for group in groups for place in group) == list(range(120))
    assert len(groups) == 32
    assert max(map(len, groups)) - min(map(len, groups)) <= 3
    where = {place: k for k, group in enumerate(groups) for place in group}
    assert all(where[i] == where[i % 50] for i in range(120))
    # Ten copies of four rows are four pieces of evidence, too few for an interval.
    rows = [pair.chosen for pair in curves.pairs()][:4] * 10
    with caplog.at_level("WARNING"):
        task = OfflineTask(rows, rows, sft.length_of, sft.collate, sft.sft_loss)
        copies = HeldOut(task, 400)
    assert "40 rows have 4 different prompts" in caplog.text
    assert len(copies._groups) == 4


def test_prompt_of_each_kind_of_row() -> None:
    row = TokenRow((5, 6, 7, 8), (False, False, True, True))
    assert prompt_of(row) == (5, 6)
    assert prompt_of(PairRow(row, TokenRow((5, 6, 9), (False, False, True)), 2)) == (5, 6)
    # Without a prompt, rows are told apart by their whole text; a BOS token is no prompt.
    assert prompt_of(TokenRow((1, 6, 7), (False, True, True))) == (1, 6, 7)
    assert prompt_of(TokenRow((6, 7), (True, True))) == (6, 7)
    assert prompt_of(TokenRow((6, 7), (False, False))) == (6, 7)


def train(
    model_dir: Path, folder: Path, *, heldout: int = 40, steps: int = 4, checkpoint_every: int = 0
) -> tuple[dict[str, float], dict[str, torch.Tensor], torch.Tensor]:
    """Train with dropout; return the metrics, the weights and the random state at the end."""
    torch.manual_seed(11)
    model = load_for_training(
        model_dir, FullTuning(), dtype="float32", gradient_checkpointing=False, dropout=0.2, seed=5
    )
    learner = learner_of(LogprobModel(model))
    folder.mkdir(exist_ok=True)
    metrics = MetricsLog(folder, total_steps=steps)
    schedule = OfflineSchedule(steps, 8, 60, 2, checkpoint_every, 2, seed=2)
    found = train_offline(
        learner, sft_task(heldout), schedule, metrics=metrics, checkpoints=folder / "checkpoints"
    )
    metrics.close()
    weights = {name: p.detach().clone() for name, p in learner.module.named_parameters()}
    return found, weights, torch.get_rng_state()


def lines_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_step_0_is_logged_before_the_first_update_and_moves_no_bit(
    model_dir: Path, tmp_path: Path
) -> None:
    found, weights, state = train(model_dir, tmp_path / "with")
    lines = lines_of(tmp_path / "with")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    # Step 0 is the loss of the untrained model.
    before = evaluate_rows(policy_of(model_dir).module, sft_task(40), 400)
    assert lines[0]["eval/loss"] == pytest.approx(before["eval/loss"], rel=1e-5)
    assert "train/loss" not in lines[0]
    # The change is last minus first, and its interval contains it.
    expected = lines[-1]["eval/loss"] - lines[0]["eval/loss"]
    assert found["change/loss"] == pytest.approx(expected, abs=1e-9)
    assert found["change/loss_low"] < found["change/loss"] < found["change/loss_high"]
    assert lines[2]["change/loss"] == pytest.approx(lines[2]["eval/loss"] - lines[0]["eval/loss"])
    # Without held-out rows the same bytes are trained, with dropout too.
    without, same, same_state = train(model_dir, tmp_path / "without", heldout=0)
    assert not any(name.startswith(("eval/", "change/")) for name in without)
    assert [line["step"] for line in lines_of(tmp_path / "without")] == [1, 2, 3, 4]
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert torch.equal(state, same_state)


def test_resumed_run_knows_the_start_and_does_not_evaluate_it_again(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, weights, _ = train(model_dir, tmp_path / "whole", checkpoint_every=2)
    # A run that ended after its checkpoint of step 2: the later ones and their lines are gone.
    broken = tmp_path / "whole"
    shutil.rmtree(broken / "checkpoints" / "step-00000004")
    monkeypatch.setattr(HeldOut, "start", None)
    found, again, _ = train(model_dir, broken, checkpoint_every=2)
    assert {k: v for k, v in found.items() if "per_s" not in k} == {
        k: v for k, v in expected.items() if "per_s" not in k
    }
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert [line["step"] for line in lines_of(broken)] == [0, 1, 2, 3, 4]


def test_watched_scores_change_by_prompt_and_copies_are_one_cluster() -> None:
    prompts = [SimpleNamespace(input_ids=(1, i)) for i in (*range(8), 0, 0, 9)]
    gold = [[0.0] * 10 + [None], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 5.0]]
    history = [SimpleNamespace(gold=scores, proxy=[None] * 11) for scores in gold]
    watch: Any = SimpleNamespace(prompts=prompts, history=history)
    found = Watch._changes(watch)
    # The prompt without a first score is left out; the other ten rows have eight prompts.
    assert found["change/gold"] == pytest.approx(0.55)
    parts = [(0.1 + 0.9 + 1.0) / 10, *(x / 10 for x in gold[1][1:8])]
    bounds = ttest_1samp(parts, 0.0).confidence_interval(0.95)
    assert found["change/gold_low"] == pytest.approx(8 * bounds.low)
    assert found["change/gold_high"] == pytest.approx(8 * bounds.high)
    assert "change/proxy" not in found
    watch.history = history[:1]
    assert Watch._changes(watch) == {}


def test_dpo_starts_at_chance(model_dir: Path) -> None:
    spec = DpoStage(kind="dpo", beta=0.3, **curves.OFFLINE)
    module = policy_of(model_dir).module
    rows = dpo.reference_pairs(module, curves.pairs()[:1], micro_tokens=400)
    _, stats = dpo.preference_loss(spec, module, dpo.collate(rows, rows))
    # Policy and reference are one model, and the pair is packed as it was then: the margin is 0.
    assert float(stats["margin"]) == 0.0
    assert float(stats["accuracy"]) == 0.5
    # A reference that differs by rounding is still a tie, one that differs by 0.01 nats is not.
    eps = torch.finfo(torch.float32).eps
    for moved, expected in ((rows[0].ref_chosen * eps, 0.5), (-0.01, 1.0), (0.01, 0.0)):
        near = [replace(rows[0], ref_chosen=rows[0].ref_chosen + moved)]
        _, stats = dpo.preference_loss(spec, module, dpo.collate(near, near))
        assert float(stats["accuracy"]) == expected
