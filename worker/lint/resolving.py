"""What an expression denotes: through imports and their aliases, definitions, annotations and assignments.

Nothing is evaluated and the order of statements does not count. Where a name may be two things, it is neither.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

from worker.lint import library
from worker.lint.annotations import annotated_class
from worker.lint.modules import Module, Modules
from worker.lint.scopes import (
    FUNCTIONS,
    Assigned,
    Binding,
    Defined,
    Imported,
    Parameter,
    Scope,
)
from worker.lint.sorts import DEFINERS, sort_of
from worker.lint.values import (
    DICT,
    LIST,
    SET,
    Class,
    File,
    Function,
    Instance,
    Nothing,
    Outside,
    Pending,
    Sort,
    Value,
    is_set,
    same,
)

K = TypeVar("K")

_MAX_BASES = 20
_PATH = Instance(Outside("pathlib.Path"))


class Resolver:
    """Answers for all files of one check, and remembers."""

    def __init__(self, modules: Modules) -> None:
        self.modules = modules
        self._values: dict[ast.expr, Value] = {}
        self._names: dict[tuple[Scope, str], Value] = {}
        self._members: dict[tuple[Class, str, bool], Value] = {}
        self._sorts: dict[Function, Sort] = {}

    def value(self, node: ast.expr, scope: Scope) -> Value:
        """Return what an expression of `scope` denotes."""
        return _once(self._values, node, lambda: self._evaluate(node, scope))

    def name(self, name: str, scope: Scope) -> Value:
        """Return what a name denotes that is used in `scope`."""
        return _once(self._names, (scope, name), lambda: self._look_up(name, scope))

    def sort(self, function: Function) -> Sort:
        """Tell a workflow, a step and a transaction from plain functions and from what nobody can tell."""
        known = self._sorts.get(function)
        if known is None:
            self._sorts[function] = "unknown"  # while its decorators are looked at
            known = self._sorts[function] = sort_of(function, self)
        return known

    def annotation(self, node: ast.expr | None, scope: Scope) -> Value:
        """Return an instance of what an annotation names."""
        return annotated_class(node, scope, self)

    def member(self, module: Module, name: str) -> Value:
        """Return what an attribute of a module denotes."""
        if name in module.scope.bindings or module.scope.stars:
            found = self.name(name, module.scope)
            builtin = isinstance(found, Outside) and found.name == f"builtins.{name}"
            if name in module.scope.bindings or (found is not None and not builtin):
                return found
        submodule = self.modules.imported(f"{module.name}.{name}", module)
        return Outside(f"{module.name}.{name}") if submodule is None else File(submodule)

    def methods(self, cls: Class, *names: str) -> Iterator[Function]:
        """Return those methods of a class that are defined in its package."""
        for name in names:
            found = self._member_of(cls, name, instance=True)
            if isinstance(found, Function):
                yield found

    # -- expressions ------------------------------------------------------------------------------------------------

    def _evaluate(self, node: ast.expr, scope: Scope) -> Value:
        match node:
            case ast.Name(id=name):
                return self.name(name, scope)
            case ast.Attribute(value=owner, attr=name):
                return self._attribute(self.value(owner, scope), name, scope)
            case ast.Call():
                return self._result(node, scope)
            case ast.Await(value=inner) | ast.NamedExpr(value=inner):
                return self.value(inner, scope)
            case ast.BinOp():
                return self._operation(node, scope)
            case ast.BoolOp(values=parts):
                return same([self.value(part, scope) for part in parts])
            case ast.IfExp(body=first, orelse=second):
                return same([self.value(first, scope), self.value(second, scope)])
            case ast.Subscript(value=generic):
                found = self.value(generic, scope)
                is_type = isinstance(found, Outside) and library.is_class(found.name) and not found.shared
                return found if is_type or isinstance(found, Class) else None
            case ast.Lambda():
                return Function(node, scope)
        return _displayed(node)

    def _operation(self, node: ast.BinOp, scope: Scope) -> Value:
        operands = [self.value(each, scope) for each in (node.left, node.right)]
        if isinstance(node.op, (ast.BitOr, ast.BitAnd, ast.BitXor, ast.Sub)) and (
            any(map(is_set, operands)) or all(map(_is_view, (node.left, node.right)))
        ):
            return SET
        if any(isinstance(each, Pending) for each in operands):
            return Pending()
        if isinstance(node.op, ast.Div) and any(isinstance(each, Instance) for each in operands):
            return _PATH if _PATH.of in [each.of for each in operands if isinstance(each, Instance)] else None
        return None

    def _attribute(self, owner: Value, name: str, scope: Scope) -> Value:
        match owner:
            case Pending():
                return owner
            case File(module=module):
                return self.member(module, name)
            case Class():
                return self._member_of(owner, name, instance=False)
            case Instance(of=Class() as cls, shared=shared):
                return _shared(self._member_of(cls, name, instance=True), shared)
            case Instance(of=Outside(name="pathlib.Path")) if name == "parent":
                return _PATH
            case Instance(of=Outside(name=cls_name), shared=shared):
                return Outside(library.canonical(f"{cls_name}.{name}"), shared)
            case Outside(name=outer, shared=shared):
                # A directory without __init__.py is no file itself, but what is in it may be of the same package.
                inside = self.modules.imported(f"{outer}.{name}", scope.module)
                return (
                    Outside(library.canonical(f"{outer}.{name}"), shared) if inside is None else File(inside)
                )
        return None

    def _result(self, call: ast.Call, scope: Scope) -> Value:
        called = self.value(call.func, scope)
        match called:
            case Pending():
                return called
            case Outside(name=name):
                return self._result_outside(name, call, scope)
            case Class():
                return Instance(called)
            case Function(node=node) if not isinstance(node, ast.Lambda):
                return self.annotation(node.returns, called.scope)
            case Instance(of=Outside(name=name)):
                return self._result_outside(f"{name}.__call__", call, scope)
        return None

    def _result_outside(self, name: str, call: ast.Call, scope: Scope) -> Value:
        first = call.args[0] if call.args else None
        if name in DEFINERS:  # `@step(timeout=3)` is a decorator again, `step(function)` a step
            function = None if first is None else self.value(first, scope)
            if isinstance(function, Function):
                return replace(function, applied=DEFINERS[name])
            return Outside(name) if first is None else None
        if name in ("functools.partial", "worker.wait") and first is not None:
            return self.value(first, scope)
        if name in ("typing.cast", "typing_extensions.cast"):
            return self.annotation(first, scope)
        if name in ("copy.copy", "copy.deepcopy") and first is not None:
            copied = self.value(first, scope)
            return replace(copied, shared=False) if isinstance(copied, Instance) else None
        made = library.result_of(name)
        return None if made is None else Instance(Outside(library.canonical(made)))

    # -- names ------------------------------------------------------------------------------------------------------

    def _look_up(self, name: str, scope: Scope) -> Value:
        found = scope.lookup(name)
        if found is None:
            return self._from_star(name, scope.outermost())
        where, bindings = found
        if len(bindings) > 1 and all(isinstance(each, Defined) for each in bindings):
            bindings = bindings[-1:]  # overloads, and redefinitions
        value = same([self._bound(each, name, where) for each in bindings]) or self._declared(bindings, where)
        outlives = where.is_module or where.is_class
        return _shared(value, outlives and any(isinstance(each, Assigned) for each in bindings))

    def _declared(self, bindings: list[Binding], where: Scope) -> Value:
        """Return what `name: Class` says of a name whose values do not tell."""
        declared = [each.annotation for each in bindings if isinstance(each, Assigned) and each.value is None]
        return same([self.annotation(each, where) for each in declared])

    def _from_star(self, name: str, scope: Scope) -> Value:
        for star in scope.stars:
            module = self.modules.imported(star, scope.module)
            if module is not None:
                if name in module.scope.bindings or module.scope.stars:
                    found = self.name(name, module.scope)
                    if found is not None and not (
                        isinstance(found, Outside) and found.name.startswith("builtins.")
                    ):
                        return found
            elif library.rule_of(f"{star}.{name}") is not None or f"{star}.{name}" in DEFINERS:
                return Outside(library.canonical(f"{star}.{name}"))
        return Outside(library.canonical(f"builtins.{name}")) if name in library.BUILTINS else None

    def _bound(self, binding: Binding, name: str, where: Scope) -> Value:
        match binding:
            case Imported():
                return self._imported(binding, where.module)
            case Defined(node=ast.ClassDef() as node):
                return Class(node, where)
            case Defined(node=ast.FunctionDef() | ast.AsyncFunctionDef() as node):
                return Function(node, where)
            case Assigned(value=value, annotation=annotation):
                found = None if value is None else self.value(value, where)
                if annotation is not None and (found is None or isinstance(found, Nothing)):
                    return self.annotation(annotation, where)
                return found
            case Parameter():
                return self._parameter(binding, name, where)
        return None

    def _imported(self, binding: Imported, by: Module) -> Value:
        module = self.modules.imported(binding.module, by)
        if binding.name is None:
            return Outside(library.canonical(binding.module)) if module is None else File(module)
        if module is not None:
            return self.member(module, binding.name)
        name = f"{binding.module}.{binding.name}"
        inside = self.modules.imported(name, by)
        return Outside(library.canonical(name)) if inside is None else File(inside)

    def _parameter(self, parameter: Parameter, name: str, where: Scope) -> Value:
        annotated = self.annotation(parameter.annotation, where)
        owner = where.parent
        if not parameter.is_first or owner is None or not isinstance(owner.node, ast.ClassDef):
            return annotated
        if annotated is not None or owner.parent is None or not isinstance(where.node, FUNCTIONS):
            return annotated
        cls = Class(owner.node, owner.parent)
        above = [self.value(each, owner) for each in Function(where.node, owner).decorators]
        if Outside("builtins.staticmethod") in above:
            return None
        return cls if name == "cls" or Outside("builtins.classmethod") in above else Instance(cls)

    # -- classes ----------------------------------------------------------------------------------------------------

    def _member_of(self, cls: Class, name: str, *, instance: bool) -> Value:
        return _once(
            self._members, (cls, name, instance), lambda: self._find_member(cls, name, instance=instance)
        )

    def _find_member(self, cls: Class, name: str, *, instance: bool) -> Value:
        elsewhere: Outside | None = None
        for base in self._ancestry(cls):
            if isinstance(base, Outside):
                elsewhere = elsewhere or base
                continue
            bindings = base.inside.bindings.get(name)
            if bindings:
                declared = bindings[-1]
                if instance and isinstance(declared, Assigned) and declared.annotation is not None:
                    return self.annotation(declared.annotation, base.inside)
                return self.name(name, base.inside)
            if instance:
                found = self._set_by_init(base, name)
                if found is not None:
                    return found
        return None if elsewhere is None else Outside(library.canonical(f"{elsewhere.name}.{name}"))

    def _ancestry(self, cls: Class) -> Iterator[Class | Outside]:
        ahead: list[Class | Outside] = [cls]
        for _ in range(_MAX_BASES):
            if not ahead:
                return
            yield (found := ahead.pop(0))
            if isinstance(found, Class):
                bases = [self.value(base, found.scope) for base in found.node.bases]
                ahead[:0] = [base for base in bases if isinstance(base, (Class, Outside))]

    def _set_by_init(self, cls: Class, name: str) -> Value:
        for defined in cls.inside.bindings.get("__init__", []):
            if isinstance(defined, Defined) and isinstance(defined.node, ast.FunctionDef):
                init = Function(defined.node, cls.inside)
                for statement in ast.walk(defined.node):
                    if isinstance(statement, (ast.Assign, ast.AnnAssign)) and _sets_own(statement, name):
                        value = statement.value
                        found = None if value is None else self.value(value, init.inside)
                        if isinstance(statement, ast.AnnAssign) and found is None:
                            return self.annotation(statement.annotation, init.inside)
                        return found
        return None


def _once(known: dict[K, Value], key: K, find: Callable[[], Value]) -> Value:
    """Return what is known under `key`, found out the first time; Pending for whoever asks meanwhile."""
    if key not in known:
        known[key] = Pending()
        known[key] = find()
    return known[key]


def _displayed(node: ast.expr) -> Value:
    match node:
        case ast.Set() | ast.SetComp():
            return SET
        case ast.List() | ast.ListComp():
            return LIST
        case ast.Dict() | ast.DictComp():
            return DICT
        case ast.Constant(value=None):
            return Nothing()
    return None


def _shared(value: Value, shared: bool) -> Value:
    return replace(value, shared=True) if shared and isinstance(value, Instance) else value


def _is_view(node: ast.expr) -> bool:
    """Tell `d.keys()` and `d.items()`, whose operations make sets."""
    match node:
        case ast.Call(func=ast.Attribute(attr="keys" | "items"), args=[]):
            return True
    return False


def _sets_own(statement: ast.Assign | ast.AnnAssign, name: str) -> bool:
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return any(
        isinstance(target, ast.Attribute)
        and target.attr == name
        and isinstance(target.value, ast.Name)
        and target.value.id == "self"
        for target in targets
    )
