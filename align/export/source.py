"""The model to export: a stage of a run, or any model folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from align.core.artifacts import (
    MANIFEST,
    find_model,
    read_artifact,
    read_json_object,
    read_manifest,
)
from align.core.errors import ArtifactError
from align.export.folder import is_export
from align.models.bringing import check_folder
from align.models.loading import model_folder
from align.tuning.files import CONFIG as ADAPTER_CONFIG
from reward_models.scalar import SCORER_FILE

Kind = Literal["policy", "reward_model", "classifier"]
KINDS: tuple[Kind, ...] = ("policy", "reward_model", "classifier")


@dataclass(frozen=True, slots=True)
class Source:
    """A model to export.

    Attributes:
        name: its name in other tools, such as ``quickstart-dpo``.
        model_dir: weights, configuration and tokenizer.
        kind: what the model computes.
        artifact: the stage's folder, or None for a plain model folder.
        manifest: the stage's manifest, empty for a plain model folder.
    """

    name: str
    model_dir: Path
    kind: Kind
    artifact: Path | None
    manifest: Mapping[str, Any]

    @property
    def adapter_dir(self) -> Path | None:
        """Return the folder of the stage's adapter, or None if it trained none."""
        folder = None if self.artifact is None else self.artifact / "adapter"
        return folder if folder is not None and (folder / ADAPTER_CONFIG).is_file() else None


def find_place(name: str, runs: Path) -> Path:
    """Return the folder that a command names; the files of a hub id are downloaded first.

    Args:
        name: an export, ``RUN/STAGE``, the folder of a stage or of a model, or a hub id.
        runs: folder of the runs.

    Raises:
        ArtifactError: it is none of these.
    """
    if is_export(Path(name)):
        return Path(name)
    place = find_model(name, runs)
    return place if place.exists() else model_folder(place, "policy")


def find_source(reference: Path) -> Source:
    """Return the model that ``RUN/STAGE`` or a model folder names, with its files verified.

    Raises:
        ArtifactError: there is no model, or its files are damaged or incomplete.
    """
    if (reference / MANIFEST).is_file():
        kind = read_manifest(reference).get("kind")
        if kind not in KINDS:
            raise ArtifactError(
                f"{reference}: a stage that produces {kind!r} has no model to export. Name a stage "
                "that trains a policy, a reward model or a classifier"
            )
        found = read_artifact(reference, kind)
        path = reference.resolve()
        name = f"{path.parent.name}-{path.name}"
        return Source(name, found.model_dir, kind, reference, found.manifest)
    # The model/ of a stage, whose manifest is one folder up.
    if reference.name == "model" and (reference.parent / MANIFEST).is_file():
        return find_source(reference.parent)
    if not (reference / "config.json").is_file():
        raise ArtifactError(
            f"{reference}: no finished stage and no model folder (neither {MANIFEST} nor "
            "config.json). Name runs/<recipe>/<stage>, or a folder saved by transformers"
        )
    kind = _kind_of(reference)
    check_folder(str(reference), causal=kind == "policy")
    return Source(_name_of(reference.resolve()), reference, kind, None, {})


def require_weights(model_dir: Path, endings: tuple[str, ...]) -> None:
    """Raise ArtifactError unless a model folder has weights in a file with one of these endings."""
    names = sorted(path.name for path in model_dir.iterdir())
    if not any(name.endswith(endings) for name in names):
        others = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".h5", ".msgpack"))]
        found = f"only {', '.join(others)}" if others else "no file of weights"
        raise ArtifactError(
            f"{model_dir}: found {found}; expected weights as {' or '.join(endings)}. Load the "
            "model with transformers and save it with save_pretrained, which writes safetensors"
        )


def base_model(source: Source) -> tuple[str, Path]:
    """Return the model to which the stage's adapter belongs: its name for others, and its folder.

    An adapter belongs to the weights from which its stage started. If a base stage imported these,
    the name is the hub id or folder that it imported.

    Raises:
        ArtifactError: the stage's start is not known or no longer exists.
    """
    assert source.artifact is not None
    start = source.manifest.get("inputs", {}).get("init", {}).get("path")
    if not isinstance(start, str):
        raise ArtifactError(
            f"{source.artifact}: its manifest does not name the model it started from. Name it "
            "with --base"
        )
    beside = source.artifact.parent / start
    folder = beside if (beside / MANIFEST).is_file() else Path(start)
    imported = read_manifest(folder).get("spec", {}).get("path")
    name = str(imported) if imported else str((folder / "model").resolve())
    return name, folder / "model"


def _name_of(folder: Path) -> str:
    """Return the name of a model folder; that of the hub's cache is named by a commit."""
    if folder.parent.name == "snapshots":
        return folder.parents[1].name.rpartition("--")[2]
    return folder.name


def _kind_of(folder: Path) -> Kind:
    config = read_json_object(folder / "config.json")
    if config is None:
        raise ArtifactError(f"{folder / 'config.json'}: cannot be read as JSON")
    if (folder / SCORER_FILE).is_file():
        return "reward_model"
    names = json.dumps(config.get("architectures") or [])
    return "classifier" if "ForSequenceClassification" in names else "policy"
