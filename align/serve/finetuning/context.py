"""What every route of the API is given."""

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.serve.services import Services
from align.serve.settings import Settings
from align.serve.store import Store

if TYPE_CHECKING:
    from align.serve.finetuning.files import Files
    from align.serve.finetuning.generation import Generators


@dataclass(frozen=True, slots=True)
class Api:
    """Services and parts of the API.

    Attributes:
        services: of the server.
        files: contents of files.
        generators: processes that generate text.
        wake: set when the queue has something to do.
        me: dependency that returns who sends a request, counted against the rate limit.
    """

    services: Services
    files: "Files"
    generators: "Generators"
    wake: threading.Event
    me: Any

    @property
    def settings(self) -> Settings:
        """Settings of the server."""
        return self.services.settings

    @property
    def store(self) -> Store:
        """The database."""
        return self.services.store
