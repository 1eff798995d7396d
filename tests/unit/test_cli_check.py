"""`stepwell check` as its callers see it: lines, formats, statuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.unit.checked import written
from worker.cli import main
from worker.lint import RULES, Finding, Report
from worker.lint.formats import as_annotation, summary

FLOWS = """\
import time
from helpers import prepare
from worker import workflow

@workflow
def welcome(lead):
    prepare(lead)
    return time.time()
"""
HELPERS = """\
def prepare(lead):
    return open(lead)
"""
LINES = [
    "flows.py:8:12: clock time.time() gives another time in every replay; use now() of Stepwell",
    (
        "helpers.py:2:12: io open() is done again in every replay; do it in a @step, whose result is recorded; "
        "reached from workflow welcome (flows.py:6) by way of prepare()"
    ),
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, {"flows.py": FLOWS, "helpers.py": HELPERS})


def stepwell(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["check", *arguments])


def test_findings_are_lines_and_the_status_is_1() -> None:
    result = stepwell("flows.py")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == LINES
    assert result.stderr == "2 findings in 2 files, 1 workflow checked\n"


def test_without_findings_the_status_is_0(tmp_path: Path) -> None:
    written(tmp_path, {"flows.py": "from worker import workflow\n@workflow\ndef flow(): ...\n"})
    result = stepwell("flows.py", "flows")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "no findings, 1 workflow checked\n"


def test_github_gets_annotations() -> None:
    result = stepwell("flows.py", "--format", "github")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[0] == (
        "::error file=flows.py,line=8,col=12,title=stepwell clock::"
        "time.time() gives another time in every replay; use now() of Stepwell"
    )


def test_annotations_cannot_be_broken_out_of() -> None:
    finding = Finding("a,b:c%\n.py", 1, 2, "io", "100%\r\n::error::", "x,y:z")
    assert as_annotation(finding) == (
        "::error file=a%2Cb%3Ac%25%0A.py,line=1,col=2,title=stepwell io::100%25%0D%0A::error::; x,y:z"
    )


def test_programs_get_json() -> None:
    result = stepwell("flows.py", "--format", "json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {
        "workflows": 1,
        "findings": [
            {
                "path": "flows.py",
                "line": 8,
                "column": 12,
                "rule": "clock",
                "what": "time.time() gives another time in every replay",
                "instead": "use now() of Stepwell",
                "workflow": {"name": "welcome", "path": "flows.py", "line": 6},
                "by_way_of": [],
            },
            {
                "path": "helpers.py",
                "line": 2,
                "column": 12,
                "rule": "io",
                "what": "open() is done again in every replay",
                "instead": "do it in a @step, whose result is recorded",
                "workflow": {"name": "welcome", "path": "flows.py", "line": 6},
                "by_way_of": ["prepare"],
            },
        ],
    }


def test_the_rules_are_listed() -> None:
    result = stepwell("--rules")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(RULES)


@pytest.mark.parametrize(
    ("app", "sentence"),
    [
        ("nope", "there is no module 'nope'"),
        ("nope.py", "there is no file nope.py"),
        ("helpers.py", "helpers.py defines no workflow"),
        ("broken.py", "broken.py:1 cannot be parsed"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(app: str, sentence: str, tmp_path: Path) -> None:
    written(tmp_path, {"broken.py": "def f(:\n"})
    result = stepwell(app)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"stepwell: {sentence}")
    assert result.stderr.count("\n") == 1


def test_app_must_be_given() -> None:
    result = stepwell()
    assert result.exit_code == 2
    assert "Missing argument" in result.stderr


def test_the_workflows_of_the_demo_are_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    for app in ("worker.demo.workflows", "worker/demo/workflows.py"):
        assert stepwell(app).exit_code == 0


def test_the_summary_counts() -> None:
    finding = Finding("a.py", 1, 2, "io", "x", "y")
    assert summary(Report((finding,), 2)) == "1 finding in 1 file, 2 workflows checked"
    assert summary(Report((finding, finding), 1234)) == "2 findings in 1 file, 1,234 workflows checked"
