"""What is deployed for Prometheus: it is valid, each alert fires when it should and only then, and says what to do."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.prometheus import CONFIGURATION, DEPLOYED, ROOT, RULES, metrics_in, needs_prometheus, rules

ALERTS = rules("alert")
RECORDS = rules("record")
UNIT_TESTS = DEPLOYED / "tests"


def promtool(*arguments: object) -> str:
    done = subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def headings(document: Path) -> set[str]:
    """Return the anchors of a document's headings, as they are made of a single word."""
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    }


@needs_prometheus
def test_the_configuration_and_its_rules_are_valid() -> None:
    said = promtool("check", "config", CONFIGURATION)
    assert said.count("SUCCESS") == 2 + len(RULES)
    promtool("check", "rules", "--lint=all", "--lint-fatal", *RULES)


@needs_prometheus
@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_fires_when_it_should_and_only_then(alert: str) -> None:
    assert "SUCCESS" in promtool("test", "rules", UNIT_TESTS / f"{alert}.yml")


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_has_unit_tests_in_which_it_fires_and_does_not(alert: str) -> None:
    cases: list[dict[str, Any]] = [
        case
        for group in yaml.safe_load((UNIT_TESTS / f"{alert}.yml").read_text())["tests"]
        for case in group["alert_rule_test"]
    ]
    assert {case["alertname"] for case in cases} == {alert}
    assert {bool(case.get("exp_alerts")) for case in cases} == {True, False}


def test_there_are_no_unit_tests_of_alerts_that_are_gone() -> None:
    assert {file.stem for file in UNIT_TESTS.iterdir()} == set(ALERTS)


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_points_to_the_section_that_says_what_to_do(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"].endswith(".")
    document, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert anchor == alert.lower()
    assert anchor in headings(ROOT / document)


def test_what_is_recorded_is_named_by_what_it_is_made_of_and_used() -> None:
    used = {name for rule in ALERTS.values() for name in metrics_in(rule["expr"])}
    dashboard = (ROOT / "deploy" / "grafana" / "dashboards" / "stepwell.json").read_text()
    for name, rule in RECORDS.items():
        level, metric, operations = name.split(":")
        assert operations
        (made_of,) = metrics_in(rule["expr"])
        assert metric in made_of
        labels = {label for by in re.findall(r"by \(([^)]*)\)", rule["expr"]) for label in by.split(", ")}
        assert not labels or labels - {"le"} == set(level.split("_"))
        assert name in used or name in dashboard or any(name in other["expr"] for other in RECORDS.values())


def test_alerts_on_what_the_database_knows_do_not_see_which_supervisor_exports_it() -> None:
    """Its series change their instance when another takes over, which would begin each `for` anew."""
    for rule in ALERTS.values():
        assert all(":" in name for name in metrics_in(rule["expr"]))
