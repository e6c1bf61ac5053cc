"""What deploys recofuse, read: against schemas and linters, against each other, and against the code they start."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.terms.settings import Settings
from tests.deploy.compose import compose_file, image_environment, interpolated
from tests.deploy.conftest import Needing
from tests.deploy.memory import needed_bytes, num_messages
from tests.extras import recofuse, run_with

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
KNOWN_WORDS = {"and", "or", "unless", "sum", "max", "avg", "count", "rate", "increase", "changes", "vector", "time"}
KNOWN_WORDS |= {"histogram_quantile", "sum_over_time", "max_over_time", "quantile_over_time"}


def run(*words: str, cwd: Path = ROOT) -> str:
    """Run a checker; returns what it says. Fails with it if it complains."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def queries() -> dict[str, str]:
    """Every PromQL expression of the dashboards and rules by where it stands."""
    found = {}
    for path in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        for panel in _panels(json.loads(path.read_text("utf-8"))):
            for target in panel.get("targets", []):
                query = target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")
                found[f"{path.name}: {panel['title']} {target['refId']}"] = query
    for group in yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text("utf-8"))["groups"]:
        for rule in group["rules"]:
            found[f"rules.yml: {rule.get('alert', rule.get('record'))}"] = rule["expr"]
    return found


def _panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """A dashboard's panels, those in rows that are folded up among them."""
    return [panel for outer in dashboard["panels"] for panel in (outer, *outer.get("panels", []))]


def metric_names(query: str) -> set[str]:
    """The metrics that an expression reads."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]|(by|without|on|ignoring)\s*\([^)]*\)', " ", query)
    return {word for word in re.findall(r"[a-zA-Z_:][\w:]*", bare) if word not in KNOWN_WORDS}


def test_metric_names_are_found() -> None:
    query = 'sum by (le, a) (rate(x_bucket{route="/v1"}[5m])) / y:z or vector(0) > 14.4 * 0.001'
    assert metric_names(query) == {"x_bucket", "y:z"}
    assert interpolated("${A:-b}:${C:-}:$${D}", {"C": "c"}) == "b:c:${D}"


# the image


def test_the_dockerfile_passes_its_linter(tool: Needing) -> None:
    run(tool("hadolint"), "Dockerfile")


def test_the_image_leaves_the_choice_of_gpus_to_whoever_starts_it() -> None:
    assert "NVIDIA_VISIBLE_DEVICES" not in DOCKERFILE
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in DOCKERFILE


def test_layers_are_shared() -> None:
    """A worker's image has a front end's packages as the layer that they are there, and adds its own."""
    stages = dict(re.findall(r"^FROM (?:\S+) AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL))
    copied = {name: re.findall(r"^COPY --from=\S+ (\S+)", stages[name], re.MULTILINE) for name in stages}
    assert copied["runtime"] == ["/opt/packages"]
    assert copied["api"] == ["/opt/recofuse"]
    assert copied["worker"] == ["/opt/model", "/opt/recofuse"]
    assert {"FROM runtime AS api", "FROM runtime AS worker"} <= set(DOCKERFILE.splitlines())


def test_a_front_end_starts_without_the_workers_packages() -> None:
    """As in the api image: what its list does not bring fails to import, and `recofuse api` does not notice."""
    done = run_with(recofuse(["api", "--queue", "redis://"]), "server", "otel")
    assert done.returncode == 2
    assert "host is missing" in done.stderr  # it came as far as reading the queue's address
    assert "import" not in done.stderr


def test_the_image_sends_only_what_the_dockerfile_copies() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")]
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    assert sorted(allowed) == sorted(word for line in copied for word in line.split())
    assert all((ROOT / name).exists() for name in allowed)


# the compose file


def test_the_variants_of_the_worker_are_told_apart() -> None:
    """By tag and by device: neither image serves the other's profile, and a worker without its GPU does not start."""
    services = compose_file({"IMAGE_TAG": "v1"})["services"]
    for name, variant, device in (("worker-cpu", "cpu", "cpu"), ("worker-gpu", "cu130", "cuda")):
        service = services[name]
        assert service["image"] == f"recofuse-worker:v1-{variant}"
        assert service["build"]["args"]["VARIANT"] == variant
        assert service["environment"]["RECOFUSE_ENGINE__DEVICE"] == device
        assert ("deploy" in service) is (device == "cuda")


def test_the_compose_file_follows_its_schema(tool: Needing) -> None:
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")


def test_every_setting_of_the_compose_file_exists() -> None:
    for name, service in compose_file()["services"].items():
        if "build" not in service:
            continue
        environ = {**image_environment(service["build"]["target"]), **service["environment"]}
        environ = {key: value for key, value in environ.items() if not key.endswith("_FILE")}
        settings = Settings.from_environment({**environ, "RECOFUSE_QUEUE__URL": "redis://redis"})
        grace_s = float(service["stop_grace_period"].removesuffix("s"))
        drain_s = settings.jobs.drain_timeout_s if name == "api" else settings.worker.drain_timeout_s
        assert grace_s > drain_s + 5, name
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name


def test_mounted_files_and_secrets_are_there() -> None:
    compose = compose_file()
    script = (DEPLOY / "make-secrets.sh").read_text("utf-8")
    for secret in compose["secrets"].values():
        assert Path(secret["file"]).name in script
    for service in compose["services"].values():
        assert set(service.get("secrets", [])) <= set(compose["secrets"])
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (ROOT / source).exists(), volume


def test_the_example_of_the_environment_is_complete() -> None:
    example = (ROOT / ".env.example").read_text("utf-8")
    assert example == (DEPLOY / "compose.env").read_text("utf-8") + Settings.as_environment() + "\n"
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text("utf-8")))
    assert used == {name for name in re.findall(r"^# ([A-Z_]+)=", example, re.MULTILINE) if "RECOFUSE" not in name}
    values = {}
    for line in example.splitlines():
        if match := re.match(r"# (RECOFUSE_\w+__\w+)=(.*)$", line):
            values[match[1]] = match[2]
    assert Settings.from_environment(values) == Settings()
    assert len(values) == len(Settings.names())


def test_the_proxy_lets_through_what_the_service_accepts() -> None:
    config = (DEPLOY / "nginx" / "nginx.conf").read_text("utf-8")
    settings = Settings()
    (body, unbounded) = re.findall(r"client_max_body_size (\d+);", config)
    (wait,) = re.findall(r"proxy_read_timeout (\d+)s", config)
    assert int(body) == 2 * settings.limits.max_image_bytes + 64 * 1024  # so that no size is between two limits
    assert unbounded == "0"
    assert int(wait) > settings.jobs.max_timeout_s + 5
    for idle_s in re.findall(r"^ +keepalive_timeout (\d+)s", config, re.MULTILINE):
        assert int(idle_s) < settings.http.keep_alive_s
    memory = re.search(r"^maxmemory (\d+)gb", (DEPLOY / "redis" / "redis.conf").read_text("utf-8"), re.MULTILINE)
    assert memory is not None
    assert int(memory[1]) << 30 >= 2 * settings.queue.max_bytes


def _num_bytes(text: str) -> int:
    """Of a size as Docker has it."""
    return int(text[:-1]) << {"m": 20, "g": 30}[text[-1]]


def test_no_container_can_fill_the_host() -> None:
    services = compose_file()["services"]
    for name, service in services.items():
        assert _num_bytes(service["mem_limit"]) > 0, name
        assert service["pids_limit"] > 0, name
        assert service["ulimits"]["nofile"]["hard"] > 0, name
        assert service["logging"]["options"]["max-size"], name
        for mount in service.get("tmpfs", []):  # which counts as its memory
            (size,) = re.findall(r"size=(\w+)", mount)
            assert 2 * _num_bytes(size) <= _num_bytes(service["mem_limit"]) or name == "proxy"
    config = (DEPLOY / "nginx" / "nginx.conf").read_text("utf-8")
    (body, _) = map(int, re.findall(r"client_max_body_size (\d+);", config))
    (at_once,) = map(int, re.findall(r"limit_conn requests (\d+);", config))
    (calls,) = map(int, re.findall(r"limit_conn all_calls (\d+);", config))
    small, large = map(int, re.findall(r"client_body_buffer_size (\d+)k;", config))
    (connections,) = map(int, re.findall(r"worker_connections (\d+);", config))
    proxy = services["proxy"]
    (room,) = map(_num_bytes, re.findall(r"size=(\w+)", proxy["tmpfs"][0]))
    assert at_once * body < room  # one address alone leaves room for others
    buffers = (connections * small + calls * large) << 10
    assert room + buffers <= _num_bytes(proxy["mem_limit"])
    assert _num_bytes(services["redis"]["mem_limit"]) >= 2 * (3 << 30)


def frames_bytes() -> int:
    (size,) = re.findall(r"size=(\w+)", compose_file()["volumes"]["frames"]["driver_opts"]["o"])
    return _num_bytes(size)


def test_frames_have_one_place_that_all_know_and_only_recofuse_may_enter() -> None:
    compose, settings = compose_file(), Settings()
    options = compose["volumes"]["frames"]["driver_opts"]
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    assert user is not None
    assert options["type"] == "tmpfs"
    assert options["o"].endswith(f",mode=0700,uid={user[1]},gid={user[2]}")
    made = f"install -d -m 0700 -o {user[1]} -g {user[2]} /run/recofuse/frames"
    assert made in (ROOT / "Dockerfile").read_text("utf-8")  # for volumes that are made without these options
    assert frames_bytes() >= 1.5 * settings.queue.max_bytes
    for name in ("api", "worker-cpu", "worker-gpu"):
        service = compose["services"][name]
        assert "frames:/run/recofuse/frames" in service["volumes"], name
        assert "RECOFUSE_QUEUE__SHARED_FOLDER" not in service["environment"], name  # .env says whether it is used
        assert 2 * frames_bytes() <= _num_bytes(service["mem_limit"]), name


def test_a_front_end_may_take_what_it_needs() -> None:
    limit = _num_bytes(compose_file()["services"]["api"]["mem_limit"])
    assert needed_bytes(limit) + frames_bytes() <= limit
    assert num_messages(limit) >= 4


def test_compose_workers_share_a_name_that_prometheus_asks_for() -> None:
    jobs = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text("utf-8"))["scrape_configs"]
    (asked,) = [job["dns_sd_configs"][0]["names"] for job in jobs if job["job_name"] == "recofuse-worker"]
    for name, service in compose_file()["services"].items():
        if name.startswith("worker"):
            assert service["networks"]["back"]["aliases"] == asked


# Prometheus and Grafana


def test_prometheus_reads_its_configuration_and_rules(tool: Needing) -> None:
    promtool = tool("promtool")
    run(promtool, "check", "config", "prometheus.yml", cwd=DEPLOY / "prometheus")
    run(promtool, "check", "rules", "rules.yml", cwd=DEPLOY / "prometheus")


def test_alertmanager_reads_its_routes(tool: Needing) -> None:
    run(tool("amtool"), "check-config", str(DEPLOY / "alertmanager" / "alertmanager.yml"))


def test_what_follows_from_an_alert_is_kept_back_by_names_that_exist() -> None:
    routes = yaml.safe_load((DEPLOY / "alertmanager" / "alertmanager.yml").read_text("utf-8"))
    names = [alert["alert"] for alert in _alerts()]
    for rule in routes["inhibit_rules"]:
        for matcher in (*rule["source_matchers"], *rule["target_matchers"]):
            for pattern in matcher.split('"')[1].split("|"):
                assert any(re.fullmatch(pattern, name) for name in names), pattern


def test_every_alert_fires_when_it_should(tool: Needing) -> None:
    run(tool("promtool"), "test", "rules", "rules_test.yml", cwd=DEPLOY / "prometheus")


def _alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def test_every_alert_is_tested_and_has_its_entry() -> None:
    tests = yaml.safe_load((DEPLOY / "prometheus" / "rules_test.yml").read_text("utf-8"))["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs" / "operations.md").read_text("utf-8"), re.MULTILINE)
    for alert in _alerts():
        name = alert["alert"]
        assert any(case["alertname"] == name and case.get("exp_alerts") for case in cases), name
        assert any(case["alertname"] == name and not case.get("exp_alerts") for case in cases), name
        assert alert["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
        assert name in headings
    assert sorted(headings) == sorted(alert["alert"] for alert in _alerts())


def test_every_query_can_be_parsed(tool: Needing, tmp_path: Path) -> None:
    rules = [{"record": f"parsed:{number}", "expr": query} for number, query in enumerate(queries().values())]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}), "utf-8")
    assert f"{len(rules)} rules found" in run(tool("promtool"), "check", "rules", str(path))


def test_dashboards_show_only_what_the_code_or_an_exporter_names() -> None:
    from prometheus_client import CollectorRegistry

    from service.watch.metrics import Metrics

    body, _ = Metrics(CollectorRegistry()).render()
    exported = set(re.findall(r"^# TYPE (\w+)", body.decode(), re.MULTILINE))
    for where, query in queries().items():
        for name in metric_names(query):
            if name.startswith("recofuse_"):
                assert name in exported or re.sub(r"_(bucket|sum|count)$", "", name) in exported, (where, name)
            else:
                assert re.match(r"(recofuse:|redis_|node_|probe_|process_|DCGM_FI_DEV_|up$)", name), (where, name)


def test_dashboards_are_as_grafana_expects_them() -> None:
    for path in (DEPLOY / "grafana" / "dashboards").glob("*.json"):
        document = json.loads(path.read_text("utf-8"))
        assert document["uid"]
        assert document["title"]
        ids = [panel["id"] for panel in _panels(document)]
        assert len(set(ids)) == len(ids)
        assert {panel["datasource"]["uid"] for panel in _panels(document) if "datasource" in panel} == {"${datasource}"}
        variables = {entry["name"]: entry for entry in document["templating"]["list"]}
        assert set(variables) == {"datasource", "instance"}
        provisioned = yaml.safe_load(
            (DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text("utf-8")
        )
        assert variables["datasource"]["current"]["value"] == provisioned["datasources"][0]["uid"]


def test_dashboards_have_no_empty_panel_where_there_is_no_gpu() -> None:
    for path in (DEPLOY / "grafana" / "dashboards").glob("*.json"):
        shown = [panel for panel in json.loads(path.read_text("utf-8"))["panels"] if not panel.get("collapsed")]
        assert "DCGM" not in json.dumps(shown)


@pytest.mark.parametrize("script", sorted(path.name for path in DEPLOY.glob("*.sh")))
def test_scripts_can_be_read_by_the_shell(script: str) -> None:
    run("sh", "-n", str(DEPLOY / script))


DOCKER = """#!/bin/sh
# Two containers of the service api; the health of each is what stands in the file of its name.
case "$1 $2" in
    "compose ps") test "$4" = api && printf 'one\\ntwo\\n' ;;
    "restart -t") echo "$4" >> restarted ;;
    "inspect --format") cat "$4" ;;
    "logs --tail") echo "log of $4" ;;
    *) echo "unexpected: $*" >&2; exit 64 ;;
esac
"""


@pytest.mark.parametrize(
    ("service", "health", "status", "restarted"),
    [
        ("api", ("healthy", "healthy"), 0, "one two"),
        ("api", ("starting", "healthy"), 1, "one"),  # the second is left alone
        ("nobody", ("healthy", "healthy"), 1, ""),
    ],
)
def test_a_rolling_restart_ends_at_the_first_container_that_does_not_come_back(
    tmp_path: Path, service: str, health: tuple[str, str], status: int, restarted: str
) -> None:
    (tmp_path / "deploy").mkdir()
    (tmp_path / "restarted").touch()
    for name, text in zip(("one", "two"), health, strict=True):
        (tmp_path / name).write_text(text)
    docker = tmp_path / "docker"
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    script = tmp_path / "deploy" / "rolling-restart.sh"
    script.write_text((DEPLOY / script.name).read_text("utf-8"), "utf-8")
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HEALTHY_S": "1"}
    done = subprocess.run(
        ["sh", str(script), service], env=environ, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == status, done.stderr
    assert (tmp_path / "restarted").read_text().split() == restarted.split()
    assert ("log of one" in done.stderr) is (health[0] == "starting")
