"""Check source that a test writes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

from worker.lint import Finding, check

Check = Callable[..., list[str]]


def written(directory: Path, files: dict[str, str]) -> None:
    """Write source files, each without the indentation that its test has."""
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")


def findings(directory: Path, files: dict[str, str] | str, app: str = "flows.py") -> tuple[Finding, ...]:
    """Write files and return what is found in `app`. Expects that `directory` is the working directory."""
    written(directory, {"flows.py": files} if isinstance(files, str) else files)
    return check([app]).findings


def told(found: tuple[Finding, ...]) -> list[str]:
    """Return `path:line rule` of each finding, the path only of other files than flows.py."""
    return [
        f"{'' if each.path == 'flows.py' else each.path + ':'}{each.line} {each.rule}".strip()
        for each in found
    ]
