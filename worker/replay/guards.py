"""What is switched off around a body: the shape that `worker.engine.sandbox` fills, so that a replay imports no loop."""

from __future__ import annotations

from typing import Any, Protocol


class Guard(Protocol):
    """What is switched off while a body runs."""

    def enter(self) -> Any:
        """Switch off; the result is handed to `leave`."""

    def leave(self, before: Any) -> None:
        """Switch on what was on before."""

    def explain(self, error: Exception) -> str | None:
        """Say what the body did, if `error` is how a library complains of what the guard has switched off."""


class _Unguarded:
    """Switches nothing off: for bodies that are trusted, as in tests of this module."""

    def enter(self) -> None: ...

    def leave(self, before: Any) -> None: ...

    def explain(self, error: Exception) -> None: ...


UNGUARDED: Guard = _Unguarded()
