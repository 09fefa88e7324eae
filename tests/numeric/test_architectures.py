"""Every causal architecture: packed rows, padded rows and the model's own forward are one.

The oracle is transformers' forward with eager attention, one sequence at a time.
"""

import logging
import random
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent))
from architectures import (
    ALONE,
    BEGIN,
    DOCS,
    IDS,
    NARROW,
    POSITIONS,
    REFUSED,
    TYPES,
    all_double,
    measure,
    own_logprobs,
    packed_logprobs,
    tiny_config,
    tiny_model,
)
from online_parts import grpo_spec, ppo_spec

from align.core.errors import ArtifactError, TrainingError
from align.core.types import Completion, PromptRow, TokenRow
from align.models import decoder as decoders
from align.models.attention import PACKED, segments_from_positions
from align.models.classifier import ClassLogits
from align.models.decoder import PACKS, Form, attention_for, form_of, settle_decoder
from align.models.heads import ValueModel
from align.models.loading import check_length, disable_dropout, set_dropout
from align.models.logprobs import LogprobModel
from align.preflight.checks import Finding
from align.preflight.offline import own_forward
from align.preflight.sampling import Probe
from align.recipe.schema import SftStage
from reward_models.scalar import RewardModel

KNOWN = [name for name in TYPES if name not in REFUSED]
FEW = ["llama", "gemma2", "gpt_oss", "granite", "cohere", "opt", "stablelm", "qwen3_next", "mamba"]


@pytest.mark.parametrize("model_type", KNOWN)
def test_packed_logprobs_equal_each_sequence_alone_in_float64(model_type: str) -> None:
    row = measure(model_type)
    assert row.way != "refused", row.note
    assert row.error < (1e-5 if model_type in NARROW else 1e-9)
    assert (row.way == "packed") == (model_type in PACKS or model_type == "gpt-sw3")


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_is_no_causal_model_or_has_another_head_is_refused_by_name(model_type: str) -> None:
    with pytest.raises(ArtifactError, match=r"not a causal language model|not its output head's"):
        form_of(tiny_model(model_type, torch.float32))


def two_draws(model: Any) -> list[torch.Tensor]:
    """Return the log-probabilities under two states of the random generator."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            found.append(packed_logprobs(model))
    return found


@pytest.mark.parametrize("model_type", KNOWN)
def test_with_dropout_off_nothing_is_drawn_while_training(model_type: str) -> None:
    model = tiny_model(model_type, torch.float32)
    disable_dropout(model.train())
    assert torch.equal(*two_draws(model))


def test_a_router_that_samples_routes_as_the_model_does_when_it_is_used() -> None:
    """PhiMoE counts experts as tied within a threshold, which is no noise to set to 0."""
    options = {"router_jitter_noise": 0.3, "input_jitter_noise": 0.3}
    own = tiny_model("phimoe", torch.float32, own=True, **options)
    model = tiny_model("phimoe", torch.float32, **options)
    disable_dropout(model)
    for way in (model.train(), model.eval()):
        first, second = two_draws(way)
        assert torch.equal(first, second)
        with torch.no_grad():
            torch.testing.assert_close(first, own_logprobs(own), atol=1e-4, rtol=0.0)


@pytest.mark.parametrize(
    ("model_type", "option"), [("opt", "layerdrop"), ("mixtral", "router_jitter_noise")]
)
def test_layers_that_drop_out_and_routers_that_jitter_stand_still(model_type, option) -> None:
    model = tiny_model(model_type, torch.float32, **{option: 0.5})
    assert not torch.equal(*two_draws(model.train()))
    disable_dropout(model)
    assert torch.equal(*two_draws(model))


@pytest.mark.parametrize("model_type", FEW)
def test_gradients_are_those_of_the_models_own_forward(model_type: str) -> None:
    weights = torch.linspace(-1.0, 1.0, len(IDS), dtype=torch.float64)
    grads = []
    with all_double():
        for own in (True, False):
            model = tiny_model(model_type, torch.float64, own=own)
            disable_dropout(model.train())
            found = own_logprobs(model) if own else packed_logprobs(model)
            (found * weights).sum().backward()
            grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("model_type", FEW)
def test_float32_is_within_rounding_of_the_models_own_forward(model_type: str) -> None:
    with torch.no_grad():
        own = own_logprobs(tiny_model(model_type, torch.float32, own=True))
        gap = packed_logprobs(tiny_model(model_type, torch.float32)) - own
    assert float(gap.abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("model_type", "extra"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("granite", {"tie_word_embeddings": True, "logits_scaling": 0.5}),
        ("granite", {"tie_word_embeddings": False, "attention_multiplier": 0.4}),
        ("cohere", {"tie_word_embeddings": False, "logit_scale": 3.0, "use_qk_norm": True}),
        ("gemma2", {"tie_word_embeddings": False, "attn_logit_softcapping": 0.7}),
        ("mistral", {"tie_word_embeddings": True, "sliding_window": 2}),
        ("gpt2", {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True}),
        ("falcon", {"alibi": True, "new_decoder_architecture": True}),
        ("opt", {"do_layer_norm_before": False}),
    ],
)
def test_options_of_a_configuration_are_kept(model_type: str, extra: dict[str, Any]) -> None:
    assert measure(model_type, **extra).error < 1e-9


def test_a_model_that_packs_by_type_and_not_by_option_falls_back(monkeypatch, caplog) -> None:
    # ALiBi stands for an option that packed attention does not know.
    monkeypatch.setattr(decoders, "PACKS", PACKS | {"stablelm", "nemotron"})
    decoders._say.cache_clear()
    for model_type in ("stablelm", "nemotron"):
        model = tiny_model(model_type, torch.float32)
        assert model.config._attn_implementation == PACKED
        with torch.no_grad(), caplog.at_level(logging.WARNING):
            gap = packed_logprobs(model) - own_logprobs(tiny_model(model_type, torch.float32))
        assert float(gap.abs().max()) < 1e-4
        assert model.config._attn_implementation == "sdpa"
    assert [r.message.split()[0] for r in caplog.records if "padded rows" in r.message] == [
        "StableLmForCausalLM",
        "NemotronForCausalLM",
    ]


LIMIT = 16
LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
SWITCHING: dict[str, dict[str, Any]] = {
    "phi3": {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": LIMIT},
    "llama": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0},
        "max_position_embeddings": LIMIT,
    },
}


@pytest.mark.parametrize("model_type", SWITCHING)
def test_rows_beyond_a_switch_of_rotary_factors_are_refused(
    model_type: str, tmp_path: Path
) -> None:
    options = SWITCHING[model_type]
    short, longest = list(range(3, 10)), list(range(20, 20 + LIMIT))
    own = tiny_model(model_type, torch.float32, own=True, **options)
    model = tiny_model(model_type, torch.float32, **options)
    scorer = RewardModel(model.model, 32)

    def row(tail: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        both = longest + tail
        positions = [*range(len(both)), *range(len(short))]
        return torch.tensor([both + short]), torch.tensor([positions])

    # Up to the limit a packed row is right.
    with torch.no_grad():
        alone = own(torch.tensor([short])).logits[0]
        expected = alone[:-1].log_softmax(-1).gather(1, torch.tensor(short)[1:, None])[:, 0]
        found = LogprobModel(model)(*row([])).logprobs[0, -len(short) + 1 :]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0.0)
        # One token more, and transformers itself gives the short row other logits beside it.
        batch = torch.tensor([short + [0] * (LIMIT + 1 - len(short)), [*longest, 5]])
        beside = own(batch, attention_mask=(batch != 0).long()).logits[0, : len(short)]
    assert float((alone - beside).abs().max()) > 1e-3
    for run in (LogprobModel(model), ValueModel(scorer)):
        with pytest.raises(TrainingError, match=f"Set max_length to {LIMIT} or less"):
            run(*row([5]))
    model.config.save_pretrained(tmp_path)
    check_length(tmp_path, LIMIT)
    with pytest.raises(ArtifactError, match=f"max_length is {LIMIT + 1}"):
        check_length(tmp_path, LIMIT + 1)


@pytest.mark.parametrize("asked", [True, False])
def test_a_balance_loss_that_is_asked_for_and_not_added_is_said(asked: bool, caplog) -> None:
    decoders._say.cache_clear()
    model = tiny_model("mixtral", torch.float32, output_router_logits=asked)
    with caplog.at_level(logging.WARNING):
        form_of(model)
    assert ("output_router_logits" in caplog.text) is asked


def test_an_attention_option_that_is_not_known_is_refused() -> None:
    from align.models.attention import packed_attention

    q = torch.zeros(1, 2, 3, 4)
    packed_attention(torch.nn.Identity(), q, q, q, None, position_ids=torch.arange(3))
    for option in ({"position_bias": q}, {"is_causal": False}):
        with pytest.raises(TrainingError, match=next(iter(option))):
            packed_attention(torch.nn.Identity(), q, q, q, None, **option)


@pytest.mark.parametrize("model_type", FEW)
def test_values_of_a_packed_row_equal_each_sequence_alone(model_type: str) -> None:
    config = tiny_config(model_type)
    torch.manual_seed(0)
    backbone = AutoModel.from_config(config, attn_implementation=attention_for(config))
    scorer = RewardModel(backbone, 32).eval()
    disable_dropout(scorer)
    settle_decoder(scorer.backbone)
    found = ValueModel(scorer)(torch.tensor([IDS]), torch.tensor([POSITIONS]), behind=True)[0]
    backbone.set_attn_implementation("eager")
    parts = [scorer.head(backbone(torch.tensor([s])).last_hidden_state)[0] for s in ALONE]
    expected = torch.cat([x[5:] if i == 2 else x for i, x in enumerate(parts)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "model_type", ["llama", "gemma2", "gpt2", "opt", "bloom", "mistral", "qwen3", "stablelm"]
)
def test_classes_of_padded_texts_equal_each_text_alone(model_type: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_config(model_type, num_labels=3))
    positions = [p for s in ALONE for p in range(len(s))]
    ids = [t for s in ALONE for t in s]
    with torch.no_grad():
        found = ClassLogits(model.eval())(torch.tensor([ids]), torch.tensor([positions]))
        alone = torch.cat([model(input_ids=torch.tensor([s])).logits for s in ALONE])
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["opt", "gpt_bigcode", "biogpt", "llama"])
def test_keep_dropout_acts_wherever_the_architecture_has_a_place(model_type: str) -> None:
    model = tiny_model(model_type, torch.float32).train()
    disable_dropout(model)
    with torch.no_grad():
        before = packed_logprobs(model)
        set_dropout(model, 0.5)
        assert not torch.allclose(packed_logprobs(model), before)


def test_trying_a_model_out_leaves_it_as_it_was() -> None:
    model = tiny_model("llama", torch.float32).train()
    model.lm_head.eval()
    state = torch.random.get_rng_state()
    form_of(model)
    assert model.training
    assert not model.lm_head.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.config._attn_implementation == PACKED


def test_the_padded_layout_holds_each_sequence_behind_its_prompt() -> None:
    segments = segments_from_positions(torch.tensor(POSITIONS))
    rows = []
    for layout in segments.layouts:
        ids = torch.tensor(IDS)[layout.index].view(layout.num, layout.max_length)
        rows += [row[mask.bool()].tolist() for row, mask in zip(ids, layout.mask, strict=True)]
    assert sorted(rows) == sorted(ALONE)


def test_the_documented_table_names_every_packed_architecture() -> None:
    table = DOCS.read_text(encoding="utf-8").split(BEGIN)[1]
    listed = {line.split("|")[1].strip() for line in table.splitlines() if "| packed |" in line}
    assert listed - {"gpt-sw3"} == PACKS & set(TYPES)


def _own_forward_line(model: Any, dtype: str) -> Finding:
    draw = random.Random(3)
    rows = [TokenRow(tuple(draw.randrange(3, 90) for _ in range(40)), (True,) * 40)] * 2
    rows += [TokenRow(tuple(draw.randrange(3, 90) for _ in range(25)), (True,) * 25)]
    spec = SftStage(kind="sft", init="x", data=[{"path": "x"}], dtype=dtype)
    return own_forward(spec, LogprobModel(model), rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["llama", "granite", "gpt_oss", "stablelm", "qwen3_next"])
def test_the_preflight_line_holds_for_what_is_right(model_type: str, dtype: str) -> None:
    model = tiny_model(model_type, getattr(torch, dtype))
    assert _own_forward_line(model, dtype).verdict == "ok"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_preflight_line_fails_where_logits_lack_their_scale(dtype: str) -> None:
    model = tiny_model("granite", getattr(torch, dtype))
    decoders._forms[model] = Form(packs=True, scale=1.0)
    found = _own_forward_line(model, dtype)
    assert found.verdict == "fail"
    assert "differ from the model's own" in found.remedy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["stablelm", "nemotron"])
def test_the_preflight_line_fails_where_rows_see_each_other(model_type: str, dtype: str) -> None:
    model = tiny_model(model_type, getattr(torch, dtype))
    model.set_attn_implementation(PACKED)
    decoders._forms[model] = Form(packs=True, scale=1.0)
    assert _own_forward_line(model, dtype).verdict == "fail"


class FixedResponses:
    """Stand in for a sampler: 30 fixed tokens to each prompt."""

    name = "fixed"
    version = 0
    cache_dtype = None

    def awake(self) -> Any:
        return nullcontext()

    def generate(self, prompts: Any, *, n: int, **_: Any) -> list[list[Completion]]:
        draw = random.Random(4)
        said = [tuple(draw.randrange(3, 90) for _ in range(30)) for _ in range(n * len(prompts))]
        rows = [Completion(ids, (-1.0,) * 30, "length", "", 0) for ids in said]
        return [rows[i : i + n] for i in range(0, len(rows), n)]


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_an_online_stage_has_the_line_as_well(kind: str) -> None:
    spec = (grpo_spec if kind == "grpo" else ppo_spec)()
    prompts = [PromptRow((5 + i, 40, 7), "", {}) for i in range(6)]
    verdicts = {}
    for right in (True, False):
        model = tiny_model("stablelm", torch.float32)
        if not right:
            model.set_attn_implementation(PACKED)
            decoders._forms[model] = Form(packs=True, scale=1.0)
        probe = Probe(
            spec,
            engine=FixedResponses(),  # type: ignore[arg-type]
            module=LogprobModel(model),
            reference=None,
            prompts=prompts,
            stop_token_ids=(2,),
            seed=0,
        )
        verdicts[right] = dict(probe.checks())["own forward"]().verdict
    assert verdicts == {True: "ok", False: "fail"}
