"""Score a response by a metric of the `evaluate` library, such as ROUGE, against a reference."""

import tempfile
from collections.abc import Mapping
from typing import Any

from reward_models.base import InvalidScoreError, Rule, rule_from_spec
from reward_models.specs import MetricSpec


def build_metric(spec: MetricSpec) -> Rule:
    """Return a rule that computes the metric of one response and its reference at a time.

    The score of a model is then a mean over responses. That is what most metrics compute over a
    corpus, too, but not all: BLEU pools the counts of all responses.

    Raises:
        ValueError: the metric cannot be loaded.
    """
    module = _load(spec)

    def score(answer: str, reference: object) -> float:
        found = module.compute(predictions=[answer], references=[reference], **spec.args)
        return _number(found, spec)

    return rule_from_spec(spec, score, column=spec.column)


def _load(spec: MetricSpec) -> Any:
    try:
        import evaluate
    except ImportError as error:
        raise ValueError(
            f"reward '{spec.label}': kind metric needs the package evaluate. Run: pip install "
            "'align-suite[eval]'"
        ) from error
    try:
        # In memory, a metric needs its folder only while it is loaded.
        with tempfile.TemporaryDirectory() as folder:
            return evaluate.load(spec.path, spec.config, keep_in_memory=True, cache_dir=folder)
    except (OSError, ImportError, ValueError, TypeError, AttributeError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(
            f"reward '{spec.label}': the metric '{spec.path}' cannot be loaded: {first}. Give the "
            "path of the file or folder that contains it, or its name on the Hugging Face Hub if "
            "the Hub can be reached"
        ) from error


def _number(found: Mapping[str, Any] | None, spec: MetricSpec) -> float:
    """Return the result's number that the reward is; the key may be left out if there is one."""
    found = found or {}
    key = spec.key or (next(iter(found)) if len(found) == 1 else None)
    if key is None or key not in found:
        names = ", ".join(found) or "none"
        raise InvalidScoreError(f"the metric's results are {names}; set 'key' to one of them")
    return float(found[key])
