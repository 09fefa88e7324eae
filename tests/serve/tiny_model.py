"""A tiny chat model for the server, and rows for each method."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = ("sun", "moon", "star", "rain", "snow", "wind", "fog", "hail", "dew", "ice", "sea", "sky")
METHODS = ("supervised", "dpo", "reinforcement")
JOB_KEYS = (
    *(f"{method}.max_length=96" for method in METHODS),
    *(f"{method}.micro_tokens=512" for method in METHODS),
    "reinforcement.sampling.max_new_tokens=8",
    "reinforcement.sampling.engine=hf",
    "reinforcement.group_size=2",
)
"""Settings with which a job takes seconds."""


def save_model(folder: Path) -> Path:
    """Save a random model of 2 layers whose tokens are bytes."""
    from tests.unit.small_models import small_llama
    from tests.unit.small_tokenizers import byte_tokenizer

    tokenizer = byte_tokenizer(TEMPLATE, eos="<|im_end|>")
    small_llama(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def jsonl(rows: Sequence[Any]) -> bytes:
    """Return rows as a JSONL file."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def user(text: str) -> dict[str, str]:
    """Return a message of the user."""
    return {"role": "user", "content": text}


def reply(text: str) -> dict[str, str]:
    """Return a message of the assistant."""
    return {"role": "assistant", "content": text}


SUPERVISED = [{"messages": [user(f"Say {word}."), reply(word)]} for word in WORDS]
DPO = [
    {
        "input": {"messages": [user(f"Say {word}.")]},
        "preferred_output": [reply(word)],
        "non_preferred_output": [reply("no")],
    }
    for word in WORDS
]
REINFORCEMENT = [{"messages": [user(f"Say {w}.")], "reference_answer": w} for w in WORDS]
GRADER = {
    "type": "text_similarity",
    "name": "close",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.reference_answer }}",
    "evaluation_metric": "fuzzy_match",
}
