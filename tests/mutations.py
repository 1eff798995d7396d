"""Turn off one guard after the other, and see that a test notices: `make mutations`.

    python -m tests.mutations [--only TEXT] [--jobs N]

Each mutant is a copy of the tree with one naive change (`tests.mutants`). The tests that ought to notice run in that copy, in
a process of their own; that it is the copy that they import, and that processes which they start import it too, is
checked as each of them starts. First the same tests have to pass where nothing is changed. Exit status 1 if they do
not, if a mutant survives, or if one cannot be made: then the code has moved on, and the list has to follow.
"""

# ruff: noqa: T201 - a script that prints

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
MUTANT_SECONDS = 240.0
"""Tests wait with bounds of their own, also for what never comes; what takes longer has proven nothing."""
UNMUTATED_SECONDS = 900.0
STOP_SECONDS = 30.0

Verdict = Literal["noticed", "survived", "broken"]

WATCHED = '''
"""Every process of this copy imports the copy, or nothing."""

import importlib.abc
import importlib.machinery
import sys

HOME = {home!r}


class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("outbox", "worker", "tests"):
            found = importlib.machinery.PathFinder.find_spec(name, path)
            origin = found.origin if found else None
            if not str(origin).startswith(HOME + "/"):
                print(f"not the mutated copy: {{name}} is {{origin}}", file=sys.stderr)
                raise SystemExit(70)
        return None


sys.meta_path.insert(0, Watch())
'''
"""As sitecustomize.py at the head of PYTHONPATH, Python imports it whenever it starts."""


class CannotBeMadeError(Exception):
    """The code has moved on from what a mutant replaces."""


@dataclass(frozen=True)
class Result:
    """What became of one mutant. `by` is the test that noticed, or what went wrong."""

    mutant: Mutant
    verdict: Verdict
    by: str
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--only", default="", help="only the mutants whose description contains this")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    options = parser.parse_args(arguments)
    chosen = [each for each in MUTANTS if options.only in f"{each.guard}: {each.off}"]
    if not chosen:
        parser.error(f"no mutant's description contains {options.only!r}")
    with copied() as original:
        for each in chosen:
            check(each, original)
        if not unmutated_pass(original, chosen):
            return 1
        with ThreadPoolExecutor(options.jobs) as pool:
            results = list(pool.map(lambda each: told(tried(each, original)), chosen))
    return summed_up(results)


def tried(mutant: Mutant, original: Path) -> Result:
    """Make a mutant and run its tests."""
    started = time.monotonic()
    with copied(original) as home:
        for edit in mutant.edits:
            file = home / edit.file
            file.write_text(file.read_text().replace(edit.replaced, edit.by))
        verdict, by = run(home, mutant.tests, MUTANT_SECONDS)
    return Result(mutant, verdict, by, time.monotonic() - started)


def run(home: Path, tests: Sequence[str], timeout_seconds: float) -> tuple[Verdict, str]:
    """Run tests in a copy, up to the first that fails; return what they say of it."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command, cwd=home, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        said, _ = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # upon which it stops its servers
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=STOP_SECONDS)
        process.kill()
        return "broken", f"no end within {timeout_seconds:g} s"
    failed = re.search(r"^FAILED (\S+)", said, re.MULTILINE)
    if process.returncode == 1 and failed:
        return "noticed", failed[1]
    if process.returncode == 0:
        return "survived", ""
    return "broken", said.strip()[-2000:]


def check(mutant: Mutant, home: Path) -> None:
    """See that each edit of a mutant has one place."""
    for edit in mutant.edits:
        found = (home / edit.file).read_text().count(edit.replaced)
        if found != 1:
            raise CannotBeMadeError(
                f"mutant {mutant.guard!r}, {mutant.off!r}: {edit.file} has what it replaces {found} times, not once: "
                f"follow the code in tests/mutants.py\n{edit.replaced}"
            )


def unmutated_pass(original: Path, mutants: Sequence[Mutant]) -> bool:
    """See that the tests pass where nothing is changed, and say if they do not."""
    tests = sorted({test for each in mutants for test in each.tests})
    started = time.monotonic()
    verdict, by = run(original, tests, UNMUTATED_SECONDS)
    if verdict != "survived":
        print(f"the unmutated tests do not pass: {by}")
        return False
    print(f"unmutated: all {len(tests)} tests pass, {time.monotonic() - started:.1f} s", flush=True)
    return True


@contextmanager
def copied(original: Path | None = None) -> Iterator[Path]:
    """Yield a copy of another one, or of what git knows of this checkout and does not ignore, as it stands."""
    home = Path(tempfile.mkdtemp(prefix="stepwell-mutant-"))
    try:
        if original is not None:
            shutil.copytree(original, home, dirs_exist_ok=True)
        else:
            for name in _files():
                (home / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, home / name)
        (home / "sitecustomize.py").write_text(WATCHED.format(home=str(home)))
        yield home
    finally:
        shutil.rmtree(home)


def _files() -> list[str]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in said.split("\0") if name and (ROOT / name).is_file()]


def told(result: Result) -> Result:
    """Print what became of a mutant, and return it."""
    mutant = result.mutant
    by = result.by.rpartition("::test_")[2] or result.by
    print(f"{result.verdict:8} {result.seconds:5.1f} s  {mutant.guard}: {mutant.off}", flush=True)
    print(f"{'':18}{by}" if result.by else f"{'':18}no test noticed", flush=True)
    return result


def summed_up(results: Sequence[Result]) -> int:
    """Say how it went as a whole; return the exit status."""
    missed = [each for each in results if each.verdict != "noticed"]
    print(f"\n{len(results) - len(missed)} of {len(results)} mutants were noticed")
    for each in missed:
        print(f"{each.verdict}: {each.mutant.guard}: {each.mutant.off}")
    return 1 if missed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CannotBeMadeError as error:
        sys.exit(str(error))
