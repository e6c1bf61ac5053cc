"""A real OTLP/HTTP receiver: keeps the spans that any process on this host sends to it."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Span:
    """Ids in hex. attributes: values as text; role: of the process that sent it."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: dict[str, str]
    role: str
    is_error: bool


@dataclass
class Receiver:
    """url: what RECOFUSE_TRACE__ENDPOINT should be."""

    url: str = ""
    spans: list[Span] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)
    arrived: threading.Condition = field(default_factory=threading.Condition)

    def wait_for(self, count: int, timeout_s: float = 30.0) -> list[Span]:
        """All spans once there are at least so many."""
        end = time.monotonic() + timeout_s
        with self.arrived:
            while len(self.spans) < count:
                assert self.arrived.wait(max(0.0, end - time.monotonic())), [span.name for span in self.spans]
            return list(self.spans)

    def add(self, body: bytes) -> None:
        """One export request."""
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        with self.arrived:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                known = _texts(resource.resource.attributes)
                for scope in resource.scope_spans:
                    self.spans += [_span(span, known["recofuse.role"]) for span in scope.spans]
            self.arrived.notify_all()


def _span(span: Any, role: str) -> Span:
    return Span(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_texts(span.attributes),
        role=role,
        is_error=span.status.code == 2,
    )


def _texts(attributes: Any) -> dict[str, str]:
    return {pair.key: str(getattr(pair.value, pair.value.WhichOneof("value"))) for pair in attributes}


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver on a free loopback port."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            receiver.paths.add(self.path)
            receiver.add(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    receiver.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield receiver
    finally:
        server.shutdown()
        serving.join()
        server.server_close()
