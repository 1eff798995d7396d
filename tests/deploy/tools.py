"""What a validation needs beside Python: it skips with a reason where that is missing, and fails in `make deploy-check`."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

COMPLETE = "STEPWELL_DEPLOY_CHECK"
"""The variable by which `make deploy-check` asks for all of it."""


def unavailable(reason: str) -> NoReturn:
    """Skip the test; fail it where everything has to be there."""
    if os.environ.get(COMPLETE):
        pytest.fail(reason)
    pytest.skip(reason)


def program(name: str, comes_with: str) -> str:
    """Return the path of a program, beside this Python or on the path."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    return found or unavailable(f"{name} is not here: {comes_with}")


def module(name: str, comes_with: str) -> ModuleType:
    """Return an imported module."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        unavailable(f"{name} is not here: {comes_with}")


EXTRA = "it comes with the extra deploy, which `make deploy-check` installs"
