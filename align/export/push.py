"""Upload a model to the Hugging Face Hub: weights, settings and card in one commit."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.core.artifacts import read_json_object
from align.core.errors import ArtifactError
from align.core.model_card import CARD, is_on_hub, stage_card
from align.core.text import is_secret_name
from align.export.folder import RECORD, changed_files, is_export
from align.export.source import find_source, require_weights
from align.tuning.files import CONFIG, refuse_unmerged

_WEIGHTS = (".safetensors", ".gguf")
_ENDS = (*_WEIGHTS, ".json", ".jinja", ".txt", ".model", ".md")
_NAMES = ("Modelfile",)
_STATE = re.compile(r"optimizer|scheduler|rng_state|trainer_state|training_args|checkpoint")
_TOKENS = re.compile(
    rb"hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{36}|AKIA[0-9A-Z]{16}"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_REPO = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Upload:
    """One file to upload: its name in the repository and its bytes on the disk or in memory."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Return the size in bytes."""
        found = self.content
        return len(found) if isinstance(found, bytes) else found.stat().st_size


def plan_push(reference: Path) -> tuple[list[Upload], list[str]]:
    """Return the files of a stage, model folder or export to upload, and the names left out.

    Raises:
        ArtifactError: files are damaged, missing, or contain a secret; or an adapter belongs to a
            folder of this machine.
    """
    if is_export(reference):
        if changed := changed_files(reference):
            raise ArtifactError(f"{reference}: changed after the export: {'; '.join(changed[:3])}")
        _refuse_local_base(reference)
        folder, card = reference, None
    else:
        source = find_source(reference)
        refuse_unmerged(source.model_dir, "align push (use align export --format adapter)")
        folder = source.model_dir
        require_weights(folder, _WEIGHTS)
        card = None if source.artifact is None else stage_card(source.artifact, source.manifest)
    found, left_out = [], []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if not _is_model_file(name):
            left_out.append(name)
        elif name != CARD or card is None:
            found.append(Upload(name, path))
    if card is not None:
        found.append(Upload(CARD, card.encode()))
    for told in _secrets(found):
        raise ArtifactError(f"{folder}: {told}. Nothing was uploaded; remove it from the file")
    return sorted(found, key=lambda upload: upload.name), left_out


def _refuse_local_base(export: Path) -> None:
    """Raise ArtifactError if an exported adapter names a base model that only this machine has."""
    config = read_json_object(export / CONFIG) or {}
    base = str(config.get("base_model_name_or_path", ""))
    if (export / CONFIG).is_file() and not is_on_hub(base):
        raise ArtifactError(
            f"{export / CONFIG}: the adapter's base model is {base or 'not named'}, a folder of "
            "this machine. Nothing was uploaded. Push the base model, and export the adapter with "
            "--base ORG/NAME"
        )


def _is_model_file(name: str) -> bool:
    known = name.endswith(_ENDS) or name in _NAMES
    return known and name != RECORD and "/" not in name and not _STATE.search(name.lower())


def _secrets(uploads: Sequence[Upload]) -> Iterator[str]:
    """Yield one line for each text file that contains a secret, without the secret."""
    values = {
        name: value.encode()
        for name, value in os.environ.items()
        # A shorter value could be in a file by chance.
        if is_secret_name(name) and len(value) >= 8
    }
    for upload in uploads:
        if upload.name.endswith(_WEIGHTS):
            continue
        content = upload.content
        text = content if isinstance(content, bytes) else content.read_bytes()
        for name, value in values.items():
            if value in text:
                yield f"{upload.name} contains the value of ${name}"
        if _TOKENS.search(text):
            yield f"{upload.name} contains an access token or a private key"


def push(
    uploads: Sequence[Upload], repo: str, *, private: bool, revision: str | None, message: str
) -> str:
    """Create the repository if needed, upload all files in one commit, and return its address.

    Raises:
        ArtifactError: the hub refused, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_repo(repo)
    api = HfApi()
    operations = [CommitOperationAdd(u.name, u.content) for u in uploads]
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done: Any = api.create_commit(repo, operations, commit_message=message, revision=revision)
    # The client raises its own types, those of httpx, and OSError.
    except Exception as error:
        told = " ".join(str(error).split())[:300]
        raise ArtifactError(
            f"{repo}: not uploaded: {type(error).__name__}: {told}. Log in with a token that may "
            "write (hf auth login, or HF_TOKEN), and check the name"
        ) from error
    return str(done.commit_url)


def check_repo(repo: str) -> None:
    """Raise ArtifactError unless a name is ORG/NAME."""
    if not _REPO.fullmatch(repo):
        raise ArtifactError(f"{repo}: expected ORG/NAME, such as my-org/quickstart-dpo")
