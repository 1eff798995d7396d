"""deploy/compose.yaml against the specification's schema, and what the schema does not say. Docker does not run here."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from outbox.settings import Settings
from tests.deploy import tools
from tests.deploy.dockerfile import Dockerfile
from tests.deploy.stops import longest_stop_seconds

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


@pytest.fixture(scope="module")
def compose() -> Any:
    yaml = tools.module("yaml", tools.EXTRA)
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def test_it_fits_the_specification(compose: Any) -> None:
    model = tools.module("compose_viz.spec.compose_spec", tools.EXTRA).ComposeSpecification
    # The model, made from the specification's schema, leaves out what that says of extensions.
    without_extensions = {key: value for key, value in compose.items() if not key.startswith("x-")}
    model.model_validate(without_extensions)
    without_extensions["services"]["worker"]["stop_grace"] = "60s"
    with pytest.raises(ValueError, match="stop_grace"):
        model.model_validate(without_extensions)
    del without_extensions["services"]["worker"]["stop_grace"]


def test_what_it_mounts_builds_and_names_is_there(compose: Any) -> None:
    services = compose["services"]
    for name, service in services.items():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), f"{name} mounts {source}"
            else:
                assert source in compose["volumes"]
        if build := service.get("build"):
            assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
        assert set(service.get("depends_on", ())) <= set(services)


def test_who_waits_for_whom_can_come_about(compose: Any) -> None:
    """Who is waited for as healthy has a check, and who is waited for as done ends by himself."""
    services = compose["services"]
    image_has_a_check = Dockerfile.parse((DEPLOY / "Dockerfile").read_text()).stages[-1].last("HEALTHCHECK")
    for name, service in services.items():
        waits = service.get("depends_on", {})
        for other, how in waits.items() if isinstance(waits, dict) else ():
            check = services[other].get(
                "healthcheck", image_has_a_check if "build" in services[other] else None
            )
            ends = isinstance(check, dict) and check.get("disable", False)
            if how["condition"] == "service_healthy":
                assert check is not None, f"{name} waits for {other}, which has no health check"
                assert not ends
            else:
                assert how["condition"] == "service_completed_successfully"
                assert "restart" not in services[other]


def test_whatever_runs_our_image_has_no_rights_and_a_read_only_root(compose: Any) -> None:
    ours = {name: service for name, service in compose["services"].items() if service["image"] == "stepwell"}
    assert set(ours) == {"migrate", "worker", "leads"}
    for service in ours.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["tmpfs"] == ["/tmp"]
        assert not service.get("privileged")


def test_a_worker_has_the_time_to_drain(compose: Any) -> None:
    seconds = re.fullmatch(r"(\d+)s", compose["services"]["worker"]["stop_grace_period"])
    assert seconds is not None
    assert int(seconds[1]) >= longest_stop_seconds(Settings().grace_seconds)


def test_images_are_of_a_version_and_ports_for_this_machine_only(compose: Any) -> None:
    for service in compose["services"].values():
        if "build" not in service:
            assert re.search(r":v?\d", service["image"]), service["image"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


def test_prometheus_takes_its_configuration() -> None:
    promtool = tools.program("promtool", "it comes with the Debian package prometheus")
    command = [promtool, "check", "config", "--syntax-only", str(DEPLOY / "compose/prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_asks_the_port_that_workers_serve(compose: Any) -> None:
    yaml = tools.module("yaml", tools.EXTRA)
    (job,) = yaml.safe_load((DEPLOY / "compose/prometheus.yml").read_text())["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert set(found["names"]) <= set(compose["services"])
    command = compose["services"]["worker"]["command"]
    port = command[command.index("--metrics-port") + 1]
    assert port == str(found["port"])
    image = Dockerfile.parse((DEPLOY / "Dockerfile").read_text()).stages[-1]
    assert f":{port}/healthz" in image.last("HEALTHCHECK").text
