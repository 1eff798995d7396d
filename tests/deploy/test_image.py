"""deploy/Dockerfile: what it would build, built without Docker; what it installs, and from where."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import psycopg
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy import tools
from tests.deploy.dockerfile import Dockerfile
from tests.deploy.rehearsal import Room
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "deploy/Dockerfile").read_text()
DOCKERFILE = Dockerfile.parse(TEXT)
IMAGE = DOCKERFILE.stages[-1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PORT = "9464"
LOCKS = [ROOT / "deploy/requirements.txt", ROOT / "deploy/requirements-build.txt"]


def locked(file: Path) -> dict[str, tuple[Requirement, list[str]]]:
    """Return name → requirement and hashes."""
    text = re.sub(r"\\\n\s*", " ", re.sub(r"^\s*#.*\n", "", file.read_text(), flags=re.MULTILINE))
    made = {}
    for line in filter(str.strip, text.splitlines()):
        said, *hashes = line.split(" --hash=")
        requirement = Requirement(said.strip())
        made[canonicalize_name(requirement.name)] = requirement, [each.strip() for each in hashes]
    return made


def free_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


# -- the text ----------------------------------------------------------------------------------------


def test_hadolint_has_no_complaint() -> None:
    hadolint = tools.program("hadolint", tools.EXTRA)
    done = subprocess.run(
        [hadolint, str(ROOT / "deploy/Dockerfile")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_the_image_is_slim_runs_as_nobody_special_and_looks_after_its_health() -> None:
    assert [stage.image for stage in DOCKERFILE.stages] == [
        f"python:{DOCKERFILE.arguments['PYTHON']}-slim-bookworm"
    ] * 2
    uid, gid = IMAGE.last("USER").text.split(":")
    assert gid.isdigit()
    assert int(uid) > 999, "Kubernetes has to see that it is not root"
    assert IMAGE.last("EXPOSE").text == PORT
    assert f":{PORT}/healthz" in IMAGE.last("HEALTHCHECK").text
    assert IMAGE.last("ENTRYPOINT").arguments == ["stepwell"]


def test_what_is_copied_is_there_and_let_in() -> None:
    rules = (ROOT / "deploy/Dockerfile.dockerignore").read_text().split("\n")
    let_in = [rule[1:] for rule in rules if rule.startswith("!")]
    copied = [
        source.strip("/")
        for stage in DOCKERFILE.stages
        for step in stage.steps
        if step.word == "COPY" and "from" not in step.flags
        for source in step.arguments[:-1]
    ]
    assert "*" in rules
    assert sorted(copied) == sorted(let_in)
    assert all((ROOT / each).exists() for each in copied)


# -- what is installed -------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", LOCKS, ids=lambda file: file.name)
def test_everything_is_pinned_by_hash_and_nothing_says_where_it_comes_from(lock: Path) -> None:
    assert "://" not in lock.read_text()
    assert "--index" not in lock.read_text()
    for requirement, hashes in locked(lock).values():
        assert fnmatch(str(requirement.specifier), "==*"), requirement
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes), requirement


def test_what_is_pinned_is_what_stepwell_requires() -> None:
    pinned = locked(LOCKS[0])
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["encryption"], *extras["otel"]]
    for each in map(Requirement, wanted):
        version = str(pinned[canonicalize_name(each.name)][0].specifier).removeprefix("==")
        assert each.specifier.contains(version), f"{each} is pinned to {version}: run `make lock`"
    build = locked(LOCKS[1])
    assert {canonicalize_name(Requirement(each).name) for each in PROJECT["build-system"]["requires"]} <= set(
        build
    )


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_pinned_package_has_a_wheel_for_the_python_of_the_image(machine: str, tmp_path: Path) -> None:
    uv = tools.program("uv", tools.EXTRA)
    command = [
        uv, "pip", "install", "--dry-run", "--require-hashes", "--only-binary", ":all:", "--no-deps",
        "--python-version", DOCKERFILE.arguments["PYTHON"], "--python-platform", f"{machine}-manylinux_2_28",
        "--target", str(tmp_path), *(word for lock in LOCKS for word in ("--requirement", str(lock))),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (
        f"Would install {len(locked(LOCKS[0]) | locked(LOCKS[1])) - 1} packages" in done.stderr
    )  # all but tzdata


# -- the image ---------------------------------------------------------------------------------------


@pytest.mark.packaging
def test_it_runs_as_its_user_on_a_read_only_root(image: Room) -> None:
    assert image.run("id", "--user").stdout == "10001\n"
    assert image.run("sh", "-c", "touch /app/x /opt/stepwell/x /x").returncode != 0
    assert image.run("touch", "/tmp/x").returncode == 0
    said = image.run("sh", "-c", "grep CapEff /proc/self/status").stdout
    assert int(said.split()[1], 16) == 0
    done = image.run(*IMAGE.last("ENTRYPOINT").arguments, *IMAGE.last("CMD").arguments)
    assert done.returncode == 0, done.stderr
    assert "worker" in done.stdout


@pytest.mark.packaging
def test_what_only_the_build_needs_stays_behind(image: Room) -> None:
    said = image.run("sh", "-c", "ls /build /opt/stepwell/bin/hatchling; pip list --format json 2>/dev/null")
    installed = {canonicalize_name(each["name"]) for each in json.loads(said.stdout)}
    assert installed - {"pip", "setuptools", "stepwell"} == set(locked(LOCKS[0])) - {"tzdata"}


@pytest.mark.packaging
def test_compose_up_would_welcome_the_leads(image: Room, tcp_url: str) -> None:
    """The services of deploy/compose.yaml that run our image, with their commands, in the order that they wait for."""
    yaml = tools.module("yaml", tools.EXTRA)
    services = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    environment = {"STEPWELL_DATABASE_URL": tcp_url}
    port = free_port()
    check = json.loads(IMAGE.last("HEALTHCHECK").text.partition("CMD ")[2].replace(PORT, port))
    ready = [word.replace("healthz", "readyz") for word in check]

    def argv(name: str) -> list[str]:
        entrypoint = services[name].get("entrypoint", IMAGE.last("ENTRYPOINT").arguments)
        return [word.replace(PORT, port) for word in [*entrypoint, *services[name]["command"]]]

    migrated = image.run(*argv("migrate"), environment=environment)
    assert migrated.returncode == 0, migrated.stderr
    assert image.run(*check).returncode != 0  # there is nobody yet
    worker = subprocess.Popen(
        image.command(argv("worker"), environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_until(lambda: image.run(*check).returncode == 0, what="the health check")
        wait_until(lambda: image.run(*ready).returncode == 0, what="readiness")
        leads = image.run(*argv("leads"), environment=environment)
        assert leads.returncode == 0, leads.stdout + leads.stderr
        with psycopg.connect(tcp_url, autocommit=True) as db:
            wait_until(
                lambda: db.execute("select count(*) from crm_leads").fetchone() == (10,), what="ten leads"
            )
    finally:
        worker.terminate()
        said = worker.communicate(timeout=60)[0]
    assert worker.returncode == 0, said
    assert said.count("mail to ") == 10
