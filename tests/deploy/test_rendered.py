"""What kustomize makes of the manifests: every overlay with every combination of components, all that they must keep.

Schemas, pods that start beside the services of their namespace, KEDA's admission, Secrets and ConfigMaps that exist,
what the network lets through, and what Prometheus finds. Nothing here needs a cluster.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.deploy import keda
from tests.deploy.conftest import Needing
from tests.deploy.memory import needed_bytes, num_messages
from tests.deploy.rendered import (
    ADDED,
    KUBERNETES,
    OVERLAYS,
    REDIS,
    Combination,
    build,
    build_all,
    combinations,
    components_of,
    copy,
    is_possible,
)
from tests.deploy.schemas import Manifest, check
from tests.deploy.test_files import DEPLOY
from tests.service.redis_server import RedisServer, free_port

Built = dict[Combination, list[Manifest]]

ROOT = DEPLOY.parent
SECRET = "recofuse-queue"
SCALING = (ROOT / "docs" / "scaling.md").read_text("utf-8")


@pytest.fixture(scope="module")
def built() -> Built:
    return build_all()


def of_kind(documents: list[Manifest], *kinds: str) -> Iterator[Manifest]:
    """The manifests of these kinds."""
    return (each for each in documents if each["kind"] in kinds)


def pods(documents: list[Manifest]) -> Iterator[tuple[str, Manifest, dict[str, str]]]:
    """Name, pod and labels of everything that runs."""
    for document in of_kind(documents, "Deployment", "StatefulSet", "DaemonSet", "Job", "CronJob"):
        template = document["spec"]["template"]
        yield document["metadata"]["name"], template["spec"], template["metadata"]["labels"]


def generated(documents: list[Manifest], kind: str, stem: str) -> Manifest | None:
    """The ConfigMap or Secret that was generated under this name, with or without a hash at its end."""
    found = [
        each for each in of_kind(documents, kind) if re.fullmatch(stem + "(-[a-z0-9]{10})?", each["metadata"]["name"])
    ]
    return found[0] if found else None


def test_every_component_is_built_in_all_its_company() -> None:
    there = {path.name for path in (KUBERNETES / "components").iterdir()}
    assert there == {*ADDED, *REDIS}
    found = combinations()
    assert len(set(found)) == len(found) == 156
    assert all(is_possible(set(each.components)) for each in found)
    for name in there:
        assert any(name in each.components for each in found), name
    for overlay in OVERLAYS:  # what is shipped is among them, in an order that the components ask for
        assert Combination(overlay, components_of(overlay)) in found, overlay


def test_every_combination_follows_its_schemas(built: Built) -> None:
    for combination, documents in built.items():
        identities = set()
        for document in documents:
            check(document)
            metadata = document["metadata"]
            assert document["kind"] == "Namespace" or metadata["namespace"] == "recofuse", combination.name
            identities.add((document["kind"], metadata["name"]))
        assert len(identities) == len(documents), combination.name


def test_components_do_what_they_say(built: Built) -> None:
    for combination, documents in built.items():
        specs = {each["metadata"]["name"]: each["spec"] for each in of_kind(documents, "Deployment", "StatefulSet")}
        worker = specs["recofuse-worker"]
        limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert ("nvidia.com/gpu" in limits) is ("gpu" in combination.components), combination.name
        assert ("replicas" in worker) is ("keda" not in combination.components), combination.name
        assert ("redis" in specs) is (combination.redis == "redis"), combination.name
        for name in ("recofuse-api", "recofuse-worker"):
            spread = specs[name]["template"]["spec"]["topologySpreadConstraints"]
            assert all(each["labelSelector"]["matchLabels"] == {"app.kubernetes.io/name": name} for each in spread)
        settings = generated(documents, "ConfigMap", "recofuse-settings")
        assert settings is not None
        assert ("RECOFUSE_TRACE__ENDPOINT" in settings["data"]) is ("tracing" in combination.components)
        pinned = settings["data"].get("RECOFUSE_ENGINE__DEVICE")
        own = {entry["name"]: entry["value"] for entry in worker["template"]["spec"]["containers"][0].get("env", [])}
        device = own.get("RECOFUSE_ENGINE__DEVICE", pinned)
        assert device == ("cuda" if "gpu" in combination.components else "cpu"), combination.name
        if "gpu" in components_of(combination.overlay) or "gpu" not in combination.components:
            image = worker["template"]["spec"]["containers"][0]["image"]
            assert image.endswith("-cu130" if device == "cuda" else "-cpu"), combination.name


def test_a_rollout_needs_no_spare_gpu(built: Built) -> None:
    """As the Deployment controller counts: how many pods may be there at once, and how many of them must be ready."""
    for combination, documents in built.items():
        deployments = {each["metadata"]["name"]: each for each in of_kind(documents, "Deployment")}
        for deployment in (deployments["recofuse-api"], deployments["recofuse-worker"]):
            rolling = deployment["spec"]["strategy"]["rollingUpdate"]
            is_bound = "nvidia.com/gpu" in str(deployment["spec"]["template"]["spec"]["containers"])
            assert (rolling["maxSurge"] == 0) is is_bound, combination.name
            assert rolling["maxSurge"] + rolling["maxUnavailable"] >= 1, combination.name  # else it never moves


def test_a_front_end_may_take_what_it_needs(built: Built) -> None:
    for combination, documents in built.items():
        specs = {each["metadata"]["name"]: each["spec"] for each in of_kind(documents, "Deployment")}
        (container,) = specs["recofuse-api"]["template"]["spec"]["containers"]
        memory = container["resources"]["limits"]["memory"]
        assert memory.endswith("Gi"), combination.name
        limit = int(memory.removesuffix("Gi")) << 30
        assert needed_bytes(limit) <= limit, combination.name
        assert num_messages(limit) >= 4, combination.name


def test_grpc_finds_every_front_end_and_speaks_http2_to_it(built: Built) -> None:
    for documents in built.values():
        services = {each["metadata"]["name"]: each["spec"] for each in of_kind(documents, "Service")}
        headless = services["recofuse-api-headless"]
        assert headless["clusterIP"] == "None"
        assert headless["selector"] == services["recofuse-api"]["selector"]
        for name in ("recofuse-api", "recofuse-api-headless"):
            (port,) = [port for port in services[name]["ports"] if port["name"] == "grpc"]
            assert port["appProtocol"] == "kubernetes.io/h2c"


# starting


def service_links(documents: list[Manifest]) -> dict[str, str]:
    """What Kubernetes sets in every pod of a namespace with these services, unless a pod declines it.

    It does so for those with an address; here also for those without, as if they had one.
    """
    links: dict[str, str] = {}
    for document in of_kind(documents, "Service"):
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


def commands(documents: list[Manifest]) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Arguments and environment of every container of recofuse."""
    for _, pod, _ in pods(documents):
        for container in pod["containers"]:
            if "recofuse" not in container["image"]:
                continue
            environment = service_links(documents)
            for source in container.get("envFrom", []):
                (values,) = (
                    each["data"]
                    for each in of_kind(documents, "ConfigMap")
                    if each["metadata"]["name"] == source["configMapRef"]["name"]
                )
                environment |= values
            environment |= {entry["name"]: entry["value"] for entry in container.get("env", [])}
            yield container["args"], environment


RUN_ALL = """
import contextlib, io, json, os, runpy, sys
for arguments, environment in json.load(sys.stdin):
    for name in [name for name in os.environ if name.startswith("RECOFUSE")]:
        del os.environ[name]
    os.environ.update(environment)
    sys.argv = ["recofuse", *arguments]
    status = 0
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            runpy.run_module("service", run_name="__main__")
        except SystemExit as ended:
            status = ended.code
    print(json.dumps([status, said.getvalue()]))
"""


def test_every_command_starts_beside_the_services_of_its_namespace(built: Built, tmp_path: Path) -> None:
    """Pods decline the services' variables, and would start with them, up to the queue's address without a host."""
    place = tmp_path / "url"
    place.write_text("redis://\n", "utf-8")
    cases: set[str] = set()
    for combination, documents in built.items():
        for name, pod, _ in pods(documents):
            assert pod["enableServiceLinks"] is False, (combination.name, name)
        found = list(commands(documents))
        assert sorted(arguments for arguments, _ in found) == [["api"], ["worker"]]
        for arguments, environment in found:
            assert environment["RECOFUSE_QUEUE__URL_FILE"] == "/run/secrets/recofuse/url"
            assert "RECOFUSE_API_PORT" in environment
            assert "RECOFUSE_WORKER_SERVICE_HOST" in environment
            cases.add(json.dumps([arguments, {**environment, "RECOFUSE_QUEUE__URL_FILE": str(place)}], sort_keys=True))
    bare = {name: value for name, value in os.environ.items() if not name.startswith("RECOFUSE")}
    misspelt = json.dumps([["api"], {"RECOFUSE_API_PORTS": "8000"}])
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        input=f"[{','.join([*sorted(cases), misspelt])}]",
        env=bare,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(cases) + 1
    *answers, last = answers
    assert last[0] == 2
    assert "RECOFUSE_API_PORTS" in last[1]
    for case, (status, said) in zip(sorted(cases), answers, strict=True):
        assert status == 2, (case, said)
        assert "host is missing" in said, (case, said)


# KEDA


def test_keda_admits_every_combination_from_its_lowest_version_on(built: Built) -> None:
    for combination, documents in built.items():
        scaled = list(of_kind(documents, "ScaledObject"))
        assert len(scaled) == ("keda" in combination.components), combination.name
        for version in keda.VERSIONS:
            assert keda.refusals(documents, version) == [], (combination.name, version)


def test_keda_measures_what_waits_and_runs_over_the_way_that_redis_asks_for(built: Built) -> None:
    forms = {"redis": ("redis-streams", None), "redis-tls": ("redis-streams", "true")}
    forms["redis-sentinel"] = ("redis-sentinel-streams", "true")
    for combination, documents in built.items():
        for scaled in of_kind(documents, "ScaledObject"):
            triggers = scaled["spec"]["triggers"]
            streams = [trigger for trigger in triggers if trigger["type"] != "prometheus"]
            assert len(streams) == 3, combination.name
            for trigger in streams:
                assert keda.measured_by_length(trigger), combination.name
                form = (trigger["type"], trigger["metadata"].get("enableTLS"))
                assert form == forms[combination.redis], combination.name
            assert len(triggers) == 3 + ("keda-latency" in combination.components), combination.name
            assert scaled["spec"]["fallback"]["replicas"] >= 1


def test_the_rules_of_keda_see_what_was_wrong(built: Built) -> None:
    """The trigger of old, by lag and with a Value beside a fallback, and some more mistakes."""
    documents = built[Combination("production", components_of("production"))]

    def changed(path: str, value: object) -> list[Manifest]:
        copy: list[Manifest] = json.loads(json.dumps(documents))
        (scaled,) = of_kind(copy, "ScaledObject")
        *way, last = path.split("/")
        place = scaled["spec"]
        for step in way:
            place = place[int(step) if step.isdigit() else step]
        if value is None:
            del place[last]
        else:
            place[last] = value
        return copy

    def refused_by(copy: list[Manifest]) -> list[keda.Version]:
        return [version for version in keda.VERSIONS if keda.refusals(copy, version)]

    of_old = json.loads(json.dumps(documents))
    (scaled,) = of_kind(of_old, "ScaledObject")
    for trigger in scaled["spec"]["triggers"]:
        del trigger["metricType"]
    scaled["spec"]["triggers"][-1]["metricType"] = "Value"
    assert refused_by(of_old) == [version for version in keda.VERSIONS if (2, 14, 0) <= version <= (2, 17, 0)]
    for trigger in scaled["spec"]["triggers"]:
        trigger["metricType"] = "Value"
    assert refused_by(of_old) == [version for version in keda.VERSIONS if (2, 14, 0) <= version < (2, 18, 0)]
    for path, value in (
        ("triggers/0/metadata/stream", None),
        ("triggers/0/metadata/streamLength", "many"),
        ("triggers/0/type", "redis-sentinel-streams"),
        ("triggers/0/type", "redis-stream"),
        ("triggers/0/authenticationRef/name", "elsewhere"),
        ("triggers/3/metadata/query", None),
        ("maxReplicaCount", -1),
        ("idleReplicaCount", 0),
        ("scaleTargetRef/name", "recofuse-api"),
    ):
        assert refused_by(changed(path, value)) == list(keda.VERSIONS), path
    by_lag = changed("triggers/0/metadata/consumerGroup", "workers")
    (scaled,) = of_kind(by_lag, "ScaledObject")
    assert not keda.measured_by_length(scaled["spec"]["triggers"][0])


def test_the_lowest_version_of_keda_is_named() -> None:
    lowest = ".".join(str(part) for part in keda.LOWEST[:2])
    assert min(keda.VERSIONS) == keda.LOWEST
    assert f"KEDA {lowest}" in SCALING
    assert f"KEDA {lowest}" in (KUBERNETES / "components" / "keda" / "kustomization.yaml").read_text("utf-8")


# Secrets and ConfigMaps


def secret_keys(documents: list[Manifest]) -> Iterator[tuple[str, str | None]]:
    """Name and key (None: all) of every Secret that something asks for."""
    for _, pod, _ in pods(documents):
        for volume in pod.get("volumes", []):
            if "secret" in volume:
                yield from ((volume["secret"]["secretName"], item["key"]) for item in volume["secret"].get("items", []))
                yield volume["secret"]["secretName"], None
        for container in pod["containers"]:
            sources = (entry.get("valueFrom", {}).get("secretKeyRef") for entry in container.get("env", []))
            yield from ((source["name"], source["key"]) for source in sources if source is not None)
    for document in of_kind(documents, "TriggerAuthentication"):
        yield from ((each["name"], each["key"]) for each in document["spec"]["secretTargetRef"])


def test_secrets_and_configmaps_are_there_under_the_names_that_are_asked_for(built: Built) -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", SCALING[SCALING.index("recofuse-queue") :], re.MULTILINE))
    for combination, documents in built.items():
        secret = generated(documents, "Secret", SECRET)
        assert (secret is None) is combination.overlay.startswith("production")
        asked = set(secret_keys(documents))
        name = SECRET if secret is None else secret["metadata"]["name"]
        assert {each for each, _ in asked} == {name}, combination.name
        keys = {key for _, key in asked if key is not None}
        assert keys <= documented, combination.name
        if secret is not None:
            assert name != SECRET  # it has a hash: a change rolls the pods
            assert keys <= set(secret["data"]), combination.name
            assert "url" in secret["data"]
        maps = {each["metadata"]["name"] for each in of_kind(documents, "ConfigMap")}
        for _, pod, _ in pods(documents):
            for volume in pod.get("volumes", []):
                assert "configMap" not in volume or volume["configMap"]["name"] in maps, combination.name


def test_the_example_of_the_secret_leads_to_the_redis_of_the_cluster(built: Built) -> None:
    for combination, documents in built.items():
        if (secret := generated(documents, "Secret", SECRET)) is None:
            continue
        values = {name: base64.b64decode(value).decode() for name, value in secret["data"].items()}
        (service,) = (each for each in of_kind(documents, "Service") if each["metadata"]["name"] == "redis")
        (port,) = service["spec"]["ports"]
        assert values["address"] == f"redis.recofuse.svc:{port['port']}", combination.name
        assert values["redis_auth"] == f"requirepass {values['password']}"
        assert values["url"] == f"redis://:{values['password']}@redis:{port['port']}/0"


# the network


def reaches(
    documents: list[Manifest], direction: str, labels: dict[str, str], peer: Manifest, port: int, protocol: str
) -> bool:
    """Whether the policies let this pod send to (egress) or receive from (ingress) the peer.

    peer: `address`, of something that is no pod; or `labels` of a pod, with `namespace`, that one's labels, if it is
    in another.
    """
    policies = [
        each["spec"]
        for each in of_kind(documents, "NetworkPolicy")
        if direction.capitalize() in each["spec"]["policyTypes"] and _selects(each["spec"]["podSelector"], labels)
    ]
    if not policies:
        return True
    word = "to" if direction == "egress" else "from"
    for policy in policies:
        for rule in policy.get(direction, []):
            ports = rule.get("ports")
            if ports is not None and {"protocol": protocol, "port": port} not in ports:
                continue
            if word not in rule or any(_is_peer(each, peer) for each in rule[word]):
                return True
    return False


def _selects(selector: Manifest, labels: dict[str, str]) -> bool:
    if any(labels.get(name) != value for name, value in selector.get("matchLabels", {}).items()):
        return False
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


def _is_peer(rule: Manifest, peer: Manifest) -> bool:
    if "ipBlock" in rule:
        return "address" in peer and ipaddress.ip_address(peer["address"]) in ipaddress.ip_network(
            rule["ipBlock"]["cidr"]
        )
    if "address" in peer:
        return False
    if "namespaceSelector" in rule:
        if not _selects(rule["namespaceSelector"], peer.get("namespace", {})):
            return False
    elif "namespace" in peer:
        return False
    return _selects(rule.get("podSelector", {}), peer.get("labels", {}))


def namespace(**labels: str) -> Manifest:
    """A pod of another namespace, which has these labels (`name` for the one that Kubernetes gives it)."""
    names = {"name": "kubernetes.io/metadata.name", "access": "recofuse-access"}
    return {"namespace": {names[name]: value for name, value in labels.items()}, "labels": {"app": "somebody"}}


RESOLVERS = (
    (namespace(name="kube-system"), 53),
    ({"address": "169.254.20.10"}, 53),  # NodeLocal DNSCache
    (namespace(name="openshift-dns"), 5353),
)


def test_every_pod_can_resolve_names_and_nothing_else_leaves(built: Built) -> None:
    for combination, documents in built.items():
        for name, _, labels in pods(documents):
            for peer, port in RESOLVERS:
                for protocol in ("UDP", "TCP"):
                    assert reaches(documents, "egress", labels, peer, port, protocol), (combination.name, name, peer)
            assert not reaches(documents, "egress", labels, {"address": "203.0.113.1"}, 443, "TCP"), combination.name
            assert not reaches(documents, "egress", labels, namespace(name="default"), 443, "TCP"), combination.name
            collector = namespace(name="observability")
            is_traced = "tracing" in combination.components and name.startswith("recofuse-")
            assert reaches(documents, "egress", labels, collector, 4318, "TCP") is is_traced, (combination.name, name)


def test_redis_is_reached_by_whom_it_must_be_and_by_nobody_else(built: Built) -> None:
    outside = {"redis-tls": (6379, 6380), "redis-sentinel": (26379, 6379)}
    for combination, documents in built.items():
        labels = {name: labels for name, _, labels in pods(documents)}
        inside = {"labels": labels.get("redis", {})}
        for name in ("recofuse-api", "recofuse-worker", "redis-exporter"):
            if name not in labels:
                continue
            own = {"labels": labels[name]}
            if combination.redis == "redis":
                assert reaches(documents, "egress", labels[name], inside, 6379, "TCP"), (combination.name, name)
                assert reaches(documents, "ingress", labels["redis"], own, 6379, "TCP"), (combination.name, name)
            for port in outside.get(combination.redis, ()):
                peer = {"address": "10.1.2.3"}
                assert reaches(documents, "egress", labels[name], peer, port, "TCP"), (combination.name, name, port)
        if combination.redis == "redis":
            assert reaches(documents, "ingress", labels["redis"], namespace(name="keda"), 6379, "TCP")
            assert not reaches(documents, "ingress", labels["redis"], namespace(name="default"), 6379, "TCP")
            assert not reaches(documents, "ingress", labels["redis"], namespace(access="client"), 6379, "TCP")


def test_clients_and_prometheus_come_in_where_they_should(built: Built) -> None:
    client, prometheus, stranger = namespace(access="client"), namespace(access="metrics"), namespace(name="default")
    doors = {
        "recofuse-api": {8000: (True, True), 8001: (True, False)},
        "recofuse-worker": {9000: (False, True)},
        "redis-exporter": {9121: (False, True)},
        "redis": {6379: (False, False)},
    }
    for combination, documents in built.items():
        for name, _, labels in pods(documents):
            for port, allowed in doors[name].items():
                found = tuple(reaches(documents, "ingress", labels, peer, port, "TCP") for peer in (client, prometheus))
                assert found == allowed, (combination.name, name, port)
                assert not reaches(documents, "ingress", labels, stranger, port, "TCP"), (combination.name, name)


# Prometheus and Grafana


def test_prometheus_finds_every_process_once_under_the_name_that_alerts_know(built: Built) -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text("utf-8"))
    known = {job["job_name"] for job in config["scrape_configs"]}
    for combination, documents in built.items():
        jobs = []
        for monitor in of_kind(documents, "ServiceMonitor"):
            spec = monitor["spec"]
            (service,) = (
                each
                for each in of_kind(documents, "Service")
                if _selects(spec["selector"], each["metadata"].get("labels", {}))
            )
            (endpoint,) = spec["endpoints"]
            assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}, combination.name
            jobs.append(service["metadata"]["labels"][spec["jobLabel"]])
        wanted = ["recofuse-api", "recofuse-worker"] if "monitoring" in combination.components else []
        wanted += ["redis"] if "redis-exporter" in combination.components else []
        assert sorted(jobs) == wanted, combination.name
        assert set(jobs) <= known


def test_kube_prometheus_stack_finds_monitors_rules_and_dashboard(built: Built) -> None:
    dashboard = (DEPLOY / "grafana" / "dashboards" / "recofuse.json").read_text("utf-8")
    for combination, documents in built.items():
        for document in documents:
            if document["apiVersion"].startswith("monitoring.coreos.com/"):
                assert document["metadata"]["labels"]["release"] == "kube-prometheus-stack", combination.name
        found = generated(documents, "ConfigMap", "recofuse-dashboards")
        assert (found is not None) is ("monitoring" in combination.components), combination.name
        if found is not None:
            assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
            assert found["data"] == {"recofuse.json": dashboard}
            assert len(json.dumps(found)) < 200_000  # what `kubectl apply` can write down as last applied
    assert "grafana_dashboard" in SCALING


def test_the_release_can_be_patched_as_the_guide_says(tmp_path: Path) -> None:
    (patch,) = re.findall(r"^```yaml\n(patches:.+?)^```$", SCALING, re.MULTILINE | re.DOTALL)
    copy(tmp_path)
    place = tmp_path / "kubernetes" / "overlays" / "production" / "kustomization.yaml"
    place.write_text(place.read_text("utf-8") + patch, "utf-8")
    changed = [each for each in build(place.parent) if each["apiVersion"].startswith("monitoring.coreos.com/")]
    assert len(changed) == 4
    assert {each["metadata"]["labels"]["release"] for each in changed} == {"YOURS"}


def test_the_exporter_asks_redis_the_way_that_it_asks_for(built: Built) -> None:
    for combination, documents in built.items():
        for name, pod, _ in pods(documents):
            if name == "redis-exporter":
                (container,) = pod["containers"]
                (address,) = (entry["value"] for entry in container["env"] if entry["name"] == "REDIS_ADDR")
                scheme = "redis" if combination.redis == "redis" else "rediss"
                assert address == f"{scheme}://$(ADDRESS)", combination.name
                names = [entry["name"] for entry in container["env"]]
                assert names.index("ADDRESS") < names.index("REDIS_ADDR"), combination.name  # or it is not replaced


@pytest.mark.redis
def test_the_exporter_reads_redis_with_what_its_pod_gives_it(built: Built, tool: Needing) -> None:
    """The real one, with the environment of the manifest and the values of the Secret's example."""
    program = tool("prometheus-redis-exporter")
    documents = next(each for key, each in built.items() if key.overlay == "cpu" and "redis-exporter" in key.components)
    secret = generated(documents, "Secret", SECRET)
    assert secret is not None
    port, own_port = free_port(), free_port()
    values = {name: base64.b64decode(value).decode() for name, value in secret["data"].items()}
    values["address"] = f"127.0.0.1:{port}"
    (pod,) = (pod for name, pod, _ in pods(documents) if name == "redis-exporter")
    environment: dict[str, str] = {}
    for entry in pod["containers"][0]["env"]:  # as the kubelet does it, in order
        value = values[entry["valueFrom"]["secretKeyRef"]["key"]] if "valueFrom" in entry else entry["value"]
        environment[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda found: environment.get(found[1], found[0]), value)
    environment["REDIS_EXPORTER_WEB_LISTEN_ADDRESS"] = f"127.0.0.1:{own_port}"
    with tempfile.TemporaryDirectory(prefix="rq-") as folder:
        server = RedisServer(Path(folder), port=port)
        server.start()
        assert server.command("CONFIG", "SET", "requirepass", values["password"]) == b"+OK\r\n"
        with subprocess.Popen([program], env=environment, stderr=subprocess.DEVNULL) as process:
            try:
                until = time.monotonic() + 20
                while "\nredis_up 1\n" not in (said := _page(f"http://127.0.0.1:{own_port}/metrics")):
                    assert time.monotonic() < until, said
                    time.sleep(0.05)
            finally:
                process.kill()
                server.kill()


def _page(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read().decode())
    except OSError as error:
        return str(error)
