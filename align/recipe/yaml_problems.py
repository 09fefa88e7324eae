"""Explain mistakes in YAML to people who write recipes."""

import yaml

UNCLOSED_QUOTE = "found unexpected end of stream"
PROBLEMS = {
    "found character that cannot start any token": "a tab or a value that begins with a character "
    "such as @, % or `. Indent with spaces, and put such a value in quotes",
    "found a tab character that violates indentation": "a tab. Indent with spaces",
    "mapping values are not allowed in this context": "a second ':' in one entry, or a line that "
    "is indented too far. Put a text that contains ': ' in quotes",
    "did not find expected ',' or ']'": "the list that begins with '['{line} is not closed",
    "did not find expected ',' or '}'": "the mapping that begins with '{{'{line} is not closed",
    "did not find expected node content": "a value is missing, or a bracket is not closed",
    "could not find expected ':'": "the key{line} has no ':'",
    "did not find expected key": "the line is indented differently from the other keys of its "
    "mapping, which begins{line}",
    "did not find expected '-' indicator": "the entries of a list begin with '- ' at the same "
    "indentation; this line does not",
    UNCLOSED_QUOTE: "this quote is not closed",
    "found undefined alias": "'*NAME' refers to no '&NAME'. Put a text that begins with * in "
    "quotes",
    "found unknown escape character": "unknown escape in double quotes. Use single quotes, which "
    "have none",
    "did not find expected <document start>": "text after the end of the recipe. A recipe is one "
    "mapping of keys to values",
    "but found another document": "'---' begins a second document; a recipe is one",
}
"""Meaning of the parser's messages; ``{line}`` is where the construct begins."""


def place_of(error: yaml.MarkedYAMLError) -> yaml.Mark | None:
    """Return where to look for a mistake: of a quote that is not closed, its beginning."""
    if error.problem == UNCLOSED_QUOTE and error.context_mark is not None:
        return error.context_mark
    return error.problem_mark or error.context_mark


def yaml_problem(error: yaml.MarkedYAMLError) -> str:
    """Return what is wrong and what to do, or the parser's own words for an unknown problem."""
    known = PROBLEMS.get(error.problem or "")
    if known is None:
        return " ".join(part for part in (error.context, error.problem) if part)
    begin = error.context_mark
    return known.format(line=f" in line {begin.line + 1}" if begin is not None else "")
