"""What a chat template writes at the beginning of a response, and which rewards see it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from small_tokenizers import byte_tokenizer

from align.core.types import Completion, Example
from align.data.render.chat import ChatFormat
from align.online.scoring import score_answers
from align.preflight.checks import examine
from align.preflight.rewards import reward_checks
from reward_models import build_reward
from reward_models.specs import read_spec

TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
)
HEADER = "{{ '<|im_start|>assistant\n' }}"
BEGINNINGS = {
    "none": (HEADER, ""),
    "open": (HEADER + "{{ '<think>\n' }}", "<think>\n"),
    "closed": (HEADER + "{{ '<think>\n\n</think>\n\n' }}", "<think>\n\n</think>\n\n"),
    "other tag": (HEADER + "{{ '<reasoning>' }}", "<reasoning>"),
    "special token that looks like a tag": ("{{ '<start_of_turn>model\n' }}", ""),
    "only if asked": (HEADER + "{% if think %}{{ '<think>\n' }}{% endif %}", ""),
}


def row_of(beginning: str, content: str = "2 + 2?", **example: object):
    template = TURNS + beginning + "{% endif %}"
    markers = ("<|im_start|>", "<|im_end|>", "<start_of_turn>")
    chat = ChatFormat(byte_tokenizer(template, eos="<|im_end|>", markers=markers))
    turns = [{"role": "user", "content": content}]
    return chat.prompt_row(Example(turns, source="x", **example))


@pytest.mark.parametrize("name", BEGINNINGS)
def test_the_prefill_is_what_follows_the_role(name: str) -> None:
    beginning, prefill = BEGINNINGS[name]
    assert row_of(beginning).prefill == prefill
    assert row_of(beginning, "a <think> of the user").prefill == prefill


def test_the_prefill_follows_the_rows_template_arguments() -> None:
    beginning, _ = BEGINNINGS["only if asked"]
    assert row_of(beginning, template_kwargs={"think": True}).prefill == "<think>\n"


def test_only_rewards_that_ask_see_the_prefill() -> None:
    rows = [row_of(BEGINNINGS["open"][0]), row_of(BEGINNINGS["none"][0])]
    said = [Completion((1,), (0.0,), "stop", "so</think>4", 0)] * 2
    pattern = r"(?s)<think>.*</think>.*"
    specs = [
        {"kind": "format", "pattern": pattern, "name": "whole", "prefill": True},
        {"kind": "format", "pattern": pattern, "name": "sampled"},
        {
            "kind": "ensemble",
            "prefill": True,
            "combine": "min",
            "name": "both",
            "members": [
                {"kind": "regex", "pattern": "^<think>"},
                {"kind": "regex", "pattern": "4$"},
            ],
        },
    ]
    found = score_answers(rows, said, [build_reward(spec) for spec in specs]).by_name
    assert found == {"whole": [1.0, 0.0], "sampled": [0.0, 0.0], "both": [1.0, 0.0]}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "scalar", "model": "rm", "prefill": True}, "its own chat template"),
        ({"kind": "process", "model": "rm", "prefill": True}, "its own chat template"),
        (
            {
                "kind": "ensemble",
                "members": [{"kind": "repetition", "prefill": True}, {"kind": "repetition"}],
            },
            "set it on the ensemble",
        ),
    ],
)
def test_prefill_without_effect_is_refused(spec: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_spec(spec)


def test_the_preflight_names_a_pattern_that_expects_the_prefill() -> None:
    rows = [row_of(BEGINNINGS["open"][0])] * 4
    said = [Completion((1,), (0.0,), "stop", text, 0) for text in ("a</think>b", "c", "d", "e")]
    for prefill, remedy in ((False, "Set prefill: true"), (True, "")):
        plain = {"kind": "format", "pattern": "(?s)<think>.*</think>.*", "prefill": prefill}
        spec, reward = read_spec(plain), build_reward(plain)
        checks = reward_checks(
            "reward", [spec], [reward], prompts=rows, answers=lambda: (rows, said)
        )
        (line,) = examine(checks)
        assert remedy in line.remedy
        assert bool(line.remedy) == bool(remedy)
