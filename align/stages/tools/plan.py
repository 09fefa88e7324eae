"""Print the memory and disk that each training stage of a recipe will need; nothing is loaded."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, Qwen2Config

from align.core.accelerator import list_gpus
from align.core.errors import EXIT_OK, EXIT_USER, AlignError, RecipeError
from align.core.text import suggest, visible
from align.models.loading import bringing_in
from align.preflight.disk import bytes_to_write
from align.preflight.memory import GIB, ModelSize, Prediction, predict, size_of_model
from align.recipe.load import load_recipe
from align.recipe.schema import OnlineStage, Recipe, TrainingStage, TrlStage
from align.tuning.files import num_trained, unmerged_adapter
from align.tuning.wrap import add_tuner

SMALLEST_MICRO = 1024
"""``micro_tokens`` below which a smaller number is not proposed."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the stages run on: ``cpu`` or ``gpu``, bytes of memory, and ranks if given."""

    device: str
    memory: float
    ranks: int | None

    def ranks_of(self, spec: TrainingStage) -> int:
        """Return the number of ranks of a stage."""
        return self.ranks or spec.ranks

    def room(self, ranks: int) -> float:
        """Return the memory of one rank."""
        return self.memory if self.device == "gpu" else self.memory / ranks


class Sizes:
    """Sizes of the models of a recipe, from their configurations alone."""

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        self._recipe, self._run_dir = recipe, run_dir

    def config(self, reference: str) -> PreTrainedConfig:
        """Return the configuration of the model that a reference names.

        Raises:
            RecipeError: the reference is a stage whose model is not known before it has run.
        """
        folder = self._recipe.folder_of(reference, self._run_dir)
        spec = self._recipe.stages.get(reference)
        for place in (folder / "model", folder):
            if (place / "config.json").is_file():
                return AutoConfig.from_pretrained(str(place), trust_remote_code=False)
        if spec is None or spec.imports_model:
            return self._imported(spec, reference)
        # A stage's model has the shape of the one it starts from.
        start = getattr(spec, "init", None) or getattr(spec, "base", None)
        if start is None:
            raise RecipeError(f"the model of stage '{reference}' is not known before it has run")
        return self.config(start)

    def _imported(self, spec: object, reference: str) -> PreTrainedConfig:
        build = getattr(spec, "build", None)
        if build is not None:
            return Qwen2Config(
                vocab_size=build.vocab_size,
                hidden_size=build.hidden_size,
                num_hidden_layers=build.num_layers,
                num_attention_heads=build.num_heads,
                num_key_value_heads=build.num_kv_heads,
                intermediate_size=build.intermediate_size,
                tie_word_embeddings=True,
            )
        path = str(getattr(spec, "path", None) or reference)
        with bringing_in(path):
            return AutoConfig.from_pretrained(path, trust_remote_code=False)

    def total(self, reference: str) -> int:
        """Return the number of parameters of a model."""
        return sum(p.numel() for p in _empty(self.config(reference)).parameters())

    def of(self, spec: TrainingStage) -> ModelSize:
        """Return the size of a stage's model, with the parameters that its tuning trains."""
        config = self.config(spec.init)
        model = _empty(config)
        largest = max(p.numel() for p in model.parameters())
        with torch.device("meta"):
            tuned = add_tuner(model, spec.tuning)
        trained, total = num_trained(tuned)
        size = size_of_model(config, total=total, trained=trained, largest=largest)
        return replace(size, adapted=self._adapted(spec.init))

    def _adapted(self, reference: str) -> bool:
        """Return whether a model has an adapter that cannot be merged into its weights."""
        model_dir = self._recipe.folder_of(reference, self._run_dir) / "model"
        if model_dir.is_dir():
            return unmerged_adapter(model_dir) is not None
        made_by = self._recipe.stages.get(reference)
        return isinstance(made_by, TrainingStage) and made_by.tuning.peft_type is not None


def _empty(config: PreTrainedConfig) -> Any:
    """Return a model without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def learned_rewards(spec: TrainingStage, sizes: Sizes) -> dict[str, tuple[int, str]]:
    """Return parameters and dtype of each reward model of a stage, by the name of the reward."""
    found = {}
    for reward in getattr(spec, "rewards", []):
        if reward.kind in ("scalar", "process"):
            found[f"reward {reward.label}"] = (sizes.total(reward.model), reward.dtype)
    return found


def changes(spec: TrainingStage, ranks: int) -> Iterator[tuple[str, TrainingStage]]:
    """Yield changes of a stage that save memory, each on top of the ones before it."""

    def made(key: str, **update: object) -> tuple[str, TrainingStage]:
        nonlocal spec
        spec = spec.model_copy(update=update)
        return key, spec

    if spec.dtype == "float32":
        yield made("dtype: bfloat16", dtype="bfloat16")
    if not spec.gradient_checkpointing and not spec.tuning.virtual:
        yield made("gradient_checkpointing: true", gradient_checkpointing=True)
    for stage in range(max(spec.zero.stage, 1) + 1, 4 if ranks > 1 else 0):
        zero = spec.zero.model_copy(update={"stage": stage})
        yield made(f"zero.stage: {stage}", zero=zero)
    while spec.micro_tokens // 2 >= max(spec.max_length, SMALLEST_MICRO):
        half = spec.micro_tokens // 2
        yield made(f"micro_tokens: {half}", micro_tokens=half)
    if isinstance(spec, OnlineStage) and not spec.offload_idle:
        yield made("offload_idle: true", offload_idle=True)
    if spec.zero.offload == "none" and spec.zero.stage:
        zero = spec.zero.model_copy(update={"offload": "cpu"})
        yield made("zero.offload: cpu", zero=zero)


def advice(
    name: str, spec: TrainingStage, *, ranks: int, fits: Callable[[TrainingStage], bool]
) -> str:
    """Return which keys to change so that a stage fits."""
    keys: dict[str, str] = {}
    for change, changed in changes(spec, ranks):
        key, _, value = change.partition(": ")
        keys[key] = value
        if fits(changed):
            return "change " + ", ".join(f"stages.{name}.{k}={v}" for k, v in keys.items())
    return (
        "no change of these keys is enough: use more ranks with zero.stage: 3, tuning.method: "
        "lora, or a smaller model"
    )


def planned(
    name: str, spec: TrainingStage, *, sizes: Sizes, machine: Machine
) -> tuple[list[str], Prediction, bool]:
    """Return the lines about a stage, its prediction, and whether it fits."""
    ranks, size = machine.ranks_of(spec), sizes.of(spec)
    rewards = learned_rewards(spec, sizes)

    def predicted(changed: TrainingStage) -> Prediction:
        return predict(
            changed,
            size,
            rewards=rewards,
            ranks=ranks,
            device=machine.device,
            memory=machine.memory,
        )

    found, room = predicted(spec), machine.room(ranks)
    fits = found.peak <= room
    what = "GPU" if machine.device == "gpu" else "process"
    lines = [
        f"{name} ({spec.kind}): {size.total:,} parameters, {size.trained:,} trained, {ranks} "
        f"rank{'s' if ranks > 1 else ''}, zero.stage {spec.zero.stage}, {spec.dtype}",
        f"  {what}: " + ", ".join(f"{k} {v / GIB:.2f}" for k, v in found.phases.items()) + " GiB",
        "  in a step: " + ", ".join(f"{k} {v / GIB:.2f}" for k, v in found.parts.items() if v),
    ]
    written, checkpoint, _ = bytes_to_write(spec, size.trained, size.total)
    lines.append(
        f"  disk: {written / GIB:.2f} GiB at most, {checkpoint / GIB:.2f} for each checkpoint"
    )
    verdict = f"  peak {found.peak / GIB:.2f} of {room / GIB:.2f} GiB: "
    if fits:
        return [*lines, verdict + "fits"], found, True
    told = advice(name, spec, ranks=ranks, fits=lambda s: predicted(s).peak <= room)
    return [*lines, verdict + "does not fit; " + told], found, False


def machine_of(gpus: int | None, memory: float | None) -> Machine:
    """Return the machine to plan for: the one described, or this one."""
    present = list_gpus()
    if gpus is None and memory is None and not present:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Machine("cpu", float(pages), None)
    if memory is None:
        if not present:
            raise RecipeError("--gpus without --memory, and this machine has no GPU to ask")
        mib = min(float(line.split(",")[1].split()[0]) for line in present)
        return Machine("gpu", mib * 2**20, gpus)
    return Machine("gpu", memory * GIB, gpus)


def _recipe_for(
    machine: Machine, path: Path | str, overrides: Sequence[str], *, runs: Path
) -> Recipe:
    """Return a recipe as the machine would read it: the usual dtype of GPUs is bfloat16."""
    recipe = load_recipe(path, overrides, runs=runs)
    if machine.device == "cpu" or recipe.dtype is not None or list_gpus():
        return recipe
    return load_recipe(path, [*overrides, "dtype=bfloat16"], runs=runs)


def plan(
    recipe: Recipe, run_dir: Path, machine: Machine, *, only: str | None = None
) -> Iterator[tuple[str, list[str], Prediction, bool]]:
    """Yield (name, lines, prediction, fits) of every training stage of a recipe."""
    names = list(recipe.stages)
    if only is not None and only not in names:
        raise RecipeError(f"no stage '{only}'; stages are {', '.join(names)}{suggest(only, names)}")
    sizes = Sizes(recipe, run_dir)
    for name, spec in recipe.stages.items():
        if only not in (None, name) or not isinstance(spec, TrainingStage):
            continue
        if isinstance(spec, TrlStage):
            continue
        yield name, *planned(name, spec, sizes=sizes, machine=machine)


def _json(found: Mapping[str, tuple[Prediction, bool]]) -> str:
    stages = {
        name: {"phases": dict(p.phases), "parts": dict(p.parts), "fits": fits}
        for name, (p, fits) in found.items()
    }
    return json.dumps({"stages": stages}, indent=2)


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Plan the recipe named on the command line, and exit with 2 if a stage does not fit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--memory", type=float)
    parser.add_argument("--only")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(words)
    found: dict[str, tuple[Prediction, bool]] = {}
    try:
        machine = machine_of(args.gpus, args.memory)
        recipe = _recipe_for(machine, args.recipe, args.overrides, runs=args.runs)
        for name, lines, prediction, fits in plan(
            recipe, args.runs / recipe.name, machine, only=args.only
        ):
            found[name] = prediction, fits
            if not args.json:
                sys.stdout.write(visible("\n".join(lines)) + "\n")
    except AlignError as error:
        sys.stderr.write(visible(f"{error}\n"))
        sys.exit(error.exit_code)
    if args.json:
        sys.stdout.write(_json(found) + "\n")
    sys.exit(EXIT_OK if all(fits for _, fits in found.values()) else EXIT_USER)


if __name__ == "__main__":
    main()
