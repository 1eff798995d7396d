"""Workflows as a producer sees them: a name, a signature, a queue. No worker is needed to define one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from outbox.codec import Signature

R = TypeVar("R")


@dataclass(frozen=True)
class Lead:
    id: int
    name: str = "Ada"


class Flow(Generic[R]):
    """Stands in for what `@workflow` makes of a function."""

    def __init__(self, function: Callable[..., R], queue: str = "default", version: str = "") -> None:
        self.name = function.__name__
        self.queue = queue
        self.version = version
        self.signature = Signature.of(function)
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> R:
        return self._function(*args, **kwargs)


def _welcome(lead: Lead, greeting: str = "Hello") -> Lead:
    return lead


def _count(n: int) -> int:
    return n


_welcome.__name__, _count.__name__ = "welcome", "count"
welcome = Flow(_welcome)
count = Flow(_count)
