"""Where source files are: APP as `stepwell worker` takes it, or a directory, and what files import.

Nothing is imported to find it. A module is looked for below the working directory and along `sys.path`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from outbox.errors import ConfigError

_OURS = ("worker", "outbox")
_INSTALLED = ("site-packages", "dist-packages")
_SKIPPED = ("__pycache__", "node_modules", *_INSTALLED)


@dataclass(frozen=True, slots=True)
class Place:
    """A source file: its module's name as seen from `root`, and `home`, within which imports are followed."""

    path: Path
    name: str
    root: Path
    home: Path

    @property
    def is_package(self) -> bool:
        """Tell whether relative imports start at this module itself."""
        return self.path.name == "__init__.py"


def places_of(app: str) -> list[Place]:
    """Return the files of APP: one, or those of a directory. Raises ConfigError, in one sentence."""
    if not app.strip():
        raise ConfigError(
            "APP is empty; give a module (`shop.flows`), a file (`flows.py`) or a directory (`shop/`)"
        )
    path = Path(os.path.abspath(app))  # noqa: PTH100 - resolve() would show the target of a symbolic link
    if path.is_dir():
        return [_place(each) for each in _files_below(path)]
    if app.endswith(".py") or os.sep in app:
        if not path.is_file():
            raise ConfigError(f"there is no file {app} (in {Path.cwd()})")
        return [_place(path)]
    return [_module(app)]


def imported(name: str, near: Place) -> Place | None:
    """Return the file of module `name` as `near` imports it, None outside of its package."""
    parts = name.split(".")
    if not name or (parts[0] in _OURS and near.name.split(".")[0] not in _OURS):
        return None
    # A directory without __init__.py is a package of those who start beside it.
    for root in dict.fromkeys((near.root, Path.cwd())):
        path = _file_at(root.joinpath(*parts))
        if path is not None and path.is_relative_to(near.home):
            return Place(path, name, root, near.home)
    return None


def read(place: Place) -> str:
    """Return the text of a file in the encoding that it declares. Raises ConfigError."""
    try:
        with tokenize.open(place.path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise ConfigError(f"{shown(place.path)} cannot be read: {error}") from error


def shown(path: Path) -> str:
    """Return a path as it is reported: relative below the working directory."""
    cwd = Path.cwd()
    return str(path.relative_to(cwd) if path.is_relative_to(cwd) else path)


def _files_below(directory: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(directory):
        here = Path(folder)
        folders[:] = sorted(
            each
            for each in folders
            if not each.startswith(".") and each not in _SKIPPED and not (here / each / "pyvenv.cfg").exists()
        )
        yield from (here / each for each in sorted(files) if each.endswith(".py"))


def _place(path: Path) -> Place:
    """Return the place of a file: its package is what the `__init__.py` beside and above it make."""
    names = [] if path.name == "__init__.py" else [path.stem]
    root = path.parent
    while (root / "__init__.py").is_file() and root.parent != root:
        names.insert(0, root.name)
        root = root.parent
    return _at_home(path, ".".join(names) or path.stem, root)


def _at_home(path: Path, name: str, root: Path) -> Place:
    package = name.partition(".")[0]
    if package in _OURS:
        return Place(path, name, root, path.parent)
    if path.is_relative_to(root / package):
        return Place(path, name, root, root / package)
    alone = root.name in _INSTALLED  # everything else that is installed lies beside it
    return Place(path, name, root, path if alone else root)


def _module(name: str) -> Place:
    parts = name.split(".")
    if all(part.isidentifier() for part in parts):
        for root in _roots(parts[0]):
            path = _file_at(root.joinpath(*parts))
            if path is not None:
                return _at_home(path, name, root)
    raise ConfigError(f"there is no module {name!r} with a source file (seen from {Path.cwd()})")


def _roots(package: str) -> Iterator[Path]:
    yield Path.cwd()
    yield from (Path(entry) for entry in sys.path if entry)
    try:
        spec = importlib.util.find_spec(package)  # knows editable installs; a top-level name imports nothing
    except (ImportError, ValueError):
        spec = None
    if spec is not None and spec.origin is not None:
        origin = Path(spec.origin)
        yield origin.parent.parent if origin.name == "__init__.py" else origin.parent


def _file_at(base: Path) -> Path | None:
    for path in (base / "__init__.py", base.with_name(f"{base.name}.py")):
        if path.is_file():
            return path
    return None
