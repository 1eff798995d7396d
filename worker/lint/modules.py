"""Source files, parsed when something asks for them."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from outbox.errors import ConfigError
from worker.lint import sources
from worker.lint.scopes import Scope
from worker.lint.sources import Place


@dataclass(eq=False)
class Module:
    """A source file. `path` is as it is reported."""

    place: Place
    path: str
    text: str = field(repr=False)
    tree: ast.Module = field(repr=False)

    @property
    def name(self) -> str:
        """Return its dotted name."""
        return self.place.name

    @cached_property
    def scope(self) -> Scope:
        """Return the scope of its top level."""
        return Scope(self.tree, self, None)

    def absolute(self, node: ast.ImportFrom) -> str:
        """Return the name of the module that `from … import` names."""
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        climbed = node.level - int(self.place.is_package)
        package = parts[: len(parts) - climbed] if climbed else parts
        return ".".join([*package, *([node.module] if node.module else [])])

    def imports(self) -> Iterator[str]:
        """Return the names of the modules that are imported with it, as far as the top level tells."""
        for node in _executed_on_import(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                module = self.absolute(node)
                yield module
                yield from (f"{module}.{alias.name}" for alias in node.names if alias.name != "*")


class Modules:
    """The source files read so far, by path."""

    def __init__(self) -> None:
        self._read: dict[Path, Module] = {}
        self._imported: dict[tuple[str, Module], Place | None] = {}

    def at(self, place: Place) -> Module:
        """Return the file at `place`. Raises ConfigError when it cannot be read or parsed."""
        known = self._read.get(place.path)
        if known is None:
            known = self._read[place.path] = _parsed(place)
        return known

    def imported(self, name: str, by: Module) -> Module | None:
        """Return the module that `by` knows under `name`, None for one of another package."""
        if (name, by) not in self._imported:
            self._imported[name, by] = sources.imported(name, by.place)
        place = self._imported[name, by]
        return None if place is None else self.at(place)

    def with_imports(self, module: Module) -> list[Module]:
        """Return a module and those of its package that are imported with it, also by way of others."""
        found, ahead = {module.place.path: module}, [module]
        while ahead:
            by = ahead.pop()
            for name in by.imports():
                for package in _with_parents(name):
                    each = self.imported(package, by)
                    if each is not None and each.place.path not in found:
                        found[each.place.path] = each
                        ahead.append(each)
        return list(found.values())


def _parsed(place: Place) -> Module:
    path, text = sources.shown(place.path), sources.read(place)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # about escapes in strings: the compiler's business, not this check's
            tree = ast.parse(text, filename=path)
    except SyntaxError as error:
        raise ConfigError(f"{path}:{error.lineno or 1} cannot be parsed: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be parsed: {error}") from error
    return Module(place, path, text, tree)


def _executed_on_import(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.expr)):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for alternative in child.orelse:
                yield alternative
                yield from _executed_on_import(alternative)
            continue
        yield child
        yield from _executed_on_import(child)


def _with_parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1))
