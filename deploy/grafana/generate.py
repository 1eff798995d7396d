"""Write `dashboards/stepwell.json`, the Grafana dashboard, from the rows and panels below.

Run it after a change (`python deploy/grafana/generate.py`); a test fails when the file is not what this makes. Another test
puts each query to a real Prometheus. Whatever one supervisor exports for all (see `rules/recording.yml`) is read from the
recorded series, or by `max`, so that a change of the exporter is not seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("dashboards") / "stepwell.json"
COLUMNS = 24
ROW_HEIGHT = 1
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
NOTHING, SOME, MUCH = "green", "orange", "red"


@dataclass(frozen=True)
class Query:
    """A query of Prometheus, and how its series are called."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """A graph, or with `stat` a number; `limits` are the values from which it is orange and red."""

    title: str
    description: str
    queries: tuple[Query, ...]
    unit: str = "short"
    width: int = 8
    height: int = 8
    stat: bool = False
    stacked: bool = False
    limits: tuple[float, ...] = field(default=())


def number(title: str, expr: str, description: str, unit: str = "short", *limits: float) -> Panel:
    """Return a number of the overview."""
    return Panel(title, description, (Query(expr),), unit, width=3, height=4, stat=True, limits=limits)


def quantile(q: float, histogram: str, labels: str = "") -> str:
    """Return the query of a quantile of a histogram, for each combination of `labels`."""
    by = ", ".join(part for part in (labels, "le") if part)
    return (
        f'histogram_quantile({q}, sum by ({by}) (rate({histogram}_bucket{{job="$job"}}[$__rate_interval])))'
    )


OVERVIEW = (
    number(
        "Runs",
        'sum(job_workflow_outcome:stepwell_runs:rate5m{job="$job"})',
        "Runs that ended in a second, whatever their outcome.",
        "ops",
    ),
    number(
        "Steps",
        'sum(job_step_outcome:stepwell_steps:rate5m{job="$job", outcome="completed"})',
        "Steps that were completed in a second.",
        "ops",
    ),
    number(
        "Ready",
        'sum(job_queue_state:stepwell_queue_tasks:max{job="$job", state=~"ready|shelved|suspect"})',
        "Tasks that could be executed now.",
    ),
    number(
        "Oldest ready",
        'max(job_queue:stepwell_queue_oldest_ready_seconds:max{job="$job"})',
        "For how long the longest ready task has been ready.",
        "s", 60, 300,
    ),
    number(
        "Blocked", 'max(job:stepwell_runs_blocked:max{job="$job"})', "Runs that need a person.", "short", 1
    ),
    number("Workers", 'max(job:stepwell_workers:max{job="$job"})', "Worker processes that are alive."),
    number(
        "Places taken",
        'sum(stepwell_slots{job="$job", state="busy"}) / sum(stepwell_slots{job="$job"})',
        "How many of the places for runs in flight are taken. At 100 % work waits for a place.",
        "percentunit", 0.8, 0.95,
    ),
    number(
        "Alerts",
        'count(ALERTS{job="$job", alertname=~"Stepwell.*", alertstate="firing"}) or vector(0)',
        "Alerts that fire; docs/operations.md has a section for each.",
        "short", 1,
    ),
)  # fmt: skip

QUEUES = (
    Panel(
        "Ready tasks",
        "Tasks of each queue that could be executed now.",
        (
            Query(
                'job_queue_state:stepwell_queue_tasks:max{job="$job", queue=~"$queue", state="ready"}',
                "{{queue}}",
            ),
        ),
    ),
    Panel(
        "Oldest ready task",
        "For how long the longest ready task of each queue has been ready.",
        (
            Query(
                'job_queue:stepwell_queue_oldest_ready_seconds:max{job="$job", queue=~"$queue"}', "{{queue}}"
            ),
        ),
        "s",
        limits=(60, 300),
    ),
    Panel(
        "Workers",
        "Worker processes that claim from each queue.",
        (Query('job_queue:stepwell_queue_workers:max{job="$job", queue=~"$queue"}', "{{queue}}"),),
    ),
    Panel(
        "Tasks by state",
        "waiting: for time, a signal, a child. shelved: nobody knows the name. suspect: two workers died of it.",
        (
            Query(
                'sum by (state) (job_queue_state:stepwell_queue_tasks:max{job="$job", queue=~"$queue"})',
                "{{state}}",
            ),
        ),
        width=12,
        stacked=True,
    ),
    Panel(
        "Wait until claimed",
        "From when a task was due until a worker claimed it, over all queues.",
        (
            Query(quantile(0.5, "stepwell_claim_wait_seconds"), "median"),
            Query('job:stepwell_claim_wait_seconds:p95_rate5m{job="$job"}', "95 %"),
        ),
        "s",
        width=12,
    ),
)

WORKFLOWS = (
    Panel(
        "Runs",
        "Runs that ended in a second.",
        (Query('sum by (workflow) (job_workflow_outcome:stepwell_runs:rate5m{job="$job"})', "{{workflow}}"),),
        "ops",
    ),
    Panel(
        "Runs without success",
        "Runs that failed, were cancelled or are blocked, in a second.",
        (
            Query(
                'job_workflow_outcome:stepwell_runs:rate5m{job="$job", outcome!="succeeded"}',
                "{{workflow}} {{outcome}}",
            ),
        ),
        "ops",
    ),
    Panel(
        "Duration",
        "From the first claim of a run until its end, waits included: one run in twenty takes longer.",
        (Query(quantile(0.95, "stepwell_run_seconds", "workflow"), "{{workflow}}"),),
        "s",
    ),
    Panel(
        "Runs since the beginning",
        "Exact totals, by outcome.",
        (
            Query(
                'sum by (outcome) (job_workflow_outcome:stepwell_runs_total:max{job="$job"})', "{{outcome}}"
            ),
        ),
        width=12,
    ),
    Panel(
        "Blocked, and drift",
        "Runs that need a person now, and replayed calls with other arguments than the recorded ones, in an hour.",
        (
            Query('max(job:stepwell_runs_blocked:max{job="$job"})', "blocked"),
            Query('sum(increase(stepwell_replay_drift_total{job="$job"}[1h]))', "drift"),
        ),
        width=12,
    ),
)

STEPS = (
    Panel(
        "Completed",
        "Steps that were completed in a second.",
        (
            Query(
                'sum by (step) (job_step_outcome:stepwell_steps:rate5m{job="$job", outcome="completed"})',
                "{{step}}",
            ),
        ),
        "ops",
    ),
    Panel(
        "Failed and interrupted",
        "Executions that failed, or were cut off and are executed again, verified or held.",
        (
            Query(
                'job_step_outcome:stepwell_steps:rate5m{job="$job", outcome!="completed"}',
                "{{step}} {{outcome}}",
            ),
        ),
        "ops",
    ),
    Panel(
        "Duration",
        "Time of one execution, however it ended: one in twenty takes longer.",
        (Query(quantile(0.95, "stepwell_step_seconds", "step"), "{{step}}"),),
        "s",
    ),
    Panel(
        "Executions in progress",
        "Time spent in executions of each step per second: how many of them are under way on average.",
        (Query('sum by (step) (rate(stepwell_step_seconds_sum{job="$job"}[$__rate_interval]))', "{{step}}"),),
        width=12,
    ),
    Panel(
        "Steps since the beginning",
        "Exact totals, by outcome.",
        (Query('sum by (outcome) (job_step_outcome:stepwell_steps_total:max{job="$job"})', "{{outcome}}"),),
        width=12,
    ),
)

WORKERS = (
    Panel(
        "Workers and supervisors",
        "Worker processes that are alive, and supervisors that answer.",
        (
            Query('max(job:stepwell_workers:max{job="$job"})', "workers"),
            Query('sum(up{job="$job"})', "supervisors"),
        ),
    ),
    Panel(
        "Places",
        "Places for runs in flight of all worker processes.",
        (Query('sum by (state) (stepwell_slots{job="$job"})', "{{state}}"),),
        stacked=True,
    ),
    Panel(
        "Claims",
        "Tasks that the workers of each supervisor claim in a second.",
        (
            Query(
                'sum by (instance) (rate(stepwell_claims_total{job="$job"}[$__rate_interval]))',
                "{{instance}}",
            ),
        ),
        "ops",
    ),
    Panel(
        "Workers that died",
        "In a quarter of an hour, by what noticed it: their supervisor, a lost lock, silence.",
        (
            Query(
                'sum by (detector) (increase(job_detector:stepwell_reclaims_total:max{job="$job"}[15m]))',
                "{{detector}}",
            ),
        ),
    ),
    Panel(
        "Refused writes",
        "Writes on claims that had been given to somebody else, in a quarter of an hour.",
        (Query('job:stepwell_fenced_writes:increase15m{job="$job"}', "refused"),),
    ),
    Panel(
        "Loop lag",
        "How much later than due the event loops of a supervisor's workers wake up, the worst of a hundred times.",
        (Query('job_instance:stepwell_loop_lag_seconds:p99_rate5m{job="$job"}', "{{instance}}"),),
        "s",
        limits=(0.25, 1),
    ),
)

POSTGRES = (
    Panel(
        "Commit latency",
        "Time of one group commit, from sending it until it is durable.",
        (
            Query(quantile(0.5, "stepwell_commit_seconds"), "median"),
            Query('job:stepwell_commit_seconds:p95_rate5m{job="$job"}', "95 %"),
            Query(quantile(0.99, "stepwell_commit_seconds"), "99 %"),
        ),
        "s",
        limits=(0.1, 0.5),
    ),
    Panel(
        "Commits",
        "Group commits in a second.",
        (Query('sum(rate(stepwell_commit_seconds_count{job="$job"}[$__rate_interval]))', "commits"),),
        "ops",
    ),
    Panel(
        "Transitions in a commit",
        "How many transitions of runs share one commit on average.",
        (
            Query(
                'sum(rate(stepwell_commit_batch_size_sum{job="$job"}[$__rate_interval]))'
                ' / sum(rate(stepwell_commit_batch_size_count{job="$job"}[$__rate_interval]))',
                "transitions",
            ),
        ),
    ),
    Panel(
        "Oldest transaction",
        "Age of the oldest open transaction. While it is open, vacuum removes nothing that was deleted after it began.",
        (Query('max(job:stepwell_oldest_transaction_seconds:max{job="$job"})', "age"),),
        "s",
        limits=(300, 900),
    ),
    Panel(
        "Dead rows",
        "Rows that vacuum has not removed yet.",
        (Query('max by (table) (stepwell_table_dead_rows{job="$job"})', "{{table}}"),),
    ),
    Panel(
        "Size of tables",
        "Room that each table takes with its indexes.",
        (Query('max by (table) (stepwell_table_bytes{job="$job"})', "{{table}}"),),
        "bytes",
        stacked=True,
    ),
)

ROWS = {
    "Overview": OVERVIEW,
    "Queues": QUEUES,
    "Workflows": WORKFLOWS,
    "Steps": STEPS,
    "Workers": WORKERS,
    "Postgres": POSTGRES,
}


# -- as Grafana wants it -----------------------------------------------------------------------------


def dashboard() -> dict[str, Any]:
    """Return the dashboard."""
    return {
        "uid": "stepwell",
        "title": "Stepwell",
        "tags": ["stepwell"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "",
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": list(variables())},
        "panels": list(laid_out(ROWS)),
    }


def variables() -> Iterator[dict[str, Any]]:
    """Yield what is chosen at the top: where to ask, which database, which queues."""
    yield {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "hide": 0,
    }
    choice: dict[str, Any] = {"type": "query", "datasource": DATASOURCE, "refresh": 2, "sort": 1, "hide": 0}
    of_job, of_queue = (
        "label_values(job:stepwell_workers:max, job)",
        'label_values(job_queue_state:stepwell_queue_tasks:max{job="$job"}, queue)',
    )
    yield {"name": "job", "label": "Database", "query": {"query": of_job, "refId": "job"}, **choice}
    yield {
        "name": "queue",
        "label": "Queue",
        "query": {"query": of_queue, "refId": "queue"},
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
        **choice,
    }


def laid_out(rows: dict[str, Iterable[Panel]]) -> Iterator[dict[str, Any]]:
    """Yield the panels, each row's from left to right and then below."""
    identity = y = 0
    for title, panels in rows.items():
        identity += 1
        yield {
            "id": identity,
            "type": "row",
            "title": title,
            "collapsed": False,
            "panels": [],
            "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": ROW_HEIGHT},
        }
        y += ROW_HEIGHT
        x = tallest = 0
        for panel in panels:
            if x + panel.width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            identity += 1
            yield drawn(panel, identity, x, y)
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest


def drawn(panel: Panel, identity: int, x: int, y: int) -> dict[str, Any]:
    """Return a panel at its place."""
    return {
        "id": identity,
        "type": "stat" if panel.stat else "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": DATASOURCE,
                "expr": query.expr,
                "legendFormat": query.legend or "__auto",
                "instant": panel.stat,
                "range": not panel.stat,
            }
            for i, query in enumerate(panel.queries)
        ],
        "fieldConfig": {"defaults": looks(panel), "overrides": []},
        "options": options(panel),
    }


def looks(panel: Panel) -> dict[str, Any]:
    """Return the unit, the limits and how a graph is drawn."""
    steps: list[dict[str, Any]] = [{"color": NOTHING, "value": None}]
    colours = (SOME, MUCH) if len(panel.limits) == 2 else (MUCH,)
    steps += [{"color": colour, "value": limit} for colour, limit in zip(colours, panel.limits, strict=False)]
    found: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0,
        "thresholds": {"mode": "absolute", "steps": steps},
    }
    if not panel.stat:
        found["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 20 if panel.stacked else 5,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "line" if panel.limits else "off"},
        }
        found["color"] = {"mode": "palette-classic"}
    return found


def options(panel: Panel) -> dict[str, Any]:
    """Return what each sort of panel is told besides."""
    if panel.stat:
        return {
            "colorMode": "value" if panel.limits else "none",
            "graphMode": "none",
            "textMode": "value",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        }
    return {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }


def text() -> str:
    """Return the file's content."""
    return json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
