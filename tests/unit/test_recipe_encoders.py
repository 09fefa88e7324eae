"""What a recipe may begin from an encoder, and what is refused with its reason."""

import json
from pathlib import Path

import pytest

from align.core.errors import RecipeError
from align.recipe.load import load_recipe

RECIPE = """\
name: toy
stages:
  base: {kind: base, path: some/model}
  bert: {kind: encoder, path: some/bert}
  rm:
    kind: reward
    init: bert
    data: [{world: preference, rows: 100}]
    norm_prompts: 8
  ppo:
    kind: ppo
    init: base
    prompts: [{world: prompts, rows: 10}]
    rewards: [{kind: scalar, model: rm}]
    steps: 4
"""


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)


def artifact(name: str, kind: str, scorer: dict | None = None) -> None:
    model = Path(name) / "model"
    model.mkdir(parents=True)
    (Path(name) / "manifest.json").write_text(json.dumps({"kind": kind}))
    if scorer is not None:
        (model / "scorer.json").write_text(json.dumps(scorer))


def test_a_reward_stage_may_begin_from_an_encoder_and_reward_a_policy():
    assert load_recipe("r.yaml").stages["rm"].init == "bert"


@pytest.mark.parametrize("init", ["bert", "old/bert"])
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["stages.rm.supervision=steps", "stages.rm.norm_prompts=64"],
            r"stages\.rm\.supervision: an encoder gives one score to a whole text.*kind: base",
        ),
        (
            ["stages.rm.norm_sampling={max_new_tokens: 8}"],
            r"stages\.rm\.norm_sampling: an encoder cannot generate responses; remove it",
        ),
        (
            ["stages.rm.tuning={method: prefix}"],
            r"stages\.rm\.tuning\.method: prefix puts virtual tokens before the text of a decoder",
        ),
        (
            ["stages.ppo.critic={init: rm}"],
            r"stages\.ppo\.critic\.init: it scores whole texts .*a critic scores every token",
        ),
    ],
)
def test_what_needs_a_decoder_is_refused(init: str, overrides: list[str], said: str):
    artifact("old/bert", "encoder")
    with pytest.raises(RecipeError, match=said) as caught:
        load_recipe("r.yaml", [f"stages.rm.init={init}", *overrides])
    assert len(str(caught.value).splitlines()) == 1


def test_a_critic_cannot_begin_from_a_finished_scorer_of_whole_texts():
    artifact("old/rm", "reward_model", {"reads": "first"})
    artifact("old/decoder", "reward_model", {"mean": 0.0})
    with pytest.raises(RecipeError, match=r"critic\.init: it scores whole texts"):
        load_recipe("r.yaml", ["stages.ppo.critic={init: old/rm}"])
    load_recipe("r.yaml", ["stages.ppo.critic={init: old/decoder}"])


def test_a_policy_cannot_begin_from_an_encoder():
    with pytest.raises(RecipeError, match=r"stage 'bert' \(encoder\) writes a encoder"):
        load_recipe("r.yaml", ["stages.ppo.init=bert"])
