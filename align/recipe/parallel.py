"""Rules about ranks that share one model: they must divide the ranks and the model's heads."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.recipe.schema import StageSpec
from align.recipe.schema.common import SamplingSpec
from align.recipe.schema.offline import BaseStage
from align.recipe.starts import Problem, read_mapping

SAMPLING = ("sampling", "norm_sampling")
"""Blocks of a stage that describe an engine."""
STARTS = ("init", "baseline")
"""Keys that name the model that a stage samples from."""


def parallel_problems(stages: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Return the stages whose ranks, or whose model, cannot be divided as they ask.

    Args:
        stages: stage name to spec, None for an invalid stage.

    Returns:
        (stage, dotted key) to the problem.
    """
    return {
        (name, key): problem
        for name, spec in stages.items()
        if spec is not None
        for key, problem in _problems(spec, stages)
    }


def _problems(spec: StageSpec, stages: Mapping[str, Any]) -> Iterator[Problem]:
    wanted = [("parallel.sequence", getattr(spec, "sequence_ranks", 1))]
    for block in SAMPLING:
        sampling = getattr(spec, block, None)
        if isinstance(sampling, SamplingSpec):
            wanted.append((f"{block}.tensor_parallel", sampling.tensor_parallel))
    for key, ranks in wanted:
        if spec.ranks % ranks:
            yield key, f"found {ranks}; expected a divisor of the stage's {spec.ranks} ranks"
            continue
        problem = heads_problem(_config(spec, stages), ranks) if ranks > 1 else None
        if problem is not None:
            yield key, f"found {ranks}, but {problem}"


def heads_problem(config: Mapping[str, Any], ranks: int) -> str | None:
    """Return why the heads of a model cannot be divided among ranks, or None.

    Args:
        config: content of its ``config.json``; without heads, nothing is known.
        ranks: their number.
    """
    heads = config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    for number, what in ((heads, "attention heads"), (kv_heads, "key-value heads")):
        if number is not None and number % ranks:
            return f"the model's {number} {what} cannot be divided among {ranks} ranks"
    return None


def _config(spec: object, stages: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration of the model that a stage starts from, {} if it is not known."""
    seen: set[str] = set()
    while True:
        found = (getattr(spec, key, None) for key in STARTS)
        reference = next((x for x in found if isinstance(x, str)), None)
        if reference is None or reference in seen:
            break
        seen.add(reference)
        if reference not in stages:
            return _saved(Path(reference) / "model")
        spec = stages[reference]
    if not isinstance(spec, BaseStage):
        return {}
    if spec.build is not None:
        heads, kv_heads = spec.build.num_heads, spec.build.num_kv_heads
        return {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return {} if spec.path is None else _saved(Path(spec.path))


def _saved(folder: Path) -> Mapping[str, Any]:
    config = read_mapping(folder / "config.json")
    return config.get("text_config") or config
