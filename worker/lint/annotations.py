"""The class that an annotation names."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from worker.lint import library
from worker.lint.scopes import Scope
from worker.lint.values import Class, Instance, Outside, Value, same

if TYPE_CHECKING:
    from worker.lint.resolving import Resolver

_WRAPPERS = frozenset(
    f"{module}.{name}"
    for module in ("typing", "typing_extensions")
    for name in ("Annotated", "Optional", "Final", "ClassVar", "Required", "NotRequired", "ReadOnly")
) | {"sqlalchemy.orm.Mapped"}
_UNIONS = ("typing.Union", "types.UnionType")


def annotated_class(node: ast.expr | None, scope: Scope, resolver: Resolver) -> Value:
    """Return an instance of the class that an annotation of `scope` names, None if it names none or several."""
    match node:
        case None:
            return None
        case ast.Constant(value=str() as text):
            return annotated_class(_parsed(text), scope, resolver)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _either([left, right], scope, resolver)
        case ast.Subscript(value=generic, slice=inner):
            outer = resolver.value(generic, scope)
            parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            if isinstance(outer, Outside) and outer.name in _WRAPPERS:
                return annotated_class(parts[0], scope, resolver) if parts else None
            if isinstance(outer, Outside) and outer.name in _UNIONS:
                return _either(parts, scope, resolver)
            return _instance(outer)
        case ast.Name() | ast.Attribute():
            return _instance(resolver.value(node, scope))
    return None


def _either(parts: list[ast.expr], scope: Scope, resolver: Resolver) -> Value:
    told = [part for part in parts if not (isinstance(part, ast.Constant) and part.value is None)]
    return same([annotated_class(part, scope, resolver) for part in told])


def _instance(cls: Value) -> Value:
    if isinstance(cls, Class):
        return Instance(cls)
    if isinstance(cls, Outside) and library.is_class(cls.name):
        return Instance(Outside(library.canonical(cls.name)))
    return None


def _parsed(text: str) -> ast.expr | None:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        return None
