"""Every kind of training step on a GPU that is not there: what is computed, and where."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "golden"))
sys.path.insert(0, str(Path(__file__).parent))
import architectures
import curves
from architectures import IDS, POSITIONS
from curves import VOCAB, alone, policy_of, save_tiny, sft_curve, tiny_model
from online_parts import LORA, ppo_spec, run_of

from align.core import distributed
from align.core.types import Completion, PromptRow
from align.models.heads import scorer_from
from align.models.idle import in_use, keep_on_cpu, models_in
from align.models.logprobs import token_logprobs
from align.online.scoring import score_answers
from align.sampling import rollout
from align.training import batch, learner
from align.tuning.ewc import anchor_at, fisher_diagonal, scaled
from reward_models.scalar import score_heads
from tests.two_devices import GPU, WrongDevice, two_devices


class PlainEngine(nn.Module):
    """What the learner uses of DeepSpeed's engine, whose own code places its tensors itself."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.module, self.optimizer = module.to(distributed.device()), optimizer
        self.clip_fp32_gradients: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, **_: Any) -> None:
        loss.backward()

    def step(self) -> None:
        self.clip_fp32_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def get_global_grad_norm(self) -> None:
        return None


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with alone.world_of_one():
        yield save_tiny(tiny_model(1, tied=True), tmp_path_factory.mktemp("policy"))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of each curve, by an engine that leaves tensors where they are."""
    monkeypatch.setattr(curves, "STEPS", 2)

    def initialize(*, model: nn.Module, optimizer: Any, **_: Any) -> tuple[Any, Any, None, None]:
        return PlainEngine(model, optimizer), optimizer, None, None

    monkeypatch.setattr(learner.deepspeed, "initialize", initialize)


@pytest.mark.parametrize("name", curves.CURVES)
def test_a_step_on_a_gpu_is_that_of_the_record(model_dir: Path, name: str) -> None:
    with two_devices():
        found = curves.CURVES[name](model_dir)
    for key, values in curves.recorded(name).items():
        # The branches for GPUs round otherwise.
        assert found[key] == pytest.approx(values[:2], rel=1e-3), key


def test_lora_and_an_anchor_train_on_a_gpu(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def anchored(folder: Path) -> Any:
        found = policy_of(folder, LORA)
        ids, at = (torch.tensor([x], device=distributed.device()) for x in (IDS, POSITIONS))
        rows = [(ids % VOCAB, at)]
        fisher = fisher_diagonal(found.module, rows, lambda m, row: m(*row).logprobs.sum())
        found.anchor = anchor_at(found.module, scaled(fisher, cap=2.0), coef=0.5)
        return found

    monkeypatch.setattr(curves, "policy_of", anchored)
    expected = sft_curve(model_dir)
    with two_devices():
        found = sft_curve(model_dir)
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-4), key


# Sliding windows, sinks and soft-capped scores, partial rotary, multi-query, recurrent layers.
@pytest.mark.parametrize(
    "model_type", ["llama", "gemma2", "gpt_oss", "gemma3_text", "granite", "opt", "qwen3_next"]
)
def test_packed_rows_on_a_gpu_are_those_of_the_cpu(model_type: str) -> None:
    model = architectures.tiny_model(model_type, torch.float32)
    ids, at = torch.tensor([IDS]), torch.tensor([POSITIONS])
    expected = token_logprobs(model, ids, position_ids=at).logprobs
    with two_devices():
        model = model.to(GPU)
        found = token_logprobs(model, ids.to(GPU), position_ids=at.to(GPU)).logprobs
        found.sum().backward()
        assert found.device == GPU
        found = found.detach().cpu()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_a_reference_in_cpu_memory_changes_no_bit(
    model_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[nn.Module] = []

    def kept(folder: Path) -> Any:
        reference = curves_reference(folder).requires_grad_(False).to(GPU)
        assert keep_on_cpu(reference)
        made.append(reference)
        return reference

    curves_reference = curves.reference_of
    with two_devices():
        expected = curves.CURVES[name](model_dir)
        monkeypatch.setattr(curves, "reference_of", kept)
        found = curves.CURVES[name](model_dir)
        assert {p.device for p in made[0].parameters()} == {torch.device("cpu")}
    assert found == expected


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_optimizer_states_in_cpu_memory_between_steps_change_no_bit(
    model_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    step = learner.Learner.step

    def parked(self: Any, *args: Any) -> Any:
        with self.optimizer_on_cpu():
            moments = [x for s in self._optimizer.state.values() for x in s.values() if x.dim()]
            seen.append(sum(x.untyped_storage().nbytes() for x in moments))
            if moments:
                assert {x.device for x in moments} == {GPU}
                with pytest.raises(WrongDevice, match="given back"):
                    moments[0].add(1)
        return step(self, *args)

    with two_devices():
        expected = curves.CURVES[name](model_dir)
        monkeypatch.setattr(learner.Learner, "step", parked)
        found = curves.CURVES[name](model_dir)
    assert found == expected
    assert len(seen) >= 2
    assert not any(seen)


@pytest.mark.parametrize("idle", [False, True])
def test_states_are_away_exactly_while_the_engine_is_awake(model_dir: Path, idle: bool) -> None:
    seen: list[list[bool]] = []

    class Engine:
        @contextmanager
        def awake(self) -> Iterator[None]:
            look()
            yield
            look()

    def look() -> None:
        """Note for policy and critic whether their moments have memory."""
        seen.append(
            [
                all(x.untyped_storage().nbytes() for s in states(made) for x in s.values())
                for made in (policy, critic)
            ]
        )

    def states(made: Any) -> list[dict[str, Tensor]]:
        found = list(made._optimizer.state.values())
        assert found
        return found

    with two_devices():
        policy, critic = policy_of(model_dir), curves.critic_of(model_dir)
        for made in (policy, critic):
            sum(p.sum() for p in made.module.parameters()).backward()
            made._optimizer.step()
        run = run_of(ppo_spec(offload_idle=idle), policy, critic=critic, engine=Engine())
        look()
        with run.awake():
            look()
        look()
    here, away = [True, True], [not idle, not idle]
    assert seen == [here, away, away, away, here]


def test_optimizer_states_of_the_cpu_stay(model_dir: Path) -> None:
    made = policy_of(model_dir)
    optimizer = torch.optim.AdamW(made.module.parameters())
    made._optimizer = optimizer
    sum(p.sum() for p in made.module.parameters()).backward()
    optimizer.step()
    with made.optimizer_on_cpu():
        assert all(
            x.untyped_storage().nbytes() for s in optimizer.state.values() for x in s.values()
        )


def test_an_idle_model_is_on_the_gpu_only_while_it_is_used(model_dir: Path) -> None:
    torch.manual_seed(4)
    scorer = scorer_from(model_dir, dtype="float32").eval().requires_grad_(False)
    before = [x.clone() for x in (*scorer.parameters(), *scorer.buffers())]
    reward = SimpleNamespace(members=[SimpleNamespace(model=scorer), SimpleNamespace()])

    def devices() -> set[torch.device]:
        return {x.device for x in (*scorer.parameters(), *scorer.buffers())}

    with two_devices():
        assert not keep_on_cpu(scorer)  # it is there
        expected = score_heads(scorer.to(GPU), [[3, 4, 5]], micro_tokens=6)
        assert keep_on_cpu(scorer)
        assert devices() == {torch.device("cpu")}
        for _ in range(2):
            with in_use(*models_in(reward), None):
                assert devices() == {GPU}
                assert score_heads(scorer, [[3, 4, 5]], micro_tokens=6) == expected
            assert devices() == {torch.device("cpu")}
        with pytest.raises(KeyError), in_use(scorer):
            raise KeyError
        assert devices() == {torch.device("cpu")}
        after = (*scorer.parameters(), *scorer.buffers())
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_rewards_are_scored_while_their_models_are_in_use(model_dir: Path) -> None:
    scorer = scorer_from(model_dir, dtype="float32").eval().requires_grad_(False)
    seen: list[torch.device] = []

    class Reward:
        name, weight, model = "r", 1.0, scorer

        def __call__(self, *, completions: list[str], **_: Any) -> list[float]:
            seen.append(scorer.head.weight.device)
            return [1.0 for _ in completions]

    with two_devices():
        scorer.to(GPU)
        assert keep_on_cpu(scorer)
        said = Completion((3, 4), (-1.0, -1.0), "stop", "a", 0)
        found = score_answers([PromptRow((5,), "p", {})], [said], [Reward()])  # type: ignore[list-item]
        assert scorer.head.weight.device.type == "cpu"
    assert (found.total, seen) == ([1.0], [GPU])


def test_responses_are_scored_on_a_gpu(model_dir: Path) -> None:
    torch.manual_seed(4)
    scorer = scorer_from(model_dir, dtype="float32").eval()
    rows = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
    expected = [one for (one,) in score_heads(scorer, rows, micro_tokens=6)]
    with two_devices():
        found = [one for (one,) in score_heads(scorer.to(GPU), rows, micro_tokens=6)]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", curves.CURVES)
def test_a_batch_that_stays_on_the_cpu_is_found(
    model_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stays = SimpleNamespace(device=lambda: torch.device("cpu"))
    for module in (batch, rollout):
        monkeypatch.setattr(module, "distributed", stays)
    with two_devices(), pytest.raises(WrongDevice):
        curves.CURVES[name](model_dir)
