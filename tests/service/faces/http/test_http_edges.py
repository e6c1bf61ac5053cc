"""The edges of HTTP, as clients of many kinds come to them: over a real socket where bytes matter."""

from __future__ import annotations

import asyncio
import json
import re
import selectors
from collections.abc import AsyncIterator, Iterator
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from service.faces.gateway import Gateway
from service.faces.http.app import OPTION_FIELDS, build_app, build_monitor_app
from service.queue.memory import MemoryQueue
from service.terms.errors import ErrorCode
from service.terms.settings import Settings
from service.watch.metrics import Metrics
from tests.fakes import pair, picture
from tests.service.conftest import Server, Serving
from tests.service.faces.http.test_api import FILES, finished, problem

VIS, IR = pair()
FORM_KIND = "multipart/form-data; boundary=edge"
INFER = "/v2/models/recofuse/infer"

JAVA = (
    b"Connection: Upgrade, HTTP2-Settings\r\nContent-Length: %d\r\nHost: h\r\n"
    b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\nUpgrade: h2c\r\nUser-Agent: Java-http-client/17\r\n"
)
OFFERS = {
    "java": JAVA,
    "websocket": b"Host: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: %d\r\n",
    "loud": b"HOST: h\r\nCONNECTION: keep-alive, UPGRADE\r\nContent-Length: %d\r\nUPGRADE: TLS/1.0, IRC/6.9\r\n",
    "twice": b"Host: h\r\nupgrade: a\r\nconnection: upgrade\r\nUpgrade: b\r\nContent-Length: %d\r\n",
}


def form_of(**fields: bytes) -> bytes:
    """A multipart body with boundary `edge`."""
    parts = [
        b'--edge\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (name.encode(), value)
        for name, value in fields.items()
    ]
    return b"".join([*parts, b"--edge--\r\n"])


def chunked(body: bytes) -> bytes:
    """A body in chunks of 1000 bytes."""
    pieces = [body[at : at + 1000] for at in range(0, len(body), 1000)]
    return b"".join([b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces] + [b"0\r\n\r\n"])


@pytest.fixture
async def server(serving: Serving) -> AsyncIterator[Server]:
    async with serving() as running:
        yield running


class Line:
    """A connection of which the test writes every byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, *pieces: bytes) -> None:
        """Each piece in a segment of its own, as far as one may tell."""
        for piece in pieces:
            self._writer.write(piece)
            await self._writer.drain()
            await asyncio.sleep(0.02)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The next answer: status, headers, body."""
        head = await asyncio.wait_for(self._reader.readuntil(b"\r\n\r\n"), 20)
        first, *lines = head.decode().strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        status = int(first.split()[1])
        return status, headers, await self._reader.readexactly(int(headers.get("content-length", "0")))


@pytest.fixture
async def line(server: Server) -> AsyncIterator[Line]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.client.base_url.port)
    yield Line(reader, writer)
    writer.close()
    await writer.wait_closed()


# upgrades


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("way", ["at once", "head first", "in chunks"])
async def test_an_offer_to_upgrade_is_declined_and_the_request_served(line: Line, offer: str, way: str) -> None:
    """Twice on one connection, with another request behind."""
    body = form_of(vis=VIS, ir=IR)
    head = b"POST /v1/fuse?seed=3 HTTP/1.1\r\n" + OFFERS[offer] % len(body)
    head += b"Content-Type: %b\r\n\r\n" % FORM_KIND.encode()
    if way == "in chunks":
        head = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", head)
        body = chunked(body)
    for _ in range(2):
        await line.send(*([head + body] if way == "at once" else [head[:30], head[30:], body[:500], body[500:]]))
        status, headers, content = await line.answer()
        assert (status, headers["content-type"]) == (200, "image/png"), content
        assert "upgrade" not in headers
        decoded = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
        np.testing.assert_array_equal(decoded, picture())
    await line.send(b"GET /health/live HTTP/1.1\r\nHost: h\r\n\r\n")
    assert (await line.answer())[0] == 200


async def test_pipelined_requests_may_offer_to_upgrade(line: Line) -> None:
    body = form_of(vis=VIS, ir=IR)
    fuse = b"POST /v1/fuse HTTP/1.1\r\n" + JAVA % len(body) + b"Content-Type: %b\r\n\r\n" % FORM_KIND.encode() + body
    infer = b"POST %b HTTP/1.1\r\n" % INFER.encode() + OFFERS["loud"] % 2 + b"\r\n{}"
    live = b"GET /health/live HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    await line.send(live + fuse + infer + live)
    assert [(await line.answer())[0] for _ in range(4)] == [200, 200, 422, 200]


async def test_an_offer_does_not_keep_a_connection_that_is_to_close(line: Line) -> None:
    await line.send(b"POST %b HTTP/1.1\r\nConnection: close, Upgrade\r\nUpgrade: h2c\r\n" % INFER.encode())
    await line.send(b"Content-Length: 2\r\n\r\n{}")
    status, headers, _ = await line.answer()
    assert (status, headers["connection"]) == (422, "close")


async def test_an_offer_with_a_question_gets_its_answer(line: Line) -> None:
    """`curl --http2` asks before it sends much, and offers in the same head."""
    body = form_of(vis=VIS, ir=IR)
    head = b"POST /v1/fuse HTTP/1.1\r\n" + JAVA % len(body)
    await line.send(head + b"Expect: 100-continue\r\nContent-Type: %b\r\n\r\n" % FORM_KIND.encode())
    assert (await line.answer())[0] == 100
    await line.send(body)
    assert (await line.answer())[0] == 200


@pytest.mark.parametrize("head", [b"CONNECT h:443 HTTP/1.1\r\nHost: h\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"])
async def test_tunnels_and_unasked_http_2_are_refused(line: Line, head: bytes) -> None:
    await line.send(head + b"\0" * 20)
    status, headers, body = await line.answer()
    assert (status, json.loads(body)["code"], headers["connection"]) == (400, "malformed_request", "close")


# HEAD


async def test_head_is_get_without_the_body(server: Server) -> None:
    accepted = await server.client.post("/v1/fuse", files=FILES, headers={"Prefer": "respond-async"})
    job = accepted.headers["location"]
    assert (await finished(server.client, job))["status"] == "succeeded"
    document = (await server.client.get("/openapi.json")).json()
    paths = {path for path, operations in document["paths"].items() if "get" in operations}
    assert len(paths) > 12
    values = {"{job_id}": job.rpartition("/")[2], "{model_name}": "recofuse", "{model_version}": "7"}
    for path in {
        *paths,
        "/",
        "/docs",
        "/openapi.json",
        "/playground/page.js",
        "/v1/jobs/other",
        "/nothing",
        "/v1/fuse",
    }:
        for name, value in values.items():
            path = path.replace(name, value)
        got, headed = await server.client.get(path), await server.client.head(path)
        assert headed.status_code == got.status_code, path
        assert headed.content == b""
        ignored = {"x-request-id", "date"} | (
            {"content-length"} if path == "/metrics" or got.status_code > 400 else set()
        )
        for answer in (got, headed):
            assert answer.status_code == 304 or int(answer.headers["content-length"]) > 0, path
            for name in ignored & set(answer.headers):
                del answer.headers[name]
        assert headed.headers == got.headers, path
    text = (await server.client.get("/metrics")).text
    assert re.search(r'_requests_total\{[^}]*method="HEAD"[^}]*route="/v1/jobs/\{job_id\}/result"', text), text


async def test_what_allows_get_allows_head(server: Server) -> None:
    refused = await server.client.post("/health/live")
    problem(refused, ErrorCode.METHOD_NOT_ALLOWED)
    assert refused.headers["allow"] == "GET, HEAD"


async def test_a_workers_monitor_answers_head_too() -> None:
    app = build_monitor_app(lambda: False, Metrics(CollectorRegistry()))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://worker") as client:
        statuses = [(await client.head(path)).status_code for path in ("/health/live", "/health/ready", "/metrics")]
    assert statuses == [200, 503, 200]


# options in the query string


async def test_options_may_come_in_form_and_query_together(server: Server) -> None:
    answer = await server.client.post("/v1/fuse?output=ir&seed=5", files=FILES, data={"format": "jpeg", "steps": "4"})
    assert (answer.headers["x-picture"], answer.headers["content-type"]) == ("ir", "image/jpeg")
    assert server.engine.batches[-1] == [5]
    assert server.engine.options[-1].steps == 4
    submitted = await server.client.post("/v1/fuse?output=all", files=FILES, headers={"Prefer": "respond-async"})
    assert (await finished(server.client, submitted.headers["location"]))["status"] == "succeeded"
    result = await server.client.get(submitted.headers["location"] + "/result")
    assert result.headers["content-type"] == "application/zip"


@pytest.mark.parametrize(
    ("query", "form", "told"),
    [
        ("stepz=3&seed=1&colour=2", {}, "no query parameter 'stepz', 'colour'; accepted are output, "),
        ("vis=1", {}, "'vis'"),
        ("Seed=1", {}, "'Seed'"),
        ("=1", {}, "''"),
        ("%FF%00=1", {}, "accepted are"),
        ("stepz=", {}, "'stepz'"),
        ("seed=1&seed=1", {}, "seed is there more than once"),
        ("seed=1&seed=2", {}, "seed is there more than once"),
        ("seed=1", {"seed": "1"}, "seed is in the query string as well"),
        ("steps=many", {}, "steps"),
        ("seed=%E2%98%83", {}, "seed is not plain text"),
    ],
)
async def test_what_the_query_may_not_say_is_refused(
    server: Server, query: str, form: dict[str, str], told: str
) -> None:
    answer = await server.client.post(f"/v1/fuse?{query}", files=FILES, data=form)
    assert told in problem(answer, ErrorCode.INVALID_INPUT)["detail"]
    assert server.engine.batches == []


async def test_a_value_in_the_query_is_as_long_as_one_in_the_form(server: Server) -> None:
    long = "1" * 1025
    for answer in (
        await server.client.post(f"/v1/fuse?seed={long}", files=FILES),
        await server.client.post("/v1/fuse", files=FILES, data={"seed": long}),
    ):
        assert "seed has more than the accepted 1024 bytes" in problem(answer, ErrorCode.PAYLOAD_TOO_LARGE)["detail"]


async def test_the_description_names_the_options_in_the_query(server: Server) -> None:
    operation = (await server.client.get("/openapi.json")).json()["paths"]["/v1/fuse"]["post"]
    form = operation["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    described = {entry["name"]: entry["schema"] for entry in operation["parameters"] if entry["in"] == "query"}
    assert described == {name: form[name] for name in OPTION_FIELDS}
    assert len(described) == sum(entry["in"] == "query" for entry in operation["parameters"])
    assert {entry["name"] for entry in operation["parameters"] if entry["in"] == "header"} >= {"prefer"}


async def test_an_empty_option_is_an_absent_one(server: Server) -> None:
    empty = dict.fromkeys(OPTION_FIELDS, "")
    query = "&".join(f"{name}=" for name in OPTION_FIELDS)
    plain = await server.client.post("/v1/fuse", files=FILES)
    for answer in (
        await server.client.post("/v1/fuse", files=FILES, data=empty),
        await server.client.post(f"/v1/fuse?{query}", files=FILES),
        await server.client.post(f"/v1/fuse?{query}", files=FILES, data={**empty, "output": "fused"}),
        await server.client.post("/v1/fuse?output=fused", files=FILES, data=empty),
    ):
        assert answer.status_code == 200, answer.text
        assert answer.content == plain.content
    filled = await server.client.post("/v1/fuse?output=ir&seed=", files=FILES, data={**empty, "seed": "8"})
    assert (filled.headers["x-picture"], server.engine.batches[-1]) == ("ir", [8])


async def test_the_inference_protocol_refuses_options_in_the_query(server: Server) -> None:
    body = b'{"inputs": []}'
    for query in ("seed=5", "x=1&ir_range=1,2", "output=ir"):
        answer = await server.client.post(f"{INFER}?{query}", content=body)
        assert "belongs into the body" in problem_of_v2(answer, ErrorCode.INVALID_INPUT)
    for query in ("", "tenant=7", "seed="):  # for a proxy, perhaps; or nothing
        answer = await server.client.post(f"{INFER}?{query}", content=body)
        assert "missing" in problem_of_v2(answer, ErrorCode.INVALID_INPUT)


def problem_of_v2(answer: httpx.Response, code: ErrorCode) -> str:
    document = problem(answer, code)
    assert document["error"] == document["detail"]
    return str(document["error"])


# compressed bodies


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "deflate", "br", "identity, gzip", "x-unknown"])
async def test_compressed_bodies_are_refused_on_every_route(server: Server, coding: str) -> None:
    document = (await server.client.get("/openapi.json")).json()
    paths = [path for path, operations in document["paths"].items() if "requestBody" in operations.get("post", {})]
    assert len(paths) >= 3
    for path in paths:
        path = path.replace("{model_name}", "recofuse").replace("{model_version}", "7")
        answer = await server.client.post(path, files=FILES, headers={"Content-Encoding": coding})
        told = problem(answer, ErrorCode.UNSUPPORTED_MEDIA)["detail"]
        assert "send it uncompressed" in told
    assert server.engine.batches == []


@pytest.mark.parametrize("path", ["/v1/fuse", INFER])
async def test_a_compressed_body_is_refused_before_it_is_sent(line: Line, path: str) -> None:
    head = b"POST %b HTTP/1.1\r\nHost: h\r\nContent-Length: 5000000\r\nExpect: 100-continue\r\n" % path.encode()
    head += b"Content-Encoding: identity\r\nContent-Encoding: gzip\r\nContent-Type: %b\r\n\r\n" % FORM_KIND.encode()
    await line.send(head)
    status, headers, body = await line.answer()
    assert (status, json.loads(body)["code"], headers["connection"]) == (415, "unsupported_media", "close")


@pytest.mark.parametrize("coding", ["identity", "Identity", "", "identity ,IDENTITY"])
async def test_uncompressed_bodies_may_say_so(server: Server, coding: str) -> None:
    answer = await server.client.post("/v1/fuse", files=FILES, headers={"Content-Encoding": coding})
    assert answer.status_code == 200, answer.text
    answer = await server.client.post(INFER, content=b"{}", headers={"Content-Encoding": coding})
    problem_of_v2(answer, ErrorCode.INVALID_INPUT)


async def test_a_compressed_transfer_is_refused(line: Line) -> None:
    await line.send(b"POST /v1/fuse HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked\r\n")
    await line.send(b"Content-Type: %b\r\n\r\n" % FORM_KIND.encode() + chunked(form_of(vis=VIS, ir=IR)))
    status, _, body = await line.answer()
    assert (status, json.loads(body)["code"]) == (415, "unsupported_media")


# the time of a body


class Instant(selectors.DefaultSelector):
    """Waits for nothing: the clock jumps to the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now_s += timeout or 0
        return super().select(0)


class InstantLoop(asyncio.SelectorEventLoop):
    """An event loop in which hours pass at once; for what waits for timers only."""

    def __init__(self) -> None:
        self._instant = Instant()
        super().__init__(self._instant)

    def time(self) -> float:
        return self._instant.now_s


def post_slowly(pieces: Iterator[tuple[float, bytes]], **http: Any) -> tuple[int, str, float]:
    """Send a body of which each piece comes so many seconds after the one before; the status, detail and seconds.

    A body that ends is refused as one without its closing boundary; nothing else is waited for.
    """

    async def main() -> tuple[int, str, float]:
        values = Settings.from_values({"http": http})
        metrics = Metrics(CollectorRegistry())
        app = build_app(Gateway(MemoryQueue(values.queue), values, metrics), values, metrics)
        loop = asyncio.get_running_loop()
        started_s, ended_s, sent = loop.time(), [0.0], []

        async def receive() -> dict[str, Any]:
            pause_s, piece = next(pieces, (0.0, b""))
            await asyncio.sleep(pause_s)
            return {"type": "http.request", "body": piece, "more_body": bool(piece)}

        async def send(message: Any) -> None:
            ended_s[0] = loop.time()
            sent.append(message)

        headers = [(b"content-type", FORM_KIND.encode()), (b"expect", b"100-continue")]  # nothing is discarded after it
        scope = {"type": "http", "method": "POST", "path": "/v1/fuse", "headers": headers, "query_string": b""}
        await app({**scope, "root_path": ""}, receive, send)
        return sent[0]["status"], json.loads(sent[1]["body"])["detail"], ended_s[0] - started_s

    with asyncio.Runner(loop_factory=InstantLoop) as runner:
        return runner.run(main())


FIELD = b'--edge\r\nContent-Disposition: form-data; name="vis"\r\n\r\n'


def steadily(rate: float, num_bytes: int, every_s: float) -> Iterator[tuple[float, bytes]]:
    """A body that comes with so many bytes a second."""
    yield 0.0, FIELD
    for _ in range(round(num_bytes / rate / every_s)):
        yield every_s, bytes(max(1, round(rate * every_s)))


def test_a_slow_but_steady_body_is_received() -> None:
    """20 MB over an uplink of 2 Mbit/s, and a picture over one of 64 kbit/s."""
    for rate, num_bytes in ((250_000, 20_000_000), (8000, 1_000_000)):
        status, detail, seconds = post_slowly(steadily(rate, num_bytes, every_s=0.5))
        assert (status, "closing boundary" in detail) == (400, True), detail
        assert seconds == pytest.approx(num_bytes / rate, rel=0.01)


def test_an_uplink_may_pause_and_go_on() -> None:
    pauses = [(0.0, FIELD)] + [(29.0, bytes(200_000))] * 5
    assert post_slowly(iter(pauses))[0] == 400


def test_silence_ends_a_body() -> None:
    """However much has come before."""
    pieces = [(0.0, FIELD), (5.0, bytes(1_000_000)), (30.5, bytes(1000))]
    status, detail, seconds = post_slowly(iter(pieces))
    assert (status, "pauses of up to 30 s" in detail) == (504, True)
    assert seconds == pytest.approx(35.0)


@pytest.mark.parametrize(("rate", "every_s"), [(1.0, 1.0), (100.0, 0.1), (4000.0, 0.5), (1 / 29, 29.0)])
def test_a_trickle_is_cut_off(rate: float, every_s: float) -> None:
    """As soon as it is slower than the least rate allows, or at the next byte."""
    status, detail, seconds = post_slowly(steadily(rate, 10_000_000, every_s))
    assert (status, "at least 4096 bytes/s" in detail) == (504, True)
    least = (30.0 + len(FIELD) / 4096) / (1 - rate / 4096)
    assert least - every_s / (1 - rate / 4096) <= seconds <= least


@pytest.mark.parametrize("least", [100, 1000, 100_000])
def test_the_least_rate_is_a_setting(least: int) -> None:
    http = {"body_timeout_s": 10, "min_body_bytes_per_s": least}
    assert post_slowly(steadily(least * 1.1, least * 100, 1.0), **http)[0] == 400
    assert post_slowly(steadily(least * 0.5, least * 100, 2.0), **http)[0] == 504


async def test_a_body_longer_than_the_silence_it_may_have_arrives(serving: Serving) -> None:
    """The same over a socket."""
    body = form_of(vis=VIS, ir=IR)
    size = -(-len(body) // 16)

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), size):
            await asyncio.sleep(0.25)
            yield body[at : at + size]

    async with serving(http={"body_timeout_s": 3.0, "min_body_bytes_per_s": 100}) as server:
        answer = await server.client.post("/v1/fuse", content=pieces(), headers={"Content-Type": FORM_KIND})
    assert answer.status_code == 200, answer.text


async def test_a_trickling_client_does_not_stay(serving: Serving) -> None:
    """Answered while it still sends, after the setting's half a second and the patience with refused bodies."""
    async with serving(http={"body_timeout_s": 0.5}) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.client.base_url.port)
        head = b"POST /v1/fuse HTTP/1.1\r\nHost: h\r\nContent-Length: 400000\r\nContent-Type: %b\r\n\r\n"
        writer.write(head % FORM_KIND.encode() + FIELD)

        async def trickle() -> None:
            while True:
                writer.write(b"a")
                await asyncio.sleep(0.05)

        trickling = asyncio.create_task(trickle())
        try:
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
        finally:
            trickling.cancel()
            writer.transport.abort()
    assert answer.startswith(b"HTTP/1.1 504")
