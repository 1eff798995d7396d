"""Where the order of a set gets out: loops, conversions, unpacking."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from worker.lint.resolving import Resolver
from worker.lint.scopes import Scope
from worker.lint.values import Function, Outside, is_set

_HARMLESS = frozenset(
    f"builtins.{name}"
    for name in ("all", "any", "frozenset", "len", "max", "min", "set", "sorted", "sum")
) | {f"builtins.set.{name}" for name in (
    "difference", "difference_update", "intersection", "intersection_update", "isdisjoint", "issubset", "issuperset",
    "symmetric_difference", "symmetric_difference_update", "union", "update",
)} | {"collections.Counter", "math.fsum"}  # fmt: skip

_IN_ORDER = frozenset(
    f"builtins.{name}" for name in ("enumerate", "filter", "iter", "list", "map", "reversed", "tuple", "zip")
) | {"builtins.dict.fromkeys", "builtins.list.extend", "collections.deque", "functools.reduce", "worker.map"}

_METHODS = ("join", "extend")
"""Those that go through their argument, whatever it is that has them."""


class Ordering:
    """Sees which sets are gone through in one function, and which in no order that matters."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver
        self._sorted: set[ast.AST] = set()

    def gone_through(self, call: ast.Call, scope: Scope) -> Iterator[ast.expr]:
        """Return the arguments of a call that are sets whose order comes out of it."""
        yield from (
            each.value
            for each in call.args
            if isinstance(each, ast.Starred) and self.is_set(each.value, scope)
        )
        called = self._resolver.value(call.func, scope)
        name = called.name if isinstance(called, Outside) else ""
        if name in _HARMLESS:
            self._sorted.update(each for each in call.args if not self._calls_steps(each, scope))
        elif name in _IN_ORDER or name.startswith("itertools.") or _is_method(call, called):
            if call in self._sorted:
                self._sorted.update(call.args)
            else:
                yield from (each for each in call.args if self.is_set(each, scope))

    def of_comprehension(self, node: ast.expr, iterable: ast.expr, scope: Scope) -> bool:
        """Tell whether a comprehension puts what is in a set into an order."""
        return not isinstance(node, ast.SetComp) and node not in self._sorted and self.is_set(iterable, scope)

    def is_set(self, node: ast.expr, scope: Scope) -> bool:
        """Tell whether an expression is known to be a set."""
        return is_set(self._resolver.value(node, scope))

    def _calls_steps(self, node: ast.expr, scope: Scope) -> bool:
        """Tell whether the elements come from steps, whose order does matter. Names are looked up from outside."""
        for each in ast.walk(node):
            if isinstance(each, ast.Await):
                return True
            if isinstance(each, ast.Call) and isinstance(each.func, ast.Name):
                called = self._resolver.name(each.func.id, scope)
                if isinstance(called, Function) and self._resolver.sort(called) in (
                    "step",
                    "transaction",
                    "workflow",
                ):
                    return True
        return False


def _is_method(call: ast.Call, called: object) -> bool:
    """Tell `", ".join(…)` and `found.extend(…)`, of which only the method is known."""
    return called is None and isinstance(call.func, ast.Attribute) and call.func.attr in _METHODS
