"""What users install: the wheel, in an environment that has nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.packaging


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(target), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(target.glob("stepwell-*.whl"))


def test_the_wheel_holds_the_schema_the_statements_and_the_leads(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "outbox/schema.sql" in names
    for package in ("outbox", "worker"):
        assert f"{package}/py.typed" in names
        for statement in (ROOT / package).rglob("*.sql"):
            assert str(statement.relative_to(ROOT)) in names
    assert "worker/demo/leads.csv" in names
    assert (
        "stepwell_pytest.py" in names
    )  # without it pytest would not start, as the wheel names it as a plugin
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


def test_the_demo_runs_from_the_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    bin_dir = tmp_path / "venv" / "bin"
    install = [
        bin_dir / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        f"{wheel}[demo]",
    ]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    demo = subprocess.run(
        [bin_dir / "stepwell", "demo", "--leads", "50", "--json"],
        capture_output=True, text=True, cwd=tmp_path, timeout=180, check=False,
    )  # fmt: skip
    assert demo.returncode == 0, demo.stdout + demo.stderr
    report = json.loads(demo.stdout)
    assert report["leads"] == 50
    assert report["messages"] == report["crm_rows"] == report["succeeded"]
    assert report["duplicate_messages"] == 0
    assert report["kills"] == 2
