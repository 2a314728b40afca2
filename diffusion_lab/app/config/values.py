"""Does a value from YAML fit an annotation, as far as the source text tells?

Simple annotations (int, float, bool, str, None, Literal, unions, lists, tuples and mappings of these) are decided; a
class that no scalar can be (a tensor, a module, a schedule) asks for a node; every other name is taken as fitting, for
a checker that cries wolf is switched off.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

SCALARS = {"int": int, "float": float, "bool": bool, "str": str}
SEQUENCES = {"list", "List", "Sequence", "Iterable", "Collection", "tuple", "Tuple", "set", "frozenset"}
MAPPINGS = {"dict", "Dict", "Mapping", "MutableMapping"}
# objects that only a node (a mapping with `_target_`) can become
OBJECTS = {
    "Callable", "Denoiser", "DenoiserFn", "DenoisingLoss", "Device", "FeatureExtractor", "Generation", "Guidance",
    "Interpolant", "Module", "NetworkDenoiser", "Prediction", "Profile", "Sampler", "Schedule", "Tensor", "Weighting",
}  # fmt: skip


def _tail(expression: ast.expr) -> str | None:
    if isinstance(expression, ast.Name):
        return expression.id
    return expression.attr if isinstance(expression, ast.Attribute) else None


def _members(annotation: ast.expr) -> list[ast.expr]:
    """Split a union into its members; anything else is its only member."""
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return _members(annotation.left) + _members(annotation.right)
    if isinstance(annotation, ast.Subscript) and _tail(annotation.value) == "Union":
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        return [member for part in inner for member in _members(part)]
    if isinstance(annotation, ast.Subscript) and _tail(annotation.value) == "Optional":
        return [*_members(annotation.slice), ast.Constant(None)]
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        try:
            return _members(ast.parse(annotation.value, mode="eval").body)
        except SyntaxError:
            return [annotation]
    return [annotation]


def fits(annotation: ast.expr | None, value: Any) -> bool:
    """Return False where `value` certainly does not fit `annotation`, True otherwise.

    Args:
        annotation: As in the source; None where there is none.
        value: Plain data: scalars, lists, mappings. A mapping with `_target_` stands for an object and fits anything
            but a scalar.
    """
    if annotation is None:
        return True
    return any(_fits_one(member, value) for member in _members(annotation))


def _fits_one(annotation: ast.expr, value: Any) -> bool:
    if isinstance(annotation, ast.Constant) and annotation.value is None:
        return value is None
    is_node = isinstance(value, Mapping) and "_target_" in value
    name = _tail(annotation)
    if name in SCALARS:
        if is_node or isinstance(value, Mapping | list | tuple) or value is None:
            return False
        if name == "bool" or isinstance(value, bool):
            return name == "bool" and isinstance(value, bool)
        return isinstance(value, int | float) if name == "float" else isinstance(value, SCALARS[name])
    if name in SEQUENCES:
        return is_node or (isinstance(value, Sequence) and not isinstance(value, str))
    if name in MAPPINGS:
        return isinstance(value, Mapping)
    if name in OBJECTS:
        return isinstance(value, Mapping)
    if isinstance(annotation, ast.Subscript):
        return _fits_generic(_tail(annotation.value), annotation.slice, value, is_node)
    return True


def _fits_generic(name: str | None, inner: ast.expr, value: Any, is_node: bool) -> bool:
    parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    if name == "Literal":
        return any(
            isinstance(part, ast.Constant) and part.value == value and type(part.value) is type(value)
            for part in parts
        ) or not all(isinstance(part, ast.Constant) for part in parts)
    if name in SEQUENCES:
        if is_node:
            return True
        if not isinstance(value, Sequence) or isinstance(value, str):
            return False
        open_ended = len(parts) == 2 and isinstance(parts[1], ast.Constant) and parts[1].value is ...
        if name in {"tuple", "Tuple"} and not open_ended:
            return len(parts) == len(value) and all(map(fits, parts, value))
        return all(fits(parts[0], item) for item in value)
    if name in MAPPINGS and len(parts) == 2:
        return isinstance(value, Mapping) and (
            is_node or all(fits(parts[1], item) for item in value.values())
        )
    if name == "Annotated":
        return fits(parts[0], value)
    if name in OBJECTS:
        return isinstance(value, Mapping)
    return True


def describe(annotation: ast.expr) -> str:
    """Return the annotation as a reader would write it."""
    return " | ".join(ast.unparse(member).strip("'\"") for member in _members(annotation))
