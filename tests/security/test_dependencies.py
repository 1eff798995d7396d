"""What is installed with Stepwell: from where the user has it, no older than was tried, and nothing that is not used."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

RUNTIME = PROJECT["dependencies"]
EXTRAS = [each for extra in PROJECT["optional-dependencies"].values() for each in extra]


@pytest.mark.parametrize("requirement", [*RUNTIME, *EXTRAS])
def test_each_requirement_has_a_lower_bound_and_names_no_place_to_get_it(requirement: str) -> None:
    read = Requirement(requirement)
    assert read.url is None
    assert "://" not in requirement
    assert read.name == "stepwell" or any(each.operator == ">=" for each in read.specifier), requirement
    # An exact version would keep a user from the one with the mend in it.
    assert not any(each.operator in ("==", "===", "~=", "<", "<=") for each in read.specifier), requirement


def test_nothing_says_where_packages_come_from() -> None:
    text = (
        (ROOT / "pyproject.toml").read_text()
        + (ROOT / "Makefile").read_text()
        + (ROOT / ".ci/run").read_text()
    )
    for option in ("index-url", "extra-index", "find-links", "trusted-host", "--pre", "direct_url", "git+"):
        assert option not in text


def test_what_the_product_imports_at_its_top_is_what_it_requires() -> None:
    """Nothing comes in by way of something else, which may drop it in its next release."""
    required = {Requirement(each).name.replace("-", "_").lower() for each in RUNTIME}
    wanted: dict[str, Path] = {}
    for package in ("outbox", "worker"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.parse(file.read_text()).body:
                for name in _imported(node):
                    wanted.setdefault(name.partition(".")[0], file)
    foreign = set(wanted) - set(sys.stdlib_module_names) - {"outbox", "worker"}
    known = {"psycopg": "psycopg", "psycopg_pool": "psycopg"}  # the pool comes by an extra of psycopg's
    demo_and_tests = {
        name for name in foreign if {"demo", "testing"} & set(wanted[name].relative_to(ROOT).parts)
    }
    assert foreign - demo_and_tests, "nothing was found"
    for name in foreign - demo_and_tests:
        assert known.get(name, name).lower() in required, (name, wanted[name])


def _imported(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def test_nothing_unpickles_evaluates_or_starts_a_shell() -> None:
    """The linter's rules say so too; this also holds where a line is exempt from them."""
    forbidden_modules = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml"}
    forbidden_calls = {"eval", "exec", "system", "popen"}
    for package in ("outbox", "worker"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    assert not forbidden_modules & {n.partition(".")[0] for n in _imported(node)}, file
                elif isinstance(node, ast.Call):
                    called = (
                        node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                    )
                    assert called not in forbidden_calls, (file, node.lineno)
                    assert not any(k.arg == "shell" for k in node.keywords), (file, node.lineno)
