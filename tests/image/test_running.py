"""docker-compose.yml and the manifests at work in real containers, with all of their limits: `make check-image`.

Nothing here depends on how long something takes: what has to be so is waited for. The last test looks back.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import subprocess
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from benchmarks.load import Answer, ask, fuse_request, png
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from tests.deploy.compose import readme_command
from tests.fakes import file_of, pair, picture
from tests.image import pods
from tests.image.conftest import SETTINGS, Images, Note
from tests.image.podman import Podman, PodmanError
from tests.image.stack import BACK, Stack, wait_until

pytestmark = [pytest.mark.image, pytest.mark.timeout(3000)]

VIS, IR = pair()
FILES = {"vis": VIS, "ir": IR}
LARGE = dict(zip(("vis", "ir"), pair(1024, 768), strict=True))  # seconds of work
UNITS = {"m": 1 << 20, "g": 1 << 30}
NUM_UPLOADS = 15  # at once
PADDING_BYTES = 30_000_000  # of each picture: two of them are just within the limit
USABLE = "from recofuse_host.memory import usable_memory; print(usable_memory())"
ANSWER_S = 240.0

Send = Callable[[str, str], tuple[int, Counter[str]]]


@pytest.fixture(scope="module")
def key(stack: Stack) -> str:
    """As README has it created."""
    return created_key(stack, *readme_command("docker compose exec -T api recofuse "))


@pytest.fixture
def door(stack: Stack, key: str) -> Iterator[httpx.Client]:
    """A client of the proxy."""
    context = ssl.create_default_context(cafile=str(certificate(stack)))
    headers = {"Authorization": f"Bearer {key}"}
    url = f"https://localhost:{port_of(stack, 'proxy')}"
    with httpx.Client(base_url=url, verify=context, headers=headers, timeout=ANSWER_S, trust_env=False) as client:
        wait_until(lambda: client.get("/health/ready").status_code == 200, "the proxy finds a front end")
        yield client


def certificate(stack: Stack) -> Path:
    return stack.folder / "deploy" / "secrets" / "tls_cert.pem"


def port_of(stack: Stack, service: str) -> int:
    """On this machine."""
    (published,) = stack.services[service]["ports"]
    return int(published.split(":")[1])


def get(address: str, port: int, path: str) -> httpx.Response:
    """From a container."""
    return httpx.get(f"http://{address}:{port}{path}", timeout=30, trust_env=False)


def fuse(address: str, key: str, files: dict[str, bytes]) -> httpx.Response:
    """At a front end, without the proxy."""
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"http://{address}:8000/v1/fuse", files=files, headers=headers, timeout=ANSWER_S, trust_env=False)


def created_key(stack: Stack, *command: str) -> str:
    """What `recofuse keys create` in a front end writes; asked again for as long as Redis cannot be reached."""
    made: list[str] = []

    def is_made() -> bool:
        done = stack.podman.attempt("exec", "api-1", "recofuse", *command)
        if done.returncode and "at the moment" not in done.stderr:
            raise PodmanError(done.stderr)
        made.append(done.stdout.strip())
        return not done.returncode

    wait_until(is_made, "made a key")
    return made[-1]


def metric(address: str, port: int, name: str) -> float:
    """The sum of a metric over its labels."""
    found = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", get(address, port, "/metrics").text, re.MULTILINE)
    return sum(map(float, found))


def usable_memory(podman: Podman, name: str) -> int:
    """What recofuse within a container takes for its memory."""
    return int(podman.exec(name, "python", "-c", USABLE))


def status_of(podman: Podman, name: str) -> dict[str, str]:
    """Of a container's first process, as the kernel tells it."""
    text = Path(f"/proc/{podman.inspect(name)['State']['Pid']}/status").read_text("utf-8")
    return dict(line.split(":\t", 1) for line in text.splitlines())


# what the compose file says of every container


def test_nobody_has_rights_or_can_write_or_has_more_memory_than_allowed(stack: Stack) -> None:
    podman = stack.podman
    for name in stack.names:
        service = stack.services[name.rpartition("-")[0]]
        status = status_of(podman, name)
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0, name
        assert status["NoNewPrivs"] == "1", name
        refused = podman.attempt("exec", name, "touch", "/probe")
        assert "Read-only file system" in refused.stderr, (name, refused.stderr)
        limit_bytes = int(service["mem_limit"][:-1]) * UNITS[service["mem_limit"][-1]]
        host = podman.inspect(name)["HostConfig"]
        assert (host["Memory"], host["PidsLimit"]) == (limit_bytes, service["pids_limit"]), name
        if "build" in service:
            assert usable_memory(podman, name) == limit_bytes


# what README promises


def test_readmes_curl_fetches_a_picture(stack: Stack, key: str, door: httpx.Client, tmp_path: Path) -> None:
    (tmp_path / "street.jpg").write_bytes(file_of(picture(), ".jpg"))
    (tmp_path / "street_thermal.png").write_bytes(IR)
    (tmp_path / "deploy").symlink_to(stack.folder / "deploy")
    words = [word.replace("$KEY", key) for word in readme_command("curl ")]
    route = ["--connect-to", f"localhost:8443:127.0.0.1:{port_of(stack, 'proxy')}"]
    subprocess.run(["curl", "--fail-with-body", "-sS", "--noproxy", "*", *route, *words], cwd=tmp_path, check=True)
    assert (tmp_path / "fused.png").read_bytes()[:4] == b"\x89PNG"


def test_strangers_see_the_page_alone(door: httpx.Client) -> None:
    door.headers.pop("Authorization")
    assert door.get("/").headers["content-type"].startswith("text/html")
    assert door.post("/v1/fuse", files=FILES).status_code == 401
    assert door.get("/metrics").status_code == 404


def test_a_revoked_key_is_refused_by_every_front_end(stack: Stack) -> None:
    lent = created_key(stack, "keys", "create", "lent")
    addresses = [stack.address(name) for name in ("api-1", "api-2")]
    assert [fuse(address, lent, FILES).status_code for address in addresses] == [200, 200]
    stack.podman.exec("api-2", "recofuse", "keys", "revoke", lent.split("_")[1])
    for address in addresses:
        wait_until(lambda: fuse(address, lent, FILES).status_code == 401, "revoked")  # noqa: B023 - called here


def test_calls_and_streams_pass_the_proxy(stack: Stack, key: str, door: httpx.Client) -> None:
    picture_of_http = door.post("/v1/fuse", files=FILES).content
    credentials = grpc.ssl_channel_credentials(certificate(stack).read_bytes())
    where, options = f"localhost:{port_of(stack, 'proxy')}", [("grpc.enable_http_proxy", 0)]
    with grpc.secure_channel(where, credentials, options) as channel:
        stub = fusion_pb2_grpc.FusionServiceStub(channel)
        vis, ir = pb.Image(encoded=VIS), pb.Image(encoded=IR)
        known: dict[str, Any] = {"metadata": (("x-api-key", key),), "timeout": ANSWER_S}
        fused = stub.Fuse(pb.FuseRequest(vis=vis, ir=ir), **known)
        assert fused.fusion.pictures[0].image.encoded == picture_of_http
        frames = [pb.FuseStreamRequest(frame=pb.Frame(sequence=number, vis=vis, ir=ir)) for number in range(3)]
        answers = list(stub.FuseStream(iter(frames), **known))
    assert [answer.WhichOneof("outcome") for answer in answers] == ["fusion"] * 3


# who finds whom, and who leaves in order


def served(stack: Stack) -> Counter[str]:
    """How many requests of the proxy went to which address."""
    lines = [line for line in stack.podman.logs("proxy-1").splitlines() if line.startswith("{")]
    return Counter(json.loads(line)["upstream"].partition(":")[0] for line in lines)


def wait_served(stack: Stack, door: httpx.Client, name: str) -> None:
    """Until the proxy gives a request to this front end."""
    address, before = stack.address(name), served(stack)

    def is_so() -> bool:
        answer = door.post("/v1/fuse", files=FILES)
        assert answer.status_code == 200, (answer.text, address, stack.podman.logs("proxy-1")[-2000:])
        return served(stack)[address] > before[address]

    wait_until(is_so, f"the proxy finds {name}")


def test_a_front_end_answers_what_it_has_before_it_ends(stack: Stack, key: str, door: httpx.Client) -> None:
    podman = stack.podman
    for name in ("api-1", "api-2"):
        wait_served(stack, door, name)
    address, drains = stack.address("api-1"), podman.logs("api-1").count('"draining"')
    podman("pause", "worker-cpu-1")
    with ThreadPoolExecutor(1) as threads:
        try:
            asked = threads.submit(fuse, address, key, FILES)
            waiting = ("recofuse_queue_depth", "recofuse_queue_leased")
            wait_until(lambda: sum(metric(address, 8000, name) for name in waiting) > 0, "a job waits")
            stopping = podman.start("stop", "api-1")
            wait_until(lambda: podman.logs("api-1").count('"draining"') > drains, "it drains")
            assert not asked.done()
        finally:
            podman("unpause", "worker-cpu-1")
        assert asked.result().status_code == 200
    assert stopping.wait(ANSWER_S) == 0
    assert podman.inspect("api-1")["State"]["ExitCode"] == 0
    podman("start", "api-1")
    podman.wait_healthy("api-1")
    wait_served(stack, door, "api-1")


def test_a_worker_ends_in_order_and_its_job_is_answered(stack: Stack, key: str) -> None:
    podman, worker, api = stack.podman, stack.address("worker-cpu-1"), stack.address("api-2")
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(fuse, api, key, LARGE)
        wait_until(lambda: metric(worker, 9000, "recofuse_jobs_held") > 0 or asked.done(), "the worker has the job")
        podman("stop", "worker-cpu-1")
        assert podman.inspect("worker-cpu-1")["State"]["ExitCode"] == 0
        podman("start", "worker-cpu-1")
        assert asked.result().status_code == 200
    podman.wait_healthy("worker-cpu-1")


def test_prometheus_finds_everybody(stack: Stack) -> None:
    base = f"http://127.0.0.1:{port_of(stack, 'prometheus')}/api/v1/query"
    expected = {"recofuse-api": 2, "recofuse-worker": 1, "redis": 1, "node": 1, "proxy": 1, "prometheus": 1}

    def told(query: str) -> dict[str, int]:
        answer = httpx.get(base, params={"query": query}, timeout=30, trust_env=False).json()
        return {entry["metric"]["job"]: int(entry["value"][1]) for entry in answer["data"]["result"]}

    wait_until(lambda: told("sum by (job) (up)").items() >= expected.items(), "every target is up")
    wait_until(lambda: told("probe_success") == {"proxy": 1}, "the probe of the proxy's door succeeds")


# what the manifests say


def run_pod(stack: Stack, image: str, name: str, folder: Path) -> None:
    """Start a manifest's container within the stack's network, and wait until its probe calls it ready."""
    queue_url = (stack.folder / "deploy" / "secrets" / "queue_url").read_text("utf-8")
    _, container = pods.container_of(name)
    flags = [f"--network={BACK}", *pods.flags(name, folder, queue_url, SETTINGS)]
    stack.run(f"pod-{name}", flags, [image], container["args"])
    probe = container["readinessProbe"]["httpGet"]
    (port,) = [entry["containerPort"] for entry in container["ports"] if entry["name"] == probe["port"]]

    def is_ready() -> bool:
        assert stack.podman.is_running(f"pod-{name}"), stack.podman.logs(f"pod-{name}")[-3000:]
        try:
            return get(stack.address(f"pod-{name}"), port, probe["path"]).status_code == 200
        except httpx.TransportError:
            return False

    wait_until(is_ready, f"the manifest's {name} is ready")
    assert usable_memory(stack.podman, f"pod-{name}") == pods.memory_bytes(container)
    assert int(status_of(stack.podman, f"pod-{name}")["CapBnd"], 16) == 0


def end_pod(stack: Stack, name: str) -> None:
    stack.podman("stop", f"pod-{name}")
    assert stack.podman.inspect(f"pod-{name}")["State"]["ExitCode"] == 0
    stack.podman("rm", f"pod-{name}")
    stack.names.remove(f"pod-{name}")


def test_the_manifests_worker_runs(stack: Stack, images: Images, tmp_path: Path) -> None:
    run_pod(stack, images.worker, "worker", tmp_path)
    end_pod(stack, "worker")


def padded(seed: int) -> bytes:
    """A small picture in a large file."""
    rows = np.random.default_rng(seed).integers(0, 256, (48, 1 + 3 * 64), np.uint8)
    rows[:, 0] = 0  # no filter
    return png(64, 48, zlib.compress(rows.tobytes()), [(b"reCo", bytes(PADDING_BYTES))])


def over_http(address: str, key: str) -> tuple[int, Counter[str]]:
    """Uploads at once: the size of one, and what came of them."""
    upload = fuse_request(padded(0), padded(1), headers=f"Authorization: Bearer {key}\r\n")

    async def at_once() -> list[Answer]:
        asked = [ask((address, 8000), upload, timeout_s=ANSWER_S) for _ in range(NUM_UPLOADS)]
        return await asyncio.gather(*asked)

    answers = asyncio.run(at_once())
    assert all(answer.headers.get("retry-after") for answer in answers if answer.status == 429)
    return len(upload), Counter(str(answer.status) for answer in answers)


def over_grpc(address: str, key: str) -> tuple[int, Counter[str]]:
    """The same by calls on connections of their own, whose sizes nobody announces."""
    upload = pb.FuseRequest(vis=pb.Image(encoded=padded(0)), ir=pb.Image(encoded=padded(1))).SerializeToString()

    def call(_: int) -> str:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0)]
        with grpc.insecure_channel(f"{address}:8001", options) as channel:
            fuse: Any = channel.unary_unary("/recofuse.v1.FusionService/Fuse", None, pb.FuseResponse.FromString)
            try:
                fuse(upload, metadata=(("x-api-key", key),), timeout=ANSWER_S)
            except grpc.RpcError as error:
                return str(error.code().name)
            return "OK"

    with ThreadPoolExecutor(NUM_UPLOADS) as threads:
        return len(upload), Counter(threads.map(call, range(NUM_UPLOADS)))


def over_streams(address: str, key: str) -> tuple[int, Counter[str]]:
    """The same as frames of as many streams, three each, of which each has an answer."""
    frame = pb.Frame(vis=pb.Image(encoded=padded(0)), ir=pb.Image(encoded=padded(1)))

    def frames() -> Iterator[pb.FuseStreamRequest]:
        for number in range(1, 4):
            request = pb.FuseStreamRequest(frame=frame)
            request.frame.sequence = number
            yield request

    def stream(_: int) -> list[str]:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0)]
        came: list[str] = []
        with grpc.insecure_channel(f"{address}:8001", options) as channel:
            stub = fusion_pb2_grpc.FusionServiceStub(channel)
            try:
                for answer in stub.FuseStream(frames(), metadata=(("x-api-key", key),), timeout=ANSWER_S):
                    came.append(answer.WhichOneof("outcome") or "")
            except grpc.RpcError as error:
                came.append(str(error.code().name))
        return came

    with ThreadPoolExecutor(NUM_UPLOADS) as threads:
        return frame.ByteSize(), Counter(chain.from_iterable(threads.map(stream, range(NUM_UPLOADS))))


@pytest.mark.parametrize(
    ("send", "answered", "refused"),
    [
        (over_http, "200", {"429"}),
        (over_grpc, "OK", {"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}),  # the latter where the machine is busy
        (over_streams, "fusion", {"RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "error"}),
    ],
    ids=["http", "grpc", "streams"],
)
def test_the_manifests_front_end_survives_large_uploads(
    stack: Stack, images: Images, key: str, note: Note, tmp_path: Path, send: Send, answered: str, refused: set[str]
) -> None:
    """As many at once as are nearly the memory that it may use: each is answered, or refused in words."""
    run_pod(stack, images.api, "api", tmp_path)
    address = stack.address("pod-api")
    size_bytes, came = send(address, key)
    assert stack.podman.is_running("pod-api"), came
    assert came.keys() <= {answered, *refused}, came
    assert came[answered], came
    assert fuse(address, key, FILES).status_code == 200
    peak_mib = int(status_of(stack.podman, "pod-api")["VmHWM"].split()[0]) / 1024
    told = ", ".join(f"{count} times {outcome}" for outcome, count in sorted(came.items()))
    note(f"{NUM_UPLOADS} uploads of {size_bytes / 1e6:.0f} MB at once: {told}, peak {peak_mib:.0f} MiB")
    end_pod(stack, "api")


# afterwards


def test_nobody_died_and_nothing_is_left_unreaped(stack: Stack) -> None:
    for name in stack.names:
        entry = stack.podman.inspect(name)
        state = entry["State"]
        assert (state["Running"], state["OOMKilled"], entry["RestartCount"]) == (True, False, 0), name
        if stack.services[name.rpartition("-")[0]].get("pid") != "host":
            assert not [line for line in stack.podman("top", name, "state", "args").splitlines() if line[0] == "Z"]
