"""ASGI middleware around every request: what each answer carries, whatever becomes of the request, and HEAD."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.faces.http.problems import problem
from service.terms.errors import INTERNAL_MESSAGE, InternalError
from service.terms.settings import HttpSettings
from service.watch.logs import accepted_id, request_id
from service.watch.metrics import Metrics
from service.watch.tracing import NO_TRACES, Tracer

logger = logging.getLogger(__name__)

PIECE_BYTES = 512 * 1024  # of an answer

_SECURE = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"x-frame-options", b"DENY")]
_PAGE_POLICY = (
    b"default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    b"img-src 'self' blob: data:; media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
_DATA_POLICY = b"default-src 'none'; frame-ancestors 'none'"
_METHODS = frozenset({"GET", "POST", "DELETE", "HEAD", "PUT", "PATCH", "OPTIONS"})


class Envelope:
    """Around every request: its id, metrics and trace, and an answer even if something unforeseen happens."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, http: HttpSettings | None = None, tracer: Tracer = NO_TRACES
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._tracer = tracer
        has_tls = http is not None and bool(http.tls_cert)
        self._secure = _SECURE + [(b"strict-transport-security", b"max-age=31536000")] * has_tls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        current = accepted_id(_header(scope, b"x-request-id"))
        token = request_id.set(current)
        try:
            with (
                self._metrics.request("http") as timer,
                self._tracer.request(scope["path"], timer, _header(scope, b"traceparent")),
            ):
                timer.method = scope["method"] if scope["method"] in _METHODS else "other"

                async def send_marked(message: Message) -> None:
                    if message["type"] == "http.response.start":
                        timer.status = str(message["status"])
                        headers = message.setdefault("headers", [])
                        for index, (name, value) in enumerate(headers):
                            if name == b"x-error-code":
                                self._metrics.errors.labels(value.decode()).inc()
                                del headers[index]
                                break
                        headers.append((b"x-request-id", current.encode()))
                        headers += self._secure
                        names = dict(headers)
                        is_page = names.get(b"content-type", b"").startswith(b"text/html")
                        if b"content-security-policy" not in names:
                            headers.append((b"content-security-policy", _PAGE_POLICY if is_page else _DATA_POLICY))
                        if b"cache-control" not in names and not is_page:
                            headers.append((b"cache-control", b"no-store"))
                    for piece in _pieces(message):
                        await send(piece)

                try:
                    await self._app(scope, receive, send_marked)
                except Exception:
                    logger.exception("request failed", extra={"method": scope["method"]})
                    if timer.status != "0":
                        raise  # half an answer is out; only cutting the connection can tell the client
                    failure = InternalError(INTERNAL_MESSAGE)
                    await problem(failure, path=scope["path"])(scope, receive, send_marked)
                finally:
                    timer.route = getattr(scope.get("route"), "path", "unmatched")
        finally:
            request_id.reset(token)


class Head:
    """Answers HEAD wherever there is GET, with the same status and headers; the server leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        asked = {**scope, "method": "GET"}
        try:
            await self._app(asked, receive, send)
        finally:
            if "route" in asked:
                scope["route"] = asked["route"]  # for the metrics


def _pieces(message: Message) -> Iterator[Message]:
    """A large body in pieces, each handed over when the client has taken those before.

    At once it would be complete for uvicorn, which then waits for the next request, and over TLS hangs up on a client
    that takes longer for its answer than an idle connection is kept.
    """
    body: bytes = message.get("body", b"")
    if len(body) <= PIECE_BYTES:
        yield message
        return
    for start in range(0, len(body), PIECE_BYTES):
        end = start + PIECE_BYTES
        yield {**message, "body": body[start:end], "more_body": end < len(body) or message.get("more_body", False)}


def _header(scope: Scope, wanted: bytes) -> str:
    """A header's first value; empty if it is not there. wanted: in lower case."""
    value: bytes = next((value for name, value in scope["headers"] if name == wanted), b"")
    return value.decode("latin-1")
