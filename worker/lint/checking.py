"""The check as a whole: from the workflows of APP through their helper functions to a report."""

from __future__ import annotations

import ast
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from outbox.errors import ConfigError
from worker.lint.bodies import Walked, walked
from worker.lint.findings import Entry, Finding, Found
from worker.lint.ignores import Ignores
from worker.lint.modules import Module, Modules
from worker.lint.resolving import Resolver
from worker.lint.scopes import FUNCTIONS, Assigned, Scope
from worker.lint.sources import places_of
from worker.lint.values import Function


@dataclass(frozen=True, slots=True)
class Report:
    """What was found, in the order of files and lines, and in how many workflows it was looked for."""

    findings: tuple[Finding, ...]
    workflows: int

    @property
    def files(self) -> int:
        """Return how many files have findings."""
        return len({finding.path for finding in self.findings})


def check(apps: Sequence[str]) -> Report:
    """Check the workflows of every APP. Raises ConfigError when one is not there, is broken, or defines none."""
    modules = Modules()
    resolver = Resolver(modules)
    named: dict[Module, None] = {}
    workflows: dict[ast.AST, Function] = {}
    for app in apps:
        own = [modules.at(place) for place in places_of(app)]
        named.update(dict.fromkeys(own))
        # One file registers also what it imports; a directory says itself which files count.
        considered = modules.with_imports(own[0]) if len(own) == 1 else own
        defined: list[Function] = []
        for module in considered:
            with _told_if_too_deep(module):
                defined += _workflows_of(module, resolver)
        if not defined:
            raise ConfigError(f"{app} defines no workflow; decorate a function with @workflow")
        workflows.update((each.node, each) for each in defined)
    entries = sorted(workflows.values(), key=lambda each: (_module(each).path, each.node.lineno))
    reached = list(_reached(entries, resolver))
    return Report(tuple(sorted(_findings(reached, named), key=_position)), len(workflows))


@dataclass(frozen=True, slots=True)
class _Reached:
    """A function that was walked, and the shortest way to it. `by_way_of` ends with itself, unless it is the workflow."""

    walked: Walked
    entry: Entry
    by_way_of: tuple[str, ...]

    @property
    def function(self) -> Function:
        return self.walked.function


def _reached(workflows: list[Function], resolver: Resolver) -> Iterator[_Reached]:
    ahead: deque[tuple[Function, Entry, tuple[str, ...]]] = deque(
        (each, Entry(each.name, _module(each).path, each.node.lineno), ()) for each in workflows
    )
    seen: set[ast.AST] = {each.node for each in workflows}
    while ahead:
        function, entry, way = ahead.popleft()
        with _told_if_too_deep(_module(function)):
            found = _Reached(walked(function, resolver), entry, way)
        yield found
        for called in found.walked.calls:
            if called.node not in seen:
                seen.add(called.node)
                ahead.append((called, entry, (*way, called.name)))


def _findings(reached: list[_Reached], named: Iterable[Module]) -> Iterator[Finding]:
    parking = _that_may_park(reached)
    ignores = {module: Ignores(module.text) for module in named}
    looked_at: dict[Module, set[int]] = {
        module: set(range(module.text.count("\n") + 2)) for module in ignores
    }
    for each in reached:
        module = _module(each.function)
        if module not in ignores:
            ignores[module], looked_at[module] = Ignores(module.text), set()
        looked_at[module].update(_lines(each.function))
        cleanups = [found for function, found in each.walked.in_cleanup if function.node in parking]
        for found in (*each.walked.found, *cleanups):
            if not ignores[module].silence(found):
                yield _finding(found, module, each)
    for module, comments in ignores.items():
        for found in comments.leftovers(looked_at[module]):
            yield _finding(found, module, None)


def _finding(found: Found, module: Module, reached: _Reached | None) -> Finding:
    return Finding(
        path=module.path,
        line=found.line,
        column=found.column,
        rule=found.rule.id,
        what=found.what,
        instead=found.instead,
        workflow=None if reached is None else reached.entry,
        by_way_of=() if reached is None else reached.by_way_of,
    )


def _that_may_park(reached: list[_Reached]) -> set[ast.AST]:
    """Return the functions that call a step or wait, themselves or through others."""
    parking: set[ast.AST] = {each.function.node for each in reached if each.walked.is_durable}
    grown = True
    while grown:
        grown = False
        for each in reached:
            node = each.function.node
            if node not in parking and any(called.node in parking for called in each.walked.calls):
                parking.add(node)
                grown = True
    return parking


def _workflows_of(module: Module, resolver: Resolver) -> Iterator[Function]:
    for function in _functions_in(module.tree, module.scope):
        if resolver.sort(function) == "workflow":
            yield function
    for bindings in module.scope.bindings.values():  # flow = workflow(function)
        for binding in bindings:
            if isinstance(binding, Assigned) and isinstance(binding.value, ast.Call):
                made = resolver.value(binding.value, module.scope)
                if isinstance(made, Function) and resolver.sort(made) == "workflow" and made.applied:
                    yield made


def _functions_in(node: ast.AST, scope: Scope) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS):
            if not isinstance(child, ast.Lambda):
                yield Function(child, scope)
            yield from _functions_in(child, scope.within(child))
        elif isinstance(child, ast.ClassDef):
            yield from _functions_in(child, scope.within(child))
        else:
            yield from _functions_in(child, scope)


@contextmanager
def _told_if_too_deep(module: Module) -> Iterator[None]:
    try:
        yield
    except RecursionError as error:
        raise ConfigError(
            f"{module.path} cannot be checked: an expression in it is nested too deeply"
        ) from error


def _lines(function: Function) -> range:
    first = function.node.lineno
    return range(first, (function.node.end_lineno or first) + 1)


def _module(function: Function) -> Module:
    return function.scope.module


def _position(finding: Finding) -> tuple[str, int, int, str]:
    return finding.path, finding.line, finding.column, finding.rule
