"""`stepwell demo` as the command that it is: through both kills, through Ctrl-C, and killed itself."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # comes with the embedded Postgres, without types
import psycopg
import pytest

from tests.waiting import wait_until
from worker.demo.home import fresh_home

pytestmark = [pytest.mark.crash, pytest.mark.slow]


class Demo:
    """A running demo. Its lines are read one by one, so that a test can act at a certain one."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "worker.cli", "demo", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self.started: list[psutil.Process] = []

    def read_until(self, wanted: str) -> re.Match[str]:
        """Return the match in the first line that has one."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if match := re.search(wanted, line):
                self.started = psutil.Process(self.process.pid).children(recursive=True)
                return match
        raise AssertionError(f"no line with {wanted!r} in:\n{self.said}")

    @property
    def said(self) -> str:
        return "".join(self.lines)

    @property
    def home(self) -> Path:
        match = re.search(r"of its own in (\S+)", self.said)
        assert match is not None, self.said
        return Path(match[1])

    def end(self) -> int:
        """Read the rest and return the exit status."""
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)
        return self.process.wait(30)

    def left(self) -> list[psutil.Process]:
        """Return what still runs of the processes that were there at the last line that was read."""
        return [each for each in self.started if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


@contextmanager
def demo(*arguments: str) -> Iterator[Demo]:
    running = Demo(*arguments)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            os.killpg(running.process.pid, signal.SIGKILL)
            running.process.wait()
        assert running.process.stdout is not None
        running.process.stdout.close()


@pytest.mark.parametrize("processes", [3, 1])
def test_every_lead_is_welcomed_once_through_both_kills(processes: int) -> None:
    command = [sys.executable, "-m", "worker.cli", "demo", "--leads", "50", "--processes", str(processes)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, timeout=120)

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert list(report) == [
        "leads",
        "rejected",
        "duplicates",
        "succeeded",
        "messages",
        "duplicate_messages",
        "crm_rows",
        "kills",
        "recovery_seconds",
        "runs_per_second",
    ]
    assert (report["leads"], report["rejected"], report["duplicates"]) == (50, 1, 0)
    assert report["succeeded"] == report["messages"] == report["crm_rows"] == 49
    assert report["duplicate_messages"] == 0
    assert report["kills"] == 2
    assert 0 < report["recovery_seconds"] < 20


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("Starting a Postgres", signal.SIGINT),
        ("Enqueued", signal.SIGTERM),
        ("kill -9 of worker", signal.SIGINT),
        ("kill -9 of the supervisor", signal.SIGHUP),
    ],
)
def test_a_signal_takes_everything_down_without_a_traceback(line: str, number: signal.Signals) -> None:
    with demo("--leads", "50") as running:
        running.read_until(line)
        os.killpg(running.process.pid, number)  # as a terminal does: to all of the foreground group

        assert running.end() == 128 + number
        assert f"interrupted by {number.name}" in running.said
        assert "Traceback" not in running.said
        assert not running.home.exists()
        wait_until(lambda: not running.left())


def test_kept_it_stays_up_with_exact_metrics_until_it_is_told_to_end() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with demo("--leads", "30", "--keep", "--metrics-port", str(port)) as running:
            url = running.read_until("psql '(.*)'")[1]
            assert f"Port {port} is taken" in running.said
            metrics_url = running.read_until(r"curl (http://\S+)")[1]
            running.read_until("Ctrl-C here")

            metrics = urllib.request.urlopen(metrics_url, timeout=10).read().decode()
            with psycopg.connect(url) as connection:
                counted = connection.execute(
                    "select name, outcome, count(*) from stepwell.outbox where kind = 'step' group by 1, 2"
                ).fetchall()
            for name, outcome, count in counted:
                assert f'stepwell_steps_total{{outcome="{outcome}",step="{name}"}} {float(count)}' in metrics
            assert 'stepwell_runs_total{outcome="succeeded",workflow="welcome_lead"} 30.0' in metrics

            running.process.terminate()
            assert running.end() == 0
            assert not running.home.exists()
            wait_until(lambda: not running.left())


def test_what_a_killed_demo_leaves_behind_is_cleared_up_by_the_next() -> None:
    with demo("--leads", "50") as running:
        running.read_until("runs have ended")
        running.process.kill()
        running.process.wait()
        assert running.home.exists()

        with fresh_home() as other:
            assert other != running.home
        assert not running.home.exists()
        wait_until(lambda: not running.left())
