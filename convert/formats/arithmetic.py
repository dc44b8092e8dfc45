"""Evaluates `${eval:...}` of a configuration, if it is arithmetic on constants.

UVA registers Python's `eval` as a resolver of OmegaConf and writes latencies and frame indices with
it. Here no code runs: the expression's syntax tree is interpreted, and only numbers, texts, lists,
the operators of arithmetic and comparison, and a few functions of numbers are allowed.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable

MAX_CHARACTERS = 1000
MAX_ITEMS = 10_000  # of a list
_MAX_NUMBER = 2.0**63

_BINARY: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: math.pow,
}
_UNARY: dict[type, Callable] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}
_COMPARE: dict[type, Callable] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def _range(*bounds: int) -> list[int]:
    found = range(*bounds)
    if len(found) > MAX_ITEMS:
        raise ValueError("a range is too long")
    return list(found)


# `ListConfig` is OmegaConf's list, which UVA's expressions name.
_FUNCTIONS: dict[str, Callable] = {
    **{kind.__name__: kind for kind in (int, float, bool, list, tuple)},
    **{f.__name__: f for f in (abs, max, min, round, sum, len)},
    "range": _range,
    "ListConfig": list,
}


def evaluate(expression: str) -> object:
    """Returns the value of an expression on constants: a number, a text, or a list.

    Raises:
      ValueError: the expression is anything else, or its value is too large.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"it has more than {MAX_CHARACTERS} characters")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ValueError(str(error) or type(error).__name__) from None
    return list(value) if isinstance(value, tuple) else value


def _value(node: ast.expr) -> object:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value if isinstance(value, str | None) else _number(value)
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_value(part) for part in parts]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _number(_UNARY[type(op)](_number(_value(operand))))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _binary(op, _value(left), _value(right))
        case ast.BoolOp(op=op, values=parts):
            found = [_value(part) for part in parts]
            stops = (lambda x: x) if isinstance(op, ast.Or) else operator.not_
            return next((value for value in found if stops(value)), found[-1])
        case ast.Compare(left=left, ops=ops, comparators=others):
            if all(type(op) in _COMPARE for op in ops):
                values = [_value(left), *map(_value, others)]
                pairs = zip(ops, values, values[1:], strict=False)
                return all(_COMPARE[type(op)](a, b) for op, a, b in pairs)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _value(body if _value(test) else orelse)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            found = _FUNCTIONS[name](*map(_value, args))
            return found if isinstance(found, list | tuple) else _number(found)
    raise ValueError("it is not arithmetic on constants")


def _binary(op: ast.operator, left: object, right: object) -> object:
    if isinstance(op, ast.Add) and isinstance(left, list) and isinstance(right, list):
        if len(left) + len(right) > MAX_ITEMS:
            raise ValueError("a list is too long")
        return left + right
    value = _BINARY[type(op)](_number(left), _number(right))
    whole = isinstance(op, ast.Pow) and isinstance(left, int) and isinstance(right, int)
    return _number(int(value) if whole and right >= 0 and value < 2**53 else value)


def _number(value: object) -> bool | int | float:
    if not isinstance(value, bool | int | float):
        raise ValueError(f"{value!r:.40} is not a number")
    if not abs(value) < _MAX_NUMBER:  # also true for NaN
        raise ValueError("its value is too large or not a number")
    return value
