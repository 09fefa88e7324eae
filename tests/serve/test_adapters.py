"""Which models of a job are its adapter on the base, and which are served whole."""

import json
from pathlib import Path
from typing import Any

import pytest

from align.serve.errors import ServeError
from align.serve.finetuning.adapters import STATES, Place, saved_steps, trained_place
from align.serve.finetuning.recipes import write_recipe
from align.serve.settings import Settings

JOB = "ftjob-1"
LORA = {"method": "lora", "rank": 16, "alpha": 32.0}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    found = Settings(runs=tmp_path / "runs")
    base = tmp_path / "bases ${HOME}"
    base.mkdir()
    (base / "config.json").write_text("{}")
    finished(found, base, LORA, {"r": 16})
    return found


def finished(settings: Settings, base: Path | str, tuning: Any, config: dict[str, Any]) -> None:
    stage = settings.runs / JOB / "train"
    for folder in ("model", "adapter", "checkpoints/step-00000004/policy"):
        (stage / folder).mkdir(parents=True, exist_ok=True)
    (stage / "manifest.json").write_text(json.dumps({"spec": {"tuning": tuning}}))
    (stage / "adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    (stage / "checkpoints/step-00000004" / STATES).touch()
    (stage / "checkpoints/step-00000008").mkdir(exist_ok=True)  # of ZeRO stage 3: other files
    own = settings.data / "jobs" / JOB
    own.mkdir(parents=True, exist_ok=True)
    write_recipe({"stages": {"base": {"path": str(base)}}}, own / "recipe.yaml")


def test_a_lora_job_is_served_on_its_base_and_its_checkpoints_too(settings: Settings):
    stage = (settings.runs / JOB / "train").resolve()
    base = str(settings.runs.parent / "bases ${HOME}")
    place = trained_place(settings, JOB, step=None)
    assert place == Place(base, str(stage / "adapter"), str(stage / "model"))
    assert list(saved_steps(settings, JOB)) == [4]
    earlier = trained_place(settings, JOB, step=4)
    assert (earlier.model, earlier.format, earlier.like) == (base, place.format, place.adapter)
    assert earlier.checkpoint == str(stage / "checkpoints/step-00000004" / STATES)
    assert earlier.adapter is not None
    assert Path(earlier.adapter).is_relative_to(settings.data.resolve())
    assert earlier.exists()
    assert not trained_place(settings, JOB, step=5).exists()


@pytest.mark.parametrize(
    ("tuning", "config"),
    [
        ({"method": "full"}, {}),
        ({"method": "dora", "rank": 8}, {"r": 8, "use_dora": True}),
        # Its adapter was converted at the end: a checkpoint has other numbers.
        ({"method": "pissa", "rank": 8}, {"r": 16}),
        ({"method": "lora", "rank": 128}, {"r": 128}),
        (LORA, {"r": 16, "target_parameters": ["experts.down_proj"]}),
        (LORA, {}),
        (None, {"r": 16}),
    ],
)
def test_what_is_no_plain_adapter_is_served_whole(
    settings: Settings, tuning: Any, config: dict[str, Any]
):
    finished(settings, settings.runs.parent / "bases ${HOME}", tuning, config)
    whole = Place(str((settings.runs / JOB / "train/model").resolve()))
    assert trained_place(settings, JOB, step=None) == whole
    assert saved_steps(settings, JOB) == {}
    with pytest.raises(ServeError, match="gone"):
        trained_place(settings, JOB, step=4)


def test_a_base_that_is_gone_or_an_adapter_itself_is_not_needed(settings: Settings, tmp_path: Path):
    whole = Place(str((settings.runs / JOB / "train/model").resolve()))
    (tmp_path / "own-adapter").mkdir()
    for base in ("gone", "own-adapter"):
        finished(settings, tmp_path / base, LORA, {"r": 16})
        assert trained_place(settings, JOB, step=None) == whole
    finished(settings, "org/hub-model", LORA, {"r": 16})
    assert trained_place(settings, JOB, step=None).model == "org/hub-model"
