"""What its decorators make of a function."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from worker.lint.scopes import FUNCTIONS, Scope
from worker.lint.values import Function, Outside, Sort

if TYPE_CHECKING:
    from worker.lint.resolving import Resolver

DEFINERS: dict[str, Sort] = {
    "worker.workflow": "workflow",
    "worker.step": "step",
    "worker.transaction": "transaction",
}

# What these return still does, when it is called, what the function below them does.
_TRANSPARENT = ("abc.", "builtins.", "contextlib.", "dataclasses.", "functools.", "tenacity.", "typing.", "typing_extensions.", "warnings.")  # fmt: skip


def sort_of(function: Function, resolver: Resolver) -> Sort:
    """Return what a function is after its decorators; unknown below one that comes from elsewhere."""
    if function.applied is not None:
        return function.applied
    found: list[Sort] = [_made_by(each, function.scope, resolver) for each in function.decorators]
    for sort in found:
        if sort in DEFINERS.values():
            return sort
    return "unknown" if "unknown" in found else "plain"


def _made_by(decorator: ast.expr, scope: Scope, resolver: Resolver) -> Sort:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    match resolver.value(called, scope):
        case Outside(name=name):
            if name in DEFINERS:
                return DEFINERS[name]
            return "plain" if name.startswith(_TRANSPARENT) else "unknown"
        case Function() as own:
            return _applied_in(own, resolver)
    return "unknown"


def _applied_in(decorator: Function, resolver: Resolver) -> Sort:
    """Return what a decorator of the same package makes of functions: what it mentions, it applies."""
    for name, scope in _mentioned(decorator.node, decorator.inside):
        value = resolver.value(name, scope)
        if isinstance(value, Outside) and value.name in DEFINERS:
            return DEFINERS[value.name]
    return "plain"


def _mentioned(node: ast.AST, scope: Scope) -> list[tuple[ast.expr, Scope]]:
    found: list[tuple[ast.expr, Scope]] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS):
            found += _mentioned(child, scope.within(child))
            continue
        if isinstance(child, (ast.Name, ast.Attribute)):
            found.append((child, scope))
        found += _mentioned(child, scope)
    return found
