"""What the proxy itself says and bounds: deploy/nginx/nginx.conf before real front ends, dead ones, and silent ones.

`make check-deploy` runs this. No worker is there, since no request gets that far. Limits and times that a test cannot
wait for are changed in its copy of the configuration, each by name.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from recofuse_client.errors import BY_CODE, error_of
from recofuse_client.retries import is_safe_to_repeat
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from service.terms.errors import STATUS, TITLE, ErrorCode
from service.terms.settings import Settings
from tests.deploy.compose import DEPLOYED_NGINX, RESOLVES_UPSTREAMS, LocalStack, nginx_version
from tests.deploy.conftest import missing
from tests.fakes import pair

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]

MAX_BODY = 2 * Settings().limits.max_image_bytes + 64 * 1024
AT_ONCE, CALLS_AT_ONCE = 32, 64
VIS, IR = pair()
NO_RETRIES = [("grpc.enable_retries", 0)]


@dataclass(frozen=True, slots=True)
class Door:
    """A running proxy, and the stack that it is part of."""

    stack: LocalStack

    @property
    def address(self) -> str:
        return self.stack.containers["proxy"][0].address

    @property
    def certificate(self) -> Path:
        return self.stack.folder / "deploy" / "secrets" / "tls_cert.pem"

    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.certificate))
        context.check_hostname = False  # the address is this test's
        return context

    def http(self, source: str = "127.0.0.1") -> httpx.Client:
        transport = httpx.HTTPTransport(verify=self.context(), local_address=source)
        return httpx.Client(base_url=f"https://{self.address}:8443", transport=transport, timeout=60)

    def socket(self, source: str) -> ssl.SSLSocket:
        """A connection from this address of the loopback network."""
        plain = socket.create_connection((self.address, 8443), timeout=60, source_address=(source, 0))
        return self.context().wrap_socket(plain)

    def grpc(self) -> grpc.Channel:
        options = [("grpc.ssl_target_name_override", "localhost"), *NO_RETRIES]
        credentials = grpc.ssl_channel_credentials(self.certificate.read_bytes())
        return grpc.secure_channel(f"{self.address}:8443", credentials, options)


@contextlib.contextmanager
def door(changes: Mapping[str, str] | None = None, *, served: bool = False) -> Iterator[Door]:
    """The proxy, with changes to its configuration, before two front ends, or before whatever a test puts there."""
    for program in ("nginx", "openssl"):
        if shutil.which(program) is None:
            missing(program)
    with tempfile.TemporaryDirectory(prefix="rq-") as folder:
        stack = LocalStack(Path(folder), {})
        config = Path(folder) / DEPLOYED_NGINX
        text = config.read_text("utf-8")
        for old, new in (changes or {}).items():
            assert old in text, old
            text = text.replace(old, new)
        config.write_text(text, "utf-8")
        if served and (reason := stack.can_run("redis")):
            missing(reason)
        try:
            if served:
                stack.start("redis")[0].wait_healthy(6379)
                for container in stack.start("api"):
                    container.wait_healthy()
            stack.start("proxy")[0].wait_healthy(8443)
            yield Door(stack)
        finally:
            stack.close()


@pytest.fixture(scope="module")
def served() -> Iterator[Door]:
    with door(served=True) as running:
        yield running


def problem(answer: httpx.Response, status: int, code: str, *, retry_after: str | None = None) -> str:
    """The detail of the problem document that an answer must be."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers.get("retry-after") == retry_after
    assert answer.headers["strict-transport-security"]
    document = json.loads(answer.content)
    assert document["type"] == f"urn:recofuse:problem:{code}"
    assert (document["status"], document["code"]) == (status, code)
    assert document["request_id"] == answer.headers["x-request-id"]
    assert code in BY_CODE
    if code in list(ErrorCode):
        assert document["title"] == TITLE[ErrorCode(code)]
    assert set(document) - {"error"} == {"type", "title", "status", "detail", "code", "request_id"}
    detail = document["detail"]
    assert isinstance(detail, str)
    return detail


def refused(door: Door) -> tuple[grpc.RpcError, dict[str, str | bytes]]:
    """What a gRPC call ends with, and its trailing metadata."""
    with door.grpc() as channel:
        stub = fusion_pb2_grpc.FusionServiceStub(channel)
        request = pb.FuseRequest(vis=pb.Image(encoded=VIS), ir=pb.Image(encoded=IR))
        with pytest.raises(grpc.RpcError) as error:
            stub.Fuse(request, timeout=30)
    trailing: Any = error.value.trailing_metadata()
    return error.value, dict(trailing or ())


# sizes


def test_no_body_of_any_size_ends_as_anything_but_a_problem_document(served: Door) -> None:
    """Up to the limit it is api that answers (here: that no key came), beyond it the proxy; nothing is in between."""
    with served.http() as client:
        for size in (1000, MAX_BODY - 1, MAX_BODY):
            problem(client.post("/v1/fuse", content=bytes(size)), 401, "unauthenticated")
        for size in (MAX_BODY + 1, 76 << 20, 90 << 20):
            detail = problem(client.post("/v1/fuse", content=bytes(size)), 413, "payload_too_large")
            assert f"at most {MAX_BODY} bytes" in detail
        piece = bytes(1 << 20)
        unannounced = client.post("/v1/fuse", content=(piece for _ in range(70)))
        problem(unannounced, 413, "payload_too_large")


def test_nor_does_one_over_http_2(served: Door, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        missing("curl")
    body = tmp_path / "body"
    command = [
        "curl",
        "--http2",
        "-sS",
        "--noproxy",
        "*",
        "--cacert",
        str(served.certificate),
        "-w",
        "\n%{http_version}",
    ]
    command += ["--connect-to", f"localhost:8443:{served.address}:8443", "https://localhost:8443/v1/fuse"]
    for size, code in ((MAX_BODY, "unauthenticated"), (MAX_BODY + 1, "payload_too_large")):
        body.write_bytes(bytes(size))
        done = subprocess.run([*command, "--data-binary", f"@{body}"], capture_output=True, text=True, check=True)
        document, version = done.stdout.rsplit("\n", 1)
        assert (json.loads(document)["code"], version) == (code, "2")


def test_a_message_that_is_too_large_for_grpc_has_a_status(served: Door) -> None:
    with served.grpc() as channel:
        request = health_pb2.HealthCheckRequest(service="x" * MAX_BODY)  # asks for no key
        with pytest.raises(grpc.RpcError) as error:
            health_pb2_grpc.HealthStub(channel).Check(request, timeout=60)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in (error.value.details() or "")


def test_a_stranger_is_told_before_a_large_message_is_read(served: Door) -> None:
    with served.grpc() as channel:
        stub = fusion_pb2_grpc.FusionServiceStub(channel)
        request = pb.FuseRequest(vis=pb.Image(encoded=bytes(MAX_BODY)), ir=pb.Image(encoded=IR))
        with pytest.raises(grpc.RpcError) as error:
            stub.Fuse(request, timeout=60)
    assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_what_is_not_for_outside_is_a_problem_document_too(served: Door) -> None:
    with served.http() as client:
        problem(client.get("/metrics"), 404, "route_not_found")
        theirs = client.get("/metrics", headers={"X-Request-ID": "mine:1"})
        assert (theirs.headers["x-request-id"], theirs.json()["request_id"]) == ("mine:1", "mine:1")
        forged = client.get("/metrics", headers={"X-Request-ID": 'a","code":"b'})
        problem(forged, 404, "route_not_found")
    with served.socket("127.0.0.1") as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: plain.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"application/problem+json" in answer
    assert b'"code":"malformed_request"' in answer


# how much at once


def test_one_address_may_send_so_many_requests_at_once_and_others_do_not_notice(served: Door) -> None:
    head = b"POST /v1/fuse HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(AT_ONCE):  # each is being received: the proxy has said that it wants the body
            half = stack.enter_context(served.socket("127.0.9.1"))
            half.sendall(head)
            assert half.recv(100).startswith(b"HTTP/1.1 100 ")
        with served.http("127.0.9.1") as client:
            answer = client.get("/health/live")
            assert str(AT_ONCE) in problem(answer, 429, "rate_limited", retry_after="1")
            assert is_safe_to_repeat(error_of("rate_limited", ""), is_idempotent=False)
            inference = client.get("/v2/health/live")
            assert inference.json()["error"] == problem(inference, 429, "rate_limited", retry_after="1")
        with served.http("127.0.9.2") as client:
            assert client.get("/health/live").status_code == 200


def test_one_address_may_make_so_many_calls_at_once(served: Door) -> None:
    with served.grpc() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watched = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(CALLS_AT_ONCE)]
        for call in watched:
            next(call)
        error, metadata = refused(served)
        for call in watched:
            call.cancel()
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert f"{CALLS_AT_ONCE} at once" in (error.details() or "")
    assert metadata["grpc-retry-pushback-ms"] == "1000"
    end = time.monotonic() + 30
    while refused(served)[0].code() is not grpc.StatusCode.UNAUTHENTICATED:  # their places are free again
        assert time.monotonic() < end


def test_one_address_may_ask_so_often() -> None:
    slow = {"rate=200r/s": "rate=1r/m", "burst=400": "burst=1"}
    with door(slow) as running:
        with running.http() as client:
            statuses = [client.get("/health/live").status_code for _ in range(2)]
            assert statuses == [502, 502]  # let through, to where nobody is
            problem(client.get("/health/live"), 429, "rate_limited", retry_after="1")
        error, _ = refused(running)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# front ends that are not there, or do not answer


def test_where_no_front_end_is_callers_hear_that_nothing_was_done() -> None:
    with door() as running:
        with running.http() as client:
            answer = client.post("/v1/fuse", files={"vis": VIS, "ir": IR})
            detail = problem(answer, 502, "unavailable", retry_after="1")
            assert is_safe_to_repeat(error_of("unavailable", detail), is_idempotent=False)
        error, metadata = refused(running)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert error.details() == "no front end answers; try again later"
        assert metadata["grpc-retry-pushback-ms"] == "1000"


class Silent:
    """Front ends that take connections and never say a word; leaving ones end each as soon as they have heard one."""

    def __init__(self, addresses: list[str], *, is_leaving: bool) -> None:
        self._listeners = [socket.create_server((address, port)) for address in addresses for port in (8000, 8001)]
        self._taken: list[socket.socket] = []
        if is_leaving:
            for listener in self._listeners:
                threading.Thread(target=self._leave, args=(listener,), daemon=True).start()

    def _leave(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                taken, _ = listener.accept()
                taken.recv(65536)
                taken.close()

    def close(self) -> None:
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()


@contextlib.contextmanager
def silent(running: Door, *, is_leaving: bool = False) -> Iterator[None]:
    there = Silent(running.stack.addresses("api"), is_leaving=is_leaving)
    try:
        yield
    finally:
        there.close()


def test_a_front_end_that_does_not_answer_is_a_timeout() -> None:
    impatient = {"proxy_read_timeout 660s": "proxy_read_timeout 1s", "grpc_read_timeout 1h": "grpc_read_timeout 1s"}
    with door(impatient) as running, silent(running):
        with running.http() as client:
            problem(client.get("/v1/models"), 504, "timed_out", retry_after="1")
        assert STATUS[ErrorCode.TIMED_OUT][0] == 504
        error, _ = refused(running)
        assert error.code() is grpc.StatusCode.UNAVAILABLE


def test_a_front_end_that_goes_while_it_has_a_request_leaves_a_doubt() -> None:
    with door() as running, silent(running, is_leaving=True):
        with running.http() as client:
            answer = client.post("/v1/fuse", files={"vis": VIS, "ir": IR})
            problem(answer, 502, "connection_lost", retry_after="1")
        assert refused(running)[0].code() is grpc.StatusCode.UNAVAILABLE


FIRST_ATTEMPT = "limit_conn requests 32;\n            proxy_pass http://api-http;"


def first_to(address: str) -> dict[str, str]:
    """The change that lets the first attempt of every request go to this address, whatever front ends there are."""
    return {FIRST_ATTEMPT: FIRST_ATTEMPT.replace("http://api-http", f"http://{address}:8000")}


def test_a_request_that_no_front_end_has_had_is_passed_on_once_more() -> None:
    """As where the list of front ends is renewed while a connection to one that is gone is being tried."""
    with door(first_to("127.0.99.1"), served=True) as running, running.http() as client:  # nobody is there
        answer = client.post("/v1/fuse", content=bytes(MAX_BODY), headers={"X-Request-ID": "mine:2"})
        problem(answer, 401, "unauthenticated")  # from a front end, and so with all of its body
        assert answer.headers["x-request-id"] == "mine:2"
        assert client.get("/health/live").status_code == 200
        problem(client.post("/v1/nothing"), 401, "unauthenticated")


def test_a_request_that_a_front_end_has_had_is_not() -> None:
    gone = "127.0.99.2"
    leaving = contextlib.closing(Silent([gone], is_leaving=True))
    with door(first_to(gone), served=True) as running, leaving, running.http() as client:
        answer = client.post("/v1/fuse", files={"vis": VIS, "ir": IR})
        problem(answer, 502, "connection_lost", retry_after="1")


def test_a_proxy_without_room_for_a_body_says_so() -> None:
    with door() as running:
        shutil.rmtree(running.stack.containers["proxy"][0].folder / "tmp" / "body")  # as if it were full
        with running.http() as client:
            detail = problem(client.post("/v1/fuse", content=bytes(1 << 20)), 503, "unavailable", retry_after="1")
        assert "no room" in detail


def test_callers_do_not_wait_for_names_to_be_found() -> None:
    if shutil.which("nginx") is None:
        missing("nginx")
    if nginx_version() < RESOLVES_UPSTREAMS:
        pytest.skip("this nginx is too old to look names up while it runs")
    silence = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    silence.bind(("127.0.0.1", 0))  # takes every question, answers none
    nobody = f"resolver 127.0.0.1:{silence.getsockname()[1]} valid"
    with contextlib.closing(silence), door({"resolver 127.0.0.11 valid": nobody}) as running, running.http() as client:
        started_s = time.monotonic()
        problem(client.get("/v1/models"), 502, "unavailable", retry_after="1")
        assert time.monotonic() - started_s < 10


def test_the_numbers_that_callers_are_told_are_those_of_the_limits() -> None:
    config = (Path(__file__).parents[2] / DEPLOYED_NGINX).read_text("utf-8")
    (rate,) = re.findall(r"rate=(\d+)r/s", config)
    assert re.findall(r"limit_conn (?:requests|calls) (\d+);", config) == [str(AT_ONCE), str(CALLS_AT_ONCE)]
    assert f"one address may send {rate} requests a second and {AT_ONCE} at once" in config
    assert f"one address may make {rate} calls a second and {CALLS_AT_ONCE} at once" in config
    assert config.count(str(MAX_BODY)) == 2
