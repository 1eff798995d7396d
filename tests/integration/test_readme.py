"""The README, done as it says: its files written, its commands run, its SQL executed, in its order."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line for language, text in BLOCKS if language == "sh" for line in text.splitlines() if line.strip()
]
LEADS = "id,name,email\n10,Ada,ada@example.com\n11,Grace,grace@example.com\nx,Nobody,nobody@example.com\n"


class Shop:
    """A directory with the README's files, and an environment in which its commands work."""

    def __init__(self, home: Path, url: str) -> None:
        self.home = home
        self.port = _free_port()
        self.workers: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "STEPWELL_DATABASE_URL": url,
        }  # fmt: skip
        for language, text in BLOCKS:
            if language == "python":
                (home / text.splitlines()[0].removeprefix("# ")).write_text(text, encoding="utf-8")
        (home / "leads.csv").write_text(LEADS)

    def run(self, command: str) -> str:
        command = command.replace("localhost:9464", f"localhost:{self.port}").replace(
            "port 9464", f"port {self.port}"
        )
        if command.startswith("stepwell worker"):
            self.workers.append(
                subprocess.Popen(
                    ["bash", "-c", f"exec {command}"],
                    cwd=self.home,
                    env=self.environment,
                    stderr=subprocess.DEVNULL,
                )
            )
            ready = f"curl -sf localhost:{self.port}/readyz"
            wait_until(lambda: self._shell(ready).returncode == 0, 60, what="the workers to be ready")
            return ""
        done = self._shell(command)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout

    def _shell(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", command],
            cwd=self.home,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def close(self) -> None:
        for worker in self.workers:
            worker.send_signal(signal.SIGTERM)
            worker.wait(30)


@pytest.fixture
def shop(tmp_path: Path, empty_database_url: str) -> Iterator[Shop]:
    if not shutil.which("curl") or not shutil.which("psql"):
        pytest.skip("the README's commands need curl and psql on the PATH")
    opened = Shop(tmp_path, empty_database_url)
    try:
        yield opened
    finally:
        opened.close()


def test_every_command_statement_and_file_of_the_readme_works(shop: Shop) -> None:
    said = {}
    for command in COMMANDS:
        if command.startswith(("make", "export")):
            continue
        said[command] = shop.run(command)
    assert any("stepwell_runs_total" in text for text in said.values())
    assert said[next(c for c in COMMANDS if c.endswith("--wait"))].splitlines()[-1] == "1"
    rejects = (shop.home / "leads.csv.rejects.csv").read_text()
    assert rejects.count("\n") == 2
    assert "Nobody" in rejects

    with psycopg.connect(shop.environment["STEPWELL_DATABASE_URL"], autocommit=True) as db:
        for language, text in BLOCKS:
            if language == "sql":
                db.execute(text)  # type: ignore[call-overload]  # a script, not a literal
        assert shop.run("python enqueue.py") == "3\n"
        wait_until(
            lambda: (
                db.execute("select count(*) from stepwell.runs where state = 'succeeded'").fetchone() == (6,)
            ),
            what="every lead to be welcomed",
        )
        rows = db.execute("select id from crm_leads order by id").fetchall()
    assert [row[0] for row in rows] == [1, 2, 2, 3, 4, 10, 11]  # 2 is also the row of one's own


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_the_targets_of_the_readme_exist(command: str) -> None:
    """They are run by `.ci/run`, and the demo by a test of its own."""
    assert (
        subprocess.run([*command.split(), "-n"], cwd=ROOT, capture_output=True, check=False).returncode == 0
    )


def test_the_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
