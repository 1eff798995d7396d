from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CALLS, MISUSE = HERE / "calls.py", HERE / "misuse.py"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def mypy() -> dict[Path, dict[int, str]]:
    """Return the errors that mypy finds, by file and line."""
    done = run("mypy", "--strict", "--output", "json", str(CALLS), str(MISUSE))
    errors: dict[Path, dict[int, str]] = {CALLS: {}, MISUSE: {}}
    for line in done.stdout.splitlines():
        found = json.loads(line)
        if found["severity"] == "error":
            errors.setdefault((ROOT / found["file"]).resolve(), {})[found["line"]] = found["message"]
    assert done.returncode == 1, done.stdout + done.stderr  # misuse.py is full of errors
    return errors


def pyright() -> dict[Path, dict[int, str]]:
    """Return the errors that pyright finds, by file and line. Skip where it has no Node or is not installed."""
    done = run("pyright", "--outputjson", str(CALLS), str(MISUSE))
    try:
        answer = json.loads(done.stdout)
    except json.JSONDecodeError:
        pytest.skip(f"pyright cannot run here: {(done.stderr or done.stdout).strip()[-300:]}")
    errors: dict[Path, dict[int, str]] = {CALLS: {}, MISUSE: {}}
    for found in answer["generalDiagnostics"]:
        if found["severity"] == "error":
            lines = errors.setdefault(Path(found["file"]).resolve(), {})
            lines[found["range"]["start"]["line"] + 1] = found["message"]
    return errors


@pytest.mark.parametrize("checker", [mypy, pyright], ids=lambda checker: checker.__name__)
def test_definitions_are_typed_as_the_functions_that_they_are(checker):
    errors = checker()
    assert errors[CALLS] == {}
    refused = {
        number for number, line in enumerate(MISUSE.read_text().splitlines(), 1) if line.endswith("# refused")
    }
    assert set(errors[MISUSE]) == refused
