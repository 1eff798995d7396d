"""What is reported."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from worker.lint.rules import Rule


@dataclass(frozen=True, slots=True)
class Found:
    """What a rule has found in a function, before anybody asks who reaches it. Lines and columns count from 1.

    `statement` is the line at which the statement around it begins.
    """

    rule: Rule
    line: int
    column: int
    statement: int
    what: str
    instead: str

    @classmethod
    def at(cls, node: ast.expr | ast.stmt, statement: int, rule: Rule, what: str, instead: str) -> Found:
        """Return what was found at `node`."""
        return cls(rule, node.lineno, node.col_offset + 1, statement, what, instead)


@dataclass(frozen=True, slots=True)
class Entry:
    """A workflow through which something is reached."""

    name: str
    path: str
    line: int


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `by_way_of` are the functions on the way to it, empty if it is in the body itself."""

    path: str
    line: int
    column: int
    rule: str
    what: str
    instead: str
    workflow: Entry | None = None
    by_way_of: tuple[str, ...] = ()

    @property
    def message(self) -> str:
        """Return everything but where it is and the rule."""
        return f"{self.what}; {self.instead}{self._reached()}"

    def _reached(self) -> str:
        if self.workflow is None or not self.by_way_of:
            return ""
        calls = [f"{name}()" for name in self.by_way_of]
        way = ", ".join(calls if len(calls) <= 3 else [calls[0], "…", calls[-1]])
        entry = self.workflow
        return f"; reached from workflow {entry.name} ({entry.path}:{entry.line}) by way of {way}"
