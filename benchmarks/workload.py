"""What the workers of the benchmarks run: no-op steps, so that what is measured is Stepwell."""

from __future__ import annotations

import asyncio
import os
import time

from worker import current_step, map, sleep, step, workflow


def _tell(word: str) -> None:
    """Append a line to the file that the benchmark reads; CLOCK_MONOTONIC is the same in all processes."""
    path = os.environ.get("STEPWELL_BENCH_LOG")
    if path:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{word} {time.monotonic_ns()} {os.getpid()}\n".encode())
        os.close(descriptor)


@step
async def first(n: int) -> int:
    return n


@step
async def second(n: int) -> int:
    return n


@workflow
async def one_step(n: int) -> int:
    return await first(n)


@workflow
async def two_steps(n: int) -> int:
    return await second(await first(n))


@workflow
async def ten_steps(n: int) -> int:
    for _ in range(10):
        n = await first(n)
    return n


@step
async def started(word: str) -> None:
    _tell(word)


@workflow
async def start(word: str) -> None:
    await started(word)


@step
async def linger(word: str) -> None:
    """Stay until killed; the execution that follows is done at once."""
    _tell(word)
    if current_step().execution == 1:
        await asyncio.sleep(60)


@workflow
async def lingering(word: str) -> None:
    await linger(word)


@workflow
async def fan_out(items: int) -> int:
    return len(await map(first, range(items)))


@workflow
async def nap(seconds: float, word: str) -> None:
    await sleep(seconds)
    await started(word)


@workflow
async def many_steps(steps: int) -> int:
    for n in range(steps):
        await first(n)
    return steps
