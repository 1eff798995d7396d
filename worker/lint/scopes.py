"""Which name is bound to what, in each scope of a source file, as Python scopes them.

Bindings are collected without regard to order: a name that is assigned twice in a function has two bindings,
and whoever asks may use them only where they agree.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from worker.lint.modules import Module

FunctionNode: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
DefinedNode: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
ComprehensionNode: TypeAlias = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
ScopeNode: TypeAlias = ast.Module | ast.ClassDef | FunctionNode | ComprehensionNode

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True, slots=True)
class Imported:
    """`import module`, or with a name `from module import name`."""

    module: str
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Defined:
    """A function or a class."""

    node: DefinedNode


@dataclass(frozen=True, slots=True)
class Assigned:
    """A value, an annotation, or both. What `with value as name` binds is taken for the value itself."""

    value: ast.expr | None
    annotation: ast.expr | None = None


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter; `is_first` matters to methods."""

    annotation: ast.expr | None
    is_first: bool


@dataclass(frozen=True, slots=True)
class Opaque:
    """Bound by a loop, by unpacking, by a pattern: to what, nobody looks."""


Binding: TypeAlias = Imported | Defined | Assigned | Parameter | Opaque


@dataclass(eq=False)
class Scope:
    """A module, class, function or comprehension, with the names that it binds itself."""

    node: ScopeNode
    module: Module
    parent: Scope | None
    bindings: dict[str, list[Binding]] = field(default_factory=dict)
    globals: set[str] = field(default_factory=set)
    stars: list[str] = field(default_factory=list)
    _inner: dict[ast.AST, Scope] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _Collector(self).collect()

    @property
    def is_module(self) -> bool:
        """Tell whether names bound here outlive every run."""
        return isinstance(self.node, ast.Module)

    @property
    def is_class(self) -> bool:
        """Tell whether functions in it are methods."""
        return isinstance(self.node, ast.ClassDef)

    def within(self, node: ScopeNode) -> Scope:
        """Return the scope of a definition or comprehension that stands directly in this one."""
        scope = self._inner.get(node)
        if scope is None:
            scope = self._inner[node] = Scope(node, self.module, self)
        return scope

    def lookup(self, name: str) -> tuple[Scope, list[Binding]] | None:
        """Return where a name used in this scope is bound, and to what; None if nowhere in the file."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.globals:
                scope = scope.outermost()
            if name in scope.bindings and (scope is self or not scope.is_class):
                return scope, scope.bindings[name]
            scope = scope.parent
        return None

    def outermost(self) -> Scope:
        """Return the scope of the module."""
        scope = self
        while scope.parent is not None:
            scope = scope.parent
        return scope

    def function(self) -> Scope:
        """Return the innermost function around, or the module or class: comprehensions have no names to declare."""
        scope = self
        while isinstance(scope.node, COMPREHENSIONS) and scope.parent is not None:
            scope = scope.parent
        return scope


class _Collector(ast.NodeVisitor):
    """Collects the bindings of one scope, and leaves those inside of it alone."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    def collect(self) -> None:
        node = self._scope.node
        if isinstance(node, COMPREHENSIONS):
            for generator in node.generators:
                self._bind_target(generator.target, Opaque())
            return
        if isinstance(node, FUNCTIONS):
            self._bind_parameters(node.args)
        body = node.body if isinstance(node.body, list) else [node.body]
        for child in body:
            self.visit(child)

    def _bind(self, name: str, binding: Binding) -> None:
        self._scope.bindings.setdefault(name, []).append(binding)

    def _bind_parameters(self, arguments: ast.arguments) -> None:
        positional = [*arguments.posonlyargs, *arguments.args]
        for index, parameter in enumerate([*positional, *arguments.kwonlyargs]):
            self._bind(
                parameter.arg, Parameter(parameter.annotation, is_first=bool(positional) and index == 0)
            )
        for rest in (arguments.vararg, arguments.kwarg):
            if rest is not None:
                self._bind(rest.arg, Opaque())

    def _bind_target(self, target: ast.expr, binding: Binding) -> None:
        if isinstance(target, ast.Name):
            self._bind(target.id, binding)
        else:
            for name in _names_in(target):
                self._bind(name, Opaque())

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.asname:
                self._bind(alias.asname, Imported(alias.name))
            else:
                package = alias.name.partition(".")[0]
                self._bind(package, Imported(package))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = self._scope.module.absolute(node)
        for alias in node.names:
            if alias.name == "*":
                self._scope.stars.append(module)
            else:
                self._bind(alias.asname or alias.name, Imported(module, alias.name))

    def _visit_definition(self, node: DefinedNode) -> None:
        self._bind(node.name, Defined(node))
        # Decorators, defaults and bases are evaluated out here and may hold a walrus; the inside is another scope.
        for outer in outside_of(node):
            self.visit(outer)

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _visit_definition

    def visit_Lambda(self, node: ast.Lambda) -> None:
        for outer in outside_of(node):
            self.visit(outer)

    def visit_Global(self, node: ast.Global) -> None:
        self._scope.globals.update(node.names)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._bind_target(target, Assigned(node.value))
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._bind_target(node.target, Assigned(node.value, node.annotation))
        self.generic_visit(node)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._bind(node.target.id, Assigned(node.value))
        self.generic_visit(node)

    def _visit_for(self, node: ast.For | ast.AsyncFor) -> None:
        self._bind_target(node.target, Opaque())
        self.generic_visit(node)

    visit_For = visit_AsyncFor = _visit_for

    def visit_withitem(self, node: ast.withitem) -> None:
        if node.optional_vars is not None:
            self._bind_target(node.optional_vars, Assigned(node.context_expr))
        self.generic_visit(node)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        if node.name:
            self._bind(node.name, Opaque())
        self.generic_visit(node)

    def _visit_pattern(self, node: ast.MatchAs | ast.MatchStar) -> None:
        if node.name:
            self._bind(node.name, Opaque())
        self.generic_visit(node)

    visit_MatchAs = visit_MatchStar = _visit_pattern

    def visit_MatchMapping(self, node: ast.MatchMapping) -> None:
        if node.rest:
            self._bind(node.rest, Opaque())
        self.generic_visit(node)


def outside_of(node: DefinedNode | ast.Lambda) -> Iterator[ast.expr]:
    """Return what a definition evaluates in the scope that it stands in."""
    if not isinstance(node, ast.Lambda):
        yield from node.decorator_list
    if isinstance(node, ast.ClassDef):
        yield from node.bases
        yield from (keyword.value for keyword in node.keywords)
    else:
        yield from node.args.defaults
        yield from (default for default in node.args.kw_defaults if default is not None)


def _names_in(target: ast.expr) -> Iterable[str]:
    """Return the names that an unpacking binds, not those whose attributes or items it sets."""
    match target:
        case ast.Name(id=name):
            return (name,)
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            return [name for element in elements for name in _names_in(element)]
        case ast.Starred(value=value):
            return _names_in(value)
    return ()
