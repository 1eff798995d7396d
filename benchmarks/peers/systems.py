"""The systems that are compared: one program each, see README.md, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / ".peers"
ORDER = (
    "stepwell_python", "dbos_python", "absurd_python", "procrastinate_python", "pgqueuer_python", "chancy_python",
    "graphile_worker", "pg_boss", "dbos_typescript", "absurd_typescript",
)  # fmt: skip
STEPS = {"job": 1, "one": 1, "two": 2, "ten": 10}
"""How many effects a run of each work has."""
INSTALL_SECONDS = 600


class UnavailableError(Exception):
    """A system cannot be measured here; the message says why."""


@dataclass(frozen=True)
class System:
    """One program, and what it says of itself."""

    program: Path

    @cached_property
    def said(self) -> dict[str, Any]:
        """What `describe` prints; it needs nothing that has to be installed."""
        runner = "node" if self.program.suffix == ".mjs" else sys.executable
        try:
            answer = subprocess.run(
                [runner, self.program, "describe"], capture_output=True, text=True, timeout=60, check=True
            ).stdout
        except (OSError, subprocess.SubprocessError) as error:
            raise UnavailableError(f"{self.program.name} does not describe itself: {error}") from error
        described: dict[str, Any] = json.loads(answer)
        return described

    @property
    def name(self) -> str:
        return str(self.said["name"])

    @property
    def is_ours(self) -> bool:
        return self.program.stem == "stepwell_python"

    @property
    def home(self) -> Path:
        """Where what it requires is installed."""
        return ENVIRONMENTS / self.program.stem

    def can(self, work: str) -> bool:
        return work in self.said["works"]

    def first_work(self) -> str:
        """Return the work to compare queues by: a run of one step where steps are recorded, else a job."""
        return "one" if self.can("one") else "job"

    def install(self) -> None:
        """Install what it requires, once. Raises UnavailableError."""
        stamp = self.home / "installed"
        wanted = json.dumps(self.said["requires"])
        if self.is_ours or (stamp.exists() and stamp.read_text() == wanted):
            return
        self.home.mkdir(parents=True, exist_ok=True)
        if self.said["language"] == "node":
            commands = [["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--prefix", self.home, *self.said["requires"]]]  # fmt: skip
        else:
            venv.create(self.home, with_pip=True, clear=True)
            pip = [
                self.home / "bin" / "python",
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
            ]
            commands = [[*pip, *self.said["requires"]]]
        for command in commands:
            try:
                subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    timeout=INSTALL_SECONDS,
                    check=True,
                    cwd=self.home,
                )
            except OSError as error:
                raise UnavailableError(f"{self.name}: {error}") from error
            except subprocess.SubprocessError as error:
                said = str(getattr(error, "stderr", "") or error).strip()
                raise UnavailableError(f"{self.name} cannot be installed: {said[-300:]}") from error
        stamp.write_text(wanted)

    def command(self, *arguments: object) -> list[str]:
        """Return how its program is run."""
        if self.said["language"] == "node":
            runner: Path | str = "node"
        else:
            runner = sys.executable if self.is_ours else self.home / "bin" / "python"
        return [str(runner), str(self.program), *map(str, arguments)]

    def environment(self, url: str, effects: Path, marks: Path) -> dict[str, str]:
        """Return the environment that its program is run in."""
        return {
            **os.environ,
            "BENCH_URL": url,
            "BENCH_EFFECTS": str(effects),
            "BENCH_MARKS": str(marks),
            "BENCH_MODULES": str(self.home),
            "PYTHONPATH": str(ROOT) if self.is_ours else "",
            "PYTHONUNBUFFERED": "1",
        }


def found(only: str = "") -> list[System]:
    """Return the systems whose program's name contains `only`; Stepwell always, and first."""
    programs = {each.stem: each for each in HERE.iterdir() if each.suffix in (".py", ".mjs")}
    return [
        System(programs[stem]) for stem in ORDER if stem in programs and (only in stem or stem == ORDER[0])
    ]
