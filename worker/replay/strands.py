"""The strands of a body: its own course, and the branches of its joins that are coroutines.

Each strand is a greenlet. Only one runs at a time, and each runs until it waits; what is recorded is handed to them one
record at a time, in the order in which it happened, and only when all of them wait. So two branches that share a
list replay as they ran.
"""

from __future__ import annotations

from contextvars import Context
from typing import Any

from greenlet import greenlet  # type: ignore[import-untyped]  # ships no types

from worker.replay.calls import Call, First, JoinCall
from worker.replay.records import Path


class Strand:
    """One course of a body. `prefix` is where its calls are numbered: () for the body's own."""

    __slots__ = (
        "awaitable", "body", "branch", "calls", "closing", "context", "ended", "join", "prefix", "result", "waits_at",
    )  # fmt: skip

    def __init__(self, prefix: Path = (), join: Join | None = None, branch: int = 0) -> None:
        self.prefix = prefix
        self.join = join
        self.branch = branch
        self.calls = 0
        self.body: greenlet | None = None
        self.awaitable: Any = None
        self.context: Context | None = None
        self.ended = False
        self.closing = False
        self.waits_at: Path = ()
        self.result: tuple[Any, BaseException | None] = (None, None)

    def next_path(self) -> Path:
        """Return the path of the next call."""
        self.calls += 1
        return (*self.prefix, self.calls)

    def has_ended(self) -> bool:
        """Tell whether its code has run to its end."""
        return self.ended


class Join:
    """A join that a strand waits for, until `over`. Then `error` is raised in the strand, or `value` returned."""

    __slots__ = ("begun", "call", "error", "left", "over", "path", "strands", "values", "waiter")

    def __init__(self, call: JoinCall, path: Path, waiter: Strand) -> None:
        self.call = call
        self.path = path
        self.waiter = waiter
        self.strands: list[Strand] = []
        self.values: list[Any] = [None] * len(call.branches)
        self.begun = 0
        self.left = len(call.branches)
        self.error: BaseException | None = None
        self.over = not call.branches

    def settle(self, branch: int, value: Any, error: BaseException | None) -> bool:
        """Take note that a branch (counted from 1) has ended; tell whether the join is over."""
        if self.over:
            return True
        self.left -= 1
        if error is not None and (self.call.mode != "settled" or not isinstance(error, Exception)):
            self.error, self.over = error, True
        elif self.call.mode == "first":
            self.values, self.over = [First(branch - 1, value)], True
        else:
            self.values[branch - 1] = value if error is None else error
            self.over = not self.left
        return self.over

    @property
    def value(self) -> Any:
        """What the join returns."""
        if self.call.mode == "first":
            return self.values[0]
        return self.values if self.call.as_list else tuple(self.values)


class Waiting:
    """A call that nothing is recorded of yet: of a strand, or one that is a branch of a join by itself."""

    __slots__ = ("branch", "call", "fresh", "join", "path", "strand")

    def __init__(
        self,
        path: Path,
        call: Call,
        fresh: bool,
        strand: Strand | None,
        join: Join | None = None,
        branch: int = 0,
    ) -> None:
        self.path = path
        self.call = call
        self.fresh = fresh
        self.strand = strand
        self.join = join
        self.branch = branch
