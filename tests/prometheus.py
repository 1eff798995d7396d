"""A real Prometheus for the tests: configured as `deploy/prometheus` says, but faster and with targets of the test."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml

from tests.deploy.tools import COMPLETE
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[1]
DEPLOYED = ROOT / "deploy" / "prometheus"
CONFIGURATION = DEPLOYED / "prometheus.yml"
RULES = sorted((DEPLOYED / "rules").glob("*.yml"))
EVERY = "1s"

needs_prometheus = pytest.mark.skipif(  # `make deploy-check` wants it all: there the test fails instead
    not (shutil.which("prometheus") and shutil.which("promtool")) and COMPLETE not in os.environ,
    reason="prometheus and promtool are not here: install the Debian package prometheus",
)

_METRIC = re.compile(r"(?<![\w:.\-/])(?:[a-z][a-z0-9_]*:)?stepwell_[a-z0-9_]+(?::[a-z0-9_]+)?(?![\w:])")
_LISTENING = re.compile(r'msg="Listening on".* address=\S+:(\d+)')
_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')


def metrics_in(expression: str) -> set[str]:
    """Return the names of the metrics of ours that a query reads."""
    return set(_METRIC.findall(_TEXT.sub('""', expression)))


def rules(kind: str) -> dict[str, dict[str, Any]]:
    """Return the rules that are deployed, `record` or `alert`, by name."""
    found = [
        rule
        for file in RULES
        for group in yaml.safe_load(file.read_text())["groups"]
        for rule in group["rules"]
        if kind in rule
    ]
    named = {rule[kind]: rule for rule in found}
    assert len(named) == len(found), "a rule is there twice"
    return named


class Prometheus:
    """A running server, asked over HTTP."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Return (labels, value) of each series now; AssertionError with what the server says of a query that is none."""
        data = self._get("/api/v1/query", query=expression)
        if data["resultType"] == "scalar":
            return [({}, float(data["result"][1]))]
        return [(each["metric"], float(each["value"][1])) for each in data["result"]]

    def value(self, expression: str) -> float | None:
        """Return the value of the one series that there is now; None if there is none."""
        found = self.query(expression)
        assert len(found) <= 1, found
        return found[0][1] if found else None

    def names(self) -> set[str]:
        """Return the names of all metrics that there were."""
        return set(self._get("/api/v1/label/__name__/values"))

    def rules(self) -> list[dict[str, Any]]:
        """Return how each rule does: `health`, and `lastError`."""
        return [rule for group in self._get("/api/v1/rules")["groups"] for rule in group["rules"]]

    def targets(self) -> list[dict[str, Any]]:
        """Return the targets that are scraped, with their `health`."""
        found: list[dict[str, Any]] = self._get("/api/v1/targets", state="active")["activeTargets"]
        return found

    def ready(self) -> bool:
        try:
            with urlopen(f"{self.address}/-/ready", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def _get(self, path: str, **parameters: str) -> Any:
        try:
            with urlopen(f"{self.address}{path}?{urlencode(parameters)}", timeout=20) as response:
                return json.load(response)["data"]
        except HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None


@contextmanager
def running(home: Path, targets: Path | None = None) -> Iterator[Prometheus]:
    """Yield a server with the deployed rules; `targets` is a file for its discovery, which may change meanwhile."""
    (home / "prometheus.yml").write_text(yaml.safe_dump(_hurried(targets)))
    log = home / "prometheus.log"
    output = log.open("wb")
    server = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={home / 'prometheus.yml'}",
            f"--storage.tsdb.path={home / 'prometheus'}",
            "--web.listen-address=127.0.0.1:0",
        ],
        stdout=output,
        stderr=output,
    )
    output.close()
    try:
        (port,) = wait_until(lambda: _LISTENING.findall(log.read_text()), 60, what=f"{log} to name a port")
        prometheus = Prometheus(int(port))
        wait_until(prometheus.ready, 60, what="Prometheus to be ready")
        yield prometheus
    finally:
        server.terminate()
        server.wait(30)


def write_targets(file: Path, ports: Sequence[int]) -> None:
    """Have these ports of this machine scraped, and no others."""
    # Under another name first: Prometheus must not read half of it.
    new = file.with_suffix(".new")
    new.write_text(json.dumps([{"targets": [f"127.0.0.1:{port}" for port in ports]}]))
    new.replace(file)


def _hurried(targets: Path | None) -> dict[str, Any]:
    """Return the configuration that is deployed, with everything done each second."""
    configuration: dict[str, Any] = yaml.safe_load(CONFIGURATION.read_text())
    configuration["global"] = dict.fromkeys(configuration["global"], EVERY)
    configuration["rule_files"] = [str(DEPLOYED / pattern) for pattern in configuration["rule_files"]]
    (job,) = configuration["scrape_configs"]
    del job["static_configs"]
    job["scrape_timeout"] = EVERY
    if targets is not None:
        job["file_sd_configs"] = [{"files": [str(targets)], "refresh_interval": EVERY}]
    return configuration
