"""How findings are written: for people and their editors, for GitHub."""

from __future__ import annotations

from worker.lint.checking import Report
from worker.lint.findings import Finding


def as_line(finding: Finding) -> str:
    """Return `path:line:column: rule message`."""
    return f"{finding.path}:{finding.line}:{finding.column}: {finding.rule} {finding.message}"


def as_annotation(finding: Finding) -> str:
    """Return the workflow command with which GitHub marks a line of a pull request."""
    properties = {
        "file": finding.path,
        "line": str(finding.line),
        "col": str(finding.column),
        "title": f"stepwell {finding.rule}",
    }
    told = ",".join(f"{name}={_property(value)}" for name, value in properties.items())
    return f"::error {told}::{_data(finding.message)}"


def summary(report: Report) -> str:
    """Return how much was found in how much."""
    checked = f"{_counted(report.workflows, 'workflow')} checked"
    found = len(report.findings)
    if not found:
        return f"no findings, {checked}"
    return f"{_counted(found, 'finding')} in {_counted(report.files, 'file')}, {checked}"


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
