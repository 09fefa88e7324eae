"""GSPO, CISPO, importance by answer and corrected KL: definitions, enumeration and TRL's code."""

import math
import sys
from collections import defaultdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from test_normalizer import gradient

from align.core.types import TokenRow
from align.losses.kl import corrected_kl
from align.losses.policy import cispo_policy_loss, gspo_policy_loss, importance_weights
from align.online.algorithms import build_algorithm
from align.online.objective import policy_loss, reduce_policy_loss
from align.recipe.schema import GrpoStage
from align.training.batch import PackedBatch, pack

NAN = float("nan")
token = st.tuples(st.floats(-3, 0), st.floats(-3, 0), st.booleans())
answers = st.lists(
    st.tuples(st.lists(token, min_size=1, max_size=5), st.floats(-2, 2)), min_size=1, max_size=4
)


def grpo_stage(**options):
    return GrpoStage(
        kind="grpo",
        init="x",
        prompts=[{"path": "x"}],
        steps=1,
        prompts_per_step=1,
        rewards=[{"kind": "regex", "pattern": "x"}],
        sampling={"max_new_tokens": 6},
        **options,
    )


def row_of(answers):
    """Lay answers end to end: logprobs, old, advantages, mask, segment ids; NaN under the mask."""
    flat = [(new, old, a, keep, i) for i, (ts, a) in enumerate(answers) for new, old, keep in ts]
    new, old, advantages, keep, ids = zip(*flat, strict=True)

    def column(values):
        shown = [v if k else NAN for v, k in zip(values, keep, strict=True)]
        return torch.tensor(shown, dtype=torch.float64)

    mask = torch.tensor(keep)
    return column(new), column(old), column(advantages), mask, torch.tensor(ids)


def bounded(x, low, high):
    return min(max(x, 1 - low), 1 + high)


@given(answers)
def test_gspo_equals_the_definition(answers):
    *columns, ids = row_of(answers)
    got = gspo_policy_loss(
        *columns, segment_ids=ids, num_segments=len(answers), clip_low=0.1, clip_high=0.2
    )
    at = 0
    for tokens, advantage in answers:
        kept = [new - old for new, old, keep in tokens if keep]
        s = math.exp(math.fsum(kept) / len(kept)) if kept else 1.0
        loss = -min(s * advantage, bounded(s, 0.1, 0.2) * advantage)
        for _, _, keep in tokens:
            assert got.loss[at].item() == pytest.approx(loss if keep else 0.0, abs=1e-9)
            assert got.ratio[at].item() == pytest.approx(s if keep else 1.0)
            at += 1


def test_gspo_gradient_by_hand():
    # Three tokens, s = exp((0.3 + 0 - 0.3) / 3) = 1, A = 2: each token's gradient is -s A / 3.
    old = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
    new = (old + torch.tensor([0.3, 0.0, -0.3])).requires_grad_()
    mask, ids = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.long)
    options = {"segment_ids": ids, "num_segments": 1, "clip_low": 3e-4, "clip_high": 4e-4}
    advantages = torch.full((3,), 2.0, dtype=torch.float64)
    gspo_policy_loss(new, old, advantages, mask, **options).loss.mean().backward()
    assert new.grad.tolist() == pytest.approx([-2 / 3] * 3)
    # Every token's own ratio but one lies outside the bounds: only the mean counts. One nat more
    # on the first token, and the clip holds for all of them.
    risen = (old + torch.tensor([1.3, 0.0, -0.3])).requires_grad_()
    out = gspo_policy_loss(risen, old, advantages, mask, **options)
    out.loss.mean().backward()
    assert out.loss.tolist() == pytest.approx([-2 * 1.0004] * 3)
    assert risen.grad.tolist() == [0.0] * 3
    assert out.clipped.all()


@given(answers)
def test_cispo_equals_the_definition(answers):
    new, old, advantages, mask, _ = row_of(answers)
    new.requires_grad_()
    out = cispo_policy_loss(new, old, advantages, mask, clip_low=1.0, clip_high=0.5)
    out.loss.sum().backward()
    flat = [(t, a) for tokens, a in answers for t in tokens]
    for i, ((n, o, keep), a) in enumerate(flat):
        weight = min(math.exp(n - o), 1.5)
        assert out.loss[i].item() == pytest.approx(-weight * a * n if keep else 0.0, abs=1e-9)
        # The weight is a constant: a bounded token keeps its gradient.
        assert new.grad[i].item() == pytest.approx(-weight * a if keep else 0.0, abs=1e-9)
        assert out.clipped[i].item() == (keep and math.exp(n - o) > 1.5)


# Two answers of 2 and 3 trained tokens with trainer / sampler ratios (4, 1/2), product 2, mean
# sqrt 2; and (1/2, 1/2, 1/2), product 1/8, mean 1/2. The last token is masked.
RATIOS = [4.0, 0.5, 0.5, 0.5, 0.5]
LEVELS = [
    ("sequence", "truncate", {"cap": 1.5}, [1.5, 1.5, 0.125, 0.125, 0.125]),
    ("sequence", "mask", {"cap": 3.0}, [2.0, 2.0, 0.0, 0.0, 0.0]),
    ("sequence", "mask", {"cap": 3.0, "floor": 0.1}, [2.0, 2.0, 0.125, 0.125, 0.125]),
    ("geometric", "truncate", {"cap": 1.2}, [1.2, 1.2, 0.5, 0.5, 0.5]),
    ("geometric", "mask", {"cap": 1.9}, [2**0.5, 2**0.5, 0.0, 0.0, 0.0]),
    ("token", "mask", {"cap": 5.0, "floor": 0.6}, [4.0, 0.0, 0.0, 0.0, 0.0]),
]


@pytest.mark.parametrize(("level", "mode", "bounds", "expected"), LEVELS)
@pytest.mark.parametrize("batched", [False, True])
def test_importance_by_answer_by_hand(level, mode, bounds, expected, batched):
    old = torch.tensor([*RATIOS, NAN]).log()
    sampler = torch.zeros(6)
    mask = torch.tensor([True] * 5 + [False])
    if batched:
        old, sampler, mask = (x.unsqueeze(0) for x in (old, sampler, mask))
    weights = importance_weights(
        old,
        sampler,
        mask,
        mode=mode,
        level=level,
        **bounds,
        segment_ids=torch.tensor([0, 0, 1, 1, 1, 1]),
        num_segments=2,
    )
    assert weights.flatten().tolist() == pytest.approx([*expected, 0.0])


def test_importance_product_over_answers_turns_the_samplers_mean_into_the_trainers():
    # All nine answers of two tokens, each token drawn alone from three.
    trainer = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    sampler = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    pairs = [(a, b) for a in range(3) for b in range(3)]
    flat = torch.tensor(pairs).flatten()
    weights = importance_weights(
        trainer.log()[flat],
        sampler.log()[flat],
        torch.ones(18, dtype=torch.bool),
        mode="truncate",
        cap=100.0,
        level="sequence",
        segment_ids=torch.arange(9).repeat_interleave(2),
        num_segments=9,
    )
    value = [3.0 * a - b * b for a, b in pairs]
    expected = sum(trainer[a] * trainer[b] * v for (a, b), v in zip(pairs, value, strict=True))
    found = sum(
        sampler[a] * sampler[b] * weights[2 * i] * value[i] for i, (a, b) in enumerate(pairs)
    )
    assert float(found) == pytest.approx(float(expected))


@given(st.tuples(*[st.floats(-3, 3)] * 3), st.tuples(*[st.floats(-3, 3)] * 3))
def test_corrected_kl_off_policy_has_value_and_gradient_of_the_divergence(logits, old_logits):
    theta = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    logprobs, ref = theta.log_softmax(0), torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    old = torch.tensor(old_logits, dtype=torch.float64).log_softmax(0)
    exact = (logprobs.exp() * (logprobs - ref)).sum()
    sampled = (old.exp() * corrected_kl(logprobs, old, ref)).sum()
    torch.testing.assert_close(sampled, exact, atol=1e-9, rtol=1e-9)
    (got,), (expected,) = (
        torch.autograd.grad(x, theta, retain_graph=True) for x in (sampled, exact)
    )
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


# TRL's loss_type and importance level, and ours.
TRL = [
    ("grpo", "token", {"aggregation": "sequence"}),
    ("dapo", "token", {"clip": {"low": 0.2, "high": 0.28}}),
    ("bnpo", "token", {}),
    ("dr_grpo", "token", {"algorithm": "dr_grpo"}),
    ("grpo", "sequence", {"algorithm": "gspo", "clip": {"low": 0.1, "high": 0.1}}),
    ("luspo", "token", {"aggregation": "sequence_sum"}),
    ("cispo", "token", {"algorithm": "cispo", "clip": {"low": 1.0, "high": 0.5}}),
]


@pytest.mark.parametrize(("loss_type", "level", "options"), TRL)
@pytest.mark.parametrize("kl", [None, "plain", "corrected"])
def test_policy_objectives_equal_trl(loss_type, level, options, kl):
    trl = pytest.importorskip("trl", reason="TRL is the oracle of this test")
    beta = 0.1 if kl and level == "token" else 0.0  # TRL's correction is per answer at that level
    spec = grpo_stage(
        kl={"coef": beta, "place": "loss", "estimator": "k3", "corrected": kl == "corrected"},
        **options,
    )
    generator = torch.Generator().manual_seed(4)
    rows, width = 4, 6
    lengths = torch.tensor([6, 2, 1, 4])
    mask = torch.arange(width) < lengths[:, None]
    new, old, ref = -2 * torch.rand(3, rows, width, generator=generator).double()
    advantages = torch.tensor([1.0, -0.5, 0.7, -2.0], dtype=torch.float64)
    theirs_in = new.clone().requires_grad_()
    state = SimpleNamespace(
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, **_: x, num_processes=1),
        model=SimpleNamespace(training=True),
        _metrics=defaultdict(lambda: defaultdict(list)),
        args=SimpleNamespace(use_bias_correction_kl=kl == "corrected", delta=None),
        beta=beta,
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_low=spec.clip.low,
        use_vllm=False,
        aux_loss_enabled=False,
        epsilon_high=1 + spec.clip.high if loss_type == "cispo" else spec.clip.high,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        max_completion_length=width,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *a, **k: (theirs_in, new * 0 + 1, None),
    )
    state.args.steps_per_generation = 1
    theirs = trl.GRPOTrainer._compute_loss(
        state,
        None,
        {
            "prompt_ids": torch.zeros(rows, 1),
            "prompt_mask": torch.ones(rows, 1),
            "completion_ids": torch.zeros(rows, width),
            "completion_mask": mask.long(),
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
            "num_items_in_batch": mask.sum(),
        },
    )
    theirs.backward()
    ours_in = new.clone().requires_grad_()
    flat = {n: x[mask].unsqueeze(0) for n, x in {"new": ours_in, "old": old, "ref": ref}.items()}
    ids = torch.arange(rows).repeat_interleave(lengths)
    ones = torch.ones(1, len(ids), dtype=torch.bool)
    batch = PackedBatch(
        input_ids=ones.long(),
        position_ids=ones.long(),
        mask=ones,
        segment_ids=ids,
        num=rows,
        counts={"tokens": float(len(ids)), "answers": float(rows)},
        per_token={"advantages": advantages[ids].unsqueeze(0)},
    )
    loss = policy_loss(
        flat["new"],
        flat["old"],
        batch,
        objective=spec.objective,
        clip={"clip_low": spec.clip.low, "clip_high": spec.clip.high},
    ).loss
    if beta:
        x = flat["new"] - flat["ref"]
        k3 = torch.exp(-x) - 1 + x
        loss = loss + beta * (
            corrected_kl(flat["new"], flat["old"], flat["ref"]) if kl == "corrected" else k3
        )
    ours = reduce_policy_loss(
        loss, batch, aggregation=spec.aggregation, max_tokens=spec.sampling.max_new_tokens
    )
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, atol=1e-12, rtol=1e-9)


REDUCED = [
    {"aggregation": "token"},
    {"aggregation": "sequence"},
    {"aggregation": "constant"},
    {"aggregation": "sequence_sum"},
    {"algorithm": "gspo", "clip": {"low": 0.1, "high": 0.1}},
    {"algorithm": "cispo"},
    {"importance": {"level": "geometric", "mode": "mask", "cap": 1.3}},
]
ROWS = [((3, 5), 3), ((3, 5), 1), ((4,), 4), ((4,), 2), ((9, 2, 6), 5)]


@settings(max_examples=6)
@given(st.permutations(range(len(ROWS))), st.sets(st.integers(1, len(ROWS) - 1)))
@pytest.mark.parametrize("options", REDUCED, ids=str)
def test_policy_gradient_is_the_same_for_every_split_into_micro_batches(options, order, cuts):
    """Micro-batches, padding rows of an idle rank, packing and order: one gradient."""
    spec = grpo_stage(**options)
    draw = torch.Generator().manual_seed(1)
    rows, tokens = [], []
    for prompt, n in ROWS:
        ids = (*prompt, *torch.randint(1, 11, (n,), generator=draw).tolist())
        rows.append(TokenRow(ids, tuple(t >= len(prompt) for t in range(len(ids)))))
        shape = (2, len(ids))
        tokens.append((-2 * torch.rand(shape, generator=draw)).tolist())
    counts = {"tokens": float(sum(n for _, n in ROWS)), "answers": float(len(ROWS))}

    def packed(part):
        per_token = {
            "old_logprobs": [tokens[i][0] for i in part],
            "rollout_logprobs": [tokens[i][1] for i in part],
            "advantages": [[i - 1.5] * len(rows[i].input_ids) for i in part],
        }
        return pack([rows[i] for i in part], counts=counts, per_token=per_token)

    loss_fn = partial(build_algorithm(spec).policy_objective, kl_coef=0.0)
    whole = gradient([packed(range(len(ROWS)))], loss_fn)
    edges = [0, *sorted(cuts), len(ROWS)]
    parts = [packed(order[a:b]) for a, b in pairwise(edges)]
    found = gradient([*parts, packed([])], loss_fn)
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=1e-5)
