"""What a function changes that outlives the run: globals, attributes of modules and classes, what they hold."""

from __future__ import annotations

import ast

from worker.lint import library
from worker.lint.resolving import Resolver
from worker.lint.scopes import Assigned, Imported, Scope
from worker.lint.values import Class, File, Instance, Outside

_CONTAINERS = frozenset(
    {"builtins.set", "builtins.list", "builtins.dict", "builtins.bytearray"}
    | {f"collections.{name}" for name in ("deque", "defaultdict", "Counter", "OrderedDict", "ChainMap")}
)
_CHANGING = frozenset(
    (
        "add", "append", "appendleft", "clear", "difference_update", "discard", "extend", "extendleft", "insert",
        "intersection_update", "pop", "popitem", "popleft", "remove", "reverse", "rotate", "setdefault", "sort",
        "subtract", "symmetric_difference_update", "update",
    )
)  # fmt: skip
_ITERATORS = frozenset(("itertools.count", "itertools.cycle"))


def changed(target: ast.expr, scope: Scope, resolver: Resolver) -> str | None:
    """Return what an assignment to `target` changes that is global, as its source has it."""
    match target:
        case ast.Name(id=name):
            return name if name in scope.function().globals else None
        case ast.Attribute(value=owner) | ast.Subscript(value=owner):
            value = resolver.value(owner, scope)
            if isinstance(value, Outside) and value.name in library.READ:
                return None  # found as what it is already
            return ast.unparse(target) if _outlives(owner, scope, resolver) else None
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            found = (changed(each, scope, resolver) for each in elements)
            return next((each for each in found if each is not None), None)
        case ast.Starred(value=inner):
            return changed(inner, scope, resolver)
    return None


def changed_by_call(call: ast.Call, scope: Scope, resolver: Resolver) -> str | None:
    """Return what a call changes that is global."""
    match call:
        case ast.Call(func=ast.Attribute(value=owner, attr=method)) if method in _CHANGING:
            if _is_shared(owner, _CONTAINERS, scope, resolver):
                return ast.unparse(owner)
        case ast.Call(func=ast.Name(id="setattr" | "delattr" as name), args=[owner, *_]):
            builtin = resolver.name(name, scope) == Outside(f"builtins.{name}")
            if builtin and _outlives(owner, scope, resolver):
                return ast.unparse(owner)
        case ast.Call(func=ast.Name(id="next"), args=[iterator, *_]):
            if _is_shared(iterator, _ITERATORS, scope, resolver):
                return ast.unparse(iterator)
    return None


def _is_shared(node: ast.expr, classes: frozenset[str], scope: Scope, resolver: Resolver) -> bool:
    match resolver.value(node, scope):
        case Instance(of=Outside(name=name), shared=True):
            return name in classes
    return False


def _outlives(owner: ast.expr, scope: Scope, resolver: Resolver) -> bool:
    """Tell whether `owner` belongs to what was there before the run: by its value, or by where its name is bound."""
    root = owner
    while isinstance(root, (ast.Attribute, ast.Subscript)):
        root = root.value
    if isinstance(root, ast.Call):  # globals()["x"]
        return resolver.value(root.func, scope) == Outside("builtins.globals")
    if not isinstance(root, ast.Name):
        return False
    value = resolver.value(root, scope)
    if isinstance(value, (File, Class)) or (isinstance(value, Instance) and value.shared):
        return True
    found = scope.lookup(root.id)
    if found is None:
        return False
    where, bindings = found
    return any(
        isinstance(each, Imported) or (where.is_module and isinstance(each, Assigned)) for each in bindings
    )
