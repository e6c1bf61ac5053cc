"""The Kubernetes manifests as they stand in their files: against their schemas and the code that they run.

What kustomize makes of them is looked at in `test_rendered.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import jsonschema
import kubernetes_validate
import pytest
import yaml

from service.queue.redis.address import PREFIX
from service.terms.jobs import Priority
from service.terms.settings import Settings
from tests.deploy.schemas import Manifest, check
from tests.deploy.test_files import DEPLOY, metric_names

KUBERNETES = DEPLOY / "kubernetes"
PATCHES = {"gpu/worker.yaml", "keda/settings.yaml", "keda/replicas.yaml"}  # parts of a manifest
OPERATIONS = {"keda-latency/trigger.yaml", "redis-tls/exporter.yaml"}  # JSON patches
REFERENCES = {"keda/references.yaml"}  # for kustomize
PARTS = PATCHES | OPERATIONS | REFERENCES


def manifests() -> Iterator[tuple[str, Manifest]]:
    """Every whole manifest with the file that it stands in."""
    for path in sorted(KUBERNETES.rglob("*.yaml")):
        where = path.relative_to(KUBERNETES).as_posix()
        if path.name == "kustomization.yaml" or where.removeprefix("components/") in PARTS:
            continue
        for document in yaml.safe_load_all(path.read_text("utf-8")):
            yield where, document


def named(kind: str, name: str, documents: list[Manifest] | None = None) -> Manifest:
    """The manifest of this kind and name."""
    found = documents if documents is not None else [document for _, document in manifests()]
    return next(each for each in found if each["kind"] == kind and each["metadata"]["name"] == name)


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
        local = [
            *document.get("resources", []),
            *(patch["path"] for patch in document.get("patches", []) if "path" in patch),
        ]
        local += [name for each in document.get("configMapGenerator", []) for name in each.get("files", [])]
        local += document.get("configurations", [])
        for name in (*local, *document.get("components", [])):
            assert (path.parent / name).exists(), (path, name)
        there = {each.name for each in path.parent.glob("*.yaml")} - {"kustomization.yaml"}
        assert there == {name for name in local if name.endswith(".yaml")}, path


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


def test_probes_ask_what_the_processes_answer() -> None:
    faces = DEPLOY.parent / "service" / "faces" / "http"
    for name, module in (("recofuse-api", "app.py"), ("recofuse-worker", "monitor.py")):
        source = (faces / module).read_text("utf-8")
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


def test_scaling_looks_at_every_class_and_leaves_a_worker_what_it_can_hold() -> None:
    triggers = named("ScaledObject", "recofuse-worker")["spec"]["triggers"]
    streams = {trigger["metadata"]["stream"]: int(trigger["metadata"]["streamLength"]) for trigger in triggers}
    assert set(streams) == {f"{PREFIX}:jobs:{priority.value}" for priority in Priority}
    max_batch = Settings().batch.max_batch
    held = 3 * max_batch  # RECOFUSE_WORKER__MAX_HELD
    assert streams[f"{PREFIX}:jobs:high"] == streams[f"{PREFIX}:jobs:normal"] == held + 2 * max_batch
    assert streams[f"{PREFIX}:jobs:low"] == held + 8 * max_batch


def test_the_trigger_for_latency_asks_for_metrics_that_exist() -> None:
    from prometheus_client import CollectorRegistry

    from service.watch.metrics import Metrics

    body, _ = Metrics(CollectorRegistry()).render()
    (operation,) = yaml.safe_load((KUBERNETES / "components" / "keda-latency" / "trigger.yaml").read_text("utf-8"))
    names = metric_names(operation["value"]["metadata"]["query"])
    assert names == {"recofuse_stage_seconds_bucket", "up"}
    assert "# TYPE recofuse_stage_seconds " in body.decode()


def test_a_door_lets_through_what_the_service_accepts() -> None:
    settings = Settings()
    notes = named("Ingress", "recofuse-http")["metadata"]["annotations"]
    size = notes["nginx.ingress.kubernetes.io/proxy-body-size"]
    assert int(size.removesuffix("k")) << 10 == 2 * settings.limits.max_image_bytes + 64 * 1024
    longest_s = settings.jobs.max_timeout_s + 5
    assert int(notes["nginx.ingress.kubernetes.io/proxy-read-timeout"]) > longest_s
    rule = named("HTTPRoute", "recofuse-http")["spec"]["rules"][0]
    assert int(rule["timeouts"]["request"].removesuffix("s")) > longest_s
    notes = named("Ingress", "recofuse-grpc")["metadata"]["annotations"]
    assert notes["nginx.ingress.kubernetes.io/backend-protocol"] == "GRPC"
    assert notes["nginx.ingress.kubernetes.io/proxy-body-size"] == "0"


def test_a_door_leads_to_every_route_but_the_metrics() -> None:
    sources = (path.read_text("utf-8") for path in (DEPLOY.parent / "service" / "faces").rglob("*.py"))
    declared = re.findall(r"@(?:app|router)\.\w+\(\s*\"(/[^\"]*)\"", "".join(sources))
    routes = {*declared, "/openapi.json"}  # FastAPI's own
    assert {"/", "/metrics", "/docs", "/v1/fuse", "/v2", "/playground/{path:path}"} <= routes
    (rule,) = named("Ingress", "recofuse-http")["spec"]["rules"]
    by_ingress = {(path["path"], path["pathType"] == "Exact") for path in rule["http"]["paths"]}
    (matches,) = (each["matches"] for each in named("HTTPRoute", "recofuse-http")["spec"]["rules"])
    by_gateway = {(match["path"]["value"], match["path"]["type"] == "Exact") for match in matches}
    assert by_ingress == by_gateway
    for route in routes:
        led = any(
            route == path or (not exact and route.startswith(f"{path.rstrip('/')}/")) for path, exact in by_ingress
        )
        assert led is (route != "/metrics"), route


def test_a_door_leads_to_every_service_of_grpc() -> None:
    from google.protobuf.descriptor import FileDescriptor
    from grpc_health.v1 import health_pb2
    from grpc_reflection.v1alpha import reflection_pb2

    files: list[FileDescriptor] = [health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR]
    names = {service.full_name for file in files for service in file.services_by_name.values()}
    for path in (DEPLOY.parent / "proto").rglob("*.proto"):
        text = path.read_text("utf-8")
        package = re.search(r"^package (.+);$", text, re.MULTILINE)
        assert package is not None
        names |= {f"{package[1]}.{name}" for name in re.findall(r"^service (\w+)", text, re.MULTILINE)}
    (rule,) = named("Ingress", "recofuse-grpc")["spec"]["rules"]
    assert {path["path"].removeprefix("/") for path in rule["http"]["paths"]} == names
    (matches,) = (each["matches"] for each in named("GRPCRoute", "recofuse-grpc")["spec"]["rules"])
    assert {match["method"]["service"] for match in matches} == names
    both = (named("HTTPRoute", "recofuse-http"), named("GRPCRoute", "recofuse-grpc"))
    assert not set(both[0]["spec"]["hostnames"]) & set(both[1]["spec"]["hostnames"])
