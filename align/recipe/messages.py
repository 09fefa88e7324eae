"""Turn pydantic's validation errors into lines with the place, the problem and the fix."""

import re
import types
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel

from align.core.text import shown, suggest
from align.recipe.recipe_text import odd_characters
from align.recipe.schema import Recipe
from align.recipe.source import Key, Mark, dotted, plain_scalar
from reward_models.specs import Variants

ALIASES = {
    "lr": "learning_rate",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "micro_tokens",
    "max_seq_length": "max_length",
    "model_name_or_path": "init",
    "model": "init",
    "dataset": "data",
    "datasets": "data",
    "lora_r": "rank",
    "r": "rank",
    "lora_alpha": "alpha",
    "target_modules": "targets",
    "init_kl_coef": "coef",
    "num_generations": "group_size",
    "n": "group_size",
    "mask_truncated_completions": "truncation",
    "epsilon": "low",
    "epsilon_high": "high",
    "max_completion_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "loss_type": "loss",
    "gpus": "ranks",
    "world_size": "ranks",
    "bf16": "dtype",
    "max_grad_norm_": "max_grad_norm",
    "gradient_clipping": "max_grad_norm",
}
"""Names of the same keys in other libraries; used for suggestions only."""

MOVED = {"lora": "write 'tuning: {method: lora, rank: ...}' instead"}
"""Keys of earlier versions, with their replacement."""

_WRITTEN = re.compile(r"(?P<number>[-+]?[0-9][0-9_]*(?:\.[0-9]+)?) ?(?P<unit>%|[kM]|)")
"""A number with underscores between its digits, in percent, or in thousands or millions."""
_POWERS = {"%": -2, "": 0, "k": 3, "m": 6}
_VARIABLE = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)")
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def describe(errors: Iterable[Mapping[str, Any]], marks: Mapping[Key, Mark]) -> list[str]:
    """Return one line per validation error.

    Args:
        errors: ``ValidationError.errors()`` of ``Recipe``.
        marks: place of each value in the recipe's files.

    Returns:
        ``file:line:column: dotted.path: what was found; what is expected`` lines.
    """
    # One line per key: the first error of a key explains the others.
    lines: dict[Key, str] = {}
    for error in errors:
        key, kind, owners = trace(error["loc"])
        what = _what(error, key, kind, owners=owners)
        if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
            key = (*key, error["ctx"]["discriminator"].strip("'"))
        # A union reports an error for each of its members; the first one is enough.
        lines.setdefault(key, f"{locate(key, error['type'], marks)}: {dotted(key)}: {what}")
    return list(lines.values())


def locate(key: Key, problem: str, marks: Mapping[Key, Mark]) -> str:
    """Return the place of a value; for a missing one, the place of the mapping around it."""
    whole = key
    while key and key not in marks:
        key = key[:-1]
    mark = marks.get(key, Mark("recipe"))
    at_key = problem == "extra_forbidden" or key != whole
    return mark.at_key() if at_key else mark.at_value()


def trace(loc: Sequence[str | int]) -> tuple[Key, Any, list[tuple[Key, type[BaseModel]]]]:
    """Follow pydantic's location through the schema, without the union tags that it contains.

    Returns:
        The key path in the recipe, the type that is expected there (None: unknown), and the
        models along the path with their own paths, outermost first.
    """
    key: list[str | int] = []
    kind: Any = Recipe
    union: Any = None
    owners: list[tuple[Key, type[BaseModel]]] = []
    for part in loc:
        kind, union = bare(kind), None
        # A base of variants: this part is the tag, not a key.
        if models := _variants_of(kind):
            kind = models.get(str(part))
            continue
        variants = _union_of(kind)
        # A plain union: a word is the label of the member that pydantic tried.
        if len(variants) > 1 and not isinstance(part, int):
            union = kind
            kind = next((v for v in variants if _label(v) == str(part).split("[")[0]), None)
            continue
        if len(variants) > 1:
            kind = next(v for v in variants if get_origin(v) is list)
        if _is_model(kind):
            owners.append((tuple(key), kind))
        kind = inner(kind, part)
        key.append(part)
    kind = bare(union or kind)
    if _is_model(kind):
        owners.append((tuple(key), kind))
    return tuple(key), kind, owners


def bare(kind: object) -> Any:
    """Return a type without ``Annotated`` and ``| None``."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, types.UnionType):
        rest = [a for a in get_args(kind) if a is not type(None)]
        if len(rest) == 1:
            return bare(rest[0])
    return kind


def _union_of(kind: object) -> list[Any]:
    """Return the members of a union, [] for any other type."""
    if get_origin(kind) not in (Union, types.UnionType):
        return []
    return [bare(a) for a in get_args(kind) if a is not type(None)]


def _variants_of(kind: object) -> dict[str, type[Variants]]:
    """Return the class of each ``kind`` (or ``method``) of a base of variants, {} for others."""
    return kind.__dict__.get("variants", {}) if _is_model(kind) else {}


def _is_model(kind: object) -> TypeGuard[type[BaseModel]]:
    """Return whether a type is a schema class with named keys."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def inner(kind: object, part: str | int) -> Any:
    """Return the type one step further along a key path, None if there is none."""
    if _is_model(kind):
        field = kind.model_fields.get(str(part))
        return field.annotation if field else None
    args = get_args(kind)
    if get_origin(kind) is dict:
        return args[1]
    if get_origin(kind) is list:
        return args[0]
    if get_origin(kind) is tuple and isinstance(part, int) and part < len(args):
        return args[part]
    return None


def _label(kind: object) -> str:
    origin = get_origin(kind)
    return "literal" if origin is Literal else getattr(origin or kind, "__name__", "")


def expected(kind: object) -> str:
    """Return a description of the values that a type accepts."""
    plain = bare(kind)
    if models := _variants_of(plain):
        return f"a mapping with '{plain.tag}' one of {', '.join(models)}"
    if variants := _union_of(plain):
        return " or ".join(expected(v) for v in variants)
    origin, args = get_origin(plain), get_args(plain)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(str(a) for a in args)
    if _is_model(plain):
        return f"a mapping with the keys {', '.join(plain.model_fields)}"
    if origin is list:
        return f"a list (each item {expected(args[0])})"
    if origin is tuple:
        return f"a list of {len(args)} ({', '.join(expected(a) for a in args)})"
    if origin is dict:
        return "a mapping"
    return _WORDS.get(plain, "another value")


def _what(
    error: Mapping[str, Any], key: Key, kind: object, *, owners: list[tuple[Key, type[BaseModel]]]
) -> str:
    problem, context, found = error["type"], error.get("ctx", {}), error.get("input")
    # Keys that should not be there, or are missing.
    if problem == "extra_forbidden":
        name = str(key[-1])
        return "unknown key" + (odd_characters(name) or _unknown_key(name, owners))
    if problem == "missing":
        return f"missing; expected {expected(kind)}"
    if problem == "union_tag_not_found":
        return f"missing; expected one of {_tags(kind)}"
    if problem == "union_tag_invalid":
        tags = list(_variants_of(kind))
        return (
            f"found '{context['tag']}'; expected one of {', '.join(tags)}"
            f"{suggest(str(context['tag']), tags)}"
        )
    # Values of the right type that are not allowed.
    if problem == "literal_error" and get_origin(kind) is Literal:
        options = [str(a) for a in get_args(kind)]
        return f"found {shown(found)}; expected {expected(kind)}{suggest(str(found), options)}"
    if problem == "value_error":
        return str(context["error"])
    if problem == "too_short":
        return f"found {context['actual_length']} items; expected at least {context['min_length']}"
    if problem == "string_too_long":
        return f"found {len(str(found))} characters; expected at most {context['max_length']}"
    if problem == "string_pattern_mismatch":
        odd = odd_characters(str(found))
        return (
            f"found {shown(found)}; expected letters, digits, '_', and then also '.' and '-'{odd}"
        )
    if bound := _bound(context):
        number = bare(kind) if bare(kind) in _WORDS else float
        return f"found {shown(found)}; expected {_WORDS[number]} {bound}"
    # Values of another type.
    if problem.endswith(("_type", "_parsing", "_from_float", "_size")) or _union_of(kind):
        numbers = [k for k in (kind, *_union_of(kind)) if k in (int, float)]
        hint = _as_number(found, numbers[0]) if numbers else ""
        if key == ("stages",) and isinstance(found, list):
            hint = " of each stage's name to its settings"
        return f"found {shown(found)}; expected {expected(kind)}{hint}"
    return f"found {shown(found)}; {error['msg']}"


def _bound(context: Mapping[str, Any]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return next(
        (f"{sign} {_number(context[name])}" for name, sign in signs.items() if name in context), ""
    )


def _number(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _as_number(found: object, kind: type) -> str:
    """Return how to write a value where a number is expected; "" if no number can be meant."""
    if isinstance(found, float) and found.is_integer():
        return f"; write {found:.0f}"
    if not isinstance(found, str):
        return ""
    text = found.strip().replace("−", "-")
    if _reads_as_number(text):
        # It has quotes around it, or a minus of typography.
        return "; remove the quotes" if text == found else f"; write {text}"
    if meant := _WRITTEN.fullmatch(text):
        number, unit = meant["number"].replace("_", ""), meant["unit"]
        exact = Decimal(number).scaleb(_POWERS[unit.lower()])
        if abs(exact) < 2**63 and (kind is float or exact == int(exact)):
            return f"; write {exact.normalize():f}"
    if re.fullmatch(r"0[xX][0-9a-fA-F]{1,15}", text):
        return f"; write {int(text, 16)}"
    if variable := _VARIABLE.fullmatch(text):
        return f"; write ${{{variable[1]}}} for the value of an environment variable"
    return ""


def _reads_as_number(text: str) -> bool:
    try:
        value = plain_scalar(text)
    except ValueError:  # beyond the limits of a recipe
        return False
    return isinstance(value, int | float) and not isinstance(value, bool)


def _tags(kind: object) -> str:
    return ", ".join(_variants_of(kind))


def _unknown_key(name: str, owners: list[tuple[Key, type[BaseModel]]]) -> str:
    if not owners:
        return ""
    if name in MOVED and "tuning" in owners[-1][1].model_fields:
        return f"; {MOVED[name]}"
    # Look for the key where people misplace it: here, in a block below, in a block above.
    _, model = owners[-1]
    wanted = ALIASES.get(name, name)
    fields = list(model.model_fields)
    if wanted in fields:
        return f"; did you mean '{wanted}'?"
    below = _nested_keys(model)
    for path in below:
        if path.rpartition(".")[2] == wanted:
            return f"; did you mean '{path}'?"
    for outer_key, outer in reversed(owners[:-1]):
        if wanted in outer.model_fields:
            return f"; did you mean '{dotted((*outer_key, wanted))}'?"
    return suggest(name, fields) or suggest(name, below) or f"; expected one of {', '.join(fields)}"


def _nested_keys(model: type[BaseModel]) -> list[str]:
    """Return the dotted keys of all models nested in a model."""
    found = []
    for name, field in model.model_fields.items():
        kind = bare(field.annotation)
        for inner_model in _variants_of(kind).values() or [kind] * _is_model(kind):
            found += [f"{name}.{inside}" for inside in inner_model.model_fields]
            found += [f"{name}.{inside}" for inside in _nested_keys(inner_model)]
    return list(dict.fromkeys(found))
