"""A supervisor under systemd, as far as systemd's socket shows it: real processes, a real datagram socket."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.integration.supervising import Db, workers
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
WATCHDOG_SECONDS = 2.0

APP = """
from worker import workflow

@workflow
async def nothing() -> None: ...
"""


class Journal:
    """What came over the socket, in order."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._messages: list[str] = []

    @property
    def messages(self) -> list[str]:
        with suppress(BlockingIOError):
            while True:
                self._messages.append(self._listener.recv(4096, socket.MSG_DONTWAIT).decode())
        return self._messages

    def count(self, word: str) -> int:
        return self.messages.count(word)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        yield Journal(listener)


@pytest.fixture
def unit(journal: Journal, database_url: str, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`stepwell worker` with the environment that systemd gives to a unit of Type=notify."""
    app = tmp_path / "unit_flows.py"
    app.write_text(APP)
    environment = {
        **os.environ,
        "STEPWELL_DATABASE_URL": database_url,
        "NOTIFY_SOCKET": str(tmp_path / "notify"),
        "WATCHDOG_USEC": str(round(WATCHDOG_SECONDS * 1_000_000)),
    }
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker.cli", "worker", str(app), "--processes", "2"],
            cwd=ROOT, env=environment, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGCONT)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def test_a_unit_is_ready_when_its_workers_claim_alive_while_it_runs_and_tells_that_it_drains(
    unit: subprocess.Popen[bytes], journal: Journal, db: Db
) -> None:
    wait_until(lambda: journal.count("READY=1"))
    assert workers(db)
    wait_until(lambda: journal.count("WATCHDOG=1") >= 2)
    for _, pid in workers(db):
        assert b"NOTIFY_SOCKET" not in Path(f"/proc/{pid}/environ").read_bytes()
    unit.send_signal(signal.SIGTERM)
    assert unit.wait(30) == 0
    assert journal.count("READY=1") == journal.count("STOPPING=1") == 1
    assert journal.messages.index("READY=1") < journal.messages.index("STOPPING=1")


def test_a_supervisor_that_stands_still_gives_no_sign_of_life(
    unit: subprocess.Popen[bytes], journal: Journal
) -> None:
    wait_until(lambda: journal.count("WATCHDOG=1") >= 1)
    unit.send_signal(signal.SIGSTOP)
    wait_until(lambda: Path(f"/proc/{unit.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    said = len(journal.messages)
    # The one wait for a time: that nothing comes can only be seen by letting pass the time in which it would.
    time.sleep(WATCHDOG_SECONDS)
    assert len(journal.messages) == said
    unit.send_signal(signal.SIGCONT)
    wait_until(lambda: len(journal.messages) > said)
