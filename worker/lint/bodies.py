"""Walk one function, the body of a workflow or what such a body calls, and note what a replay could not repeat."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from worker.lint import library, rules
from worker.lint.findings import Found
from worker.lint.ordering import Ordering
from worker.lint.resolving import Resolver
from worker.lint.rules import Rule
from worker.lint.scopes import FUNCTIONS, Assigned, ComprehensionNode, Scope, outside_of
from worker.lint.sharing import changed, changed_by_call
from worker.lint.values import Class, Function, Instance, Outside

_ENTRANCES = ("__enter__", "__exit__", "__aenter__", "__aexit__")
_CONSTRUCTORS = ("__new__", "__init__", "__post_init__")
_LONGEST_SOURCE = 40
_PROPERTIES = (Outside("builtins.property"), Outside("functools.cached_property"))


@dataclass
class Walked:
    """What is in a function. `in_cleanup` are helpers called where a run that is parked comes by.

    `is_durable` says whether the function itself calls a step or waits.
    """

    function: Function
    found: list[Found] = field(default_factory=list)
    calls: list[Function] = field(default_factory=list)
    in_cleanup: list[tuple[Function, Found]] = field(default_factory=list)
    is_durable: bool = False


def walked(function: Function, resolver: Resolver) -> Walked:
    """Walk a function with all that is defined inside of it, other workflows and steps left out."""
    walk = _Walk(function, resolver)
    body = function.node.body
    for node in body if isinstance(body, list) else [body]:
        walk.visit(node)
    return walk.result


class _Walk(ast.NodeVisitor):
    def __init__(self, function: Function, resolver: Resolver) -> None:
        self.result = Walked(function)
        self._resolver = resolver
        self._ordering = Ordering(resolver)
        self._scope = function.inside
        self._statement = function.node.lineno
        self._cleanup: str | None = None
        self._told_of_cleanup: set[int] = set()
        self._in_async = function.is_async

    # -- where we are -----------------------------------------------------------------------------------------------

    def visit(self, node: ast.AST) -> None:
        if not isinstance(node, ast.stmt):
            super().visit(node)
            return
        around, self._statement = self._statement, node.lineno
        super().visit(node)
        self._statement = around

    @contextmanager
    def _inside(self, scope: Scope) -> Iterator[None]:
        around, self._scope = self._scope, scope
        yield
        self._scope = around

    @contextmanager
    def _cleaning_up(self, where: str | None) -> Iterator[None]:
        around, self._cleanup = self._cleanup, where
        yield
        self._cleanup = around

    def _all(self, nodes: list[ast.stmt] | list[ast.expr] | list[ast.ExceptHandler]) -> None:
        for node in nodes:
            self.visit(node)

    def _tell(self, node: ast.expr | ast.stmt, rule: Rule, what: str, instead: str | None = None) -> Found:
        found = Found.at(node, self._statement, rule, f"{what} {rule.why}", instead or rule.instead)
        self.result.found.append(found)
        return found

    # -- definitions inside -----------------------------------------------------------------------------------------

    def _visit_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        self._all(list(outside_of(node)))
        if self._resolver.sort(Function(node, self._scope)) in ("workflow", "step", "transaction"):
            return
        around, self._in_async = self._in_async, isinstance(node, ast.AsyncFunctionDef)
        with self._inside(self._scope.within(node)), self._cleaning_up(None):
            self._all(node.body if isinstance(node.body, list) else [node.body])
        self._in_async = around

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _visit_function

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._all(list(outside_of(node)))
        with self._inside(self._scope.within(node)):
            self._all(node.body)

    def _visit_comprehension(self, node: ComprehensionNode) -> None:
        inner = self._scope.within(node)
        for index, generator in enumerate(node.generators):
            with self._inside(inner if index else self._scope):
                self.visit(generator.iter)
                if self._ordering.of_comprehension(node, generator.iter, self._scope):
                    self._tell(generator.iter, rules.SET_ORDER, _iterates(generator.iter))
        with self._inside(inner):
            for generator in node.generators:
                self._all(generator.ifs)
            self._all([node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt])

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _visit_comprehension

    # -- statements -------------------------------------------------------------------------------------------------

    def _visit_for(self, node: ast.For | ast.AsyncFor) -> None:
        self._iterated(node.iter)
        self.generic_visit(node)

    visit_For = visit_AsyncFor = _visit_for

    def visit_YieldFrom(self, node: ast.YieldFrom) -> None:
        self._iterated(node.value)
        self.generic_visit(node)

    def _visit_display(self, node: ast.List | ast.Tuple) -> None:
        for element in node.elts:
            if isinstance(element, ast.Starred) and isinstance(node.ctx, ast.Load):
                self._iterated(element.value)
        self.generic_visit(node)

    visit_List = visit_Tuple = _visit_display

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._assigned(target)
            if isinstance(target, (ast.Tuple, ast.List)):
                self._iterated(node.value)
        if len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            self._dropped_in(node.targets[0].id, node.value)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._assigned(node.target)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._assigned(node.target)
            self.visit(node.value)
        self.visit(node.target)

    def visit_Delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            self._assigned(target)
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        self._unawaited(node.value)
        self.generic_visit(node)

    def _visit_with(self, node: ast.With | ast.AsyncWith) -> None:
        for item in node.items:
            match self._resolver.value(item.context_expr, self._scope):
                case Instance(of=Class() as cls):
                    self._follow(*self._resolver.methods(cls, *_ENTRANCES))
                case Instance(of=Outside(name=name)) if not isinstance(item.context_expr, ast.Call):
                    rule = library.rule_of(f"{name}.__enter__")
                    if rule is not None:
                        instead = library.instead_of(name, rule)
                        self._tell(item.context_expr, rule, f"with {ast.unparse(item.context_expr)}", instead)
        self.generic_visit(node)

    visit_With = visit_AsyncWith = _visit_with

    def _visit_try(self, node: ast.Try | ast.TryStar) -> None:
        self._all(node.body)
        for handler in node.handlers:
            if handler.type is not None:
                self.visit(handler.type)
            with self._cleaning_up(
                "where BaseException is caught" if self._catches_all(handler) else self._cleanup
            ):
                self._all(handler.body)
        self._all(node.orelse)
        with self._cleaning_up("in finally"):
            self._all(node.finalbody)

    visit_Try = visit_TryStar = _visit_try

    def _catches_all(self, handler: ast.ExceptHandler) -> bool:
        types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        return any(
            each is None or self._resolver.value(each, self._scope) == Outside("builtins.BaseException")
            for each in types
        )

    # -- expressions ------------------------------------------------------------------------------------------------

    def visit_Call(self, node: ast.Call) -> None:
        for iterable in self._ordering.gone_through(node, self._scope):
            self._tell(iterable, rules.SET_ORDER, _iterates(iterable))
        target = changed_by_call(node, self._scope, self._resolver)
        if target is not None:
            self._tell(node, rules.GLOBAL_STATE, f"{target} is changed,")
        if not self._called(node):
            self.visit(node.func)
        self._all(node.args)
        self._all([keyword.value for keyword in node.keywords])

    def visit_Attribute(self, node: ast.Attribute) -> None:
        value = self._resolver.value(node, self._scope)
        if isinstance(value, Outside) and value.name in library.READ:
            self._tell(node, rules.ENVIRONMENT, value.name)
            return
        if isinstance(value, Function) and isinstance(node.ctx, ast.Load) and self._is_property(value):
            self._follow(value)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        value = self._resolver.value(node, self._scope)
        if isinstance(value, Outside) and value.name in library.READ and isinstance(node.ctx, ast.Load):
            found = self._scope.lookup(node.id)
            local = found is not None and not found[0].is_module and isinstance(found[1][0], Assigned)
            if not local:  # a local name for it was told of where it was given
                self._tell(node, rules.ENVIRONMENT, value.name)

    # -- calls ------------------------------------------------------------------------------------------------------

    def _called(self, node: ast.Call) -> bool:
        """Judge what a call calls. Returns whether that has been told of."""
        match self._resolver.value(node.func, self._scope):
            case Outside() as outside:
                self._passed_on(outside.name, node)
                if library.is_durable(outside.name):
                    self._durable(node, f"{library.shown(outside.name).removeprefix('worker.')}()")
                return self._outside(node, outside, len(node.args) - _nones(node.args) + len(node.keywords))
            case Function() as function:
                sort = self._resolver.sort(function)
                if sort in ("step", "transaction", "workflow"):
                    self._durable(node, f"the {sort} {function.name}")
                elif sort == "plain":
                    self._called_helper(node, function)
            case Class() as cls:
                self._follow(*self._resolver.methods(cls, *_CONSTRUCTORS))
            case Instance(of=Class() as cls):
                self._follow(*self._resolver.methods(cls, "__call__"))
            case Instance(of=Outside(name=name), shared=shared):
                return self._outside(node, Outside(f"{name}.__call__", shared), len(node.args))
        return False

    def _outside(self, node: ast.expr, outside: Outside, arguments: int) -> bool:
        name = outside.name
        if outside.shared and name.startswith(library.SEEDED):
            self._tell(node, rules.RANDOM, f"{ast.unparse(node)} draws from what every run shares, so it")
            return True
        rule = library.rule_of(name, arguments)
        if rule is None:
            return False
        told = library.shown(name.removesuffix(".__call__"))
        self._tell(node, rule, f"{told}()", library.instead_of(name, rule))
        return True

    def _passed_on(self, name: str, node: ast.Call) -> None:
        """Judge the functions that `map(open, paths)` and its like are given."""
        if not library.is_caller(name):
            return
        for each in (*node.args, *(keyword.value for keyword in node.keywords)):
            match self._resolver.value(each, self._scope):
                case Outside() as outside if isinstance(each, (ast.Name, ast.Attribute)):
                    self._outside(each, outside, 1)
                case Function() as function if self._resolver.sort(function) == "plain":
                    self._follow(function)

    def _called_helper(self, node: ast.Call, function: Function) -> None:
        if self._cleanup is not None:
            found = self._cleanup_found(node, f"{function.name}(), which calls steps,")
            self.result.in_cleanup.append((function, found))
        self._follow(function)

    def _follow(self, *functions: Function) -> None:
        """Have functions walked too, unless they are walked with this one."""
        self.result.calls += [function for function in functions if not function.is_nested]

    def _durable(self, node: ast.Call, what: str) -> None:
        self.result.is_durable = True
        if self._cleanup is not None and self._statement not in self._told_of_cleanup:
            self._told_of_cleanup.add(self._statement)
            self.result.found.append(self._cleanup_found(node, what))

    def _cleanup_found(self, node: ast.Call, what: str) -> Found:
        rule = rules.FINALLY
        told = f"{what} is called {self._cleanup}, {rule.why}"
        return Found.at(node, self._statement, rule, told, rule.instead)

    def _is_property(self, function: Function) -> bool:
        above = [self._resolver.value(each, function.scope) for each in function.decorators]
        return any(each in _PROPERTIES for each in above)

    # -- what becomes of values -------------------------------------------------------------------------------------

    def _iterated(self, node: ast.expr) -> None:
        if self._ordering.is_set(node, self._scope):
            self._tell(node, rules.SET_ORDER, _iterates(node))

    def _assigned(self, target: ast.expr) -> None:
        what = changed(target, self._scope, self._resolver)
        if what is not None:
            self._tell(target, rules.GLOBAL_STATE, f"{what} is changed,")

    def _unawaited(self, node: ast.expr) -> None:
        """Judge the value of a statement that does nothing with it."""
        if not isinstance(node, ast.Call):
            return
        match self._resolver.value(node.func, self._scope):
            case Function(is_async=True) as function:
                sort = self._resolver.sort(function)
                if sort != "unknown":
                    what = function.name if sort == "plain" else f"the {sort} {function.name}"
                    self._not_awaited(node, what, function.name)
            case Outside(name=name) if name in library.AWAITED:
                own = name.removeprefix("worker.")
                self._not_awaited(node, f"{own}()", own)

    def _not_awaited(self, node: ast.Call, what: str, name: str) -> None:
        self._tell(node, rules.NOT_AWAITED, what, None if self._in_async else f"wrap it: wait({name}(…))")

    def _dropped_in(self, name: str, value: ast.expr) -> None:
        """Judge a value that is given a name which nobody reads."""
        if not isinstance(self._scope.node, FUNCTIONS) or name in self._scope.globals:
            return
        around = [self.result.function.node, self._scope.node]
        if not any(
            isinstance(each, ast.Name) and each.id == name and isinstance(each.ctx, ast.Load)
            for outer in around
            for each in ast.walk(outer)
        ):
            self._unawaited(value)


def _iterates(node: ast.expr) -> str:
    text = ast.unparse(node)
    return f"iterates over the set {text}," if len(text) <= _LONGEST_SOURCE else "iterates over a set,"


def _nones(arguments: list[ast.expr]) -> int:
    """Return how many arguments are None, which stands for none: `Random(None)`."""
    return sum(isinstance(each, ast.Constant) and each.value is None for each in arguments)
