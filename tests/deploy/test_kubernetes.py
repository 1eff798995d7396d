"""deploy/kubernetes, rendered by kubectl: against the schemas of Kubernetes and of the operators, and against ourselves.

No cluster runs here, so nothing is applied. What is asked of the database is asked of a real one.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from outbox.settings import Settings
from tests.deploy import tools
from tests.deploy.dockerfile import Dockerfile
from tests.deploy.stops import longest_stop_seconds
from tests.integration.supervising import Db

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
MODELS = ROOT / ".venv/kubernetes-models"
VERSIONS = ("1.29", "1.33")
"""The oldest Kubernetes that these files are meant for, and a newer one."""
CUSTOM = {"PodMonitor", "ScaledObject", "TriggerAuthentication"}

Resources = list[dict[str, Any]]


@pytest.fixture(scope="module", params=["base", "overlays/production", "overlays/keda"])
def rendered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Resources:
    return render(request.param, tmp_path_factory.mktemp("kubernetes"))


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Resources:
    return render("overlays/keda", tmp_path_factory.mktemp("scaled"))


def render(directory: str, into: Path) -> Resources:
    yaml = tools.module("yaml", tools.EXTRA)
    kubectl = tools.program("kubectl", tools.EXTRA)
    copy = into / "kubernetes"
    shutil.copytree(DEPLOY / "kubernetes", copy)
    example = copy / "overlays/production/database.env.example"
    shutil.copy(example, example.with_name("database.env"))
    done = subprocess.run(
        [kubectl, "kustomize", str(copy / directory)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return list(yaml.safe_load_all(done.stdout))


def of_kind(resources: Resources, kind: str, name: str = "") -> dict[str, Any]:
    (found,) = [
        each for each in resources if each["kind"] == kind and each["metadata"]["name"].startswith(name)
    ]
    return found


def pods(resources: Resources) -> Iterator[dict[str, Any]]:
    """Yield the pod specifications of the Deployment and the Job."""
    for kind in ("Deployment", "Job"):
        yield of_kind(resources, kind)["spec"]["template"]["spec"]


# -- schemas -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_every_resource_fits_the_schema_of_kubernetes(rendered: Resources, version: str) -> None:
    kubernetes_validate = tools.module("kubernetes_validate", tools.EXTRA)
    checked = {each["kind"] for each in rendered if each["kind"] not in CUSTOM}
    assert {
        "Deployment",
        "Job",
        "PodDisruptionBudget",
        "NetworkPolicy",
        "ServiceAccount",
        "ConfigMap",
    } <= checked
    for each in rendered:
        if each["kind"] not in CUSTOM:
            kubernetes_validate.validate(each, version, strict=True)
    wrong = deepcopy(of_kind(rendered, "Deployment"))
    wrong["spec"]["template"]["spec"]["terminationGraceSeconds"] = 60
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_custom_resources_fit_the_definitions_of_their_operators(scaled: Resources) -> None:
    if not MODELS.exists():
        tools.unavailable(f"{MODELS} is not here: `make deploy-check` installs it")
    resources = deepcopy([each for each in scaled if each["kind"] in CUSTOM])
    assert {each["kind"] for each in resources} == CUSTOM
    assert validated(resources).returncode == 0, validated(resources).stderr
    of_kind(resources, "ScaledObject")["spec"]["minReplicaCount"] = "none"
    assert "minReplicaCount" in validated(resources).stderr


def validated(resources: Resources) -> subprocess.CompletedProcess[str]:
    node = tools.program("node", "it comes with the Debian package nodejs")
    command = [node, str(Path(__file__).with_name("validate_custom.mjs")), str(MODELS)]
    return subprocess.run(command, input=json.dumps(resources), capture_output=True, text=True, check=False)


# -- what a schema does not say ----------------------------------------------------------------------


def test_pods_are_restricted(rendered: Resources) -> None:
    """By the rules of the profile `restricted` of Kubernetes' pod security standards, and with a read-only root."""
    for pod in pods(rendered):
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        assert pod["automountServiceAccountToken"] is False
        assert all(set(volume) <= {"name", "emptyDir"} for volume in pod["volumes"])
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/tmp"}
            assert "memory" in container["resources"]["limits"]


def test_a_drain_fits_into_the_time_until_a_pod_is_killed(rendered: Resources) -> None:
    settings = of_kind(rendered, "ConfigMap", "stepwell-settings")["data"]
    known = {f"STEPWELL_{name.upper()}" for name in Settings.__dataclass_fields__}
    assert set(settings) <= known
    grace_seconds = float(settings["STEPWELL_GRACE_SECONDS"])
    worker = of_kind(rendered, "Deployment")["spec"]["template"]["spec"]
    assert worker["terminationGracePeriodSeconds"] >= longest_stop_seconds(grace_seconds)


def test_probes_ask_what_the_exporter_answers_on_the_port_that_is_served(rendered: Resources) -> None:
    (container,) = of_kind(rendered, "Deployment")["spec"]["template"]["spec"]["containers"]
    (port,) = container["ports"]
    served = container["args"][container["args"].index("--metrics-port") + 1]
    image = Dockerfile.parse((DEPLOY / "Dockerfile").read_text()).stages[-1]
    assert str(port["containerPort"]) == served == image.last("EXPOSE").text
    probes = {name: container[name]["httpGet"] for name in ("livenessProbe", "readinessProbe")}
    assert {probe["path"] for probe in probes.values()} == {"/healthz", "/readyz"}
    assert all(probe["port"] == port["name"] for probe in probes.values())
    assert container["args"][0] == "worker"


def test_selectors_find_the_workers_and_only_them(rendered: Resources) -> None:
    labels = of_kind(rendered, "Deployment")["spec"]["template"]["metadata"]["labels"]
    migrating = of_kind(rendered, "Job")["spec"]["template"]["metadata"]["labels"]
    for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
        for each in rendered:
            if each["kind"] == kind:
                wanted = each["spec"]["selector"]["matchLabels"].items()
                assert wanted <= labels.items()
                assert not wanted <= migrating.items()
    (policy,) = [
        each
        for each in rendered
        if each["kind"] == "NetworkPolicy" and each["metadata"]["name"] == "stepwell"
    ]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items() & migrating.items()
    (names,) = [rule for rule in policy["spec"]["egress"] if {"port": 53, "protocol": "UDP"} in rule["ports"]]
    (resolver,) = names["to"]
    assert resolver["podSelector"]["matchLabels"] == {"k8s-app": "kube-dns"}  # and none of our labels


def test_every_secret_that_is_named_has_the_key_that_is_wanted(scaled: Resources) -> None:
    secret = of_kind(scaled, "Secret", "stepwell-database")
    wanted = [
        (variable["valueFrom"]["secretKeyRef"]["name"], variable["valueFrom"]["secretKeyRef"]["key"])
        for pod in pods(scaled)
        for container in pod["containers"]
        for variable in container["env"]
    ]
    authentication = of_kind(scaled, "TriggerAuthentication")
    wanted += [(each["name"], each["key"]) for each in authentication["spec"]["secretTargetRef"]]
    assert {name for name, _ in wanted} == {secret["metadata"]["name"]}
    assert {key for _, key in wanted} == set(secret["data"])


def test_everything_is_in_one_namespace(scaled: Resources) -> None:
    (namespace,) = [each["metadata"]["name"] for each in scaled if each["kind"] == "Namespace"]
    assert {each["metadata"].get("namespace", namespace) for each in scaled} == {namespace}
    assert all("namespace" in each["metadata"] for each in scaled if each["kind"] != "Namespace")


def test_git_ignores_the_secret() -> None:
    assert "/deploy/kubernetes/overlays/*/database.env" in (ROOT / ".gitignore").read_text().splitlines()


# -- scaling -----------------------------------------------------------------------------------------


def triggers(resources: Resources) -> dict[str, dict[str, Any]]:
    return {each["type"]: each for each in of_kind(resources, "ScaledObject")["spec"]["triggers"]}


def test_kustomize_leaves_the_number_of_pods_to_keda(scaled: Resources) -> None:
    deployment = of_kind(scaled, "Deployment")
    assert "replicas" not in deployment["spec"]
    target = of_kind(scaled, "ScaledObject")["spec"]
    assert target["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert target["minReplicaCount"] == 0


def test_the_question_to_the_database_counts_what_wants_a_worker(scaled: Resources, db: Db) -> None:
    """As the role that KEDA is given: what is ready, claimed, set aside or due; not what sleeps or is paused."""
    query = triggers(scaled)["postgresql"]["metadata"]["query"]

    def counted() -> int:
        db.execute("set role stepwell_viewer")
        row = db.execute(query).fetchone()
        db.execute("reset role")
        assert row is not None
        return int(row[0])

    assert counted() == 0
    db.execute("select stepwell.enqueue('w') from generate_series(1, 6)")
    db.execute("select stepwell.enqueue('w', queue => 'other')")
    assert counted() == 6
    ids = [row[0] for row in db.execute("select id from stepwell.tasks where queue = 'default' order by id")]
    db.execute("update stepwell.tasks set state = 'claimed', claimed_by = 1 where id = %s", ids[0:1])
    db.execute("update stepwell.tasks set state = 'shelved' where id = %s", ids[1:2])
    db.execute("update stepwell.tasks set state = 'suspect' where id = %s", ids[2:3])
    assert counted() == 6
    db.execute(
        "update stepwell.tasks set state = 'waiting', due_at = now() + interval '1 hour' where id = %s",
        ids[3:4],
    )
    db.execute("update stepwell.tasks set state = 'paused' where id = %s", ids[4:5])
    assert counted() == 4
    db.execute("update stepwell.tasks set due_at = now() - interval '1 second' where id = %s", ids[3:4])
    assert counted() == 5


def test_the_question_to_the_database_never_reads_the_whole_queue(scaled: Resources, db: Db) -> None:
    query = triggers(scaled)["postgresql"]["metadata"]["query"]
    db.execute("set enable_seqscan = off")
    plan = "\n".join(row[0] for row in db.execute(f"explain {query}"))
    assert "Seq Scan" not in plan, plan


def test_the_question_to_prometheus_names_a_metric_of_the_exporter(scaled: Resources) -> None:
    metadata = triggers(scaled)["prometheus"]["metadata"]
    exporter = (ROOT / "worker/telemetry/snapshot.py").read_text()
    metric = metadata["query"].removeprefix("max(").partition("{")[0]
    assert f'"{metric}"' in exporter
    # Nobody exports it when no worker runs; that must not be an error, nor keep anything up.
    assert metadata["ignoreNullValues"] == "true"


def test_what_one_pod_takes_is_what_its_processes_have_slots_for(scaled: Resources) -> None:
    (container,) = of_kind(scaled, "Deployment")["spec"]["template"]["spec"]["containers"]
    processes = int(container["args"][container["args"].index("--processes") + 1])
    concurrency = int(of_kind(scaled, "ConfigMap", "stepwell-settings")["data"]["STEPWELL_CONCURRENCY"])
    assert int(triggers(scaled)["postgresql"]["metadata"]["targetQueryValue"]) == processes * concurrency
