"""The rules of the layout that import-linter cannot state. Each failure names file and line."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(
    path.relative_to(ROOT).as_posix() for name in ("outbox", "worker") for path in (ROOT / name).rglob("*.py")
)

MODULE_LINES = 450
FUNCTION_LINES = 60

# Whoever drives a body is handed what it needs; nothing here may tell the time, wait or ask the database.
PURE = tuple(
    f"worker/replay/{name}.py"
    for name in (
        "asides", "calls", "course", "cursor", "decisions", "driver", "effects", "guards", "judging", "records",
        "rehearsal", "strands", "undoing", "verdicts",
    )
)  # fmt: skip
IMPURE_IMPORTS = {
    "aiosmtpd",
    "asyncio",
    "concurrent",
    "multiprocessing",
    "psycopg",
    "psycopg_pool",
    "random",
    "sched",
    "select",
    "selectors",
    "signal",
    "socket",
    "sqlalchemy",
    "sqlite3",
    "subprocess",
    "threading",
    "time",
}
CLOCKS = {
    "datetime.now",
    "datetime.utcnow",
    "datetime.today",
    "date.today",
    "os.urandom",
    "uuid.uuid4",
    "uuid.uuid1",
}

OPENERS = {
    "psycopg.connect",
    "Connection.connect",
    "AsyncConnection.connect",
    "psycopg.Connection.connect",
    "psycopg.AsyncConnection.connect",
    "ConnectionPool",
    "AsyncConnectionPool",
    "NullConnectionPool",
    "AsyncNullConnectionPool",
}
ENGINES = {"create_engine": "creator", "create_async_engine": "async_creator"}

# A command line, the programs that are started as processes of their own, and what ends a process that user code has forked.
PROGRAMS = (
    "worker/cli/",
    "worker/supervision/process.py",
    "worker/demo/mailserver.py",
    "worker/demo/provider.py",
    "worker/steps/forks.py",
)
EXITS = {"sys.exit", "os._exit", "os.abort", "exit", "quit"}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text(encoding="utf-8"), filename=module)


def name_of(node: ast.AST) -> str:
    """Return 'psycopg.Connection.connect' for such an attribute, '' for what is no plain name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Subscript):  # ConnectionPool[Connection](…)
        return name_of(node.value)
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return ""


def imports_of(module: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def calls_of(module: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Call):
            yield name_of(node.func), node


def ends_with(name: str, endings: set[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def imports_of_worker(module: str) -> Iterator[str]:
    for name, line in imports_of(module):
        if name.split(".")[0] == "worker":
            yield f"{module}:{line} imports {name}"


def impurities(module: str) -> Iterator[str]:
    for name, line in imports_of(module):
        if name.split(".")[0] in IMPURE_IMPORTS or name.startswith(("outbox.database", "outbox.client")):
            yield f"{module}:{line} imports {name}"
    for name, call in calls_of(module):
        if ends_with(name, CLOCKS):
            yield f"{module}:{call.lineno} calls {name}"


def opened_connections(module: str) -> Iterator[str]:
    for name, call in calls_of(module):
        last = name.rpartition(".")[2]
        # An engine that is given its connections opens none.
        engine = last in ENGINES and ENGINES[last] not in {keyword.arg for keyword in call.keywords}
        if engine or ends_with(name, OPENERS):
            yield f"{module}:{call.lineno} calls {name}"


def exits(module: str) -> Iterator[str]:
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Attribute) and name_of(node) == "sys.argv":
            yield f"{module}:{node.lineno} reads sys.argv"
        elif isinstance(node, ast.Call) and name_of(node.func) in EXITS:
            yield f"{module}:{node.lineno} calls {name_of(node.func)}"
        elif isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if name_of(raised) == "SystemExit":
                yield f"{module}:{node.lineno} raises SystemExit"
    for name, line in imports_of(module):
        if name in EXITS | {"sys.argv"}:
            yield f"{module}:{line} imports {name}"


def excess_length(module: str) -> Iterator[str]:
    lines = len((ROOT / module).read_text(encoding="utf-8").splitlines())
    if lines > MODULE_LINES:
        yield f"{module} has {lines} lines"
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                yield f"{module}:{node.lineno} {node.name} has {length} lines"


@pytest.mark.parametrize("module", [each for each in MODULES if each.startswith("outbox/")])
def test_outbox_never_imports_worker(module: str) -> None:
    assert not list(imports_of_worker(module))


@pytest.mark.parametrize("module", PURE)
def test_replay_knows_no_database_no_clock_and_no_event_loop(module: str) -> None:
    assert not list(impurities(module))


@pytest.mark.parametrize(
    "module", [each for each in MODULES if each not in ("outbox/database.py", "outbox/pools.py")]
)
def test_only_two_modules_open_connections(module: str) -> None:
    assert not list(opened_connections(module))


@pytest.mark.parametrize("module", [each for each in MODULES if not each.startswith(PROGRAMS)])
def test_only_programs_read_their_arguments_or_exit(module: str) -> None:
    assert not list(exits(module))


@pytest.mark.parametrize("module", MODULES)
def test_no_module_and_no_function_does_everything(module: str) -> None:
    assert not list(excess_length(module))


@pytest.mark.parametrize(
    ("check", "source"),
    [
        (imports_of_worker, "from worker.replay.driver import Replay"),
        (imports_of_worker, "def f():\n    import worker"),
        (impurities, "import asyncio"),
        (impurities, "from psycopg.rows import dict_row"),
        (impurities, "import datetime\nnow = datetime.datetime.now()"),
        (opened_connections, "import psycopg\npsycopg.connect('')"),
        (opened_connections, "async def f():\n    await psycopg.AsyncConnection.connect('')"),
        (opened_connections, "pool = ConnectionPool[Connection]('')"),
        (opened_connections, "engine = sqlalchemy.create_engine('')"),
        (exits, "import sys\nprint(sys.argv)"),
        (exits, "from sys import argv"),
        (exits, "import os\nos._exit(1)"),
        (exits, "raise SystemExit(2)"),
        (exits, "raise SystemExit"),
        (excess_length, "x = 1\n" * 451),
        (excess_length, "def f():\n" + "    pass\n" * 60),
    ],
)
def test_each_rule_finds_its_offender(
    check: Callable[[str], Iterator[str]], source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "offender.py").write_text(source, encoding="utf-8")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "tree_of", tree_of.__wrapped__)
    assert list(check("offender.py"))
