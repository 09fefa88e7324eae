"""Where the models of finished jobs are served from: a LoRA adapter on its base, or whole."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align.core.artifacts import MANIFEST, read_json_object
from align.serve.errors import ServeError
from align.serve.finetuning.recipes import RECIPE, STAGE, unescaped
from align.serve.settings import Settings

STATES = "policy/mp_rank_00_model_states.pt"
"""Weights in the folder of a checkpoint, which DeepSpeed writes whole up to ZeRO stage 2."""
MAX_RANK = 64
"""Largest rank of an adapter that is served on its base."""
METHODS = ("lora", "rslora")
"""Tuning methods whose adapter on the base is the model; that of others has a changed base."""
EXTRAS = (
    *("use_dora", "use_qalora", "lora_bias", "modules_to_save", "target_parameters"),
    *("trainable_token_indices", "rank_pattern", "alpha_pattern"),
)
"""Settings of peft that vLLM refuses or ignores."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the weights of a model are.

    Attributes:
        model: folder or hub id of a whole model.
        adapter: folder of the LoRA adapter that belongs to it; None without one.
        format: folder with the adapter's tokenizer and template, if they are not the model's.
        checkpoint: weights of a step, from which the adapter is written when it is needed.
        like: adapter of the same job, whose configuration it has.
    """

    model: str
    adapter: str | None = None
    format: str | None = None
    checkpoint: str | None = None
    like: str | None = None

    def exists(self) -> bool:
        """Return whether the folders are there; a hub id may be."""
        if Path(self.model).is_absolute() and not Path(self.model).is_dir():
            return False
        places = [place for place in (self.adapter, self.checkpoint) if place is not None]
        return not places or any(Path(place).exists() for place in places)

    def parts(self) -> dict[str, Any]:
        """Return what a process with the model is told of the rest."""
        return {name: value for name, value in asdict(self).items() if name != "model"}


def whole_place(settings: Settings, job: str) -> str:
    """Return the folder of the whole model that a job has made."""
    return str((settings.runs / job / STAGE / "model").resolve())


def trained_place(settings: Settings, job: str, *, step: int | None) -> Place:
    """Return where a job's model is served from, or the checkpoint of a step.

    Raises:
        ServeError: the files of the checkpoint are gone.
    """
    place = _adapter_place(settings, job)
    if step is None:
        return place if place is not None and place.exists() else Place(whole_place(settings, job))
    if place is None:
        raise ServeError(404, f"The files of step {step} are gone.", param="model")
    saved = (_checkpoints(settings, job) / f"step-{step:08d}" / STATES).resolve()
    out = (settings.data / "jobs" / job / "adapters" / f"step-{step}").resolve()
    return Place(place.model, str(out), place.format, str(saved), like=place.adapter)


def saved_steps(settings: Settings, job: str) -> dict[int, int]:
    """Return the steps whose checkpoints can be served, with the time at which each was saved."""
    if _adapter_place(settings, job) is None:
        return {}
    found = _checkpoints(settings, job).glob(f"step-????????/{STATES}")
    return {
        int(path.relative_to(_checkpoints(settings, job)).parts[0].removeprefix("step-")): int(
            path.stat().st_mtime
        )
        for path in found
    }


def _checkpoints(settings: Settings, job: str) -> Path:
    return settings.runs / job / STAGE / "checkpoints"


def _adapter_place(settings: Settings, job: str) -> Place | None:
    """Return the adapter of a job on the job's base, so that one process serves all of a base.

    It is None unless both together are the model that the job has saved.
    """
    stage = (settings.runs / job / STAGE).resolve()
    manifest = read_json_object(stage / MANIFEST) or {}
    recipe = read_json_object(settings.data / "jobs" / job / RECIPE)
    config = read_json_object(stage / "adapter" / "adapter_config.json") or {}
    tuning = manifest.get("spec", {}).get("tuning") or {}
    plain = tuning.get("method") in METHODS and not any(config.get(name) for name in EXTRAS)
    if recipe is None or not plain or config.get("r", MAX_RANK + 1) > MAX_RANK:
        return None
    base = unescaped(recipe["stages"]["base"]["path"])
    if Path(base).is_absolute() and not (Path(base) / "config.json").is_file():
        return None
    # The job may have added to the base's tokenizer what it lacked, such as a stop token.
    return Place(base, str(stage / "adapter"), format=str(stage / "model"))
