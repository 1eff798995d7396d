"""Load the APP of a command line: a module path (`shop.flows`) or a file path (`flows.py`)."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from outbox.errors import ConfigError
from worker.registry import Registry, registry

_OURS = ("worker", "outbox")


def load_app(app: str) -> Registry:
    """Import APP and return the registry with what it defines. Raises ConfigError, in one sentence.

    A file that is loaded already under whatever name, such as the script that is running, is not loaded again.
    """
    if not app.strip():
        raise ConfigError("APP is empty; give a module (`shop.flows`) or a file (`flows.py`)")
    if app.endswith(".py") or os.sep in app:
        _load_file(app)
    else:
        _load_module(app)
    known = registry()
    known.resolve()
    if not known.workflows:
        raise ConfigError(f"{app} defines no workflow; decorate a function with @workflow")
    return known


def _load_file(app: str) -> None:
    path = Path(app).resolve()
    if not path.is_file():
        raise ConfigError(f"there is no file {app} (in {Path.cwd()})")
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise ConfigError(f"{app} cannot be imported: its name must be a Python name and end with .py")
    if any(_is_of(module, path) for module in _loaded()):
        return
    name = path.stem
    if name in _OURS:
        raise ConfigError(f"{app} would hide Stepwell's own package {name!r}; rename the file")
    if name in sys.modules:
        raise ConfigError(
            f"{app} cannot be imported as {name!r}: another module of that name is loaded from {_origin(sys.modules[name])}; "
            "rename the file"
        )
    _put_on_path(path.parent)
    _import(name, app)
    if not _is_of(sys.modules[name], path):
        raise ConfigError(
            f"{app} is hidden by the module {name!r} of {_origin(sys.modules[name])}; rename the file"
        )


def _load_module(app: str) -> None:
    _put_on_path(Path.cwd())
    if app in _OURS and Path(f"{app}.py").is_file():
        raise ConfigError(f"your {app}.py hides behind Stepwell's own package {app!r}; rename it")
    try:
        spec = importlib.util.find_spec(app)
    except (ImportError, ValueError, AttributeError):
        spec = None
    except Exception as error:  # a package on the way to the module is imported, and may raise anything
        raise _broken(app, error) from error
    if spec is None:
        hint = f"; is it {app.replace('.', os.sep)}.py of another directory?" if "." not in app else ""
        raise ConfigError(f"there is no module {app!r} (seen from {Path.cwd()}){hint}")
    if spec.origin and any(_is_of(module, Path(spec.origin)) for module in _loaded()):
        return
    _import(app, app)


def _import(name: str, app: str) -> None:
    try:
        importlib.import_module(name)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise _broken(app, error) from error


def _broken(app: str, error: BaseException) -> ConfigError:
    said = str(error).strip().splitlines()
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_plumbing(frame.filename)]
    at = f" ({lines[-1].filename}:{lines[-1].lineno})" if lines else ""
    return ConfigError(
        f"{app} cannot be imported: {type(error).__name__}{': ' + said[0] if said else ''}{at}"
    )


def _is_plumbing(filename: str) -> bool:
    return filename.startswith("<frozen importlib") or filename in (__file__, importlib.__file__)


def _loaded() -> Iterator[ModuleType]:
    modules: list[object] = list(sys.modules.values())  # some put other objects there
    return (module for module in modules if isinstance(module, ModuleType))


def _is_of(module: ModuleType, path: Path) -> bool:
    origin = _origin(module)
    return origin is not None and Path(origin).name == path.name and Path(origin).resolve() == path


def _origin(module: ModuleType) -> str | None:
    origin = module.__dict__.get("__file__")  # getattr would wake modules that load themselves lazily
    return origin if isinstance(origin, str) else None


def _put_on_path(directory: Path) -> None:
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
