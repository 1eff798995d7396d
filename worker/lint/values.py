"""What an expression may denote, as far as its source tells. None everywhere means: nobody can tell."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from worker.lint.scopes import FunctionNode, Scope

if TYPE_CHECKING:
    from worker.lint.modules import Module

Sort: TypeAlias = Literal["workflow", "step", "transaction", "plain", "unknown"]


@dataclass(frozen=True, slots=True)
class Outside:
    """Something of another package or of Python: `datetime.datetime.now`.

    `shared` if it belongs to an object that outlives the run.
    """

    name: str
    shared: bool = False


@dataclass(frozen=True, slots=True)
class File:
    """A module of the same package."""

    module: Module


@dataclass(frozen=True, slots=True)
class Class:
    """A class of the same package; `scope` is where it is defined."""

    node: ast.ClassDef
    scope: Scope

    @property
    def inside(self) -> Scope:
        """Return the scope of its body."""
        return self.scope.within(self.node)


@dataclass(frozen=True, slots=True)
class Function:
    """A function of the same package; `scope` is where it is defined, `applied` what it was made without `@`."""

    node: FunctionNode
    scope: Scope
    applied: Sort | None = None

    @property
    def inside(self) -> Scope:
        """Return the scope of its body."""
        return self.scope.within(self.node)

    @property
    def name(self) -> str:
        """Return its name, with that of its class."""
        name = "lambda" if isinstance(self.node, ast.Lambda) else self.node.name
        owner = self.scope.node
        return f"{owner.name}.{name}" if isinstance(owner, ast.ClassDef) else name

    @property
    def is_async(self) -> bool:
        """Tell whether its calls are awaited."""
        return isinstance(self.node, ast.AsyncFunctionDef)

    @property
    def decorators(self) -> list[ast.expr]:
        """Return what stands above it."""
        return [] if isinstance(self.node, ast.Lambda) else self.node.decorator_list

    @property
    def is_nested(self) -> bool:
        """Tell whether it stands in a function, whose body is walked with it."""
        scope: Scope | None = self.scope
        while scope is not None and scope.is_class:
            scope = scope.parent
        return scope is not None and not scope.is_module


@dataclass(frozen=True, slots=True)
class Instance:
    """An object of a class; `shared` if it outlives the run."""

    of: Outside | Class
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Nothing:
    """The value None, which says little about a name that is assigned something else as well."""


@dataclass(frozen=True, slots=True)
class Pending:
    """What is being found out already, further up: ``names = names | more``."""


Value: TypeAlias = Outside | File | Class | Function | Instance | Nothing | Pending | None

SET = Instance(Outside("builtins.set"))
LIST = Instance(Outside("builtins.list"))
DICT = Instance(Outside("builtins.dict"))


def same(values: list[Value]) -> Value:
    """Return what all of `values` are, None if they differ."""
    telling = {value for value in values if not isinstance(value, (Nothing, Pending))}
    if len(telling) == 1:
        return telling.pop()
    return values[0] if values and not telling else None


def is_set(value: Value) -> bool:
    """Tell whether it is an object whose order of iteration is arbitrary."""
    return isinstance(value, Instance) and value.of == SET.of
