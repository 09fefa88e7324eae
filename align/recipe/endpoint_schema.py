"""Schema of a language model behind an OpenAI-compatible API."""

from typing import Annotated

from pydantic import Field

from align.recipe.parts import Count, Positive, Spec


class EndpointSpec(Spec):
    """Name a language model behind an OpenAI-compatible API, and how it is asked."""

    url: str
    """Base of the API, such as http://127.0.0.1:8000/v1."""
    model: str
    api_key_env: str | None = None
    """Environment variable that holds the key; None sends none."""
    max_tokens: Count = 256
    concurrency: Count = 8
    timeout_s: Positive = 60.0
    deadline_s: Positive = 3600.0
    retries: Annotated[int, Field(ge=0)] = 4
    cache: str | None = "runs/judge-cache"
    """Folder of the verdicts by the hash of what was asked; null keeps none."""
    dollars_per_million: tuple[float, float] = (0.0, 0.0)
    """Prices of a million prompt tokens and of a million answer tokens."""
