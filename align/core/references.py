"""Find the model that a command names: RUN/STAGE, a folder, or a hub id."""

from pathlib import Path

from align.core.artifacts import MANIFEST, read_manifest
from align.core.errors import ArtifactError
from align.core.text import is_hub_id

CONFIGS = ("config.json", "adapter_config.json")
"""Files that make a folder one of transformers, or of an adapter."""
WEIGHTS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "pytorch_model*")
"""Files that are loaded from the hub; no code."""


def find_model(name: str, runs: Path = Path("runs")) -> Path:
    """Return the place of a model: a folder that exists, or the path whose text is a hub id.

    Args:
        name: ``RUN/STAGE`` below ``runs``, the folder of a finished stage or of a model saved by
            transformers, or a hub id.
        runs: folder of the runs.

    Raises:
        ArtifactError: it is none of these; the message is the same for every command.
    """
    # A path that begins at the root or at a folder above is none below the runs.
    first, slash, _ = name.removeprefix(f"{runs}/").partition("/")
    may_be_run = first not in ("", ".") and ".." not in Path(name).parts
    for place in (Path(name), runs / name) if may_be_run else (Path(name),):
        if any((place / file).is_file() for file in (MANIFEST, *CONFIGS)):
            return place
    # The name of a run that exists never means the hub.
    run = runs / first
    if slash and may_be_run and run.is_dir():
        done = sorted(path.parent.name for path in run.glob(f"*/{MANIFEST}"))
        listed = f"finished are {', '.join(done)}" if done else "none is finished"
        raise ArtifactError(f"{name}: {run} has no such finished stage; {listed}")
    if Path(name).exists():
        raise ArtifactError(
            f"{name}: no {MANIFEST} and no config.json in it; expected the folder of a finished "
            "stage, or one saved by transformers"
        )
    if is_hub_id(name) and not name.startswith(f"{runs}/"):
        return Path(name)
    raise ArtifactError(
        f"{name}: no such model; expected RUN/STAGE (looked in {runs}), the folder of a finished "
        "stage or of a transformers model, or a hub id ORG/NAME"
    )


def artifact_kind(place: Path) -> str | None:
    """Return the kind of the artifact in a folder, None if the place is none."""
    return str(read_manifest(place).get("kind")) if (place / MANIFEST).is_file() else None
