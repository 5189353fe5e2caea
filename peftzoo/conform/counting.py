"""The number of trained parameters against the formula that a method gives for it.

`count_formula` is a sum of terms, separated by semicolons, each with the name of what it is summed over:

    layers: r * (in + out)          every adapted layer; a term without a name means this too
    roles: r * (in + out)           every role and shape among them, once
    blocks: n                       every block of the model that has an adapted layer
    model: d                        once

Names in a term: the options; `in`, `out` and `role` of the layer; of all adapted layers `sum_in`, `sum_out`,
`widest_in`, `widest_out`, `gcd_widths`, and how many `layers` and `blocks` there are; of the model `width`,
`heads`, `kv_heads`, `head_dim`, and how many numbers are in it, `all_parameters`, or in its normalisation
layers, `all_norms`. There are + - * / // % **, comparisons, `a if b else c`, `or`, `and`, `not`, and the
functions min, max, ceil, gcd, has(list, item) and divisor(n), the largest divisor up to the square root.
Nothing else is evaluated.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from peftzoo.adapters import Attached
from peftzoo.conform.cases import ARCHS, Case, Skip, build, with_options
from peftzoo.conform.options import Options, accepted, describe, named_sets, other_values, values_of
from peftzoo.conform.rules import check
from peftzoo.contract import LINEAR, Adapter, Site, norm_parameters
from peftzoo.errors import UserError

SCOPES = ("layers", "roles", "blocks", "model")


def divisor(n: int) -> int:
    """The largest divisor of n up to its square root."""
    return max(m for m in range(1, math.isqrt(n) + 1) if n % m == 0)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "min": min, "max": max, "ceil": math.ceil, "gcd": math.gcd, "divisor": divisor, "has": operator.contains,
}  # fmt: skip
OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.Not: operator.not_,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
LARGEST_POWER = 16


def evaluate(text: str, names: dict[str, Any]) -> Any:
    """The value of a formula. Raises `ValueError` for what is no formula or has an unknown name."""
    try:
        tree = ast.parse(re.sub(r"\bin\b", "in_", text.strip()), mode="eval")
    except SyntaxError:
        raise ValueError(f"{text.strip()!r} is no formula") from None
    return _value(tree.body, names | {"in_": names.get("in")})


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    """The value of one node of the formula's tree."""
    match node:
        case ast.Constant(value=int() | float() | str() as value):
            return value
        case ast.Name(id=name):
            if name not in names:
                known = ", ".join(sorted(n for n in names if n != "in_"))
                raise ValueError(f"the name {name!r} is unknown, there are {known}")
            return names[name]
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            base, power = _value(left, names), _value(right, names)
            if abs(power) > LARGEST_POWER:
                raise ValueError(f"the power {power} is too large, at most {LARGEST_POWER}")
            return base**power
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left, names), _value(right, names))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(operand, names))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left, names), _value(right, names))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _value(body if _value(test, names) else orelse, names)
        case ast.BoolOp(op=op, values=[*parts, last]):
            for part in parts:
                if bool(value := _value(part, names)) == isinstance(op, ast.Or):
                    return value
            return _value(last, names)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](*(_value(a, names) for a in args))
    raise ValueError(f"{ast.unparse(node)!r} is not allowed in a formula")


def expected_count(formula: str, handle: Attached) -> int:
    """The count that the formula gives for an attached method. Raises `ValueError` for a bad formula."""
    common, total = _model_names(handle), 0
    layers = [{"in": s.shape[1], "out": s.shape[0], "role": s.role} for s in _linear(handle)]
    for term in formula.split(";"):
        scope, colon, text = term.rpartition(":")
        if (scope := scope.strip() if colon else "layers") not in SCOPES:
            raise ValueError(f"{scope!r} is none of {', '.join(SCOPES)}")
        places = {
            "layers": layers,
            "roles": [dict(t) for t in dict.fromkeys(tuple(p.items()) for p in layers)],
            "blocks": [{} for _ in range(common["blocks"])],
            "model": [{}],
        }[scope]
        total += sum(evaluate(text, common | place) for place in places)
    return total


def _linear(handle: Attached) -> list[Site]:
    return [s for s in handle.sites if s.kind == LINEAR]


def _model_names(handle: Attached) -> dict[str, Any]:
    """The options, and the sizes of the model."""
    model, linear = handle.model, _linear(handle)
    config, own = model.config.get_text_config(), dict(model.named_parameters())
    shapes, heads = [s.shape for s in linear] or [(0, 0)], config.num_attention_heads
    return dict(handle.adapter.config) | {
        "sum_in": sum(i for _, i in shapes),
        "sum_out": sum(o for o, _ in shapes),
        "widest_in": max(i for _, i in shapes),
        "widest_out": max(o for o, _ in shapes),
        "gcd_widths": math.gcd(*(n for shape in shapes for n in shape)),
        "layers": len(linear),
        "blocks": len({s.layer for s in handle.sites if s.layer >= 0}),
        "width": config.hidden_size,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "all_parameters": sum(p.numel() for p in own.values()),
        "all_norms": sum(own[n].numel() for n in norm_parameters(model)),
    }


@check(once=True)
def check_count_formula(case: Case) -> None:
    """`count_formula` gives the trained count, on all architectures and with every option changed."""
    if not (formula := case.cls.count_formula):
        raise Skip("the method gives no count_formula")
    for label, options in _option_sets(case.cls):
        for arch in ARCHS:
            if not (handle := _on_shapes(case.cls, options, arch)):
                continue
            names = f"{arch}{', ' if label else ''}{label}"
            try:
                wanted = expected_count(formula, handle)
            except (ValueError, TypeError, ArithmeticError) as error:
                raise AssertionError(f"count_formula {formula!r}, {names}: {error}") from error
            finally:
                handle.detach()
            got = handle.trainable_count()
            assert got == wanted, f"count_formula {formula!r} gives {wanted}, trained are {got} ({names})"


@functools.lru_cache
def _shapes(arch: str) -> nn.Module:
    """A model of the architecture without weights; whoever attaches to it detaches again."""
    with torch.device("meta"):
        return build(arch)


def _on_shapes(cls: type[Adapter], options: Options, arch: str) -> Attached | None:
    """The method attached to a model without weights; None where it refuses the options or the model."""
    if not accepted(cls, options):
        return None
    case = Case(with_options(cls, options), arch)
    try:
        return case.attach(_shapes(arch), install=False)
    except UserError:
        return None


def _option_sets(cls: type[Adapter]) -> list[tuple[str, Options]]:
    """No change, the named sets, and one other value of every further option."""
    sets = [("", {}), *named_sets(cls)]
    for name in cls.Config.model_fields:
        if not values_of(cls, name):
            possible = [{name: v} for v in other_values(cls, name) if accepted(cls, {name: v})]
            sets += [(describe(o), o) for o in possible[:2]]
    return sets
