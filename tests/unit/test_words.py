"""Text for users is American English with the field's terms: a short list of words is out.

The list has what a reader of the first version stumbled over. docs/glossary.md has the terms.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CHANGELOG.md", "SECURITY.md", "CONTRIBUTING.md", "recipes/README.md")
BANNED = {
    r"\bstands?\b(?! for|-in|alone)": "is, appears",
    r"\bbrings? in\b": "loads, imports",
    r"\bmade data\b": "synthetic dataset",
    r"\bhas to be\b": "must be",
    r"\bask again\b": "run again",
    r"\bsuch (?:a )?thing\b": "unknown key, missing file",
    r"\bthe share of\b": "the fraction of",
    r"(?<=\w )(?<!there )(?:is|are|was|were) no (?!longer|better|more|less|worse|different)[a-z]": (
        "is not a, means no"
    ),
    r"\banew\b": "again",
    r"\bone a line\b": "one per line",
    r"\bartefact": "artifact",
    r"\b(?:be|mis)?behaviour": "behavior",
    r"\b(?:un)?favour": "favor",
    r"\bneighbour": "neighbor",
    r"\blabell(?:ed|ing)": "labeled, labeling",
    r"\bmodell(?:ed|ing)": "modeled, modeling",
    r"\bcancell(?:ed|ing)": "canceled, canceling",
    r"\bwhilst\b": "while",
    r"\b\w*(?:al|ar|or|er|im|in|ens|oken|rgan|ecogn)is(?:e[ds]?|ing|ation)\b": "-ize",
}
"""Pattern: what to write instead."""
KNOWN = re.compile(
    r"align\.core\.artefacts|`normalise`|`overoptimise`"
    r"|otherwise|precis|exercis|promis|surpris|comparis"
)


def user_strings() -> Iterator[tuple[str, str]]:
    """Yield (place, text) of the code's strings, docstrings of commands included."""
    for path in [*(ROOT / "align").rglob("*.py"), *(ROOT / "reward_models").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node.value


def page_lines() -> Iterator[tuple[str, str]]:
    for path in [*(ROOT / name for name in PAGES), *(ROOT / "docs").rglob("*.md")]:
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            yield f"{path.relative_to(ROOT)}:{i}", line


def found_in(text: str) -> list[str]:
    return [
        f"'{match.group(0)}' (write: {instead})"
        for pattern, instead in BANNED.items()
        for match in re.finditer(pattern, text, re.IGNORECASE)
        if not KNOWN.search(text[max(0, match.start() - 12) : match.end() + 12])
    ]


def test_no_banned_word_in_texts_for_users() -> None:
    wrong = [
        f"{place}: {word}"
        for place, text in [*user_strings(), *page_lines()]
        for word in found_in(text)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_list_finds_what_it_is_for() -> None:
    wrong = ("what stands in the row", "the behaviour", "normalised", "the share of rows")
    for text in (*wrong, "gray is no significant difference", "they are no independent evidence"):
        assert found_in(text), text
    fine = ("it stands for a value", "otherwise", "a standalone file", "the behavior")
    for text in (*fine, "There is no GPU", "it is no longer used", "is no better than chance"):
        assert not found_in(text), text
