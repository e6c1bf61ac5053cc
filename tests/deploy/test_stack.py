"""docker-compose.yml at work, its services as local processes: README's curl, gRPC, scrapes, alerts, rolling restarts.

`make check-deploy` runs this; it needs nginx, curl and openssl, and looks at more if Prometheus and its exporters are
there too. Nothing here depends on how long something takes: a load goes on until the restarts are over.
"""

from __future__ import annotations

import json
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from tests.deploy.compose import LocalStack, readme_command
from tests.deploy.conftest import missing
from tests.deploy.test_files import metric_names, queries
from tests.fakes import file_of, pair, picture

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

VIS, IR = pair()
SETTINGS = {"RECOFUSE_ENGINE__WARM_UP_SIZES": "64x48", "RECOFUSE_ENGINE__NUM_THREADS": "1"}  # what .env says
RETRYING = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    # CANCELLED: gRPC's own word for a call that arrived in the moment of closing, before any handler.
                    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
                },
            }
        ]
    }
)


class Chat(ThreadingHTTPServer):
    """Where people read: an incoming webhook. told: the messages so far."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        told = self.told

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Is not interesting."""

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Deployed:
    """The running stack as its users see it. key: an API key that may do everything; chat: where alerts are told."""

    def __init__(self, stack: LocalStack, key: str, chat: Chat) -> None:
        self.stack = stack
        self.key = key
        self.chat = chat
        self.address = stack.containers["proxy"][0].address
        self.certificate = stack.folder / "deploy" / "secrets" / "tls_cert.pem"

    def http(self, source: str = "127.0.0.1") -> httpx.Client:
        """A client at this address of the loopback network."""
        context = ssl.create_default_context(cafile=str(self.certificate))
        context.check_hostname = False  # the address is this test's
        transport = httpx.HTTPTransport(verify=context, local_address=source)
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=f"https://{self.address}:8443", transport=transport, headers=headers, timeout=90)

    def grpc(self) -> grpc.Channel:
        options = [("grpc.ssl_target_name_override", "localhost"), ("grpc.service_config", RETRYING)]
        credentials = grpc.ssl_channel_credentials(self.certificate.read_bytes())
        return grpc.secure_channel(f"{self.address}:8443", credentials, options)


@pytest.fixture(scope="module")
def deployed() -> Iterator[Deployed]:
    for program in ("nginx", "openssl", "curl"):
        if shutil.which(program) is None:
            missing(program)
    with tempfile.TemporaryDirectory(prefix="rq-") as folder:
        stack = LocalStack(Path(folder), SETTINGS)
        if reason := stack.can_run("redis"):
            missing(reason)
        chat = Chat()
        (stack.folder / "deploy/secrets/alert_webhook").write_text(f"http://127.0.0.1:{chat.server_port}/hook\n")
        routes = stack.folder / "deploy/alertmanager/alertmanager.yml"
        routes.write_text(routes.read_text("utf-8").replace("group_wait: 30s", "group_wait: 0s"), "utf-8")
        try:
            stack.start("redis")[0].wait_healthy(6379)
            apis, workers = stack.start("api"), stack.start("worker-cpu")
            for container in (*apis, *workers):
                container.wait_healthy()
            for name, port in (
                ("proxy", 8443),
                ("redis-exporter", 9121),
                ("node-exporter", 9100),
                ("blackbox-exporter", 9115),
                ("alertmanager", 9093),
                ("prometheus", 9090),
            ):
                if not stack.can_run(name):
                    stack.start(name)[0].wait_healthy(port)
            key = _recofuse(stack, *readme_command("docker compose exec -T api recofuse "))
            yield Deployed(stack, key, chat)
        finally:
            stack.close()
            chat.shutdown()
            chat.server_close()


def _recofuse(stack: LocalStack, *words: str) -> str:
    """What a command says in a front end's container."""
    command = [sys.executable, "-m", "service", *words]
    environ = stack.containers["api"][0].environ
    done = subprocess.run(command, env=environ, cwd=stack.folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_readmes_curl_fetches_a_picture(deployed: Deployed, tmp_path: Path) -> None:
    (tmp_path / "street.jpg").write_bytes(file_of(picture(), ".jpg"))
    (tmp_path / "street_thermal.png").write_bytes(IR)
    (tmp_path / "deploy").symlink_to(deployed.stack.folder / "deploy")
    words = [word.replace("$KEY", deployed.key) for word in readme_command("curl ")]
    route = ["--connect-to", f"localhost:8443:{deployed.address}:8443"]
    subprocess.run(["curl", "--fail-with-body", "-sS", "--noproxy", "*", *route, *words], cwd=tmp_path, check=True)
    assert (tmp_path / "fused.png").read_bytes()[:4] == b"\x89PNG"


def test_both_protocols_pass_the_proxy_and_strangers_do_not(deployed: Deployed) -> None:
    files = {"vis": VIS, "ir": IR}
    with deployed.http() as client:
        answer = client.post("/v1/fuse", files=files)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-model-name"] == "compact"
        assert client.post("/v1/fuse", files=files, headers={"Authorization": "Bearer nothing"}).status_code == 401
        assert client.get("/metrics").status_code == 404
        assert client.get("/health/ready").status_code == 200
    with deployed.grpc() as channel:
        stub = fusion_pb2_grpc.FusionServiceStub(channel)
        request = pb.FuseRequest(vis=pb.Image(encoded=VIS), ir=pb.Image(encoded=IR))
        fused = stub.Fuse(request, metadata=(("x-api-key", deployed.key),), timeout=60)
        assert fused.fusion.pictures[0].image.encoded == answer.content
        with pytest.raises(grpc.RpcError) as refused:
            stub.Fuse(request, timeout=60)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        frames = [pb.FuseStreamRequest(frame=pb.Frame(sequence=n, vis=request.vis, ir=request.ir)) for n in range(3)]
        answers = list(stub.FuseStream(iter(frames), metadata=(("x-api-key", deployed.key),), timeout=60))
        assert [entry.WhichOneof("outcome") for entry in answers] == ["fusion"] * 3


def test_the_page_passes_the_proxy_without_a_key(deployed: Deployed) -> None:
    with deployed.http() as client:
        client.headers.pop("Authorization")
        page = client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        for link in re.findall(r'(?:src|href)="([^"#]+)"', page.text):
            assert client.get(f"/{link}").status_code == 200, link


def test_front_ends_share_rates_and_revocations(deployed: Deployed) -> None:
    key = _recofuse(deployed.stack, "keys", "create", "slow", "--rate", "0.001", "--burst", "3")
    headers = {"Authorization": f"Bearer {key}"}
    with deployed.http() as client:

        def ask() -> int:
            return client.post("/v1/fuse", files={"vis": VIS, "ir": IR}, headers=headers).status_code

        assert [ask() for _ in range(6)] == [200] * 3 + [429] * 3
        _recofuse(deployed.stack, "keys", "revoke", key.split("_")[1])
        in_a_row, end = 0, time.monotonic() + 60
        while in_a_row < 20:  # the proxy picks either front end each time
            in_a_row = in_a_row + 1 if ask() == 401 else 0
            assert time.monotonic() < end
            time.sleep(0.05)


def test_callers_are_named_in_the_log_and_their_keys_are_not(deployed: Deployed) -> None:
    with deployed.http("127.0.9.9") as client:
        client.get("/v1/models")
    logs = [container.log.read_text("utf-8") for name in deployed.stack.containers.values() for container in name]
    entries = [json.loads(line) for text in logs for line in text.splitlines() if '"recofuse.audit"' in line]
    (named,) = [entry for entry in entries if entry["action"] == "GET /v1/models"]
    assert (named["key_name"], named["peer"]) == ("laptop", "127.0.9.9")  # the client's own address, not the proxy's
    secrets = [deployed.key, *((deployed.stack.folder / "deploy" / "secrets" / "queue_url").read_text().split("@")[:1])]
    assert not [text for text in logs for secret in secrets if secret in text]


def _scraped(deployed: Deployed) -> set[str]:
    ports = {"api": 8000, "worker-cpu": 9000, "redis-exporter": 9121, "node-exporter": 9100}
    text = "".join(
        httpx.get(f"http://{container.address}:{port}/metrics", timeout=30, trust_env=False).text
        for name, port in ports.items()
        for container in deployed.stack.containers.get(name, [])
    )
    for container in deployed.stack.containers.get("blackbox-exporter", []):
        asked = {"module": "door", "target": f"https://{deployed.address}:8443/health/live"}
        probe = httpx.get(f"http://{container.address}:9115/probe", params=asked, timeout=30, trust_env=False).text
        assert "probe_success 1" in probe
        text += probe
    return {match[1] for match in re.finditer(r"^([a-zA-Z_:][\w:]*)[ {]", text, re.MULTILINE)}


def test_every_metric_of_dashboards_and_alerts_is_really_there(deployed: Deployed) -> None:
    exported = _scraped(deployed)
    wanted = {name for query in queries().values() for name in metric_names(query)}
    # Synthetic, recorded by rules, or of a GPU exporter, whose names are DCGM's own documented ones.
    wanted = {name for name in wanted if name != "up" and not name.startswith(("recofuse:", "DCGM_FI_"))}
    wanted = {name for name in wanted if not name.startswith("recofuse_rig_")}  # there with the first frame of a rig
    for exporter, prefix in (("redis-exporter", "redis_"), ("node-exporter", "node_"), ("blackbox-exporter", "probe_")):
        if exporter not in deployed.stack.containers:
            wanted = {name for name in wanted if not name.startswith(prefix)}
    assert len(wanted) > 15
    assert wanted <= exported, sorted(wanted - exported)


def test_prometheus_finds_every_target_and_answers_every_query(deployed: Deployed) -> None:
    if "prometheus" not in deployed.stack.containers:
        missing(deployed.stack.can_run("prometheus"))
    base = f"http://{deployed.stack.containers['prometheus'][0].address}:9090/api/v1"
    expected = {"recofuse-api": 2, "recofuse-worker": 1, "prometheus": 1}
    exporters = {"redis": "redis-exporter", "node": "node-exporter", "proxy": "blackbox-exporter"}
    exporters["alertmanager"] = "alertmanager"
    expected |= {job: 1 for job, name in exporters.items() if name in deployed.stack.containers}
    end = time.monotonic() + 60
    while True:
        answer = httpx.get(f"{base}/query", params={"query": "sum by (job) (up)"}, trust_env=False).json()
        found = {entry["metric"]["job"]: int(entry["value"][1]) for entry in answer["data"]["result"]}
        if {job: found.get(job) for job in expected} == expected or time.monotonic() > end:
            break
        time.sleep(0.5)
    assert {job: found.get(job) for job in expected} == expected
    for where, query in queries().items():
        answer = httpx.get(f"{base}/query", params={"query": query}, trust_env=False).json()
        assert answer["status"] == "success", (where, answer)
    rules = httpx.get(f"{base}/rules", trust_env=False).json()["data"]["groups"]
    assert not [rule for group in rules for rule in group["rules"] if rule["health"] == "err"]


def test_an_alert_reaches_somebody(deployed: Deployed) -> None:
    if "alertmanager" not in deployed.stack.containers:
        missing(deployed.stack.can_run("alertmanager"))
    manager = f"http://{deployed.stack.containers['alertmanager'][0].address}:9093"
    alert = {
        "labels": {"alertname": "RecofuseNoWorker", "severity": "page"},
        "annotations": {"summary": "No worker is there", "runbook": "docs/operations.md#recofusenoworker"},
    }
    httpx.post(f"{manager}/api/v2/alerts", json=[alert], trust_env=False).raise_for_status()
    end = time.monotonic() + 60
    while not (told := [entry for entry in deployed.chat.told if "RecofuseNoWorker" in json.dumps(entry)]):
        assert time.monotonic() < end, deployed.stack.containers["alertmanager"][0].log.read_text()[-3000:]
        time.sleep(0.2)
    (message,) = told[0]["attachments"]
    assert message["title"] == "page: RecofuseNoWorker"
    assert message["text"] == "No worker is there (docs/operations.md#recofusenoworker)\n"
    if "prometheus" in deployed.stack.containers:
        base = f"http://{deployed.stack.containers['prometheus'][0].address}:9090/api/v1"
        known = httpx.get(f"{base}/alertmanagers", trust_env=False).json()["data"]["activeAlertmanagers"]
        assert [entry["url"] for entry in known] == [f"{manager}/api/v2/alerts"]


class Load(threading.Thread):
    """Asks again and again until told to stop; remembers what failed."""

    def __init__(self, ask: Callable[[], str]) -> None:
        super().__init__(daemon=True)
        self._ask = ask
        self.is_over = threading.Event()
        self.num_answered = 0
        self.failures: list[str] = []

    def run(self) -> None:
        while not self.is_over.is_set():
            try:
                failure = self._ask()
            except (httpx.HTTPError, grpc.RpcError) as error:
                failure = repr(error)
            self.num_answered += not failure
            if failure:
                self.failures.append(failure)


def test_rolling_restarts_under_load_fail_no_request(deployed: Deployed) -> None:
    with deployed.http() as client, deployed.grpc() as channel:
        stub = fusion_pb2_grpc.FusionServiceStub(channel)

        def over_http() -> str:
            answer = client.post("/v1/fuse", files={"vis": VIS, "ir": IR})
            return "" if answer.status_code == 200 else f"{answer.status_code} {answer.text}"

        def over_grpc() -> str:
            request = pb.FuseRequest(vis=pb.Image(encoded=VIS), ir=pb.Image(encoded=IR))
            answer = stub.Fuse(request, metadata=(("x-api-key", deployed.key),), timeout=90)
            return "" if answer.fusion.pictures else "no pictures"

        loads = [Load(ask) for ask in (over_http, over_http, over_http, over_grpc)]
        for load in loads:
            load.start()
        try:
            for name in ("api", "worker-cpu"):
                for container in deployed.stack.containers[name]:
                    before = [load.num_answered for load in loads]
                    assert container.stop() == 0, container.log.read_text()[-3000:]
                    container.start()
                    container.wait_healthy()
                    end = time.monotonic() + 60
                    while any(load.num_answered == n for load, n in zip(loads, before, strict=True)):
                        assert time.monotonic() < end, [load.failures for load in loads]
                        time.sleep(0.1)
        finally:
            for load in loads:
                load.is_over.set()
            for load in loads:
                load.join(100)
    failures = [failure for load in loads for failure in load.failures]
    assert not failures, (len(failures), failures[:3])
    answered = [load.num_answered for load in loads]
    print(f"rolling restart of 2 api and 1 worker: {sum(answered)} requests, none failed")  # noqa: T201
    assert all(answered)
