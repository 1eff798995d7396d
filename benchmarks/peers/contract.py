"""What the peers written in Python share: the command line of README.md, and what a step leaves behind.

A peer is run as a script, so this file is found beside it; it needs nothing but the standard library, so that
`describe` runs where no peer is installed.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LINGER_SECONDS = 600


@dataclass(frozen=True)
class Client:
    """An open connection; each run is given a word, which its step writes if its work is `mark`."""

    single: Callable[[str, str], Awaitable[object]]  # work, word; committed when it returns
    bulk: Callable[[str, list[str]], Awaitable[object]]  # work, words


@dataclass(frozen=True)
class Peer:
    description: dict[str, Any]
    install: Callable[[], None]
    client: Callable[[], AbstractAsyncContextManager[Client]]
    work: Callable[[], None]  # calls ready() when it takes work
    run: Callable[[Coroutine[Any, Any, None]], object] = asyncio.run  # the event loop of the client


def main(peer: Peer) -> None:
    """Run the command that the command line names."""
    match sys.argv[1:]:
        case ["describe"]:
            print(json.dumps(peer.description, indent=2, ensure_ascii=False))
        case ["install"]:
            peer.install()
        case ["enqueue", work, count, ("bulk" | "single") as way] if work in peer.description["works"]:
            peer.run(_enqueue(peer, work, int(count), in_bulk=way == "bulk"))
        case ["drip", count, rate]:
            peer.run(_drip(peer, int(count), float(rate)))
        case ["work"]:
            # The database is dropped after a measurement, so there is nothing that an orderly end would save;
            # and it could take as long as a lingering job.
            signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
            peer.work()
        case _:
            sys.exit(
                "describe | install | enqueue WORK COUNT bulk|single | drip COUNT RATE | work\n"
                f"WORK is one of: {', '.join(peer.description['works'])}"
            )


async def _enqueue(peer: Peer, work: str, count: int, *, in_bulk: bool) -> None:
    words = [str(n) for n in range(count)]
    async with peer.client() as client:
        began = time.monotonic()
        if in_bulk:
            await client.bulk(work, words)
        else:
            for word in words:
                await client.single(work, word)
        seconds = time.monotonic() - began
    print(json.dumps({"seconds": seconds}))


async def _drip(peer: Peer, count: int, rate: float) -> None:
    async with peer.client() as client:
        began = time.monotonic()
        for n in range(count):
            await asyncio.sleep(max(0, began + n / rate - time.monotonic()))
            print(f"d{n} {time.monotonic_ns()}", flush=True)
            await client.single("mark", f"d{n}")


def chunks(words: list[str], size: int) -> Iterable[list[str]]:
    return (words[start : start + size] for start in range(0, len(words), size))


def url() -> str:
    return os.environ["BENCH_URL"]


def ready() -> None:
    print("ready", flush=True)


def effect() -> None:
    """Leave the one byte of an execution of a step."""
    os.write(_appending(os.environ["BENCH_EFFECTS"]), b".")


def mark(word: str) -> None:
    line = f"{word} {time.monotonic_ns()} {os.getpid()}\n"
    os.write(_appending(os.environ["BENCH_MARKS"]), line.encode())


def first_of_linger() -> None:
    mark("first")
    effect()


async def second_of_linger() -> None:
    """Wait for the kill at the first execution, and only then."""
    lines = Path(os.environ["BENCH_MARKS"]).read_text().splitlines()
    executed_before = any(line.startswith("second ") for line in lines)
    mark("second")
    effect()
    if not executed_before:
        await asyncio.sleep(LINGER_SECONDS)


@functools.cache
def _appending(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
