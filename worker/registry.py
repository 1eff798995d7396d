"""The definitions that this process knows, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from outbox.errors import ConfigError

if TYPE_CHECKING:
    from worker.definitions import Definition, Step, Workflow
    from worker.events import Event

    Hook = Callable[[Event], object]

D = TypeVar("D", bound="Definition[..., Any]")


class Registry:
    """Steps by name, workflows by name or, if they have a version, by ``name@version``; and hooks for events."""

    def __init__(self) -> None:
        self.steps: dict[str, Step[..., Any]] = {}
        self.workflows: dict[str, Workflow[..., Any]] = {}
        self.hooks: list[Hook] = []

    def add_step(self, step: Step[..., Any]) -> None:
        """Register a step. Raises ConfigError when its name is taken."""
        _add(self.steps, step, step.name)

    def add_workflow(self, workflow: Workflow[..., Any]) -> None:
        """Register a workflow. Raises ConfigError when its name is taken."""
        _add(self.workflows, workflow, workflow.claimed_as)

    def add_hook(self, hook: Hook) -> None:
        """Register a hook, in place of the one that it is again after a reload of its module."""
        self.hooks = [each for each in self.hooks if not _is_again(each, hook)] + [hook]

    def resolve(self) -> None:
        """Resolve annotations that named what came later in their modules. Raises ConfigError."""
        for definition in (*self.workflows.values(), *self.steps.values()):
            definition.resolve()


_default = Registry()
_collecting: ContextVar[Registry | None] = ContextVar("stepwell_registry", default=None)


def registry() -> Registry:
    """Return the registry that decorators add to: the process's own, except inside `collecting()`."""
    return _collecting.get() or _default


@contextmanager
def collecting() -> Iterator[Registry]:
    """Let the decorators of this block add to a registry of its own, for tests and for tools."""
    fresh = Registry()
    token = _collecting.set(fresh)
    try:
        yield fresh
    finally:
        _collecting.reset(token)


def _add(definitions: dict[str, D], new: D, as_name: str) -> None:
    known = definitions.get(as_name)
    if known is not None and not _replaces(known.plain, new.plain):
        raise ConfigError(_taken(known, new))
    definitions[as_name] = new


def _replaces(known: Callable[..., Any], new: Callable[..., Any]) -> bool:
    """Tell whether `new` is `known` again: after a reload of its module, or retyped in a console."""
    if known.__module__ != new.__module__ or known.__qualname__ != new.__qualname__:
        return False
    before, after = known.__code__, new.__code__
    if before.co_filename != after.co_filename:
        return bool(before.co_filename.startswith("<"))
    return bool(before.co_filename.startswith("<") or before.co_firstlineno == after.co_firstlineno)


def _is_again(known: Hook, new: Hook) -> bool:
    if not (inspect.isfunction(known) and inspect.isfunction(new)) or "<locals>" in known.__qualname__:
        return known == new
    return _replaces(known, new)


def _taken(known: Definition[..., Any], new: Definition[..., Any]) -> str:
    if known.file == new.file and known.plain.__module__ != new.plain.__module__:
        return (
            f"{new.file} was loaded twice, as module {known.plain.__module__!r} and as {new.plain.__module__!r}, so that "
            f"its {new.sort} {new.name!r} is defined twice; import it under one name only (a script that is run and "
            "imported as well is loaded twice: keep definitions in a module of their own)"
        )
    return (
        f"{new.sort} {new.name!r} is defined twice, at {known.where} and at {new.where}; "
        f"rename one or give it a name of its own: @{new.sort}(name=…)"
    )
