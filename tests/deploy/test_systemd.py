"""deploy/systemd: the unit as systemd reads it, and its command with the example's environment, run for real."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from outbox.settings import Settings
from tests.deploy import tools
from tests.deploy.stops import longest_stop_seconds
from tests.waiting import wait_until
from worker.supervision.pipe import EXIT_CONFIG

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "deploy/systemd/stepwell-worker@.service"
EXAMPLE = ROOT / "deploy/systemd/leads.env.example"
MOST_EXPOSED = 2.0
"""What `systemd-analyze security` may say at the most, of ten; of a unit without hardening it says 9.6."""


@pytest.fixture(scope="module")
def analyze() -> str:
    return tools.program("systemd-analyze", "it comes with the Debian package systemd")


@pytest.fixture
def system(analyze: str, tmp_path: Path) -> Path:
    """A directory that looks as a machine's root does to systemd, with the unit and what it starts installed."""
    units = tmp_path / "root/etc/systemd/system"
    program = tmp_path / "root/opt/stepwell/bin/stepwell"
    for directory in (units, program.parent):
        directory.mkdir(parents=True)
    shutil.copytree("/lib/systemd/system", tmp_path / "root/lib/systemd/system", symlinks=True)
    shutil.copy(UNIT, units)
    shutil.copy("/bin/true", program)
    return tmp_path / "root"


def verified(analyze: str, system: Path) -> subprocess.CompletedProcess[str]:
    command = [analyze, f"--root={system}", "verify", "stepwell-worker@leads.service"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_systemd_reads_the_unit_without_a_complaint(analyze: str, system: Path) -> None:
    done = verified(analyze, system)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_mistake_in_the_unit_would_be_found(analyze: str, system: Path) -> None:
    unit = system / "etc/systemd/system" / UNIT.name
    unit.write_text(unit.read_text().replace("KillMode=mixed", "KillMode=gently"))
    assert "kill mode" in verified(analyze, system).stderr


def test_the_unit_is_hardened(analyze: str) -> None:
    command = [analyze, "security", "--offline=true", "--no-pager", str(UNIT)]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    exposed = re.search(r"Overall exposure level for \S+: ([\d.]+)", said)
    assert exposed is not None, said
    assert float(exposed[1]) <= MOST_EXPOSED, said


def directives() -> dict[str, str]:
    lines = [line for line in UNIT.read_text().splitlines() if "=" in line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_the_unit_waits_for_a_drain_to_end() -> None:
    assert float(directives()["TimeoutStopSec"]) >= longest_stop_seconds(Settings().grace_seconds)
    assert directives()["RestartPreventExitStatus"] == str(EXIT_CONFIG)


def test_the_command_of_the_unit_becomes_ready_and_ends_by_sigterm(database_url: str, tmp_path: Path) -> None:
    example = dict(
        line.split("=", 1) for line in EXAMPLE.read_text().splitlines() if not line.startswith("#")
    )
    (tmp_path / example["STEPWELL_APP"]).write_text(
        "from worker import workflow\n@workflow\nasync def rest() -> None: ...\n"
    )
    variables = {
        **example,
        "STEPWELL_DATABASE_URL": database_url,
        "STEPWELL_WORKER_OPTIONS": example["STEPWELL_WORKER_OPTIONS"].replace("9464", "0"),
        "NOTIFY_SOCKET": str(tmp_path / "notify"),
        "WATCHDOG_USEC": str(int(directives()["WatchdogSec"]) * 1_000_000),
    }
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener,
        (tmp_path / "log").open("wb") as log,
    ):
        listener.bind(variables["NOTIFY_SOCKET"])
        listener.setblocking(False)
        unit = subprocess.Popen(
            command(variables),
            cwd=tmp_path,
            env={**os.environ, **variables},
            stderr=log,
            start_new_session=True,
        )
        try:
            wait_until(lambda: "READY=1" in heard(listener), what="READY=1")
            unit.send_signal(signal.SIGTERM)
            assert unit.wait(30) == 0, (tmp_path / "log").read_text()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(unit.pid, signal.SIGKILL)


def command(variables: dict[str, str]) -> list[str]:
    """Return ExecStart with its variables replaced as systemd does: ${X} is one word, $X is split."""
    words: list[str] = []
    for word in shlex.split(directives()["ExecStart"]):
        if found := re.fullmatch(r"\$\{(\w+)\}", word):
            words.append(variables[found[1]])
        elif found := re.fullmatch(r"\$(\w+)", word):
            words += variables[found[1]].split()
        else:
            words.append(word)
    assert words[0] == "/opt/stepwell/bin/stepwell"
    return [str(Path(sys.executable).with_name("stepwell")), *words[1:]]


def heard(listener: socket.socket) -> list[str]:
    messages = []
    with suppress(BlockingIOError):
        while True:
            messages.append(listener.recv(4096).decode())
    return messages
