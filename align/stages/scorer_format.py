"""How a scorer's rows are rendered: as chat for a decoder, as a pair of texts for an encoder."""

from align.core.artefacts import Artefact
from align.data.chat import ChatFormat
from align.data.paired import PairedFormat
from align.models.loading import load_tokenizer
from align.stages.base import chat_format
from reward_models.scalar import reads_first

RowFormat = ChatFormat | PairedFormat


def scorer_format(artefact: Artefact) -> RowFormat:
    """Give the renderer of a scorer, or of the policy or encoder that one begins from."""
    if artefact.manifest["kind"] == "encoder" or reads_first(artefact.model_dir):
        return PairedFormat(load_tokenizer(artefact.model_dir))
    return chat_format(artefact.model_dir)
