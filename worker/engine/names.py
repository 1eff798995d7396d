"""The names that a process claims: those of its workflows and steps, but for what it leaves to newer workers for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from worker.registry import Registry

LEFT_SECONDS = 2.0
"""How long a name is left to newer workers after something of it did not fit what is here.

Longer than their poll: where nobody rings, what is given back would be claimed by whoever has given it back just now.
"""


class Names:
    """What the process of `registry` claims. `on_return` is called when a name that was left is claimed again."""

    def __init__(self, registry: Registry, on_return: Callable[[], None]) -> None:
        self.all = sorted({*registry.workflows, *(step.claimed_as for step in registry.steps.values())})
        self.claimed = list(self.all)
        """Those that are to be claimed now, sorted. Always the same list: a claim that waits for its turn has them as they
        are when it is sent, and not what was left to others meanwhile."""
        self._on_return = on_return
        self._left: dict[str, asyncio.TimerHandle] = {}

    def leave(self, name: str) -> None:
        """Leave what has this name to newer workers, from now on for `LEFT_SECONDS`."""
        if (before := self._left.get(name)) is not None:
            before.cancel()
        self._left[name] = asyncio.get_running_loop().call_later(LEFT_SECONDS, self._take_up, name)
        self._set()

    def _take_up(self, name: str) -> None:
        del self._left[name]
        self._set()
        self._on_return()

    def _set(self) -> None:
        self.claimed[:] = [each for each in self.all if each not in self._left]
