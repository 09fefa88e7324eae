"""The learned scorer: batch invariance, its files, the rendering, TRL's call convention."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, Olmo2Config, PreTrainedTokenizerFast

from align.core.types import Example
from align.data.render.chat import ChatFormat
from align.models.loading import stop_token_ids
from reward_models import build_reward
from reward_models.learned import ScalarReward
from reward_models.process import ProcessReward
from reward_models.scalar import RewardModel, ScalarHead, score_heads, score_token_ids

sys.path.insert(0, str(Path(__file__).parent))
from small_tokenizers import byte_tokenizer

WORDS = ["<pad>", "<eos>", "user", "assistant", "\n", "hi", "yes", "no", "a", "b"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}"
    "{% if m['role'] == 'assistant' %}{{ '<eos> \n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _model(*, seed: int = 0, dropout: float = 0.0) -> RewardModel:
    torch.manual_seed(seed)
    # Not Qwen2: AutoTokenizer replaces any tokenizer beside a Qwen2 config by Qwen2's own rules.
    config = Olmo2Config(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        max_position_embeddings=128,
        attention_dropout=dropout,
    )
    return RewardModel(AutoModel.from_config(config), 32)


ROWS = [[5, 6, 1], [8, 9, 8, 9, 5, 7, 1], [5, 1], [0, 0, 5, 0, 1, 0], [9] * 40 + [1], [5, 6, 1]]


def _alone(model: RewardModel, row: list[int]) -> float:
    """Score one row without a mask, padding or batching: the definition."""
    model.eval()
    with torch.no_grad():
        return float(model(torch.tensor([row]))[0, -1])


@pytest.mark.parametrize("micro_tokens", [1, 14, 50, 10_000])
def test_score_does_not_depend_on_padding_or_batch(micro_tokens: int):
    # Rows with the pad id 0 inside and at the end: the position comes from lengths, not from ids.
    model = _model()
    expected = [_alone(model, row) for row in ROWS]
    scores = score_token_ids(model, ROWS, micro_tokens=micro_tokens)
    assert scores == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 4) for score in scores}) == len(ROWS) - 1


def test_packed_row_has_the_values_of_its_parts():
    model = _model().eval()
    packed = torch.tensor([ROWS[0] + ROWS[1]])
    positions = torch.tensor([[*range(3), *range(7)]])
    with torch.no_grad():
        values = model(packed, position_ids=positions)[0]
    assert float(values[2]) == pytest.approx(_alone(model, ROWS[0]), abs=1e-5)
    assert float(values[-1]) == pytest.approx(_alone(model, ROWS[1]), abs=1e-5)


def test_scoring_switches_dropout_off_and_puts_the_mode_back():
    model = _model(dropout=0.9)
    expected = [_alone(model, row) for row in ROWS]
    model.train()
    assert score_token_ids(model, ROWS) == pytest.approx(expected, abs=1e-5)
    assert model.training


def test_head_starts_with_std_one_over_root_of_width_plus_one():
    # 99,999 draws: the standard error of the sample std is std / sqrt(2 n) = 0.0022 std.
    weight = ScalarHead(99_999, generator=torch.Generator().manual_seed(0)).weight
    assert float(weight.detach().std()) * 100_000**0.5 == pytest.approx(1.0, abs=0.01)
    assert float(weight.detach().mean()) * 100_000**0.5 == pytest.approx(0.0, abs=0.02)


def test_head_computes_in_float32_with_bfloat16_weights():
    # 256 ones and one 1/2: the sum 256.5 is not a bfloat16 number.
    head = ScalarHead(257).bfloat16()
    torch.nn.init.ones_(head.weight)
    hidden = torch.ones(1, 1, 257, dtype=torch.bfloat16)
    hidden[..., 0] = 0.5
    value = head(hidden)
    assert value.dtype == torch.float32
    assert value.item() == 256.5


def test_saved_scorer_scores_the_same(tmp_path: Path):
    model = _model()
    model.set_normalization(mean=0.1, std=2.5)
    expected = score_token_ids(model, ROWS)
    model.save(tmp_path, tokenizer=_tokenizer(), extra={"pairs": 7})
    names = {"model.safetensors", "config.json", "scorer.json", "tokenizer.json"}
    assert names <= {path.name for path in tmp_path.iterdir()}
    again = RewardModel.load(tmp_path)
    assert score_token_ids(again, ROWS) == expected
    assert (float(again.mean), float(again.std)) == (pytest.approx(0.1), 2.5)
    assert not again.training
    half = RewardModel.load(tmp_path, torch.bfloat16)
    assert half.head.weight.dtype == torch.bfloat16
    assert half.backbone.rotary_emb.inv_freq.dtype == torch.float32
    assert score_token_ids(half, ROWS) == pytest.approx(expected, abs=0.1)


def test_normalization_is_not_rounded_by_a_cast_of_the_module():
    model = _model().bfloat16()
    model.set_normalization(mean=1.001, std=3.003)
    assert float(model.mean) == pytest.approx(1.001, abs=1e-6)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_normalization_refuses_what_cannot_divide(mean: float, std: float):
    with pytest.raises(ValueError, match="finite numbers"):
        _model().set_normalization(mean=mean, std=std)


def test_loading_names_the_missing_file_and_the_misfit(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no scorer\.json"):
        RewardModel.load(tmp_path)
    model = _model()
    weights = model.state_dict()
    del weights["head.weight"]
    model.save(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"head\.weight"):
        RewardModel.load(tmp_path)


def _reward(tmp_path: Path, *, normalize: bool = True) -> tuple[RewardModel, ScalarReward]:
    model = _model()
    model.set_normalization(mean=0.5, std=2.0)
    model.save(tmp_path, tokenizer=_tokenizer())
    spec = {"kind": "scalar", "model": str(tmp_path), "normalize": normalize}
    return model, build_reward(spec)


def test_reward_scores_the_given_token_ids_and_normalizes(tmp_path: Path):
    model, reward = _reward(tmp_path)
    ids = {"prompt_ids": [[5], [8, 9]], "completion_ids": [[6, 1], [7]]}
    scores = reward(prompts=["x", "y"], completions=["x", "y"], **ids)
    raw = [_alone(model, [5, 6, 1]), _alone(model, [8, 9, 7])]
    assert scores == pytest.approx([(r - 0.5) / 2.0 for r in raw], abs=1e-5)
    reward.normalize = False
    assert reward(prompts=["x", "y"], completions=["x", "y"], **ids) == pytest.approx(raw, abs=1e-5)


def test_reward_renders_text_and_conversations_with_one_stop_token(tmp_path: Path):
    model, reward = _reward(tmp_path, normalize=False)
    user = [{"role": "user", "content": "hi"}]
    said = [{"role": "assistant", "content": "yes"}]
    # Words: user=2 assistant=3 hi=5 yes=6 <eos>=1; the template's newline after <eos> is left out.
    plain, turns = [5, 6, 1], [2, 5, 3, 6, 1]
    # completion_ids alone is what TRL passes: they are the policy's, not this scorer's.
    scores = reward(
        prompts=["hi", "hi", user],
        completions=["yes", "yes <eos>", said],
        completion_ids=[[9], [9], [9]],
        trainer_state=object(),
    )
    expected = [_alone(model, plain), _alone(model, plain), _alone(model, turns)]
    assert scores == pytest.approx(expected, abs=1e-5)


def test_rendering_equals_what_training_sees(tmp_path: Path):
    from align.core.types import Example
    from align.data.render.chat import ChatFormat

    _, reward = _reward(tmp_path)
    user = [{"role": "user", "content": "hi a"}]
    said = [{"role": "assistant", "content": "yes b"}]
    for prompt, completion in ((user, said), ("hi a", "yes b")):
        row = ChatFormat(_tokenizer()).sft_row(Example(prompt=prompt, completion=completion))
        last = max(t for t, trained in enumerate(row.trained) if trained)
        assert reward._render(prompt, completion) == list(row.input_ids[: last + 1])


def test_token_ids_of_another_vocabulary_are_refused(tmp_path: Path):
    _, reward = _reward(tmp_path)
    assert reward.shares_vocabulary(_tokenizer())
    with pytest.raises(ValueError, match="another tokenizer"):
        reward(prompts=["x"], completions=["x"], prompt_ids=[[5]], completion_ids=[[10]])


def test_token_ids_of_another_vocabulary_are_not_read_but_the_texts(tmp_path: Path):
    _, reward = _reward(tmp_path)
    given = {"prompts": ["hi", "a"], "completions": ["yes", "no"]}
    ids = {"prompt_ids": [[9], [9]], "completion_ids": [[8, 1], [8, 1]]}
    by_text, by_ids = reward(**given), reward(**given, **ids)
    assert by_text != pytest.approx(by_ids, abs=1e-3)
    reward.meet(_tokenizer())
    assert reward(**given, **ids) == by_ids
    other = _tokenizer()
    other.add_tokens(["more"])
    reward.meet(other)
    assert reward(**given, **ids) == by_text
    process = ProcessReward(reward, separator="\n")
    process.meet(_tokenizer())
    with pytest.raises(ValueError, match="its tokenizer differs"):
        process.meet(other)


def test_made_up_answers_of_the_preflight_are_scored_as_texts(tmp_path: Path):
    from align.core.types import PromptRow
    from align.preflight.rewards import FORMS, self_test
    from reward_models.specs import ScalarSpec as Spec

    _, reward = _reward(tmp_path)
    right, wrong = ["yes", "no", "a", "b"], ["no", "yes", "yes", "yes"]  # another row's value
    rows = [PromptRow((5,), "hi", {"reference": value}) for value in right]
    above = []
    for before, after in FORMS:
        sides = [[f"{before}{value}{after}" for value in side] for side in (right, wrong)]
        scores = [reward(prompts=["hi"] * 4, completions=side) for side in sides]
        above.append(sum(a > b for a, b in zip(*scores, strict=True)))
    assert max(above) > 0
    found = self_test(Spec(kind="scalar", model="x"), reward, prompts=rows, answers=None)
    assert found.value.startswith(f"right above wrong in {max(above)} of 4")


def test_score_that_is_not_finite_is_invalid(tmp_path: Path):
    _, reward = _reward(tmp_path)
    with torch.no_grad():
        reward.model.head.weight.fill_(float("nan"))
    assert reward(prompts=["hi"], completions=["yes"]) == [None]
    assert reward.invalid == {"score is not finite": 1}


def _two_heads(tmp_path: Path) -> tuple[RewardModel, list[list[float]]]:
    """Save a scorer whose second head is the first negated; give the raw scores of [5, 6, 1]."""
    one = _model()
    both = RewardModel(one.backbone, 32, num_heads=2)
    with torch.no_grad():
        both.head.weight.copy_(torch.cat([one.head.weight, -one.head.weight]))
    both.set_normalization(mean=[0.5, -0.5], std=[2.0, 4.0])
    both.save(tmp_path, tokenizer=_tokenizer())
    raw = _alone(one, [5, 6, 1])
    return both, [[raw, -raw]]


@pytest.mark.parametrize("combine", ["mean", "min", "mean_minus_std"])
def test_heads_are_normalized_one_by_one_and_combined(tmp_path: Path, combine: str):
    both, raw = _two_heads(tmp_path)
    assert score_heads(both, [[5, 6, 1]])[0] == pytest.approx(raw[0], abs=1e-5)
    a, b = (raw[0][0] - 0.5) / 2.0, (raw[0][1] + 0.5) / 4.0
    std = abs(a - b) / 2.0  # of two numbers
    expected = {"mean": (a + b) / 2, "min": min(a, b), "mean_minus_std": (a + b) / 2 - 2.0 * std}
    reward = build_reward(
        {"kind": "scalar", "model": str(tmp_path), "combine": combine, "kappa": 2.0}
    )
    ids = {"prompt_ids": [[5]], "completion_ids": [[6, 1]]}
    found = reward(prompts=["x"], completions=["x"], **ids)
    assert found == pytest.approx([expected[combine]], abs=1e-5)
    assert reward.disagreement == pytest.approx(std, abs=1e-5)


def test_combine_on_one_head_is_refused(tmp_path: Path):
    _reward(tmp_path)
    with pytest.raises(ValueError, match="no effect on a scorer with one head"):
        build_reward({"kind": "scalar", "model": str(tmp_path), "combine": "min"})


@pytest.mark.parametrize("kind", ["scalar", "process"])
def test_reward_in_bfloat16_differs_from_float32_by_rounding_alone(tmp_path: Path, kind: str):
    model = _model()
    model.extra = {"supervision": "steps", "step_separator": "a"} if kind == "process" else {}
    model.save(tmp_path, tokenizer=_tokenizer())
    ids = {"prompt_ids": [[5]], "completion_ids": [[6, 8, 7, 1]]}
    found = []
    for dtype in ("float32", "bfloat16"):
        reward = build_reward({"kind": kind, "model": str(tmp_path), "dtype": dtype})
        found += reward(prompts=["hi"], completions=["yes a no"], **ids)
    # bfloat16 keeps 8 bits of each of the sums, so the two are close but not the same.
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], abs=0.1)


def test_process_reward_reads_the_values_at_step_ends(tmp_path: Path):
    model = _model()
    model.extra = {"supervision": "steps", "step_separator": "a"}
    model.save(tmp_path, tokenizer=_tokenizer())
    reward = build_reward({"kind": "process", "model": str(tmp_path), "aggregate": "product"})
    # Words a=8 <eos>=1: the answer 6 8 7 1 has the steps [6 8] and [7 1].
    ids = {"prompt_ids": [[5]], "completion_ids": [[6, 8, 7, 1]]}
    found = reward(prompts=["hi"], completions=["yes a no"], **ids)
    values = [_alone(model, [5, 6, 8]), _alone(model, [5, 6, 8, 7, 1])]
    first, second = (torch.sigmoid(torch.tensor(v)).item() for v in values)
    assert found == pytest.approx([first * second], abs=1e-5)
    assert reward.token_rewards[0] == pytest.approx(
        [0.0, first, 0.0, first * second - first], abs=1e-5
    )
    # The same from text alone: words are separated by spaces, the template is not used.
    assert reward(prompts=["hi"], completions=["yes a no"]) == pytest.approx(found, abs=1e-5)
    with pytest.raises(ValueError, match="Use kind: process"):
        build_reward({"kind": "scalar", "model": str(tmp_path)})


def test_process_reward_of_a_solution_beyond_the_positions_is_invalid(tmp_path: Path):
    model = _model()
    model.extra = {"supervision": "steps", "step_separator": "a"}
    model.save(tmp_path, tokenizer=_tokenizer())
    reward = build_reward({"kind": "process", "model": str(tmp_path)})
    head, fits, long = [2, 5], [5, 8, 1], [5] * 127  # 2 + 127 tokens for 128 positions
    ids = {"prompt_ids": [head] * 3, "completion_ids": [fits, long, fits]}
    scores = reward(prompts=["x"] * 3, completions=["y"] * 3, **ids)
    assert scores[0] == scores[2] is not None
    assert scores[1] is None
    assert reward.invalid == {"longer than the 128 positions of the scorer": 1}
    assert [len(tokens) for tokens in reward.token_rewards] == [3, 127, 3]
    assert not any(reward.token_rewards[1])


def test_process_reward_needs_a_scorer_of_steps(tmp_path: Path):
    _reward(tmp_path)
    with pytest.raises(ValueError, match="supervision: steps"):
        build_reward({"kind": "process", "model": str(tmp_path)})


@pytest.mark.slow
def test_rewards_run_inside_a_trl_trainer(tmp_path: Path):
    """Train one GRPO step of TRL on a scorer, a rule and an ensemble, prompts as conversations."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    _, scalar = _reward(tmp_path / "scorer")
    members = [{"kind": "regex", "pattern": "a"}, {"kind": "length", "target": 1, "limit": 4}]
    rewards = [
        scalar,
        build_reward({"kind": "exact_match", "name": "rule"}),
        build_reward({"kind": "ensemble", "members": members}),
    ]
    prompt = [{"role": "user", "content": "hi"}]
    # The second row has no reference: its score is None, which TRL takes as "does not apply".
    data = Dataset.from_dict({"prompt": [prompt, prompt], "answer": ["a", None]})
    config = GRPOConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
    )
    torch.manual_seed(0)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_config(_model().config),
        reward_funcs=rewards,
        args=config,
        train_dataset=data,
        processing_class=_tokenizer(),
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    for name in ("scalar", "rule", "ensemble"):
        assert logged[f"rewards/{name}/mean"] == logged[f"rewards/{name}/mean"]  # not NaN
    assert rewards[1].invalid == {"column 'answer' is empty": 2}


def test_text_is_scored_as_the_rows_of_training_end(tmp_path: Path):
    # As in Gemma and Phi-3: turns end with another token than the tokenizer's eos.
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = byte_tokenizer(template, bos=True)
    stops = tuple(tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"]))
    config = Olmo2Config(
        **{"vocab_size": len(tokenizer), "hidden_size": 8, "intermediate_size": 8},
        **{"num_hidden_layers": 1, "num_attention_heads": 2},
    )
    RewardModel(AutoModel.from_config(config), 8).save(
        tmp_path, tokenizer=tokenizer, stop_token_ids=stops
    )
    # What trains on the scorer, or evaluates it, knows them as well.
    assert stop_token_ids(tmp_path) == stops
    chat = ChatFormat(tokenizer, stop_token_ids=stops)
    reward = ScalarReward(RewardModel.load(tmp_path), tokenizer)
    turns = [{"role": "user", "content": "hi"}]
    for prompt in (turns, "Q: hi\n"):
        row = chat.pair_row(Example(prompt, "yes", "no"))
        assert reward.rows([prompt], ["yes"], {}) == [list(row.chosen.input_ids)]
    # Nothing after the first stop token counts.
    assert reward.rows([turns], ["yes<|im_end|>more"], {}) == reward.rows([turns], ["yes"], {})
