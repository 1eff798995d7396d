"""Perform a Dockerfile without Docker: each stage in a copy-on-write copy of this machine's root.

Every RUN is executed as it stands, by /bin/sh, in a chroot; COPY, ENV, WORKDIR and USER do what they say. So a step that
would fail in a build fails here, and the two cannot drift apart. What is not the same: the base image is this machine,
with its own Python under the name `python`, and there are no layers, no cgroups and no network of its own.

Needs root on Linux: the copies are overlays in a mount namespace of their own, which vanish with the process that holds
it, however the test ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.deploy.dockerfile import Dockerfile, Instruction, Stage, pairs, substituted

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
WITHOUT_RIGHTS = ("--clear-groups", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs")


class Unavailable(Exception):
    """Why nothing can be rehearsed on this machine."""


class Mounts:
    """A mount namespace, held by a process that waits for its end of a pipe to close."""

    def __init__(self, home: Path) -> None:
        self.home = home
        hold = 'mount -t tmpfs -o mode=755 tmpfs "$0" && echo held && read _'
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", hold, str(home)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._holder.stdout is not None
        assert self._holder.stderr is not None
        if self._holder.stdout.readline() != "held\n":
            raise Unavailable(f"no mount namespace: {self._holder.stderr.read().strip()}")

    def close(self) -> None:
        """Let go of the namespace, and so of every mount in it."""
        self._holder.communicate("\n", timeout=10)

    def entered(self, command: Sequence[str]) -> list[str]:
        """Return the command line that runs `command` in the namespace."""
        return ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt", *command]

    def run(self, *command: str) -> None:
        """Run a command in the namespace; what it says is the error if it fails."""
        done = subprocess.run(self.entered(command), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")


class Room:
    """The root of one stage, with what the instructions so far have set."""

    def __init__(self, mounts: Mounts, name: str) -> None:
        self._mounts = mounts
        self.root = mounts.home / name / "root"
        self.environment = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8"}
        self.directory = "/"
        self.user = "0:0"
        self.variables: dict[str, str] = {}
        parts = {part: mounts.home / name / part for part in ("upper", "work", "root")}
        mounts.run("mkdir", "-p", *map(str, parts.values()))
        layers = f"lowerdir=/,upperdir={parts['upper']},workdir={parts['work']}"
        mounts.run("mount", "-t", "overlay", "-o", layers, "overlay", str(self.root))
        for place in ("/dev", "/proc"):
            mounts.run("mount", "--rbind", place, f"{self.root}{place}")
        mounts.run("ln", "-sf", _python(), f"{self.root}/usr/local/bin/python")

    def command(self, argv: Sequence[str], environment: Mapping[str, str] | None = None) -> list[str]:
        """Return the command line that runs `argv` here, as the user and in the directory of now."""
        uid, gid = self.user.split(":")
        variables = {**self.environment, **(environment or {})}
        return self._mounts.entered([
            "chroot", str(self.root), "/usr/bin/env", "-i", *(f"{key}={value}" for key, value in variables.items()),
            "setpriv", f"--reuid={uid}", f"--regid={gid}", *(WITHOUT_RIGHTS if uid != "0" else ("--clear-groups",)),
            "/bin/sh", "-c", 'cd "$0" && exec "$@"', self.directory, *argv,
        ])  # fmt: skip

    def run(
        self, *argv: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command here to its end."""
        command = self.command(argv, environment)
        return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)

    def mount(self, source: Path, target: str) -> None:
        """Have a directory of the machine's visible here, read-only."""
        self.make(target)
        self._mounts.run("mount", "--bind", "-o", "ro", str(source), f"{self.root}{target}")

    def make(self, directory: str) -> None:
        """Make a directory here."""
        self._mounts.run("mkdir", "-p", f"{self.root}{directory}")

    def seal(self) -> None:
        """Make the root read-only, and /tmp an empty directory in memory: `read_only: true` with `tmpfs: /tmp`."""
        self._mounts.run("mount", "-o", "remount,ro", str(self.root))
        self._mounts.run("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", f"{self.root}/tmp")

    def copy(self, sources: Sequence[str], target: str) -> None:
        """Copy as COPY does: of a directory what is in it, not the directory itself."""
        into = f"{self.root}{Path(self.directory, target)}{'/' if target.endswith('/') else ''}"
        for source in sources:
            self._mounts.run("sh", "-ec", _COPY, source, into)


_COPY = """
if [ -d "$0" ]; then mkdir -p "$1"; cp -R --preserve=mode "$0/." "$1"; else
    case "$1" in */) mkdir -p "$1" ;; *) mkdir -p "$(dirname "$1")" ;; esac
    cp --preserve=mode "$0" "$1"
fi
"""


class Rehearsal:
    """The stages of a Dockerfile, performed. The last one is the image."""

    def __init__(self, mounts: Mounts, dockerfile: Dockerfile, context: Path) -> None:
        self._context = context
        self._rooms: dict[str, Room] = {}
        for number, stage in enumerate(dockerfile.stages):
            name = stage.name or str(number)
            self._rooms[name] = self.image = Room(mounts, name)
            self._perform(stage)

    def _perform(self, stage: Stage) -> None:
        for step in stage.steps:
            self._step(self.image, step)

    def _step(self, room: Room, step: Instruction) -> None:
        match step.word:
            case "RUN":
                done = room.run("/bin/sh", "-c", step.text, environment=_where_packages_are())
                if done.returncode:
                    raise RuntimeError(f"RUN {step.text}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
            case "COPY":
                *sources, target = step.arguments
                origin = self._rooms[step.flags["from"]].root if "from" in step.flags else self._context
                room.copy([f"{origin}/{source.strip('/')}" for source in sources], target)
            case "ENV":
                for name, value in pairs(step.text).items():
                    room.environment[name] = substituted(value, room.environment)
            case "WORKDIR":
                room.directory = str(Path(room.directory, step.text))
                room.make(room.directory)
            case "USER":
                room.user = step.text
            case _:
                pass  # it says how the image is run


def _where_packages_are() -> dict[str, str]:
    """Return what tells pip where to find packages on this machine: a build gets it from whoever builds."""
    return {name: value for name, value in os.environ.items() if name.startswith("PIP_")}


def _python() -> str:
    """Return a Python that every account may run; root's own, in its home, is none."""
    for candidate in ("/usr/bin/python3", "/usr/local/bin/python3", sys.executable):
        test = "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))"
        if not Path(candidate).exists() or Path(candidate).resolve().is_relative_to("/root"):
            continue
        if subprocess.run([candidate, "-c", test], capture_output=True, check=False).returncode == 0:
            return str(Path(candidate).resolve())
    raise Unavailable(
        "no Python from 3.11 on that has venv and that everybody may run: the package python3-venv"
    )


@contextmanager
def rehearsed(dockerfile: Path, context: Path, home: Path) -> Iterator[Rehearsal]:
    """Yield a performed Dockerfile. Raises Unavailable where that is not possible."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise Unavailable("overlays and chroot are for root on Linux only")
    for tool in ("unshare", "nsenter", "setpriv", "chroot"):
        if shutil.which(tool) is None:
            raise Unavailable(f"{tool} is not here")
    mounts = Mounts(home)
    try:
        yield Rehearsal(mounts, Dockerfile.parse(dockerfile.read_text()), context)
    finally:
        mounts.close()
