"""The Grafana dashboard: Grafana itself does not run here, so its file is looked at, and each query put to a Prometheus."""

from __future__ import annotations

import re
import runpy
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.dashboards import FILE, GRAFANA, dashboard, filled_in, panels, queries
from tests.prometheus import metrics_in, needs_prometheus, rules, running

ROWS = ["Overview", "Queues", "Workflows", "Steps", "Workers", "Postgres"]
UNITS = {"short", "s", "ops", "bytes", "percentunit"}
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24


def place(panel: dict[str, Any]) -> tuple[int, int, int, int]:
    at = panel["gridPos"]
    return at["x"], at["y"], at["x"] + at["w"], at["y"] + at["h"]


def overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    left, top, right, bottom = place(one)
    left_of, top_of, right_of, bottom_of = place(other)
    return left < right_of and left_of < right and top < bottom_of and top_of < bottom


def test_the_file_is_what_the_generator_makes() -> None:
    assert runpy.run_path(str(GRAFANA / "generate.py"))["text"]() == FILE.read_text(encoding="utf-8")


def test_each_panel_has_a_place_of_its_own() -> None:
    found = dashboard()["panels"]
    assert len({panel["id"] for panel in found}) == len(found)
    for panel in found:
        left, top, right, bottom = place(panel)
        assert 0 <= left < right <= COLUMNS
        assert 0 <= top < bottom
    assert [f"{a['title']} and {b['title']}" for a, b in combinations(found, 2) if overlap(a, b)] == []


def test_there_is_a_row_for_each_subject_and_none_is_empty() -> None:
    found = dashboard()["panels"]
    assert [panel["title"] for panel in found if panel["type"] == "row"] == ROWS
    assert all(one["type"] != "row" or other["type"] != "row" for one, other in pairwise([*found, found[0]]))


def test_each_panel_says_what_it_shows_in_which_unit_and_asks_the_chosen_source() -> None:
    for panel in panels():
        assert panel["datasource"] == DATASOURCE, panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        references = [target["refId"] for target in panel["targets"]]
        assert references
        assert len(set(references)) == len(references)
        assert all(target["datasource"] == DATASOURCE for target in panel["targets"])


def test_seconds_are_shown_as_seconds_rates_as_rates_and_bytes_as_bytes() -> None:
    for panel in panels():
        unit = panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            expr = target["expr"]
            in_seconds = "_seconds" in expr and not re.search(r"_seconds_(count|sum)", expr)
            assert (unit == "s") == in_seconds, expr
            assert (unit == "bytes") == ("_bytes" in expr), expr


def test_what_can_be_chosen_is_read_from_series_that_are_there() -> None:
    variables = {each["name"]: each for each in dashboard()["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "queue"]
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    for name in ("job", "queue"):
        assert variables[name]["datasource"] == DATASOURCE
        (metric,) = metrics_in(variables[name]["query"]["query"])
        assert metric in rules("record")


def test_what_it_reads_from_rules_is_recorded() -> None:
    read = {name for _, expression in queries() for name in metrics_in(expression)}
    assert {name for name in read if ":" in name} <= rules("record").keys()


def test_what_one_supervisor_exports_for_all_is_never_added_up_over_instances() -> None:
    for where, expression in queries():
        if "stepwell_table_" in expression:
            assert expression.startswith("max by (table)"), where
        shared = r"(?<!:)stepwell_(runs|steps|reclaims|queue|workers|oldest)_"
        assert not re.search(shared, expression), where


def test_grafana_is_told_of_both() -> None:
    sources, providers = (
        yaml.safe_load((GRAFANA / "provisioning" / name).read_text())
        for name in ("datasources/prometheus.yml", "dashboards/stepwell.yml")
    )
    assert sources["apiVersion"] == providers["apiVersion"] == 1
    (source,) = sources["datasources"]
    assert source["type"] == "prometheus"
    (provider,) = providers["providers"]
    assert provider["type"] == "file"
    assert Path(provider["options"]["path"]).name == FILE.parent.name


@needs_prometheus
def test_prometheus_understands_every_query(tmp_path: Path) -> None:
    asked = 0
    with running(tmp_path) as prometheus:
        for _, expression in queries():
            prometheus.query(expression)
            asked += 1
        with pytest.raises(AssertionError, match="parse error"):
            prometheus.query(filled_in("sum by (job (stepwell_workers)"))
    assert asked >= len(panels())
