"""Arithmetic that others write: numbers, names, operators and a few functions, nothing else."""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

MAX_CHARACTERS = 2000
MAX_NODES = 300
MAX_EXPONENT = 100.0
OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul},
    **{ast.Div: operator.truediv, ast.Mod: operator.mod, ast.Pow: operator.pow},
    **{ast.USub: operator.neg, ast.UAdd: operator.pos},
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{"min": min, "max": max, "abs": abs, "floor": math.floor, "ceil": math.ceil},
    **{"exp": math.exp, "sqrt": math.sqrt, "log": math.log},
}


class FormulaError(ValueError):
    """A formula that cannot be read, or has no finite value."""


class Formula:
    """A formula over named numbers, such as ``0.8 * a + 0.2 * min(b, 1)``; ``^`` is a power.

    Args:
        text: the formula.

    Attributes:
        names: the numbers that it needs.

    Raises:
        FormulaError: it is more than arithmetic.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MAX_CHARACTERS:
            raise FormulaError(f"longer than {MAX_CHARACTERS} characters")
        try:
            self._tree = ast.parse(text.replace("^", "**").strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise FormulaError(f"cannot be read: {error}") from None
        if sum(1 for _ in ast.walk(self._tree)) > MAX_NODES:
            raise FormulaError(f"more than {MAX_NODES} parts")
        self.names: set[str] = set()
        self._check(self._tree)

    def _check(self, node: ast.AST) -> None:
        """Raise if a part is not allowed; collect the names."""
        match node:
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                pass
            case ast.Name(id=name):
                self.names.add(name)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                self._check(left)
                self._check(right)
            case ast.UnaryOp(op=op, operand=inner) if type(op) in OPERATORS:
                self._check(inner)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
                for inner in args:
                    self._check(inner)
            case _:
                found = ast.unparse(node)[:60]
                known = ", ".join(FUNCTIONS)
                raise FormulaError(
                    f"{found!r}: expected numbers, names, + - * / % ^ and the functions {known}"
                )

    def __call__(self, values: Mapping[str, float]) -> float:
        """Return the value for these numbers.

        Raises:
            FormulaError: a name is missing, or there is no finite value.
        """
        try:
            found = float(self._value(self._tree, values))
        except KeyError as error:
            raise FormulaError(f"there is no grader named {error}") from None
        except (ArithmeticError, ValueError, TypeError) as error:
            raise FormulaError(f"it has no value: {error}") from None
        if not math.isfinite(found):
            raise FormulaError(f"its value is {found}")
        return found

    def _value(self, node: ast.AST, values: Mapping[str, float]) -> float:
        match node:
            case ast.Constant(value=int() | float() as value):
                return float(value)
            case ast.Name(id=name):
                return float(values[name])
            case ast.UnaryOp(op=op, operand=inner):
                return OPERATORS[type(op)](self._value(inner, values))
            case ast.Call(func=ast.Name(id=name), args=args):
                return FUNCTIONS[name](*(self._value(arg, values) for arg in args))
        assert isinstance(node, ast.BinOp), node
        left, right = self._value(node.left, values), self._value(node.right, values)
        # Larger exponents mostly overflow, and a power of a negative number may be complex.
        if isinstance(node.op, ast.Pow) and (abs(right) > MAX_EXPONENT or left < 0):
            raise ValueError(f"{left} ^ {right} is out of range")
        return OPERATORS[type(node.op)](left, right)
