"""Traces: one of each request, across processes, sent to an OTLP/HTTP endpoint. Off unless an endpoint is set.

A trace holds the request's span at the front end, and below it the job's span at the worker with one span for each
stage: queue, decode, batch, model, encode. The W3C `traceparent` of the caller becomes the request's parent; the
request's own travels in the job's header to the worker, whatever queue lies between them. Each delivery of a job has a
span of its own, which tells its attempt; that of a worker that was killed dies with it.

What a newcomer would get wrong: a caller's `traceparent` is passed on even where tracing is off, so that a front end
without and a worker with an endpoint still belong to the caller's trace. OpenTelemetry is an optional extra and is
imported here alone, when it is needed. Its own variables (`OTEL_EXPORTER_OTLP_HEADERS`, ...) are read by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from service.queue.contract import Lease
from service.terms.jobs import Stage
from service.terms.settings import SettingsError, TraceSettings
from service.watch import logs
from service.watch.metrics import RequestTimer

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span
    from opentelemetry.trace import Tracer as OtelTracer

CLOSE_S = 3.0  # for the last spans when a process ends
QUIET = ("/health/", "/metrics", "/v2/health/", "/grpc.health.", "/grpc.reflection.")  # probes would drown the rest

_TRACEPARENT = re.compile(r"^00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}$")


class JobTrace(Protocol):
    """One delivery of one job."""

    def stage(self, stage: Stage, seconds: float, **attributes: str | int) -> None:
        """A stage ended just now, after this many seconds."""

    def end(self, outcome: str, *, is_error: bool = False) -> None:
        """The job left this worker; later calls change nothing."""


class Tracer(Protocol):
    """What front ends and workers tell."""

    def request(self, path: str, timer: RequestTimer, given: str) -> AbstractContextManager[None]:
        """Around one request. given: its traceparent, or anything else. The timer is read at the end.

        Within, `logs.traceparent` is what the job should carry.
        """

    def job(self, lease: Lease, taken_s: float) -> JobTrace:
        """A job was taken from the queue. taken_s: Unix seconds."""


def accepted_traceparent(given: str) -> str:
    """A W3C traceparent of version 00 as it is; nothing in place of anything else."""
    return given if _TRACEPARENT.fullmatch(given) else ""


class _NoJob:
    def stage(self, stage: Stage, seconds: float, **attributes: str | int) -> None:
        return

    def end(self, outcome: str, *, is_error: bool = False) -> None:
        return


NO_JOB_TRACE: JobTrace = _NoJob()


class _NoTraces:
    """Keeps nothing; a caller's trace is passed on all the same."""

    @contextlib.contextmanager
    def request(self, path: str, timer: RequestTimer, given: str) -> Iterator[None]:
        logs.traceparent.set(accepted_traceparent(given))  # each request has a task of its own: nothing to put back
        yield

    def job(self, lease: Lease, taken_s: float) -> JobTrace:
        return NO_JOB_TRACE


NO_TRACES: Tracer = _NoTraces()


@contextlib.asynccontextmanager
async def opened(settings: TraceSettings, role: str, version: str) -> AsyncIterator[Tracer]:
    """The tracer for the duration of the block; its end sends what is left, for a few seconds at most.

    Raises SettingsError if an endpoint is set and OpenTelemetry is not installed.
    """
    if not settings.endpoint:
        yield NO_TRACES
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError as error:
        raise SettingsError("trace.endpoint is set, but traces need an extra: pip install 'recofuse[otel]'") from error
    resource = Resource.create(
        {
            "service.name": settings.service_name,
            "service.version": version,
            "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
            "recofuse.role": role,
        }
    )
    sampler = ParentBased(TraceIdRatioBased(settings.sample_ratio))
    provider = TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=f"{settings.endpoint.rstrip('/')}/v1/traces")
    processor = BatchSpanProcessor(exporter, schedule_delay_millis=settings.delay_s * 1000)
    provider.add_span_processor(processor)
    try:
        yield _OtelTracer(provider.get_tracer("recofuse", version))
    finally:
        await _close(processor)


async def _close(processor: SpanProcessor) -> None:
    """On a thread of its own: a collector that does not answer must not hold up the process's end."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def close() -> None:
        processor.shutdown()
        with contextlib.suppress(RuntimeError):  # the loop may have ended before
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=close, name="traces-end", daemon=True).start()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_S):
            await done.wait()


class _OtelTracer:
    def __init__(self, tracer: OtelTracer) -> None:
        self._tracer = tracer

    @contextlib.contextmanager
    def request(self, path: str, timer: RequestTimer, given: str) -> Iterator[None]:
        from opentelemetry.trace import SpanKind, StatusCode

        parent = accepted_traceparent(given)
        if path.startswith(QUIET):
            logs.traceparent.set(parent)
            yield
            return
        span = self._tracer.start_span("request", context=_context_of(parent), kind=SpanKind.SERVER)
        logs.traceparent.set(_traceparent_of(span))
        try:
            yield
        finally:
            # Names come from route templates, never from paths, so that there are few of them.
            span.update_name(f"{timer.method} {timer.route}" if timer.method.isupper() else timer.route)
            span.set_attributes(
                {
                    "http.route": timer.route,
                    "recofuse.method": timer.method,
                    "recofuse.status": timer.status,
                    "recofuse.request_id": logs.request_id.get(),
                }
            )
            if timer.status.startswith("5") or timer.status in ("INTERNAL", "UNAVAILABLE"):
                span.set_status(StatusCode.ERROR)
            span.end()

    def job(self, lease: Lease, taken_s: float) -> JobTrace:
        from opentelemetry.trace import SpanKind

        job = lease.job
        if not job.traceparent:  # nobody's trace: the front end did not trace, and its caller did not either
            return NO_JOB_TRACE
        attributes: dict[str, str | int] = {
            "recofuse.job_id": job.id,
            "recofuse.request_id": job.request_id,
            "recofuse.worker": lease.worker_id,
            "recofuse.attempt": lease.attempt,
            "recofuse.width": job.width,
            "recofuse.height": job.height,
        }
        span = self._tracer.start_span(
            "job",
            context=_context_of(job.traceparent),
            kind=SpanKind.CONSUMER,
            start_time=_ns(job.created_s),
            attributes=attributes,
        )
        trace = _OtelJob(self._tracer, span)
        trace.add(Stage.QUEUE, _ns(job.created_s), _ns(max(taken_s, job.created_s)), {})
        return trace


class _OtelJob:
    def __init__(self, tracer: OtelTracer, span: Span) -> None:
        from opentelemetry.trace import set_span_in_context

        self._tracer = tracer
        self._span = span
        self._context = set_span_in_context(span, _context_of(""))
        self._is_over = False

    def stage(self, stage: Stage, seconds: float, **attributes: str | int) -> None:
        end_ns = time.time_ns()
        named = {f"recofuse.{name}": value for name, value in attributes.items()}
        self.add(stage, end_ns - _ns(max(0.0, seconds)), end_ns, named)

    def add(self, stage: Stage, start_ns: int, end_ns: int, attributes: dict[str, str | int]) -> None:
        span = self._tracer.start_span(stage.value, context=self._context, start_time=start_ns, attributes=attributes)
        span.end(end_ns)

    def end(self, outcome: str, *, is_error: bool = False) -> None:
        from opentelemetry.trace import StatusCode

        if self._is_over:
            return
        self._is_over = True
        self._span.set_attribute("recofuse.outcome", outcome)
        if is_error:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


def _context_of(traceparent: str) -> Context:
    """A context whose current span is the remote one; an empty one for no traceparent, whatever is current here."""
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    if not accepted_traceparent(traceparent):
        return Context()
    _, trace_id, span_id, flags = traceparent.split("-")
    remote = SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))
    return set_span_in_context(NonRecordingSpan(remote), Context())


def _traceparent_of(span: Any) -> str:
    known = span.get_span_context()
    return f"00-{known.trace_id:032x}-{known.span_id:016x}-{known.trace_flags & 1:02x}"


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
