"""Parse YAML of unknown origin within limits: a few lines of aliases can stand for gigabytes."""

from dataclasses import dataclass
from typing import Any

import yaml


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a text: its characters, nesting depth, and values with aliases expanded."""

    characters: int = 2**20
    depth: int = 40
    values: int = 50_000


def load(text: str, limits: Limits) -> Any:
    """Return the plain data of a YAML text.

    Raises:
        yaml.YAMLError: the text is not YAML, or exceeds a limit.
        ValueError: a date or number in it does not exist.
    """
    node = compose(text, yaml.SafeLoader, limits)
    return None if node is None else yaml.SafeLoader("").construct_document(node)


def compose(text: str, loader: type[yaml.SafeLoader], limits: Limits) -> yaml.Node | None:
    """Return the YAML node of a text.

    Raises:
        yaml.MarkedYAMLError: the text is not YAML, or exceeds a limit.
    """
    if len(text) > limits.characters:
        problem = f"{len(text):,} characters; expected at most {limits.characters:,}"
        raise yaml.MarkedYAMLError(problem=problem)
    depth = 0
    # Events need no recursion; composing deeply nested nodes would overflow libyaml's stack.
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > limits.depth:
            raise yaml.MarkedYAMLError(
                problem=f"nested more than {limits.depth} deep", problem_mark=event.start_mark
            )
    root = yaml.compose(text, Loader=loader)
    if root is not None:
        _check_expansion(root, {}, limits)
    return root


def _check_expansion(
    node: yaml.Node, known: dict[int, tuple[int, int]], limits: Limits
) -> tuple[int, int]:
    """Return the values and the depth of a node with aliases expanded, without expanding them.

    An alias names an earlier node, so each node is counted once.
    """
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = (1, 1)  # for an alias that contains itself, which the reader reports
    if isinstance(node, yaml.ScalarNode):
        return 1, 1
    values = [v for _, v in node.value] if isinstance(node, yaml.MappingNode) else node.value
    inside = (_check_expansion(value, known, limits) for value in values)
    counts, depths = zip((0, 0), *inside, strict=True)
    count, depth = 1 + sum(counts), 1 + max(depths)
    if count > limits.values or depth > limits.depth:
        is_large = count > limits.values
        limit = f"{limits.values:,} values" if is_large else f"{limits.depth} levels"
        problem = f"more than {limit} once aliases are expanded; write a smaller file"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    known[id(node)] = count, depth
    return count, depth
