"""What cannot begin from an encoder, or from a scorer that is one, though a decoder's would do."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.recipe.classify_schema import ClassifyStage, EncoderStage
from align.recipe.online_schema import PpoStage
from align.recipe.scorer_schema import RewardStage
from align.recipe.tuning_schema import VIRTUAL

Problem = tuple[str, str]
"""A dotted key below a stage, and what is wrong with its value."""


def encoder_problems(stages: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Find settings that need a decoder where the recipe names an encoder.

    Args:
        stages: stage name to spec, None for one that is not valid by itself.

    Returns:
        (stage, dotted key) to what is wrong.
    """
    found: dict[tuple[str, str], str] = {}
    for name, spec in stages.items():
        problems: list[Problem] = []
        if isinstance(spec, RewardStage | ClassifyStage) and is_encoder(spec.init, stages):
            problems = list(_head(spec))
        if isinstance(spec, PpoStage) and _scores_whole_texts(spec.critic.init, stages):
            problems = [(
                "critic.init",
                "it scores whole texts (its init is an encoder), and a critic judges every token; "
                "remove it, and the critic begins from the policy, or name a decoder's scorer",
            )]  # fmt: skip
        found |= {(name, key): problem for key, problem in problems}
    return found


def is_encoder(reference: str, stages: Mapping[str, Any]) -> bool:
    """Say whether a stage's name or an artefact's folder is that of an encoder."""
    if reference in stages:
        return isinstance(stages[reference], EncoderStage)
    return _read(Path(reference) / "manifest.json").get("kind") == "encoder"


def _scores_whole_texts(reference: str | None, stages: Mapping[str, Any]) -> bool:
    if reference is None:
        return False
    if reference in stages:
        spec = stages[reference]
        return isinstance(spec, RewardStage) and is_encoder(spec.init, stages)
    return _read(Path(reference) / "model" / "scorer.json").get("reads") == "first"


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON mapping; what is none is reported where the reference itself is checked."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _head(spec: RewardStage | ClassifyStage) -> Iterator[Problem]:
    method = spec.tuning.method
    if method in VIRTUAL:
        yield (
            "tuning.method",
            f"{method} puts virtual tokens before the text of a decoder, and init is an encoder; "
            "use lora or bottleneck",
        )
    if isinstance(spec, ClassifyStage):
        return
    if spec.supervision == "steps":
        yield (
            "supervision",
            "an encoder gives one score to a whole text, none to the steps so far; begin from a "
            "policy (kind: base), or take pairs or answers",
        )
    if spec.norm_sampling is not None:
        yield (
            "norm_sampling",
            "an encoder cannot answer prompts; remove it, and the answers of 'data' set mean and "
            "std",
        )
