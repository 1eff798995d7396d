"""Run the demo's messaging provider as a process of its own.

``python -m worker.demo.mailserver --maildir DIR`` prints its port, alone on a line, as soon as it serves.
It ends on SIGTERM and SIGINT, and when its standard input ends: whoever started it with a pipe there may
be killed without leaving it behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import click

from worker.demo.maildir import Maildir

if TYPE_CHECKING:
    from worker.demo.provider import Provider

HOST = "127.0.0.1"
WRITERS = 8
"""Threads that store messages: the disk syncs many at once for the price of one."""
BACKLOG = 512


@click.command(help="A messaging provider for the demo: SMTP in, a Maildir out.")
@click.option("--maildir", "directory", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="0 lets the system choose.")
@click.option("--latency", type=click.FloatRange(0, 60), default=0.0, help="Seconds spent on each message.")
def main(directory: Path, port: int, latency: float) -> None:
    try:
        from worker.demo.provider import Provider
    except ImportError as error:
        raise click.ClickException(f'{error.name} is missing: pip install "stepwell[demo]"') from None

    maildir = Maildir(directory)
    maildir.prepare()
    try:
        with ThreadPoolExecutor(WRITERS, thread_name_prefix="maildir") as threads:
            asyncio.run(_serve(Provider(maildir, threads, latency), port))
    except OSError as error:
        raise click.ClickException(f"cannot serve on {HOST}:{port}: {error.strerror}") from None
    finally:
        maildir.close_all()


async def _serve(provider: Provider, port: int) -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    server = await loop.create_server(provider.connection, HOST, port, backlog=BACKLOG)
    if not sys.stdin.isatty():
        threading.Thread(target=_await_end_of_input, args=(loop, stopped), daemon=True).start()
    click.echo(server.sockets[0].getsockname()[1])
    await stopped.wait()
    server.close()


def _await_end_of_input(loop: asyncio.AbstractEventLoop, stopped: asyncio.Event) -> None:
    # os.read takes no lock of the interpreter's own stdin object, which a daemon thread would die with.
    while os.read(0, 65536):
        pass
    with contextlib.suppress(RuntimeError):  # the loop is closed: SIGTERM was first
        loop.call_soon_threadsafe(stopped.set)


if __name__ == "__main__":
    main()
