"""uvicorn's HTTP protocol with the limits and the error documents that it lacks.

What uvicorn leaves open: a request's head may be as long, and take as long, as a client likes, and a connection that
never sends anything stays for ever; so a few thousand idle sockets would use up all connections. Here a head is bounded
in bytes and in time, and so is what may stand between a body's bytes and behind them (chunk extensions, trailers, which
uvicorn collects without end). Any byte counts as life for uvicorn, also the rest of a body whose answer is out; here a
kept connection must begin its next request in time. And an answer that is not taken is given up.

HTTP/1.1 is spoken and nothing else: a request that offers another protocol (`Upgrade: h2c`, as Java's HttpClient and
`curl --http2` do unasked) is served as if it did not. Left alone, the parser takes such a head for the end of HTTP, and
the body is lost.

What uvicorn refuses by itself (bytes that are not HTTP, too many connections) is answered with the same problem
documents as everything else.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import service_unavailable
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.faces.http.problems import problem
from service.terms.errors import MalformedRequestError, PayloadTooLargeError, UnavailableError
from service.terms.settings import HttpSettings

MIN_TAKEN_BYTES = 64 * 1024  # of an answer, in `answer_timeout_s`; sockets show what is taken in lumps of a megabyte


class GuardedProtocol(HttpToolsProtocol):
    """One connection. http: the limits; the other arguments are uvicorn's."""

    def __init__(self, *args: Any, http: HttpSettings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._http = http
        self._is_in_head = True
        self._is_upgrade = False  # what the parser has last: a head that it takes for the end of HTTP
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._idle_bytes = 0  # since the last byte of a head or a body
        self._answer_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client came; it owes us a request's head."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._stop_timer()
        self._stop_keep_alive()
        self._stop_answer_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """The next bytes of a head or a body."""
        was_in_head = self._is_in_head
        self._idle_bytes += len(data)
        self._parse(data)
        if self.transport.is_closing():
            return
        if not self._is_in_head:
            if self._idle_bytes > self._http.max_head_bytes:
                self.transport.close()  # the answer to this request is the application's, or out already
            return
        if self._head_timer is None:  # the next request on a kept connection has begun
            self._expect_head()
        if was_in_head:  # otherwise the piece may hold the end of a body
            self._head_bytes += len(data)
        if self._head_bytes > self._http.max_head_bytes:
            most = self._http.max_head_bytes
            self._refuse(PayloadTooLargeError(f"the request's head has more than the accepted {most} bytes"))

    def on_message_begin(self) -> None:
        """A request begins."""
        self._is_in_head, self._is_upgrade = True, False
        self._stop_keep_alive()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header. Trailers, which come after a body, are nobody's here."""
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A request's head is complete."""
        if self.parser.should_upgrade():
            self._is_upgrade = True  # `_parse` has it come again
            return
        self._is_in_head = False
        self._head_bytes = self._idle_bytes = 0
        self._stop_timer()
        self._stop_keep_alive()  # armed by the answer before, if that was completed in the middle of this head
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """The next bytes of a body."""
        self._idle_bytes = 0
        if not self.cycle.body:
            self.cycle.body = b""  # type: ignore[assignment]  # else it is copied into uvicorn's buffer and out again
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is complete."""
        if not self._is_upgrade:
            super().on_message_complete()

    def pause_writing(self) -> None:
        """More of an answer waits to be taken than the transport likes to hold."""
        super().pause_writing()
        self._expect_taking()

    def resume_writing(self) -> None:
        """The client has taken it."""
        self._stop_answer_timer()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Bytes that are not HTTP."""
        self._refuse(MalformedRequestError("this is not a readable HTTP/1.1 request"))

    def _parse(self, data: bytes) -> None:
        """Parse what came, as uvicorn does, but decline upgrades: each such head is read again without its offer."""
        rest = memoryview(data)
        try:
            while rest:
                try:
                    self.parser.feed_data(rest)
                    return
                except httptools.HttpParserUpgrade as offer:
                    rest = rest[offer.args[0] :]
                    head = self._head_without_upgrade()
                    self.parser = httptools.HttpRequestParser(self)  # the old one may be done with the connection
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it
                    self.parser.feed_data(head)
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("")

    def _head_without_upgrade(self) -> bytes:
        """Raises HttpParserError for CONNECT, which asks for a tunnel and has no other meaning."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise httptools.HttpParserInvalidMethodError("there is no tunnel")
        lines = [b"%b %b HTTP/%b" % (method, self.url, self.parser.get_http_version().encode())]
        lines += [b"%b: %b" % (name, value) for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if app is service_unavailable:
            app = problem(UnavailableError("too many connections are open; try again later", retry_after_s=1.0))
            app.raw_headers.append((b"connection", b"close"))
        super()._start_asgi_task(cycle, app)

    def _refuse(self, error: MalformedRequestError | PayloadTooLargeError) -> None:
        """Answer without the application and hang up."""
        answer = problem(error, {"Connection": "close"})
        lines = [STATUS_LINE[answer.status_code]]
        lines += [b"%b: %b\r\n" % (name, value) for name, value in answer.raw_headers if name != b"x-error-code"]
        if self.cycle is None or self.cycle.response_complete:  # half an answer cannot be followed by another
            self.transport.write(b"".join([*lines, b"\r\n", bytes(answer.body)]))
        self.transport.close()

    def _unset_keepalive_if_required(self) -> None:
        """Do nothing when uvicorn asks for it, at any byte that comes: the timer ends with the next request's begin."""

    def _stop_keep_alive(self) -> None:
        super()._unset_keepalive_if_required()

    def _expect_taking(self) -> None:
        self._stop_answer_timer()
        size = self.transport.get_write_buffer_size()
        self._answer_timer = self.loop.call_later(self._http.answer_timeout_s, self._look_at_taking, size)

    def _look_at_taking(self, before: int) -> None:
        self._answer_timer = None
        if before - self.transport.get_write_buffer_size() < MIN_TAKEN_BYTES:
            self.transport.abort()  # closing would wait for the client
        else:
            self._expect_taking()

    def _stop_answer_timer(self) -> None:
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None

    def _expect_head(self) -> None:
        self._stop_timer()
        self._head_timer = self.loop.call_later(self._http.head_timeout_s, self._give_up)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()
