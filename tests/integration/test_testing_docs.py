"""docs/testing.md, done as it says: its files written, its tests run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stepwell_pytest import URL_VARIABLE
from tests.postgres import Cluster
from worker.testing import StepwellTest

pytest_plugins = "pytester"

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
FILES = {
    match[1]: match[0]
    for _, text in re.findall(r"^```(python|ini)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    if (match := re.match(r"[#;] (\S+)\n.*", text, re.DOTALL))
}


def test_the_example_of_the_page_works(
    pytester: pytest.Pytester, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(FILES) == {"flows.py", "conftest.py", "test_flows.py", "pytest.ini"}
    for name, text in FILES.items():
        (pytester.path / name).write_text(text, encoding="utf-8")
    cluster.start()
    monkeypatch.setenv(URL_VARIABLE, cluster.url())
    done = pytester.runpytest_subprocess(
        "-p", "no:asyncio", "-W", "error", "--strict-config", "--strict-markers"
    )
    tests = re.findall(r"^def test_", FILES["test_flows.py"], re.MULTILINE)
    done.assert_outcomes(passed=len(tests) + 2)  # one of them for three moments


def test_the_reference_names_everything_that_the_kit_offers() -> None:
    reference = PAGE[PAGE.index("## Reference") :]
    named = set(re.findall(r"`(\w+)[(`]", reference[: reference.index("| ini option |")]))
    offered = {name for name in dir(StepwellTest) if not name.startswith("_")}
    internal = {"check_end", "close"}  # the fixture's business
    asynchronous = {"run_until_idle_async"}  # in the text above
    assert offered - internal - asynchronous <= named
    assert all(name in PAGE for name in asynchronous)


def test_the_links_of_the_page_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
