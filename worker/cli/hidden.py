"""Whether the packages that Python finds under our names are ours. Imports neither of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_NAMES = ("worker", "outbox")


def hidden_package() -> str | None:
    """Return a sentence if a module of the user's, or of another package, stands where one of ours should."""
    home = Path(__file__).resolve().parents[2]
    for name in _NAMES:
        found = _location(name)
        if found is None or found.resolve() != (home / name / "__init__.py"):
            where = (
                f"{found} hides"
                if found
                else f"{name} is not installed beside {home / 'worker'}; something hides"
            )
            return (
                f"{where} Stepwell's own package {name!r}: rename it, or run stepwell from another directory"
            )
    return None


def _location(name: str) -> Path | None:
    """Return the file of what `import name` gives; a directory for a namespace package."""
    module = sys.modules.get(name)
    origin = getattr(module, "__file__", None)
    if origin is None:
        spec = importlib.util.find_spec(name)
        if spec is None:
            return None
        places = spec.submodule_search_locations
        origin = spec.origin or (next(iter(places), None) if places else None)
    return Path(origin) if origin else None
