"""The model card of a saved model: README.md with metadata in the format of the Hugging Face Hub.

Every entry follows from the stage's manifest, so that equal runs write equal cards.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.core.artifacts import read_json_object, versions
from align.core.identity import layout
from align.core.text import is_hub_id

CARD = "README.md"
INHERITED = ("base_model", "license", "license_name", "license_link", "language")
"""Metadata that a model has from the model it started from."""
PIPELINES = {"policy": "text-generation"}
_SPEED = ("time/", "tokens/", "engine/", "memory/")
_OLD_ID = re.compile(r"[A-Za-z0-9][\w.-]*")
"""Ids of the hub's first models and data sets have no organization, such as gpt2."""


def write_card(out: Path, manifest: Mapping[str, Any], folder_of: Callable[[str], Path]) -> None:
    """Write the card of a stage's model, if the stage wrote one.

    Args:
        out: the stage's folder.
        manifest: its manifest.
        folder_of: returns the folder of a stage or model that the manifest names.
    """
    if not (out / "model").is_dir():
        return
    inputs = manifest.get("inputs") or {}
    named = (inputs.get("init") or inputs.get("base") or {}).get("path")
    path = (manifest.get("spec") or {}).get("path")
    imported = str(path) if path and manifest.get("stage_kind") in ("base", "encoder") else None
    start = imported_card(imported) if imported else {}
    if named is not None:
        start = front_matter(folder_of(named) / "model" / CARD)
    front = {key: start[key] for key in INHERITED if key in start}
    if imported and is_on_hub(imported):
        front["base_model"] = imported
    text = card_text({"versions": versions(), **manifest}, front)
    # Never written into: the file could be a hard link to one of the imported folder.
    (out / "model" / CARD).unlink(missing_ok=True)
    (out / "model" / CARD).write_text(text, encoding="utf-8")


def stage_card(artifact: Path, manifest: Mapping[str, Any]) -> str:
    """Return the card of a finished stage with what its run's evaluate stages measured."""
    place = artifact.resolve()
    start = front_matter(place / "model" / CARD)
    front = {key: start[key] for key in INHERITED if key in start}
    return card_text(manifest, front, evaluations=evaluations_of(place.parent, place.name))


def card_text(
    manifest: Mapping[str, Any],
    front: Mapping[str, Any],
    *,
    evaluations: Sequence[Sequence[str]] = (),
) -> str:
    """Return a model card.

    Args:
        manifest: the stage's manifest.
        front: metadata of the model it started from.
        evaluations: task, metric, value and interval of each evaluation.
    """
    import yaml

    spec = manifest.get("spec") or {}
    kind, stage = manifest.get("stage_kind", "model"), manifest.get("stage", "model")
    method = (spec.get("tuning") or {}).get("method", "full")
    pipeline = PIPELINES.get(str(manifest.get("kind")), "text-classification")
    tags = ["align", str(kind), *([str(method)] if method not in ("full", "head") else [])]
    # Of what was read from the Hub, all but the base model is data.
    datasets = [name for name in _hub_sets(manifest) if name != front.get("base_model")]
    meta = {**front, "library_name": "transformers", "pipeline_tag": pipeline, "tags": tags}
    meta |= {"datasets": datasets} if datasets else {}
    base = front.get("base_model", "a model without a hub id")
    license_ = front.get("license", "not recorded; that of the base model and the data applies")
    parts = [
        f"---\n{yaml.safe_dump(meta, sort_keys=True)}---\n",
        f"# {stage}\n",
        f"Trained by stage `{stage}` of kind `{kind}` with align, from {base}.\n",
        f"- License: {license_}",
        f"- Tuning: {method}",
        f"- Seed: {manifest.get('seed', 0)}, processes: {manifest.get('ranks', 1)}",
        *(f"- {line}" for line in resharded_lines(manifest)),
        f"- Identity of recipe and inputs: `{str(manifest.get('spec_hash', ''))[:16]}`\n",
        _table("Evaluation", ("task", "metric", "value", "95 % interval"), evaluations),
        _table("Metrics at the end of training", ("metric", "value"), _metrics(manifest)),
        _table("Data", ("source", "rows", "sha256"), _data(manifest)),
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(public(spec), sort_keys=False).strip()}\n```\n",
        _table("Versions", ("package", "version"), sorted(_versions(manifest))),
    ]
    return "\n".join(part for part in parts if part)


def resharded_lines(manifest: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each change of ranks or ZeRO stages while the stage was trained."""
    return [
        f"Continued after step {change['step']} by {layout(change['new'])}, saved by "
        f"{layout(change['old'])}: the same training up to rounding, not bit by bit"
        for change in manifest.get("resharded") or []
    ]


def is_on_hub(name: str) -> bool:
    """Return whether a name is a hub id, not a path."""
    return (is_hub_id(name) or bool(_OLD_ID.fullmatch(name))) and not Path(name).exists()


def public(value: object) -> Any:
    """Return a spec without the folders of this machine: an absolute path becomes its last part."""
    if isinstance(value, dict):
        return {key: public(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [public(inner) for inner in value]
    if isinstance(value, str) and value.startswith(("/", "~")) and "\n" not in value:
        return Path(value).name
    return value


def front_matter(path: Path) -> dict[str, Any]:
    """Return the metadata of a card; empty if there is none or it cannot be read."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        found = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else None
    except (OSError, ValueError, IndexError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def imported_card(name: str) -> dict[str, Any]:
    """Return the metadata of an imported model's card, from its folder or the hub's local cache."""
    if Path(name).is_dir():
        return front_matter(Path(name) / CARD)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, CARD) if is_on_hub(name) else None
    return front_matter(Path(found)) if isinstance(found, str) else {}


def evaluations_of(run_dir: Path, stage: str) -> list[tuple[str, str, str, str]]:
    """Return what the run's evaluate stages measured of a stage, with 95 % intervals."""
    rows = []
    for path in sorted(run_dir.glob("*/summary.json")):
        found = read_json_object(path) or {}
        for task, block in (found.get("tasks") or {}).items():
            for metric, triple in (block.get("models", {}).get(stage) or {}).items():
                if isinstance(triple, list) and len(triple) == 3 and None not in triple:
                    value, low, high = (f"{x:.4g}" for x in triple)
                    rows.append((str(task), str(metric), value, f"{low} to {high}"))
    return rows


def _hub_sets(manifest: Mapping[str, Any]) -> list[str]:
    return sorted(
        name for name in (manifest.get("identity") or {}).get("hub", {}) if is_on_hub(name)
    )


def _metrics(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = sorted((manifest.get("metrics") or {}).items())
    return [(name, f"{value:.4g}") for name, value in found if not name.startswith(_SPEED)]


def _data(manifest: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (str(public(d.get("path", ""))), str(d.get("rows", "")), str(d.get("sha256") or "")[:16])
        for d in manifest.get("data") or []
    ]


def _versions(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(k), str(v)) for k, v in (manifest.get("versions") or {}).items()]


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    body = "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines
    )
    return f"## {title}\n\n{body}\n"
