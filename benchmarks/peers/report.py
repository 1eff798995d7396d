"""Tables and charts of what was measured."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.peers.scenarios import Figures

Taken = dict[str, dict[str, list["Figures | str"]]]
"""Scenario → system → one entry for each round: its figures, or why there are none."""

BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"
FLOOR = "two steps, one transaction each"
"""What pgbench does of the same work."""
CHARTS = {
    "two steps, 2 workers": "Durable workflow of two steps, 2 workers, runs/s",
    "ten steps, 2 workers": "Durable workflow of ten steps, 2 workers, runs/s",
    "enqueue in bulk": "Enqueue in bulk, runs/s",
    "start, at 20 a second": "Enqueue to start at 20 runs a second, p99, ms",
}
UNITS = {
    "runs_per_second": "runs/s", "rows_per_second": "rows/s", "p50_ms": "p50, ms", "p99_ms": "p99, ms", "enqueued_per_second": "enqueued/s",
    "seconds": "s", "first_step_repeated": "first step repeated, times", "memory_mb": "memory, MB",
    "memory_mb_before": "memory before, MB", "sleeping": "sleeping", "percent_of_a_core": "% of a core",
    "commits_per_second": "commits/s", "statements_per_second": "statements/s",
    "worker_cpu_ms_per_run": "worker CPU, ms/run", "postgres_cpu_ms_per_run": "Postgres CPU, ms/run",
    "commits_per_run": "commits/run", "wal_bytes_per_run": "WAL, bytes/run",
    "statements_per_run": "statements/run",
}  # fmt: skip


def machine() -> str:
    """Say what this was measured on."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{os.cpu_count()} × {model}, {platform.system()}, shared by workers and Postgres"


def tables(taken: Taken) -> list[str]:
    """Return a Markdown table for each scenario: a row for each system, a column for each figure."""
    lines: list[str] = []
    for scenario, systems in taken.items():
        figures = _figures(systems)
        lines += ["", f"**{scenario}**", ""]
        lines += [
            f"| | {' | '.join(UNITS.get(figure, figure) for figure in figures)} |",
            "|---|" + "---|" * len(figures),
        ]
        lines += [_row(name, rounds, figures) for name, rounds in systems.items()]
    return lines


def _figures(systems: dict[str, list[Figures | str]]) -> list[str]:
    """Return the figures that any system has, in the order in which they come first."""
    found: dict[str, None] = {}
    for rounds in systems.values():
        for each in rounds:
            if not isinstance(each, str):
                found |= dict.fromkeys(each)
    return list(found)


def _row(name: str, rounds: list[Figures | str], figures: list[str]) -> str:
    measured = [each for each in rounds if not isinstance(each, str)]
    failed = [each for each in rounds if isinstance(each, str)]
    if not measured:
        return f"| {name} | {failed[0].replace('|', '/')} |" + " |" * (len(figures) - 1)
    cells = [cell([each[figure] for each in measured if figure in each]) for figure in figures]
    if failed:
        cells[0] += f" (failed {len(failed)} of {len(rounds)} times: {failed[0].replace('|', '/')})"
    return f"| {name} | " + " | ".join(cells) + " |"


def cell(values: list[float]) -> str:
    """Return minimum – median – maximum, or the one value that there is."""
    if not values:
        return "–"
    if all(map(math.isnan, values)):
        return "not within the time given"
    if len(values) == 1:
        return number(values[0])
    return " – ".join(number(each) for each in (min(values), statistics.median(values), max(values)))


def number(value: float) -> str:
    """Return a figure with three digits that count."""
    if math.isnan(value):
        return "–"
    if abs(value) >= 1000:
        digits = len(f"{abs(value):.0f}") - 3
        return f"{round(value, -digits):,.0f}"
    return f"{value:.3g}"


def ratios(taken: Taken, scenario: str) -> list[str]:
    """Return Stepwell's rate by that of each other system in the same round; of two steps, by pgbench's as well."""
    systems = dict(taken[scenario])
    ours = systems.pop("Stepwell", [])
    if scenario.startswith("two steps,"):
        systems |= taken.get(FLOOR, {})
    lines = []
    for name, theirs in systems.items():
        pairs = [
            mine["runs_per_second"] / other["runs_per_second"]
            for mine, other in zip(ours, theirs, strict=False)
            if not isinstance(mine, str) and not isinstance(other, str) and "runs_per_second" in mine
        ]
        if pairs:
            lines.append(f"| {scenario} | {name} | {cell(pairs)} |")
    return lines


def write(docs: Path, about: dict[str, Any], taken: Taken) -> None:
    """Put tables and charts into docs/benchmarks.md, between its marks, and beside it."""
    page = docs / "benchmarks.md"
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    charts = _charts(docs / "charts", taken)
    page.write_text(before + BEGIN + "\n" + "\n".join(_section(about, taken, charts)) + "\n" + END + after)


def _section(about: dict[str, Any], taken: Taken, charts: Iterable[Path]) -> list[str]:
    versions = f"PostgreSQL {about['postgres']}, Python {about['python']}"
    lines = [
        "",
        f"{about['date']}, {about['machine']}, {versions}. Minimum – median – maximum where there were several rounds.",
        "",
        *(f"![{chart.stem.replace('-', ' ')}](charts/{chart.name})" for chart in charts),
        "",
        "Stepwell's rate by that of the other, in the same round:",
        "",
        "| | | times |",
        "|---|---|---|",
    ]
    for scenario in taken:
        lines += ratios(taken, scenario)
    lines += tables(taken)
    lines += ["", "How each was set up:", ""]
    for system in about["systems"]:
        lines.append(
            f"- **{system['name']} {system['version']}**: {'; '.join(system['settings'])}. {system['remark']}"
        )
    return lines


def _charts(folder: Path, taken: Taken) -> list[Path]:
    """Draw a bar for each system; return the files. Without matplotlib there are none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    folder.mkdir(exist_ok=True)
    drawn = []
    for scenario, title in CHARTS.items():
        figure_name = "p99_ms" if "ms" in title else "runs_per_second"
        bars = {}
        for name, rounds in taken.get(scenario, {}).items():
            values = [each[figure_name] for each in rounds if not isinstance(each, str)]
            if values:
                bars[name] = statistics.median(values)
        if not bars:
            continue
        bars = dict(sorted(bars.items(), key=lambda each: each[1], reverse="ms" in title))
        figure = Figure(figsize=(8, 0.6 + 0.36 * len(bars)), layout="constrained")
        axes = figure.subplots()
        colors = ["#2563eb" if name == "Stepwell" else "#94a3b8" for name in bars]
        drawn_bars = axes.barh(list(bars), list(bars.values()), color=colors)
        axes.bar_label(drawn_bars, [number(value) for value in bars.values()], padding=3)
        axes.set_xscale("log")
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.15)
        path = folder / (scenario.replace(",", "").replace(" ", "-") + ".svg")
        figure.savefig(path, metadata={"Date": None})
        drawn.append(path)
    return drawn
