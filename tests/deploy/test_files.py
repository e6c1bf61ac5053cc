"""What deploys recofuse, read: against schemas and linters, against each other, and against the code they start."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.terms.settings import Settings
from tests.deploy.compose import compose_file, image_environment, interpolated
from tests.deploy.conftest import Needing
from tests.extras import named, recofuse, run_with

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KNOWN_WORDS = frozenset({"sum", "max", "avg", "rate", "increase", "histogram_quantile", "and", "or", "vector"})


def run(*words: str, cwd: Path = ROOT) -> str:
    """Run a checker; returns what it says. Fails with it if it complains."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def queries() -> dict[str, str]:
    """Every PromQL expression of the dashboards and rules by where it stands."""
    found = {}
    for path in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text("utf-8"))["panels"]:
            for target in panel.get("targets", []):
                found[f"{path.name}: {panel['title']} {target['refId']}"] = target["expr"].replace(
                    "$__rate_interval", "1m"
                )
    for group in yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text("utf-8"))["groups"]:
        for rule in group["rules"]:
            found[f"rules.yml: {rule.get('alert', rule.get('record'))}"] = rule["expr"]
    return found


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


def test_the_lists_of_the_image_are_what_the_extras_say() -> None:
    front_end, worker = named("server", "otel"), named("torch")
    wanted = {
        "requirements-api.txt": front_end,
        "requirements-worker.txt": {name: worker[name] for name in worker.keys() - front_end.keys()},
    }
    for file, requirements in wanted.items():
        lines = [line for line in (DEPLOY / file).read_text("utf-8").splitlines() if not line.startswith("#")]
        listed = [f"{one.name}[{','.join(one.extras)}]" if one.extras else one.name for one in requirements.values()]
        assert lines == sorted(listed), file
    assert "torch" in wanted["requirements-worker.txt"]


def test_a_front_end_starts_without_the_workers_packages() -> None:
    """As in the api image: what its list does not bring fails to import, and `recofuse api` does not notice."""
    done = run_with(recofuse(["api", "--queue", "redis://"]), "server", "otel")
    assert done.returncode == 2
    assert "host is missing" in done.stderr  # it came as far as reading the queue's address
    assert "import" not in done.stderr


def test_the_image_sends_only_what_the_dockerfile_copies() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")]
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    assert sorted(allowed) == sorted(word for line in copied for word in line.split())
    assert all((ROOT / name).exists() for name in allowed)


# the compose file


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
    body = re.search(r"client_max_body_size (\d+)m", config)
    wait = re.search(r"proxy_read_timeout (\d+)s", config)
    assert body is not None
    assert wait is not None
    assert int(body[1]) << 20 >= 2 * settings.limits.max_image_bytes + 64 * 1024
    assert int(wait[1]) > settings.jobs.max_timeout_s + 5
    memory = re.search(r"^maxmemory (\d+)gb", (DEPLOY / "redis" / "redis.conf").read_text("utf-8"), re.MULTILINE)
    assert memory is not None
    assert int(memory[1]) << 30 >= 2 * settings.queue.max_bytes


# Prometheus and Grafana


def test_prometheus_reads_its_configuration_and_rules(tool: Needing) -> None:
    promtool = tool("promtool")
    run(promtool, "check", "config", "prometheus.yml", cwd=DEPLOY / "prometheus")
    run(promtool, "check", "rules", "rules.yml", cwd=DEPLOY / "prometheus")


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
                assert re.match(r"(recofuse:|redis_|node_|process_|DCGM_FI_DEV_|up$)", name), (where, name)


def test_dashboards_are_as_grafana_expects_them() -> None:
    for path in (DEPLOY / "grafana" / "dashboards").glob("*.json"):
        document = json.loads(path.read_text("utf-8"))
        assert document["uid"]
        assert document["title"]
        ids = [panel["id"] for panel in document["panels"]]
        assert len(set(ids)) == len(ids)
        sources = {panel["datasource"]["uid"] for panel in document["panels"] if "datasource" in panel}
        provisioned = yaml.safe_load(
            (DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text("utf-8")
        )
        assert sources == {provisioned["datasources"][0]["uid"]}


@pytest.mark.parametrize("script", sorted(path.name for path in DEPLOY.glob("*.sh")))
def test_scripts_can_be_read_by_the_shell(script: str) -> None:
    run("sh", "-n", str(DEPLOY / script))
