"""Say what is wrong with a YAML text in words for people who write recipes."""

import yaml

PROBLEMS = {
    "found character that cannot start any token": "a tab, or a character such as @, % or ` at "
    "the start of a value. Indent with spaces, and put such a value in quotes",
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
    "found unexpected end of stream": "the quote that begins{line} is not closed",
    "found undefined alias": "'*NAME' refers to no '&NAME'. Put a text that begins with * in "
    "quotes",
    "found unknown escape character": "unknown escape in double quotes. Use single quotes, which "
    "have none",
    "did not find expected <document start>": "text after the end of the recipe. A recipe is one "
    "mapping of keys to values",
    "but found another document": "'---' begins a second document; a recipe is one",
}
"""Meaning of the parser's messages; ``{line}`` is where the construct begins."""


def yaml_problem(error: yaml.MarkedYAMLError) -> str:
    """Return what is wrong and what to do; the parser's own words where none are known."""
    known = PROBLEMS.get(error.problem or "")
    if known is None:
        return " ".join(part for part in (error.context, error.problem) if part)
    begin = error.context_mark
    return known.format(line=f" in line {begin.line + 1}" if begin is not None else "")
