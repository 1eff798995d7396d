"""What a body does beside its calls: it shows state, emits values, starts children, tells versions of its code apart.

None of it is recorded one by one. What the body has done since the last drive that was written down is sent with the
next write; if that never comes, the next drive collects the same again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from worker.replay.records import Path

if TYPE_CHECKING:
    from worker.definitions import Workflow


class Starting(msgspec.Struct, frozen=True):
    """A child to be made, with its input as JSON text."""

    path: Path
    workflow: Workflow[..., Any]
    input: str
    detached: bool
    deadline: float | None


class Emitted(msgspec.Struct, frozen=True, gc=False):
    """The nth value that the run emits."""

    n: int
    name: str
    value: str


class Effects:
    """What is to be sent with the next write: nothing, mostly."""

    __slots__ = ("dropped", "emitted", "patches", "starting", "states")

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.emitted: list[Emitted] = []
        self.starting: list[Starting] = []
        self.dropped: list[Path] = []
        self.patches: list[tuple[int, str]] = []
