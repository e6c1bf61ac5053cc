"""Bodies of requests: how much, how slowly, and in which form they may come."""

from __future__ import annotations

import asyncio
import json
import selectors
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from service.faces.gateway import Gateway
from service.faces.http.app import build_app
from service.queue.memory import MemoryQueue
from service.terms.errors import ErrorCode
from service.terms.settings import Settings
from service.watch.metrics import Metrics
from tests.service.conftest import Server, Serving
from tests.service.faces.http.asking import FILES, FORM_KIND, INFER, IR, VIS, Line, chunked, form_of, problem


async def test_all_uploads_together_are_bounded(serving: Serving) -> None:
    """A body costs memory from its first byte on, and the queue's bound begins with the last one."""
    goes_on = asyncio.Event()
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    head = b'--x\r\nContent-Disposition: form-data; name="vis"\r\n\r\n'

    async def slow() -> AsyncIterator[bytes]:
        yield head + bytes(80_000)
        await goes_on.wait()
        yield b"\r\n--x--\r\n"

    async with serving(limits={"max_held_bytes": 100_000}) as server:

        async def other(path: str) -> httpx.Response:
            return await server.client.post(path, content=head + bytes(30_000), headers=kind)

        holding = asyncio.create_task(server.client.post("/v1/fuse", content=slow(), headers=kind))
        async with asyncio.timeout(20):
            while (refused := await other("/v1/fuse")).status_code != 429:  # until the first one's bytes are there
                problem(refused, ErrorCode.MALFORMED_REQUEST)
        problem(refused, ErrorCode.OVERLOADED)
        assert refused.headers["retry-after"] == "1"
        assert (await other("/v2/models/recofuse/infer")).status_code == 429
        goes_on.set()
        problem(await holding, ErrorCode.INVALID_INPUT)
        for _ in range(5):
            problem(await other("/v1/fuse"), ErrorCode.MALFORMED_REQUEST)


async def test_an_endless_body_is_cut_off_while_it_streams(serving: Serving) -> None:
    async with serving(limits={"max_image_bytes": 100_000}) as server:
        sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal sent
            yield b'--b\r\nContent-Disposition: form-data; name="vis"\r\n\r\n'
            while sent < 400_000_000:
                sent += 500_000
                yield bytes(500_000)

        try:
            answer = await server.client.post(
                "/v1/fuse", content=endless(), headers={"Content-Type": "multipart/form-data; boundary=b"}
            )
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            pass  # the connection was closed while more was being sent
        else:
            problem(answer, ErrorCode.PAYLOAD_TOO_LARGE)
        assert sent < 60_000_000
        announced = await server.client.post("/v1/fuse", files={**FILES, "vis": bytes(400_000)})
        problem(announced, ErrorCode.PAYLOAD_TOO_LARGE)
        assert (await server.client.post("/v1/fuse", files=FILES)).status_code == 200


async def test_a_body_that_does_not_end_is_given_up(serving: Serving) -> None:
    async with serving(http={"body_timeout_s": 0.2}) as server:

        async def stuck() -> AsyncIterator[bytes]:
            yield b"--b\r\n"
            await asyncio.sleep(1)

        answer = await server.client.post(
            "/v1/fuse", content=stuck(), headers={"Content-Type": "multipart/form-data; boundary=b"}
        )
        assert "pauses of up to 0.2 s" in problem(answer, ErrorCode.TIMED_OUT)["detail"]


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
