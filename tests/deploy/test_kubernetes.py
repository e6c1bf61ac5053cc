"""The Kubernetes manifests: against their schemas, the custom ones by shape, and against the code that they run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from service.queue.redis import GROUP, PREFIX
from service.terms.jobs import Priority
from service.terms.settings import Settings
from tests.deploy.conftest import missing
from tests.deploy.test_files import DEPLOY, metric_names

KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
PATCHES = {"gpu/worker.yaml", "keda/settings.yaml", "keda/replicas.yaml"}  # parts of a manifest
VERSION = "1.31"

_NAME = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
_TRIGGER = {
    "oneOf": [
        {
            "additionalProperties": False,
            "required": ["type", "metadata", "authenticationRef"],
            "properties": {
                "type": {"const": "redis-streams"},
                "authenticationRef": _NAME,
                "metadata": {
                    "type": "object",
                    "required": ["address", "stream", "consumerGroup", "lagCount"],
                    "additionalProperties": {"type": "string"},
                },
            },
        },
        {
            "additionalProperties": False,
            "required": ["type", "metadata"],
            "properties": {
                "type": {"const": "prometheus"},
                "metricType": {"enum": ["Value", "AverageValue"]},
                "metadata": {
                    "type": "object",
                    "required": ["serverAddress", "query", "threshold"],
                    "additionalProperties": {"type": "string"},
                },
            },
        },
    ]
}
_COUNT = {"type": "integer", "minimum": 0}
CUSTOM = {  # the part of each resource definition that is used here
    "ScaledObject": {
        "type": "object",
        "additionalProperties": False,
        "required": ["scaleTargetRef", "triggers"],
        "properties": {
            "scaleTargetRef": _NAME,
            **dict.fromkeys(("minReplicaCount", "maxReplicaCount", "pollingInterval", "cooldownPeriod"), _COUNT),
            "fallback": {
                "type": "object",
                "required": ["failureThreshold", "replicas"],
                "additionalProperties": _COUNT,
            },
            "triggers": {"type": "array", "minItems": 1, "items": _TRIGGER},
        },
    },
    "TriggerAuthentication": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "secretTargetRef": {
                "type": "array",
                "items": {"required": ["parameter", "name", "key"], "additionalProperties": {"type": "string"}},
            }
        },
    },
    "ServiceMonitor": {
        "type": "object",
        "additionalProperties": False,
        "required": ["selector", "endpoints"],
        "properties": {
            "jobLabel": {"type": "string"},
            "selector": {"type": "object", "required": ["matchLabels"]},
            "endpoints": {
                "type": "array",
                "items": {
                    "required": ["port"],
                    "additionalProperties": False,
                    "properties": {key: {"type": "string"} for key in ("port", "path", "interval")},
                },
            },
        },
    },
}
CUSTOM["PrometheusRule"] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["groups"],
    "properties": {
        "groups": {
            "type": "array",
            "items": {
                "required": ["name", "rules"],
                "additionalProperties": False,
                "properties": {
                    "name": {"type": "string"},
                    "interval": {"type": "string", "pattern": "^[0-9]+[smh]$"},
                    "rules": {"type": "array", "minItems": 1},
                },
            },
        }
    },
}
CUSTOM_GROUPS = {
    "PrometheusRule": "monitoring.coreos.com/v1",
    "ScaledObject": "keda.sh/v1alpha1",
    "TriggerAuthentication": "keda.sh/v1alpha1",
    "ServiceMonitor": "monitoring.coreos.com/v1",
}

Manifest = dict[str, Any]


def manifests() -> Iterator[tuple[str, Manifest]]:
    """Every whole manifest with the file that it stands in."""
    for path in sorted(KUBERNETES.rglob("*.yaml")):
        where = path.relative_to(KUBERNETES).as_posix()
        if path.name == "kustomization.yaml" or where.removeprefix("components/") in PATCHES:
            continue
        for document in yaml.safe_load_all(path.read_text("utf-8")):
            yield where, document


def named(kind: str, name: str, documents: list[Manifest] | None = None) -> Manifest:
    """The manifest of this kind and name."""
    found = documents if documents is not None else [document for _, document in manifests()]
    return next(each for each in found if each["kind"] == kind and each["metadata"]["name"] == name)


def check(document: Manifest) -> None:
    """Against its schema: Kubernetes' own, or the shape above."""
    kind = document["kind"]
    if kind in CUSTOM:
        assert document["apiVersion"] == CUSTOM_GROUPS[kind]
        jsonschema.validate(document["spec"], CUSTOM[kind])
    else:
        kubernetes_validate.validate(document, VERSION, strict=True)


@pytest.mark.parametrize(
    ("where", "document"),
    [pytest.param(where, each, id=f"{where}:{each['kind']}:{each['metadata']['name']}") for where, each in manifests()],
)
def test_every_manifest_follows_its_schema(where: str, document: Manifest) -> None:
    check(document)


def test_the_check_sees_mistakes() -> None:
    deployment = named("Deployment", "recofuse-api")
    deployment["spec"]["replicaz"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        check(deployment)
    scaled = named("ScaledObject", "recofuse-worker")
    del scaled["spec"]["triggers"][0]["metadata"]["stream"]
    with pytest.raises(jsonschema.ValidationError):
        check(scaled)


def test_every_file_is_named_by_its_kustomization() -> None:
    for path in KUBERNETES.rglob("kustomization.yaml"):
        document = yaml.safe_load(path.read_text("utf-8"))
        local = [*document.get("resources", []), *(patch["path"] for patch in document.get("patches", []))]
        local += [name for each in document.get("configMapGenerator", []) for name in each.get("files", [])]
        for name in (*local, *document.get("components", [])):
            assert (path.parent / name).exists(), (path, name)
        there = {each.name for each in path.parent.glob("*.yaml")} - {"kustomization.yaml"}
        assert there == {name for name in local if name.endswith(".yaml")}, path


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_are_built_and_follow_their_schemas(overlay: str, tmp_path: Path) -> None:
    builder = [["kustomize", "build"], ["kubectl", "kustomize"]]
    command = next((words for words in builder if shutil.which(words[0])), None)
    if command is None:
        missing("kustomize or kubectl")
    assert command is not None
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    folder = tmp_path / "kubernetes" / "overlays" / overlay
    if (folder / "redis.env.example").exists():
        shutil.copy(folder / "redis.env.example", folder / "redis.env")
    built = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    documents: list[Manifest] = list(yaml.safe_load_all(built.stdout))
    for document in documents:
        check(document)
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "recofuse"
    worker = named("Deployment", "recofuse-worker", documents)["spec"]
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert ("nvidia.com/gpu" in limits) is (overlay != "cpu")
    assert ("replicas" in worker) is (overlay != "production")


def test_redis_is_set_up_alike_in_both_deployments() -> None:
    copy = KUBERNETES / "components" / "redis" / "redis.conf"
    assert copy.read_text("utf-8") == (DEPLOY / "redis" / "redis.conf").read_text("utf-8")


def test_both_deployments_have_the_same_alerts() -> None:
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text("utf-8"))
    assert named("PrometheusRule", "recofuse")["spec"] == rules


def _pod(name: str) -> tuple[Manifest, Manifest]:
    pod = named("Deployment", name)["spec"]["template"]["spec"]
    return pod, pod["containers"][0]


def test_pods_get_settings_that_exist_and_time_to_drain() -> None:
    base = yaml.safe_load((KUBERNETES / "base" / "kustomization.yaml").read_text("utf-8"))
    values = dict(line.split("=", 1) for line in base["configMapGenerator"][0]["literals"])
    patches = [yaml.safe_load((KUBERNETES / "components" / name).read_text("utf-8")) for name in sorted(PATCHES)]
    for patch in patches:
        for container in patch["spec"].get("template", {}).get("spec", {}).get("containers", []):
            values |= {entry["name"]: entry["value"] for entry in container.get("env", [])}
    del values["RECOFUSE_QUEUE__URL_FILE"]
    settings = Settings.from_environment({**values, "RECOFUSE_QUEUE__URL": "redis://redis"})
    pod, container = _pod("recofuse-api")
    pause = re.search(r"sleep\((\d+)\)", container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert pause is not None
    assert pod["terminationGracePeriodSeconds"] > settings.jobs.drain_timeout_s + int(pause[1]) + 5
    assert _pod("recofuse-worker")[0]["terminationGracePeriodSeconds"] > settings.worker.drain_timeout_s + 5


def service_links() -> dict[str, str]:
    """What Kubernetes sets in every pod of a namespace with these services, unless a pod declines it."""
    links: dict[str, str] = {}
    services = (each for _, each in manifests() if each["kind"] == "Service" and "ports" in each["spec"])
    for document in services:
        name = document["metadata"]["name"].upper().replace("-", "_")
        ports = document["spec"]["ports"]
        links |= {f"{name}_SERVICE_HOST": "10.0.0.1", f"{name}_SERVICE_PORT": str(ports[0]["port"])}
        links[f"{name}_PORT"] = f"tcp://10.0.0.1:{ports[0]['port']}"
        for port in ports:
            number = port["port"]
            links[f"{name}_SERVICE_PORT_{port['name'].upper()}"] = str(number)
            links[f"{name}_PORT_{number}_TCP"] = f"tcp://10.0.0.1:{number}"
            parts = {"PROTO": "tcp", "PORT": str(number), "ADDR": "10.0.0.1"}
            links |= {f"{name}_PORT_{number}_TCP_{part}": value for part, value in parts.items()}
    return links


@pytest.mark.parametrize("name", ["recofuse-api", "recofuse-worker"])
def test_a_pod_starts_beside_the_services_of_its_namespace(name: str) -> None:
    """It declines their variables, and would start with them: here as far as the queue's address, which has no host."""
    pod, container = _pod(name)
    assert pod["enableServiceLinks"] is False
    links = service_links()
    assert "RECOFUSE_API_PORT" in links
    command = [sys.executable, "-m", "service", *container["args"]]
    environment = {**os.environ, **links, "RECOFUSE_QUEUE__URL": "redis://"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=DEPLOY.parent)
    assert ended.returncode == 2
    assert "host is missing" in ended.stderr


def test_probes_ask_what_the_processes_answer() -> None:
    source = (DEPLOY.parent / "service" / "api.py").read_text("utf-8")
    for name in ("recofuse-api", "recofuse-worker"):
        _, container = _pod(name)
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container[probe]["httpGet"]
            assert f'"{asked["path"]}"' in source
            assert asked["port"] in ports
        assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"
        assert container["readinessProbe"]["httpGet"]["path"] == "/health/ready"
        assert container["securityContext"]["readOnlyRootFilesystem"]
    dockerfile = (DEPLOY.parent / "Dockerfile").read_text("utf-8")
    assert "EXPOSE 8000 8001" in dockerfile
    assert "EXPOSE 9000" in dockerfile


def test_scaling_looks_at_streams_and_metrics_that_exist() -> None:
    triggers = named("ScaledObject", "recofuse-worker")["spec"]["triggers"]
    streams = [trigger["metadata"] for trigger in triggers if trigger["type"] == "redis-streams"]
    assert {stream["stream"] for stream in streams} == {f"{PREFIX}:jobs:{priority.value}" for priority in Priority}
    assert {stream["consumerGroup"] for stream in streams} == {GROUP}
    from prometheus_client import CollectorRegistry

    from service.watch.metrics import Metrics

    body, _ = Metrics(CollectorRegistry()).render()
    for trigger in triggers:
        for name in metric_names(trigger["metadata"].get("query", "")):
            assert f"# TYPE {name.removesuffix('_bucket')} " in body.decode(), name
