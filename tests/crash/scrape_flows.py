"""What runs while it is scraped: the flows of the chaos runs, and one that fails."""

from __future__ import annotations

from tests.crash.chaos_flows import plain, short, stumbling
from worker import step, workflow

__all__ = ["fail", "plain", "refuse", "short", "stumbling"]


@step
def refuse(n: int) -> int:
    raise ValueError(n)


@workflow
def fail(n: int) -> int:
    return refuse(n)
