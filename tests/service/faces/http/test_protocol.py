"""One HTTP connection, byte by byte: the transport and the timers are stand-ins, so nothing here waits for a clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest
import uvicorn
from uvicorn.server import ServerState

from service.faces.http.protocol import MIN_TAKEN_BYTES, GuardedProtocol
from service.terms.settings import HttpSettings

HTTP = HttpSettings(max_head_bytes=1000, answer_timeout_s=7)
GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"


class Timers:
    """The event loop with timers that a test runs itself."""

    def __init__(self) -> None:
        self.armed: list[tuple[float, Callable[[], None], asyncio.TimerHandle]] = []

    def call_later(self, delay_s: float, call: Callable[..., None], *arguments: Any) -> asyncio.TimerHandle:
        loop = asyncio.get_running_loop()
        handle = asyncio.TimerHandle(0, call, arguments, loop)
        self.armed.append((delay_s, lambda: call(*arguments), handle))
        return handle

    def run(self, delay_s: float) -> None:
        """What was to happen after so many seconds, and is still wanted, happens now."""
        due = [entry for entry in self.armed if entry[0] == delay_s]
        self.armed = [entry for entry in self.armed if entry[0] != delay_s]
        for _, call, handle in due:
            if not handle.cancelled():
                call()

    def create_task(self, work: Any) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(work)


class Transport(asyncio.Transport):
    """A connection whose client takes what the test takes."""

    def __init__(self) -> None:
        super().__init__({"sockname": ("127.0.0.1", 80), "peername": ("127.0.0.1", 9)})
        self.sent = b""
        self.num_waiting = 0
        self.has_closed = self.has_aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += bytes(data)

    def close(self) -> None:
        self.has_closed = True

    def abort(self) -> None:
        self.has_aborted = True

    def is_closing(self) -> bool:
        return self.has_closed or self.has_aborted

    def get_write_buffer_size(self) -> int:
        return self.num_waiting

    def pause_reading(self) -> None:
        return

    def resume_reading(self) -> None:
        return


class Connection:
    """A protocol with its transport, its timers, and an application.

    is_reading: whether the application reads the body before it answers; `bodies` has those.
    """

    def __init__(self, *, is_reading: bool = False) -> None:
        self.seen: list[Any] = []
        self.bodies: list[bytes] = []
        self._is_reading = is_reading
        self.transport, self.timers = Transport(), Timers()
        config = uvicorn.Config(
            self._answer, interface="asgi3", ws="none", timeout_keep_alive=int(HTTP.keep_alive_s), log_config=None
        )
        self.protocol = GuardedProtocol(config, ServerState(), {}, _loop=self.timers, http=HTTP)
        self.protocol.connection_made(self.transport)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen.append(scope)
        if self._is_reading:
            body, is_complete = b"", False
            while not is_complete:
                message = await receive()
                body, is_complete = body + message["body"], not message["more_body"]
            self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def receive(self, data: bytes) -> None:
        """The client sends this, and whatever it sets off comes to its end."""
        self.protocol.data_received(data)
        while self.protocol.tasks:
            await asyncio.wait(self.protocol.tasks)


@pytest.fixture
async def connection() -> Connection:
    return Connection()


async def test_trailers_are_not_collected(connection: Connection) -> None:
    await connection.receive(CHUNKED + b"0\r\n")
    assert connection.transport.sent.endswith(b"ok")
    headers = cast("list[Any]", connection.seen[0]["headers"])
    before = len(headers)
    await connection.receive(b"a: b\r\n" * 20)
    assert len(headers) == before


@pytest.mark.parametrize("tail", [b"0\r\n" + b"a: b\r\n" * 200, b"0\r\na: " + b"b" * 1100, b"1;a=" + b"b" * 1100])
async def test_what_is_neither_head_nor_body_is_bounded(connection: Connection, tail: bytes) -> None:
    await connection.receive(CHUNKED)
    for at in range(0, len(tail), 100):
        assert connection.transport.is_closing() == (at > HTTP.max_head_bytes)
        await connection.receive(tail[at : at + 100])
    assert connection.transport.sent.count(b"HTTP/1.1") == 1  # no second answer to one request


async def test_a_long_body_is_not_taken_for_that(connection: Connection) -> None:
    await connection.receive(CHUNKED)
    for _ in range(3 * HTTP.max_head_bytes):
        await connection.receive(b"1\r\na\r\n")
    await connection.receive(b"0\r\n\r\n" + GET)
    assert not connection.transport.is_closing()
    assert connection.transport.sent.count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize(("first", "drop"), [(GET, b"\r\n"), (CHUNKED, b"1\r\na\r\n"), (CHUNKED, b"0\r\na: b\r\n")])
async def test_a_kept_connection_must_begin_a_request(connection: Connection, first: bytes, drop: bytes) -> None:
    """Neither empty lines nor the rest of a body that nobody reads any more count as life."""
    await connection.receive(first)
    assert connection.transport.sent.endswith(b"ok")
    await connection.receive(drop)
    connection.timers.run(HTTP.keep_alive_s)
    assert connection.transport.is_closing()


async def test_a_request_that_began_is_not_held_to_the_pause_before_it(connection: Connection) -> None:
    for _ in range(3):
        await connection.receive(GET)
        await connection.receive(GET[:20])  # its timer is that of a head
        connection.timers.run(HTTP.keep_alive_s)
        assert not connection.transport.is_closing()
        await connection.receive(GET[20:])
    connection.timers.run(HTTP.head_timeout_s)
    assert not connection.transport.is_closing()
    connection.timers.run(HTTP.keep_alive_s)
    assert connection.transport.is_closing()
    assert connection.transport.sent.count(b"HTTP/1.1 200") == 6


async def test_an_answer_that_is_not_taken_is_given_up(connection: Connection) -> None:
    await connection.receive(GET)
    connection.transport.num_waiting = 10 * MIN_TAKEN_BYTES
    connection.protocol.pause_writing()
    for _ in range(5):
        connection.transport.num_waiting -= MIN_TAKEN_BYTES
        connection.timers.run(HTTP.answer_timeout_s)
        assert not connection.transport.is_closing()
    connection.transport.num_waiting -= 1
    connection.timers.run(HTTP.answer_timeout_s)
    assert connection.transport.is_closing()


async def test_an_answer_that_was_taken_is_forgotten(connection: Connection) -> None:
    await connection.receive(GET)
    connection.transport.num_waiting = 10 * MIN_TAKEN_BYTES
    connection.protocol.pause_writing()
    connection.transport.num_waiting = 0
    connection.protocol.resume_writing()
    connection.timers.run(HTTP.answer_timeout_s)
    assert not connection.transport.is_closing()


OFFER = b"Host: h\r\nCONNECTION: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
SEQUENCE = (
    b"POST /a?x=1 HTTP/1.1\r\n" + OFFER + b"Content-Length: 5\r\n\r\nGET /",
    b"GET /b HTTP/1.1\r\n" + OFFER + b"\r\n",
    b"POST /c HTTP/1.1\r\n" + OFFER + b"Transfer-Encoding: chunked\r\n\r\n3;e\r\nabc\r\n2\r\n\r\n\r\n0\r\nt: u\r\n\r\n",
    b"POST /d HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nend",
    b"DELETE /e HTTP/1.1\r\nupgrade: websocket\r\nconnection: keep-alive\r\nConnection: upgrade, close\r\n"
    b"Content-Length: 4\r\n\r\nlast",
)


@pytest.mark.parametrize("step", [1, 2, 7, 50, 10_000])
async def test_requests_that_offer_an_upgrade_are_cut_as_any_others(step: int) -> None:
    """However the bytes arrive: one by one, in lumps over the edges of heads and bodies, or all at once."""
    connection = Connection(is_reading=True)
    sent = b"".join(SEQUENCE)
    for at in range(0, len(sent), step):
        connection.protocol.data_received(sent[at : at + step])
        await asyncio.sleep(0)
    while connection.protocol.tasks:
        await asyncio.wait(connection.protocol.tasks)
    seen = [(scope["method"], scope["path"], scope["query_string"]) for scope in connection.seen]
    assert seen == [
        ("POST", "/a", b"x=1"), ("GET", "/b", b""), ("POST", "/c", b""), ("POST", "/d", b""), ("DELETE", "/e", b""),
    ]  # fmt: skip
    assert connection.bodies == [b"GET /", b"", b"abc\r\n", b"end", b"last"]
    headers = [dict(scope["headers"]) for scope in connection.seen]
    assert not any(b"upgrade" in names for names in headers)
    assert [names.get(b"http2-settings") for names in headers] == [b"AAMAAABk"] * 3 + [None] * 2
    assert connection.transport.sent.count(b"HTTP/1.1 200") == 5
    assert connection.transport.is_closing()  # as the last one asks


async def test_a_head_that_offers_an_upgrade_is_bounded_as_any_other(connection: Connection) -> None:
    await connection.receive(b"POST / HTTP/1.1\r\n" + OFFER + b"X: ")
    connection.protocol.data_received(b"a" * HTTP.max_head_bytes)
    assert connection.transport.is_closing()
    assert connection.transport.sent.startswith(b"HTTP/1.1 413")


async def test_a_head_that_offers_an_upgrade_ends_the_heads_timer(connection: Connection) -> None:
    connection.protocol.data_received(b"POST / HTTP/1.1\r\n" + OFFER + b"Content-Length: 9\r\n\r\n")
    connection.timers.run(HTTP.head_timeout_s)
    assert not connection.transport.is_closing()
    await connection.receive(b"012345678")
    assert connection.transport.sent.endswith(b"ok")
