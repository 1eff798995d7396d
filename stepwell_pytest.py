"""The pytest plugin: the fixture `stepwell`, its options, and what a failed test shows. See docs/testing.md.

pytest imports it in every run of an environment that has Stepwell. So it stands apart from our packages, which take
a fifth of a second to import, and imports them where a test asks for a fixture.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from worker.registry import Registry
    from worker.testing import StepwellTest
    from worker.testing.servers import Server

URL_VARIABLE = "STEPWELL_TEST_DATABASE_URL"
_KIT: pytest.StashKey[tuple[StepwellTest, bool]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the ini options."""
    parser.addini(
        "stepwell_database_url",
        f"server on which test databases are made, instead of an embedded one; {URL_VARIABLE} goes before",
    )
    parser.addini("stepwell_app", "module (shop.flows) or file (flows.py) that defines the workflows")
    parser.addini("stepwell_timeout_seconds", "how long run_until_idle() may take", default="30")
    parser.addini(
        "stepwell_check_replay",
        "after each test that has passed, replay its runs and look for blocked ones",
        type="bool",
        default=True,
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line(
        "markers",
        "stepwell(app=, check_replay=, timeout_seconds=, **settings): options of the fixture stepwell for one test; "
        "settings are those of a worker (concurrency=1)",
    )


# -- fixtures ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def stepwell_database_url(pytestconfig: pytest.Config) -> str | None:
    """Return the URL of a server to make test databases on, None for an embedded one. Override it to bring your own."""
    return os.environ.get(URL_VARIABLE) or str(pytestconfig.getini("stepwell_database_url") or "") or None


@pytest.fixture(scope="session")
def stepwell_server(stepwell_database_url: str | None) -> Iterator[Server]:
    """Yield the server of this session."""
    _require_ours()
    from worker.testing import servers

    with _told_in_a_sentence():
        if stepwell_database_url is not None:
            with servers.Server(stepwell_database_url) as server:
                yield server
        else:
            with servers.embedded_server() as url, servers.Server(url) as server:
                yield server


@pytest.fixture(scope="session")
def stepwell_template_url(stepwell_server: Server) -> Iterator[str]:
    """Yield the URL of the database that each test gets a copy of: it has Stepwell's schema."""
    with _told_in_a_sentence(), stepwell_server.template() as url:
        yield url


@pytest.fixture(scope="session")
def stepwell_template_setup(stepwell_template_url: str) -> None:
    """Do nothing: override it to make your own tables at `stepwell_template_url`, once for the session.

    Close your connections; what is connected to a database keeps it from being copied.
    """


@pytest.fixture
def stepwell_url(
    stepwell_server: Server,
    stepwell_template_url: str,
    stepwell_template_setup: object,  # noqa: ARG001 - it has to have been set up before it is copied
) -> Iterator[str]:
    """Yield the URL of a database for this test; STEPWELL_DATABASE_URL says the same meanwhile."""
    with stepwell_server.database(stepwell_template_url) as url, pytest.MonkeyPatch.context() as patched:
        patched.setenv("STEPWELL_DATABASE_URL", url)
        yield url


@pytest.fixture
def stepwell_registry(request: pytest.FixtureRequest) -> Registry | None:
    """Return the workflows that the test's worker knows; None for all that this process has imported."""
    from worker.apps import load_app

    app = _options(request.node).get("app") or request.config.getini("stepwell_app")
    return load_app(str(app)) if app else None


@pytest.fixture
def stepwell(
    request: pytest.FixtureRequest, stepwell_url: str, stepwell_registry: Registry | None
) -> Iterator[StepwellTest]:
    """Yield Stepwell for this test: a database, a worker in this process, and time that can be advanced."""
    from worker.testing import StepwellTest

    options = _options(request.node)
    options.pop("app", None)
    options.setdefault("timeout_seconds", float(request.config.getini("stepwell_timeout_seconds")))
    check = bool(options.pop("check_replay", request.config.getini("stepwell_check_replay")))
    with StepwellTest(stepwell_url, registry=stepwell_registry, **options) as kit:
        request.node.stash[_KIT] = (kit, check)
        yield kit
        del request.node.stash[_KIT]


# -- around a test -----------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Check the replay of a test that has passed, as a part of it."""
    result = yield
    kit, check = item.stash.get(_KIT, (None, False))
    if kit is not None and check:
        kit.check_end()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to the report of a failed test what has become of its runs."""
    report = yield
    kit, _ = item.stash.get(_KIT, (None, False))
    if kit is not None and report.failed:
        try:
            told = kit.describe()
        except Exception as error:  # noqa: BLE001 - the failure is what counts, not what could be added to it
            told = f"what has become of the runs cannot be read: {error}"
        if told:
            report.sections.append(("stepwell", told))
    return report


def _options(node: pytest.Item) -> dict[str, Any]:
    """Return what the markers say; the one nearest to the test goes before."""
    options: dict[str, Any] = {}
    for marker in reversed(list(node.iter_markers("stepwell"))):
        options |= marker.kwargs
    return options


def _require_ours() -> None:
    import stepwell

    hidden = stepwell.hidden_package()
    if hidden is not None:
        pytest.fail(f"stepwell: {hidden}", pytrace=False)


@contextmanager
def _told_in_a_sentence() -> Iterator[None]:
    """Let a server that cannot be had be a failure that says what to do, without a traceback."""
    import psycopg

    from outbox.errors import StepwellError

    try:
        yield
    except (StepwellError, psycopg.Error) as error:
        reason = " ".join(str(error).split())
    else:
        return
    pytest.fail(
        f"stepwell: no test databases can be made: {reason}. They are made on an embedded Postgres, or where "
        f"{URL_VARIABLE} or the ini option stepwell_database_url says, by a role that may create databases",
        pytrace=False,
    )
