"""Label smoothing, dropout and early stopping: numbers by hand and what must not change."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
import alone
from engine_models import save_tiny, tiny_model

from align.core.errors import TrainingError
from align.core.types import TokenRow
from align.models import logprobs
from align.models.loading import load_policy, set_dropout
from align.models.logprobs import LogprobModel
from align.online import guard
from align.online.watch import Watch
from align.recipe.schema import EarlyStoppingSpec, RewardStage, SftStage, TuningSpec
from align.stages.sft import collate, sft_loss
from align.training.learner import decays
from align.training.stopping import EarlyStopping
from align.tuning.wrap import add_tuner

ROWS = [
    TokenRow(tuple(3 + (7 * r * t + t) % 60 for t in range(n)), tuple(t > 2 for t in range(n)))
    for r, n in enumerate((9, 4, 17))
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Save a tiny model and join a world of one."""
    with alone.world_of_one():
        yield save_tiny(tiny_model(1, tied=True), tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("chunk", [2**24, 64 * 5])
def test_smoothed_loss_and_gradient_equal_those_of_torch(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk)
    model = LogprobModel(load_policy(model_dir, dtype="float32")).train()
    loss, _ = sft_loss(model, collate(ROWS, ROWS), label_smoothing=0.3)
    loss.backward()
    plain = tiny_model(1, tied=True).double()
    logits, labels = [], []
    for row in ROWS:
        out = plain(torch.tensor([row.input_ids])).logits[0]
        logits.append(out[2:-1])  # rows train tokens 3 and later
        labels += row.input_ids[3:]
    expected = nn.functional.cross_entropy(
        torch.cat(logits), torch.tensor(labels), label_smoothing=0.3
    )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = dict(model.model.named_parameters())
    for name, p in plain.named_parameters():
        torch.testing.assert_close(found[name].grad.double(), p.grad, atol=1e-6, rtol=1e-4)


def test_heldout_loss_is_not_smoothed(model_dir: Path) -> None:
    model = LogprobModel(load_policy(model_dir, dtype="float32")).eval()
    batch = collate(ROWS, ROWS)
    assert sft_loss(model, batch, label_smoothing=0.3)[0] == sft_loss(model, batch)[0]


def test_dropout_acts_in_training_only_and_follows_the_seed(model_dir: Path) -> None:
    plain = LogprobModel(load_policy(model_dir, dtype="float32"))
    dropped = LogprobModel(load_policy(model_dir, dtype="float32"))
    set_dropout(dropped, 0.4)
    batch = collate(ROWS, ROWS)

    def loss(model: nn.Module, seed: int) -> float:
        torch.manual_seed(seed)
        return float(sft_loss(model, batch)[0])

    assert loss(plain.train(), 0) == loss(plain, 1) == loss(dropped.eval(), 0)
    dropped.train()
    assert loss(dropped, 0) == loss(dropped, 0) != loss(dropped, 1)
    with pytest.raises(TrainingError, match="has no dropout layer"):
        set_dropout(nn.Linear(2, 2), 0.1)


def stopped_after(values: list[float], **settings) -> tuple[int, int | None, list[int]]:
    """Feed values; give the best step, the step at which it stops, and the steps kept."""
    saved: list[int] = []
    stopping = EarlyStopping(
        EarlyStoppingSpec(**settings),
        save=saved.append,
        prune=lambda steps: None,
        keep_checkpoints=2,
    )
    for step, value in enumerate(values, 1):
        stopping.look(10 * step, {stopping.spec.metric: value})
        if stopping.stopped:
            return stopping.best_step, 10 * step, saved
    return stopping.best_step, None, saved


def test_early_stopping_waits_patience_evaluations_without_gain() -> None:
    losses = [3.0, 2.0, 2.5, 1.9, 2.0, 1.95, 1.0]
    assert stopped_after(losses, patience=2) == (40, 60, [10, 20, 40])
    assert stopped_after(losses, patience=3) == (70, None, [10, 20, 40, 70])
    # Gains of 1.9 against 2.0 are too small; 1.0 comes after three evaluations without one.
    assert stopped_after(losses, patience=5, min_delta=0.2) == (70, None, [10, 20, 70])
    # Nothing is worse than NaN, and NaN is no gain.
    lost = float("nan")
    assert stopped_after([lost, 3.0, lost, 2.0], patience=3) == (40, None, [10, 20, 40])
    assert stopped_after([lost, lost, lost], patience=2) == (10, 30, [10])
    rising = {"metric": "eval/accuracy", "patience": 1}
    assert stopped_after([0.5, 0.7, 0.7, 0.9], **rising) == (20, 30, [10, 20])


def test_early_stopping_goes_on_from_a_checkpoint_as_without_one() -> None:
    spec = EarlyStoppingSpec(patience=2)
    pruned: list[set[int]] = []
    first = EarlyStopping(spec, save=lambda step: None, prune=pruned.append, keep_checkpoints=1)
    for step, value in ((1, 3.0), (2, 2.0)):
        first.look(step, {"eval/loss": value})
    state = first.state_dict()
    worse = EarlyStopping(spec, save=lambda step: None, prune=pruned.append, keep_checkpoints=1)
    worse.load_state_dict(state)
    worse.look(3, {"eval/loss": 2.5})
    assert worse.best_step == 2  # of before the checkpoint
    again = EarlyStopping(spec, save=lambda step: None, prune=pruned.append, keep_checkpoints=1)
    again.load_state_dict(state)
    again.look(3, {"eval/loss": 1.0})
    # The weights of step 2 stay until the next checkpoint: a resumed run may need them again.
    assert pruned[-1] == {2, 3}
    for step in (4, 5):
        assert not again.stopped
        again.look(step, {"eval/loss": 1.0})
    assert again.stopped
    assert again.best == {"eval/loss": 1.0}
    with pytest.raises(TrainingError, match=r"'eval/loss' was not measured\. Use one of eval/x"):
        again.look(6, {"eval/x": 1.0})


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("kind", ["early stopping", "watch"])
def test_every_checkpoint_on_disk_has_its_best_weights(kind: str, keep: int) -> None:
    """A run may be killed at any moment, and resume from any checkpoint that is still there."""
    weights: set[int] = set()
    checkpoints: dict[int, tuple[int, dict]] = {}  # step -> best step then, state

    def prune(steps: set[int]) -> None:
        weights.intersection_update(steps)
        assert {best for best, _ in checkpoints.values()} <= weights

    def monitor() -> Any:
        if kind == "early stopping":
            spec = EarlyStoppingSpec(patience=99)
            return EarlyStopping(spec, save=weights.add, prune=prune, keep_checkpoints=keep)
        parts = dict.fromkeys(
            [
                "spec",
                "seed",
                "prompts",
                "rewards",
                "gold",
                "engine",
                "awake",
                "stop_token_ids",
                "push",
                "policy",
                "reference",
                "metrics",
            ]
        )
        stage = SimpleNamespace(keep_checkpoints=keep)
        return Watch(stage=stage, save=weights.add, prune=prune, **parts)  # type: ignore[arg-type]

    def look(step: int, loss: float) -> None:
        if kind == "early stopping":
            running.look(step, {"eval/loss": loss})
            return
        empty: Any = {"length": [], "repetition": [], "rewards": {}, "disagreement": None}
        running.history.append(guard.Evaluation(step, 0.0, [-loss], [-loss], **empty))
        running.keep_best(step)

    running = monitor()
    losses = [9.0, 8.0, 8.5, 7.0, 6.0, 6.5, 5.0, 5.5, 4.0, 3.0]
    for step, loss in enumerate(losses, 1):
        look(step, loss)
        best = min(range(1, step + 1), key=lambda at: (losses[at - 1], at))
        # A checkpoint after each step: the old ones go only when the new one is complete.
        checkpoints[step] = best, json.loads(json.dumps(running.state_dict()))
        for old in sorted(checkpoints)[:-keep]:
            del checkpoints[old]
        if step == 6:  # killed; the newest checkpoint is damaged if there is another one
            back = min(checkpoints)
            checkpoints = {back: checkpoints[back]}
            running = monitor()
            running.load_state_dict(checkpoints[back][1])
            assert checkpoints[back][0] in weights
            for again in range(back + 1, 7):
                look(again, losses[again - 1])
    assert 10 in weights
    assert len(weights) <= keep + 2


def decaying(model: nn.Module) -> set[str]:
    """Give what must decay: all but biases and the parameters of norms, by the module's class."""
    norms = {id(p) for m in model.modules() if "Norm" in type(m).__name__ for p in m.parameters()}
    named = dict(model.named_parameters())
    return {n for n, p in named.items() if id(p) not in norms and n.split(".")[-1] != "bias"}


def test_weight_decay_spares_norms_and_biases_of_every_architecture() -> None:
    small = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    gpt2 = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)
    models = [
        LlamaForCausalLM(LlamaConfig(**small, attention_bias=True)),
        BertForSequenceClassification(BertConfig(**small)),
        GPT2LMHeadModel(gpt2),
    ]
    for model in models:
        found = {n for n, p in model.named_parameters() if decays(n, p)}
        assert found == decaying(model), type(model)
        assert 0 < len(found) < len(list(model.parameters()))


@pytest.mark.parametrize(
    ("method", "decaying"),
    [("lora", {"lora_A", "lora_B"}), ("dora", {"lora_A", "lora_B"}), ("ia3", set())],
)
def test_weight_decay_of_adapters_takes_the_matrices(method: str, decaying: set[str]) -> None:
    spec = TypeAdapter(TuningSpec).validate_python({"method": method})
    model = add_tuner(LogprobModel(tiny_model(1, tied=True)).model, spec, seed=0)
    found = {n for n, p in model.named_parameters() if p.requires_grad and decays(n, p)}
    assert {
        part for n in found for part in n.split(".") if part in ("lora_A", "lora_B")
    } == decaying
    assert len(found) == sum(
        p.requires_grad and any(part in n.split(".") for part in decaying)
        for n, p in model.named_parameters()
    )


def test_weight_decay_goes_by_the_name_and_by_the_shape_that_zero_3_hides() -> None:
    matrix, flat = nn.Parameter(torch.ones(4, 8)), nn.Parameter(torch.ones(32))
    assert decays("layers.0.q_proj.weight", matrix)
    assert not decays("layers.0.q_proj.weight", flat)
    for name in ("layers.0.q_norm.weight", "layers.0.experts.bias", "encoder.LayerNorm.weight"):
        assert not decays(name, matrix)
    flat.ds_shape = torch.Size((4, 8))  # type: ignore[attr-defined]
    assert decays("layers.0.q_proj.weight", flat)


STOP = {"early_stopping": {"metric": "eval/loss"}}


@pytest.mark.parametrize(
    ("kind", "keys", "said"),
    [
        ("sft", {"keep": STOP}, "needs 'heldout' rows and 'eval_every'"),
        (
            "sft",
            {"keep": {"early_stopping": {"metric": "eval/accuracy"}}},
            "found 'eval/accuracy'; a sft stage measures eval/loss",
        ),
        ("sft", {"keep": {"augment": {}}}, "keep.augment changes nothing"),
        ("sft", {"keep": {"augment": {"templates": ["no slot"]}}}, "must contain {text} once"),
        (
            "sft",
            {"keep": {"ewc": {"coef": 1, "data": [{"path": "x"}]}}, "tuning": {"method": "lora"}},
            "which lora tuning does not change",
        ),
        ("reward", {"keep": {"ewc": {"coef": 1, "data": [{"path": "x"}]}}}, "by another head"),
        ("dpo", {"keep": {"dropout": 0.1}}, "differ from its reference by chance"),
        ("dpo", {"keep": {"augment": {"word_dropout": 0.1}}}, "uses its rows unchanged"),
        ("grpo", {"keep": {"dropout": 0.1}}, "differ from its reference by chance"),
        ("grpo", {"keep": STOP}, "use 'watch' with 'guard'"),
    ],
)
def test_settings_that_do_not_fit_the_stage_are_refused(kind: str, keys: dict, said: str) -> None:
    from pydantic import TypeAdapter, ValidationError

    from align.recipe.schema import StageSpec

    stage = {"kind": kind, "init": "base"}
    online = {
        "prompts": [{"path": "x"}],
        "steps": 1,
        "rewards": [{"kind": "regex", "pattern": "x"}],
    }
    stage |= online if kind == "grpo" else {"data": [{"path": "x"}]}
    with pytest.raises(ValidationError, match=said):
        TypeAdapter(StageSpec).validate_python(stage | keys)


def test_what_fits_is_taken() -> None:
    watched = {"heldout": [{"path": "y"}], "eval_every": 5, "data": [{"path": "x"}], "init": "base"}
    keep = {"early_stopping": {"metric": "eval/accuracy"}, "dropout": 0.1}
    assert RewardStage.model_validate({"kind": "reward", "keep": keep, **watched})
    assert SftStage.model_validate({"kind": "sft", "keep": {**STOP, "dropout": 0.1}, **watched})
