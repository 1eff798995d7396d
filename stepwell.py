"""The command `stepwell`, also `python -m stepwell`: make sure of our packages, then run `worker.cli`.

Our import packages have plain names, `worker` and `outbox`, and so may a module of the user's. Where theirs
comes first on the path (PYTHONPATH, the working directory), it would be imported in place of ours, and the
command would fail on some attribute. So this module stands apart from both and looks before it imports.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_OURS = ("worker", "outbox")


def main() -> None:
    """Run the command line."""
    problem = hidden_package()
    if problem is not None:
        sys.stderr.write(f"stepwell: {problem}\n")
        sys.exit(2)
    from worker.cli import main as run

    run(prog_name="stepwell")


def hidden_package() -> str | None:
    """Return a sentence if something else stands where one of our packages should."""
    home = Path(__file__).resolve().parent
    for name in _OURS:
        found = _location(name)
        if found is None:
            return f"Stepwell's package {name!r} is missing from {home}: install Stepwell again"
        if found.resolve() != home / name / "__init__.py":
            return f"{found} hides Stepwell's own package {name!r}: rename it, or take its directory out of PYTHONPATH"
    return None


def _location(name: str) -> Path | None:
    """Return what `import name` would give: a file, or a directory without an __init__.py."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    places = [*(spec.submodule_search_locations or ())]
    found = spec.origin or (places[0] if places else None)
    return Path(found) if found else None


if __name__ == "__main__":
    main()
