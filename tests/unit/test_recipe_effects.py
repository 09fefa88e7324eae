"""Options that change nothing are refused at their own place, one test for each rule."""

from pathlib import Path

import pytest

from align.core.errors import RecipeError
from align.recipe.load import load_recipe, load_resolved
from align.recipe.rules import idle_options
from align.recipe.schema import GrpoStage
from align.recipe.show import resolved_yaml

RECIPE = """\
name: toy
stages:
  base:
    kind: base
    build: {vocab_size: 128}
    data: [{world: corpus, rows: 10}]
    steps: 10
  found: {kind: base, path: some/model}
  sft:
    kind: sft
    init: base
    data: [{world: sft, rows: 100}]
  ppo:
    kind: ppo
    init: sft
    prompts: [{world: prompts, rows: 10}]
    rewards: [{kind: math}]
    steps: 4
  grpo:
    kind: grpo
    init: sft
    prompts: [{world: prompts, rows: 10}]
    rewards: [{kind: math}]
    steps: 4
  evaluate:
    kind: evaluate
    models: [sft, ppo]
    baseline: sft
    prompts: [{world: prompts, rows: 10}]
    scores: [{kind: math}]
    judge: [{kind: math}]
  merge: {kind: merge, base: base, tuned: sft, alphas: [0.5]}
  trl: {kind: trl, trainer: KTO, init: sft, data: [{path: x}], rows: unpaired, steps: 2}
  dpo: {kind: dpo, init: sft, data: [{world: preference, rows: 9}]}
  rm: {kind: reward, init: sft, data: [{world: preference, rows: 9}]}
  picked: {kind: curate, data: [{path: x}]}
  labeled:
    kind: weak_label
    of: sft
    data: [{path: x}]
    functions:
      - {by: {kind: repetition}, good_from: 0.5}
      - {by: {kind: regex, pattern: a}, good_from: 0.5}
      - {by: {kind: length, target: 3, limit: 9}, good_from: 0.5}
"""
JUDGE = "{endpoint: {url: 'http://127.0.0.1:1', model: m}}"
ENSEMBLE = "[{kind: ensemble, members: [{kind: math}, {kind: repetition}], kappa: 2.0}]"
GUARDED = "{every: 2, prompts: [{world: prompts, rows: 4}], gold: [{kind: repetition}], guard: {}}"


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)


def mistakes(*overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml", overrides)
    return str(caught.value).split("\n")


def test_recipe_itself_is_right() -> None:
    assert load_recipe("r.yaml").stages["ppo"].kind == "ppo"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("sft.data.0.weight", "2.0", "no effect on a single source"),
        ("sft.data.0.heldout_frac", "0.2", "no effect with split: all"),
        ("sft.data.0.rename", "{a: b}", "no effect on a synthetic dataset"),
        ("sft.data.0.format", "alpaca", "no effect on a synthetic dataset"),
        ("sft.optim", "{schedule: constant, min_lr_frac: 0.1}", "never falls"),
        ("sft.optim", "{schedule: slanted, warmup_frac: 0.1}", "no effect with schedule slanted"),
        ("sft.optim", "{schedule: slanted, min_lr_frac: 0.1}", "no effect with schedule slanted"),
        ("sft.optim", "{ratio: 16.0}", "no effect with schedule cosine"),
        ("sft.optim", "{cut_frac: 0.2}", "no effect with schedule cosine"),
        ("sft.data.0", "{path: x, phrasing: all}", "no effect without 'templates'"),
        ("sft.eval_every", "2", "no effect without 'heldout'"),
        ("trl.eval_every", "2", "no effect without 'heldout'"),
        ("trl.optim", "{min_lr_frac: 0.1}", "no effect in a trl stage"),
        ("ppo.kl", "{coef: 0.0, target: 2.0}", "no effect with coef 0; give a starting coef"),
        ("grpo.importance", "{mode: none, level: sequence}", "no effect with mode none"),
        ("grpo.importance", "{mode: none, floor: 0.5}", "no effect with mode none"),
        ("grpo.importance", "{floor: 0.5}", "no effect with mode truncate"),
        ("sft.optim.betas", "[0.9, 1.0]", "the mean never changes"),
        ("sft.zero.offload", "cpu", "no effect with stage 0"),
        ("sft.eval_every", "10", "without 'heldout'"),
        ("merge.tolerance", "0.1", "no effect with a single alpha"),
        ("merge.sampling", "{engine: hf}", "no effect with a single alpha"),
        ("merge.base", "sft", "would be merged with itself"),
        ("trl.optim.schedule", "slanted", "no slanted schedule"),
        ("found.batch_size", "8", "nothing is trained"),
        ("found.max_length", "8", "nothing is trained"),
        ("found.micro_tokens", "8", "nothing is trained"),
        ("found.optim.learning_rate", "0.1", "nothing is trained"),
        ("found.ranks", "2", "nothing is trained"),
        ("base.build.hidden_size", "130", "must divide hidden_size 130"),
        ("base.build.hidden_size", "132", "is 33; expected an even number"),
        ("base.build.num_kv_heads", "3", "must divide num_heads 4"),
        ("ppo.sampling", "{engine: hf, cache_gib: 2.0}", "no effect with engine hf"),
        ("ppo.sampling", "{engine: hf, memory_frac: 0.5}", "no effect with engine hf"),
        ("ppo.sampling", "{engine: hf, max_num_seqs: 8}", "no effect with engine hf"),
        ("ppo.sampling", "{engine: hf, cache_dtype: fp8}", "no effect with engine hf"),
        ("ppo.kl.horizon", "100", "without 'target'"),
        ("grpo.kl", "{coef: 0.0, place: loss, estimator: k2}", "coef is 0"),
        ("grpo.kl", "{coef: 0.0, place: loss, estimator: k3, corrected: true}", "with coef 0"),
        ("ppo.importance", "{mode: none, cap: 3.0}", "no effect with mode none"),
        ("grpo.clip.high", "0.3", "one optimizer step per rollout"),
        ("grpo.clip.dual", "3.0", "one optimizer step per rollout"),
        ("grpo.max_draws", "5", "without dynamic_sampling"),
        ("ppo.critic.warmup_steps", "4", "leaves none of the 4 steps"),
        ("ppo.rewards", "[{kind: math, weight: 0.0}]", "all weights are 0"),
        ("ppo.rewards.0.timeout_s", "9.0", "without latex"),
        ("ppo.rewards", ENSEMBLE, "no effect with combine mean"),
        ("ppo.rewards", "[{kind: length, target: 9, limit: 9}]", "more words than target 9"),
        ("ppo.watch", GUARDED, "needs 5 evaluations to raise an alarm, and 4 steps"),
        ("evaluate.scores.0.weight", "2.0", "weigh in 'judge'"),
        ("evaluate.pairs", "[{world: preference, rows: 4}]", "without 'reward_models'"),
        ("evaluate.reference", "base", "only measured on responses at temperature 1"),
        ("evaluate.samples", "4", "all responses to a prompt are the same"),
        ("evaluate.sampling", "{temperature: 0.0, top_p: 0.9}", "no effect at temperature 0"),
        ("evaluate.sets", "[{path: x}]", "without 'reward_models'"),
        ("evaluate.pairwise", JUDGE, "every task has a 'judge' of its own"),
        ("sft.data.0.config", "main", "without 'path'"),
        ("sft.data.0.revision", "v1", "without 'path'"),
        ("sft.data", "[{path: x, tasks: [sort]}]", "without 'world'"),
        ("sft.data.0.templates", "t.yaml", "no effect with 'world'"),
        ("sft.mix_cap", "5", "on a single dataset"),
        ("found.steps", "3", "nothing is trained"),
        ("found.data", "[{path: x}]", "nothing is trained"),
        ("merge.others", "[ppo]", "with method linear"),
        ("merge.density", "0.3", "with method linear"),
        ("dpo.gamma", "0.5", "with loss sigmoid"),
        ("rm.step_separator", "'##'", "without supervision: steps"),
        ("picked.min_quality", "0.5", "without 'quality'"),
        ("picked.keep_frac", "0.5", "without 'quality'"),
        ("labeled.use_given", "true", "have no labels"),
    ],
)
def test_option_without_effect_is_refused(key: str, value: str, reason: str) -> None:
    (line,) = mistakes(f"stages.{key}={value}")
    assert f": stages.{key.split('.')[0]}." in line
    assert reason in line


@pytest.mark.parametrize(
    "overrides",
    [
        ("sft.steps=9", "sft.epochs=2.0"),
        ("sft.checkpoint_every=0", "sft.keep_checkpoints=3"),
        ("grpo.dynamic_sampling=true", "grpo.max_draws=1"),
        ("grpo.algorithm=rloo", "grpo.scale=std"),
        ("grpo.algorithm=remax", "grpo.dynamic_sampling=true"),
        ("grpo.algorithm=cispo", "grpo.minibatches=2", "grpo.clip.dual=3.0"),
        ("grpo.truncation=mask", "grpo.truncated_score=-1.0"),
        ("grpo.tuning={method: prompt}", "grpo.layers={freeze_first: 1}"),
        ("sft.tuning={method: lora}", "sft.layers={freeze_embeddings: true}"),
        ("dpo.loss=ipo", "dpo.label_smoothing=0.1"),
        ("dpo.loss=ipo", "dpo.ld_alpha=0.5"),
        ("dpo.loss=orpo", "dpo.nll_coef=0.1"),
        ("rm.supervision=answers", "rm.use_margin=true"),
        ("rm.supervision=steps", "rm.heads=3"),
        ("rm.norm_prompts=0", "rm.norm_sampling={}"),
    ],
)
def test_options_that_cancel_each_other_are_refused(overrides: tuple[str, ...]) -> None:
    (line,) = mistakes(*(f"stages.{text}" for text in overrides))
    assert "no effect" in line or "without effect" in line


def test_each_is_named_at_its_own_line_and_column() -> None:
    text = RECIPE.replace(
        "    rewards: [{kind: math}]\n    steps: 4\n  grpo",
        ("    rewards: [{kind: math}]\n    steps: 4\n    kl: {coef: 0.1, horizon: 50}\n  grpo"),
    ).replace("rows: 100}]", "rows: 100}]\n    keep_checkpoints: 3\n    checkpoint_every: 0")
    Path("r.yaml").write_text(text)
    assert mistakes() == [
        "r.yaml:13:5: stages.sft.keep_checkpoints: has no effect with checkpoint_every 0, which "
        "keeps none",
        # "    kl: {coef: 0.1, " is 20 characters, so the key stands in column 21.
        "r.yaml:21:21: stages.ppo.kl.horizon: has no effect without 'target': the coefficient "
        "is constant",
    ]


@pytest.mark.parametrize(
    ("overrides"),
    [
        ("grpo.clip.high=0.3", "grpo.minibatches=2"),
        ("grpo.algorithm=dapo",),
        ("grpo.optim.betas=[0.9, 0.95]",),
        ("grpo.algorithm=gspo",),
        ("grpo.algorithm=rloo",),
        ("sft.keep_checkpoints=3", "sft.checkpoint_every=5"),
        ("sft.keep_checkpoints=3",),
        ("sft.data=[{world: sft, rows: 9, weight: 2.0}, {world: sft, rows: 9}]",),
        ("ppo.watch=" + GUARDED.replace("every: 2", "every: 1"),),
        ("evaluate.reference=base", "evaluate.sampling.temperature=1.0"),
    ],
)
def test_option_with_effect_stays(overrides: tuple[str, ...]) -> None:
    resolved = load_resolved("r.yaml", [f"stages.{text}" for text in overrides])
    # Written out in full, with every default, the recipe is still right.
    Path("again.yaml").write_text(resolved_yaml(resolved))
    assert load_recipe("again.yaml") == resolved.recipe


def test_top_p_with_importance_correction_is_refused() -> None:
    (line,) = mistakes("stages.grpo.sampling.top_p=0.9")
    assert "samples from another distribution than the policy" in line


def test_k1_in_the_loss_is_refused() -> None:
    (line,) = mistakes("stages.grpo.kl={coef: 0.1, place: loss, estimator: k1}")
    assert "zero expected gradient" in line


def test_wide_clip_of_answer_ratios_is_refused() -> None:
    (line,) = mistakes("stages.grpo.algorithm=gspo", "stages.grpo.clip={low: 0.2, high: 0.2}")
    assert "never falls by 0.2" in line


def test_parts_without_a_stage_are_checked_too() -> None:
    spec = GrpoStage.model_validate(
        {
            "kind": "grpo",
            "init": "x",
            "prompts": [{"path": "x"}],
            "steps": 4,
            "max_draws": 7,
            "rewards": [{"kind": "math"}],
        }
    )
    assert [key for key, _ in idle_options(spec)] == ["max_draws"]
