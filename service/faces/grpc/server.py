"""The gRPC face: messages of proto/recofuse/v1 to the same gateway calls as HTTP, health, reflection, TLS.

Errors: servicers neither catch nor map; `_Envelope`, the one interceptor, turns every failure, also a message that
cannot be parsed or an unknown method, into the statuses of `service.terms.errors.STATUS`, with an `ErrorDetail` in the
standard `grpc-status-details-bin`. Only what gRPC refuses before a message reaches us keeps gRPC's own status: messages
beyond the size limit (RESOURCE_EXHAUSTED) and compressed ones (UNIMPLEMENTED).

What a newcomer would get wrong: a stream never holds more than `max_in_flight` frames beside the one that waits. Mode
`all` reads the next message only when there is room, and HTTP/2's windows carry that to the sender; mode `latest` goes
on reading and replaces the frame that waits. Before a full queue the frames of all streams stand in one line, where a
frame of mode `latest` can still be replaced, so that chance does not decide who gets more. A peer that is gone is
noticed by HTTP/2 pings (`keep_alive_s`), one that is there and does nothing by `stream_idle_s`.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import io
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_args

import grpc
import numpy as np
from google.protobuf import descriptor_pool
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from pydantic import ValidationError

from recofuse_protos.inference.v2 import inference_pb2_grpc
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from service.access.guard import Guard, charge
from service.access.keys import Scope
from service.faces.gateway import FusionRequest, Gateway
from service.faces.grpc.ledger import StreamLedger
from service.faces.oip.grpc import FILE as INFERENCE_FILE
from service.faces.oip.grpc import SERVICE as INFERENCE
from service.faces.oip.grpc import InferenceServicer
from service.faces.oip.inference import Inference
from service.terms.errors import (
    INTERNAL_MESSAGE,
    InternalError,
    InvalidInputError,
    MalformedRequestError,
    NoRoomError,
    OverloadedError,
    RouteNotFoundError,
    ServiceError,
    TimedOutError,
    UnauthenticatedError,
    UnavailableError,
    error_of,
)
from service.terms.jobs import (
    FusionOptions,
    FusionResult,
    IrSource,
    JobView,
    Part,
    PixelFormat,
    Priority,
    RawLayout,
    problems_of,
)
from service.terms.settings import GrpcSettings, Settings
from service.watch import logs
from service.watch.metrics import FlowMode, FrameOutcome, Metrics
from service.watch.tracing import NO_TRACES, Tracer

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["FusionService"].full_name
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
IN_FLIGHT_LATEST = 2  # one in the model and one on its way there; more would only be older
WATCH_S = 0.5  # how late a change of readiness reaches those who watch it
STOP_GRACE_S = 10.0  # for answers that are being sent when everything else has stopped
RETRY_S = (0.01, 0.25)  # first and longest pause of the first frame in the line before a full queue

# What needs no key: probes, and the description of what there is.
PUBLIC_METHODS = ("/grpc.health.", "/grpc.reflection.", "/inference.GRPCInferenceService/Server")

_IDEMPOTENCY_KEY = re.compile(r"^[\x21-\x7e]{1,255}$")
_JOB_ID = re.compile(r"[0-9a-zA-Z_-]{1,64}")
_SOURCES = {source: pb.InfraredSource.Value(f"INFRARED_SOURCE_{source.upper()}") for source in get_args(IrSource)}

Context = grpc.aio.ServicerContext[Any, Any]
Answer = TypeVar("Answer")


@contextlib.asynccontextmanager
async def listening(
    gateway: Gateway,
    settings: Settings,
    metrics: Metrics,
    guard: Guard | None = None,
    tracer: Tracer = NO_TRACES,
    inference: Inference | None = None,
) -> AsyncIterator[str]:
    """Serve gRPC for the duration of the block; yields the address, such as 127.0.0.1:8001. guard: None asks no keys.

    inference: the Open Inference Protocol's calls, None leaves its service out.

    Raises OSError if the address or a TLS file cannot be used. Leaving the block waits for calls that still run.
    """
    options = settings.grpc
    stopping = asyncio.Event()
    server = grpc.aio.server(
        interceptors=[_Envelope(metrics, guard, tracer, max_open=max(1, options.max_calls // 8))],
        options=_channel_options(settings),
        maximum_concurrent_rpcs=options.max_calls,
    )
    fusion_pb2_grpc.add_FusionServiceServicer_to_server(_Fusion(gateway, settings, metrics), server)
    health_pb2_grpc.add_HealthServicer_to_server(_Health(gateway, stopping), server)
    services = [SERVICE, HEALTH, reflection.SERVICE_NAME]
    if inference is not None:
        inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(InferenceServicer(inference), server)
        services.append(INFERENCE)
    reflection.enable_server_reflection(services, server, pool=_Pools())
    address = f"[{options.host}]:{options.port}" if ":" in options.host else f"{options.host}:{options.port}"
    try:
        if (credentials := _credentials(options)) is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:  # all that gRPC tells about a busy port, an unknown host or a useless key
        raise OSError(f"cannot listen for gRPC on {address}: is it in use, and do the TLS files fit?") from error
    await server.start()
    try:
        yield f"{address.rpartition(':')[0]}:{port}"
    finally:
        stopping.set()
        await server.stop(STOP_GRACE_S)


def _channel_options(settings: Settings) -> list[tuple[str, int]]:
    options = settings.grpc
    age_ms = int(options.max_connection_age_s * 1000)
    return [
        ("grpc.so_reuseport", 0),  # a port that is in use must be an error, not a lottery
        ("grpc.max_receive_message_length", 2 * settings.limits.max_image_bytes + 64 * 1024),
        ("grpc.max_send_message_length", -1),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a small message must not unpack to gigabytes
        ("grpc.keepalive_time_ms", int(options.keep_alive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(options.keep_alive_timeout_s * 1000)),
        # keepalive_timeout_ms alone does nothing in the gRPC that is pinned: this is what ends the connection.
        ("grpc.http2.ping_timeout_ms", int(options.keep_alive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", int(options.min_ping_interval_s * 1000)),
        *([("grpc.max_connection_age_ms", age_ms)] if age_ms else []),
    ]


def _credentials(options: GrpcSettings) -> grpc.ServerCredentials | None:
    """TLS as configured, None for none. Raises OSError for files that cannot be read."""
    if not options.tls_cert:
        return None
    pair = (Path(options.tls_key).read_bytes(), Path(options.tls_cert).read_bytes())
    authorities = Path(options.tls_client_ca).read_bytes() if options.tls_client_ca else None
    return grpc.ssl_server_credentials(
        [pair], root_certificates=authorities, require_client_auth=authorities is not None
    )


class _Pools:
    """What reflection looks messages up in: the inference protocol's own pool, then protobuf's default one."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def find(*args: Any) -> Any:
            try:
                return getattr(INFERENCE_FILE.pool, name)(*args)
            except KeyError:
                return getattr(descriptor_pool.Default(), name)(*args)

        return find


# around every call


class _Envelope(grpc.aio.ServerInterceptor):
    """Around every call: its id, metrics, trace and caller, parsing of its messages, the status of any failure."""

    def __init__(self, metrics: Metrics, guard: Guard | None, tracer: Tracer, *, max_open: int) -> None:
        """max_open: calls at once that need no key and have no end; one connection could take all places with them."""
        self._metrics = metrics
        self._guard = guard
        self._tracer = tracer
        self._max_open = max_open
        self._num_open = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Wrap the method's handler. Messages arrive as bytes and are parsed in here, where failing has a status."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return grpc.stream_stream_rpc_method_handler(_lets_go(self._unknown))
        route, parse, serialise = handler_call_details.method, handler.request_deserializer, handler.response_serializer
        if handler.unary_unary is not None:

            @_lets_go
            async def unary(request: bytes, context: Context) -> Any:
                async with self._call(context, route, "unary"):
                    return await handler.unary_unary(_parsed(parse, request), context)

            return grpc.unary_unary_rpc_method_handler(unary, response_serializer=serialise)

        # A coroutine that writes, rather than a generator, so that the inner generator is closed within the call.
        if handler.unary_stream is not None:

            @_lets_go
            async def server_stream(request: bytes, context: Context) -> None:
                async with self._call(context, route, "stream"):
                    await _send(handler.unary_stream(_parsed(parse, request), context), context)

            return grpc.unary_stream_rpc_method_handler(server_stream, response_serializer=serialise)

        @_lets_go
        async def both_stream(requests: AsyncIterator[bytes], context: Context) -> None:
            async with self._call(context, route, "stream"):
                await _send(handler.stream_stream(_all_parsed(parse, requests), context), context)

        return grpc.stream_stream_rpc_method_handler(both_stream, response_serializer=serialise)

    async def _unknown(self, _: AsyncIterator[bytes], context: Context) -> None:
        async with self._call(context, "unmatched", "other"):
            raise RouteNotFoundError("there is no such method; reflection lists what there is")

    @contextlib.asynccontextmanager
    async def _call(self, context: Context, route: str, kind: str) -> AsyncIterator[None]:
        metadata = _metadata(context)
        current = logs.accepted_id(metadata.get("x-request-id", ""))
        logs.request_id.set(current)  # each call has a task of its own, so nothing needs to be put back
        with (
            self._metrics.request("grpc") as timer,
            self._tracer.request(route, timer, metadata.get("traceparent", "")),
        ):
            timer.route, timer.method = route, kind
            is_public = route.startswith(PUBLIC_METHODS)
            is_open = is_public and kind == "stream"
            self._num_open += is_open
            try:
                if self._num_open > self._max_open and is_open:
                    raise OverloadedError(
                        f"at most {self._max_open} calls may watch or reflect at once; try again later",
                        retry_after_s=5.0,
                    )
                if self._guard is not None and not is_public:
                    await self._admit(self._guard, context, route, kind)
                yield
                timer.status = "OK"
                context.set_trailing_metadata((("x-request-id", current),))
            except asyncio.CancelledError:
                timer.status = "DEADLINE_EXCEEDED" if context.time_remaining() == 0 else "CANCELLED"
                raise
            except grpc.aio.AbortError:  # a status that only health checks know
                timer.status = "NOT_FOUND"
                raise
            except ServiceError as error:
                timer.status = error.grpc_status
                await self._refuse(context, error)
            except Exception:  # the process boundary of one call
                timer.status = "INTERNAL"
                logger.exception("call failed", extra={"method": route})
                await self._refuse(context, InternalError(INTERNAL_MESSAGE))
            finally:
                self._num_open -= is_open

    @staticmethod
    async def _admit(guard: Guard, context: Context, route: str, kind: str) -> None:
        method = route.rpartition("/")[2]
        is_work = "Fuse" in method or "Infer" in method
        is_change = is_work or "Cancel" in method
        await guard.admit(
            _metadata(context),
            Scope.FUSE if is_change else Scope.READ,
            is_charged=is_work and kind == "unary",  # streams are charged by frame
            face="grpc",
            action=route,
            peer=context.peer(),
        )

    async def _refuse(self, context: Context, error: ServiceError) -> None:
        self._metrics.errors.labels(error.code).inc()
        detail, packed = error_detail(error), AnyMessage()
        packed.Pack(detail)
        status = Status(code=detail.status, message=error.message, details=[packed])
        metadata: list[tuple[str, str | bytes]] = [
            ("x-request-id", detail.request_id),
            ("grpc-status-details-bin", status.SerializeToString()),
        ]
        if error.retry_after_s is not None:
            metadata.append(("grpc-retry-pushback-ms", str(round(error.retry_after_s * 1000))))
        await context.abort(grpc.StatusCode[error.grpc_status], error.message, tuple(metadata))


def _lets_go(call: Callable[[Any, Context], Awaitable[Answer]]) -> Callable[[Any, Context], Awaitable[Answer]]:
    """The call, of which an abort leaves nothing behind.

    gRPC keeps the exception of an abort in what the call's context refers to. Frames in its traceback, or in that of
    the error that it stands for, would keep the context and the request in turn, up to twice the size of an image,
    until a collection.
    """

    async def until_the_end(request: Any, context: Context) -> Answer:
        work = call(request, context)
        del request, context  # of all frames, this one alone stays in the traceback
        try:
            return await work
        except grpc.aio.AbortError as aborted:
            if aborted.__context__ is not None:
                aborted.__context__.__traceback__ = None
                aborted.__context__ = None
            raise aborted.with_traceback(None) from None

    return until_the_end


def _metadata(context: Context) -> dict[str, str]:
    """The call's text metadata."""
    pairs: Any = context.invocation_metadata() or ()
    return {key: value for key, value in pairs if isinstance(value, str)}


def _parsed(parse: Callable[[bytes], Any], raw: bytes) -> Any:
    try:
        return parse(raw)
    except DecodeError as error:
        raise MalformedRequestError("a message cannot be parsed as what its method takes") from error


async def _all_parsed(parse: Callable[[bytes], Any], requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for raw in requests:
        yield _parsed(parse, raw)


async def _send(answers: Any, context: Context) -> None:
    if inspect.isawaitable(answers):  # a handler that writes by itself
        await answers
        return
    async with aclosing(answers):
        async for answer in answers:
            await context.write(answer)


def error_detail(error: ServiceError) -> pb.ErrorDetail:
    """An error as clients see it."""
    code: tuple[int, str] = grpc.StatusCode[error.grpc_status].value
    return pb.ErrorDetail(
        code=error.code,
        message=error.message,
        request_id=logs.request_id.get(),
        retry_after_s=error.retry_after_s,
        status=code[0],
    )


# health


class _Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc, unused-ignore]
    """The standard health service, for the server as a whole and for FusionService: the gateway's own readiness."""

    def __init__(self, gateway: Gateway, stopping: asyncio.Event) -> None:
        self._gateway = gateway
        self._stopping = stopping

    async def Check(self, request: Any, context: Context) -> Any:  # noqa: N802 - the name is the protocol's
        """SERVING if new work is welcome now. Unknown services are NOT_FOUND, as the protocol has it."""
        if request.service not in ("", SERVICE):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"accepted are the empty name and {SERVICE}")
        return await self._answer(request.service)

    async def Watch(self, request: Any, _: Context) -> AsyncIterator[Any]:  # noqa: N802
        """Readiness now and after every change, until the server stops."""
        last = None
        while not self._stopping.is_set():
            answer = await self._answer(request.service)
            if answer != last:
                last = answer
                yield answer
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), WATCH_S)

    async def _answer(self, service: str) -> Any:
        response = health_pb2.HealthCheckResponse
        if service not in ("", SERVICE):
            return response(status=response.SERVICE_UNKNOWN)
        readiness = await self._gateway.readiness()
        return response(status=response.SERVING if readiness.is_ready else response.NOT_SERVING)


# fusion


class _Fusion(fusion_pb2_grpc.FusionServiceServicer):
    """The public service."""

    def __init__(self, gateway: Gateway, settings: Settings, metrics: Metrics) -> None:
        self._gateway = gateway
        self._settings = settings
        self._metrics = metrics
        self._line = asyncio.Lock()  # served in order: frames of all streams that found the queue full

    async def Fuse(self, request: pb.FuseRequest, context: Context) -> pb.FuseResponse:  # noqa: N802
        """See fusion.proto."""
        started_s = time.monotonic()
        options = _Options.of(request.options)
        wanted = self._request(
            request, options, self._gateway.timeout_within(options.timeout_s, context.time_remaining()), context
        )
        result = await self._gateway.fuse(wanted)
        fusion = fusion_of(result, is_raw=options.is_raw, started_s=started_s)
        return pb.FuseResponse(fusion=fusion, request_id=logs.request_id.get())

    async def FuseStream(  # type: ignore[override]  # noqa: N802 - it writes by itself, to see what is not taken
        self, request_iterator: AsyncIterator[pb.FuseStreamRequest], context: Context
    ) -> None:
        """See fusion.proto."""
        traceparent = logs.traceparent.get() or None
        stream = _Stream(self._gateway, self._settings, self._metrics, request_iterator, traceparent, self._line)
        idle_s = self._settings.grpc.stream_idle_s
        async with aclosing(stream.answers()) as answers:
            async for answer in answers:
                try:
                    async with asyncio.timeout(idle_s or None):
                        await context.write(answer)
                except TimeoutError as error:
                    raise TimedOutError(f"no answer was taken for {idle_s:g} s") from error

    async def SubmitFuse(self, request: pb.FuseRequest, context: Context) -> pb.Job:  # noqa: N802
        """See fusion.proto."""
        options = _Options.of(request.options)
        return _job_message(await self._gateway.submit(self._request(request, options, options.timeout_s, context)))

    async def GetJob(self, request: pb.JobRequest, _: Context) -> pb.Job:  # noqa: N802
        """See fusion.proto."""
        return _job_message(await self._gateway.view(_job_id(request)))

    async def GetJobResult(self, request: pb.JobRequest, _: Context) -> pb.FuseResponse:  # noqa: N802
        """See fusion.proto."""
        result = await self._gateway.result(_job_id(request))
        fusion = fusion_of(result, is_raw=False, started_s=0.0)
        fusion.timings.ClearField("total_s")  # when the job came, another process may have been there
        return pb.FuseResponse(fusion=fusion, request_id=logs.request_id.get())

    async def CancelJob(self, request: pb.JobRequest, _: Context) -> pb.Job:  # noqa: N802
        """See fusion.proto."""
        return _job_message(await self._gateway.cancel(_job_id(request)))

    async def ListModels(self, request: pb.ListModelsRequest, _: Context) -> pb.ListModelsResponse:  # noqa: N802
        """See fusion.proto."""
        models = [pb.ServedModel(**asdict(model)) for model in await self._gateway.models()]
        return pb.ListModelsResponse(models=models)

    @staticmethod
    def _request(
        message: pb.FuseRequest, options: _Options, timeout_s: float | None, context: Context
    ) -> FusionRequest:
        """The gateway's request for a pair. Raises InvalidInputError."""
        key = _metadata(context).get("idempotency-key")
        if key is not None and not _IDEMPOTENCY_KEY.fullmatch(key):
            raise InvalidInputError("idempotency-key: accepted are 1 to 255 printable ASCII characters without spaces")
        return options.request(
            message.vis,
            message.ir,
            timeout_s=timeout_s,
            idempotency_key=key,
            request_id=logs.request_id.get(),
            traceparent=logs.traceparent.get() or None,
        )


@dataclass(frozen=True, slots=True)
class _Options:
    """A FuseOptions message, checked. is_raw: the answer's pictures are wanted without a codec."""

    fusion: FusionOptions
    priority: Priority
    timeout_s: float | None
    is_raw: bool

    @classmethod
    def of(cls, message: pb.FuseOptions) -> _Options:
        """Raises InvalidInputError."""
        image_format = _name_of(pb.ImageFormat, message.format, "format")
        is_raw = image_format == "raw"
        named = {
            "output": _name_of(pb.Output, message.output, "output"),
            "format": "npy" if is_raw else image_format,
            "sampler": _name_of(pb.Sampler, message.sampler, "sampler"),
            "steps": message.steps if message.HasField("steps") else None,
            "vis_range": (message.vis_range.low, message.vis_range.high) if message.HasField("vis_range") else None,
            "ir_range": (message.ir_range.low, message.ir_range.high) if message.HasField("ir_range") else None,
        }
        values = {name: value for name, value in named.items() if value is not None}
        try:
            fusion = FusionOptions.model_validate({**values, "seed": message.seed})
        except ValidationError as error:
            raise InvalidInputError(problems_of(error)) from error
        priority = _name_of(pb.Priority, message.priority, "priority")
        return cls(
            fusion=fusion,
            priority=Priority.NORMAL if priority is None else Priority(priority),
            timeout_s=message.timeout_ms / 1000 if message.HasField("timeout_ms") else None,
            is_raw=is_raw,
        )

    def request(
        self,
        vis: pb.Image,
        ir: pb.Image,
        *,
        timeout_s: float | None,
        request_id: str,
        traceparent: str | None,
        idempotency_key: str | None = None,
        may_repeat: bool = False,
    ) -> FusionRequest:
        """The gateway's request for one pair. Raises InvalidInputError."""
        vis_bytes, vis_layout = _content(vis, "vis")
        ir_bytes, ir_layout = _content(ir, "ir")
        return FusionRequest(
            vis=vis_bytes,
            ir=ir_bytes,
            options=self.fusion,
            priority=self.priority,
            timeout_s=timeout_s,
            idempotency_key=idempotency_key,
            may_repeat=may_repeat,
            request_id=request_id,
            traceparent=traceparent,
            vis_layout=vis_layout,
            ir_layout=ir_layout,
        )


class _Enum(Protocol):
    """What protobuf's enum wrappers offer."""

    def Name(self, number: Any) -> str: ...  # noqa: N802
    def items(self) -> list[tuple[str, Any]]: ...


def _name_of(kind: _Enum, number: int, field: str) -> str | None:
    """The short name of an enum's value, None for the unspecified one. Raises InvalidInputError for unknown numbers."""
    prefix = kind.Name(0).removesuffix("UNSPECIFIED")
    try:
        name = kind.Name(number)
    except ValueError as error:
        accepted = ", ".join(name for name, value in kind.items() if value != 0)
        raise InvalidInputError(f"{field}: there is no value {number}; accepted are {accepted}") from error
    return None if number == 0 else name.removeprefix(prefix).lower()


def _content(image: pb.Image, role: str) -> tuple[bytes, RawLayout | None]:
    """An image's bytes, and their layout if they are raw pixels. Raises InvalidInputError."""
    match image.WhichOneof("content"):
        case "encoded":
            return image.encoded, None
        case "raw":
            raw = image.raw
        case _:
            raise InvalidInputError(f"{role}: the image is missing; vis and ir are required, encoded or raw")
    name = _name_of(pb.PixelFormat, raw.pixel_format, f"{role}.pixel_format")
    if name is None:
        raise InvalidInputError(f"{role}.pixel_format is missing; accepted are {', '.join(PixelFormat)}")
    pixel_format = PixelFormat(name)
    stride = raw.stride or raw.width * pixel_format.bytes_per_pixel
    try:
        layout = RawLayout(pixel_format=pixel_format, width=raw.width, height=raw.height, stride=stride)
    except ValidationError as error:
        raise InvalidInputError(f"{role}: {problems_of(error)}") from error
    return raw.data, layout


def fusion_of(result: FusionResult, *, is_raw: bool, started_s: float) -> pb.Fusion:
    """A result as a message. started_s: of the request, on the monotonic clock."""
    pictures = [
        pb.Picture(
            part=pb.Part.Value(f"PART_{part.name}"),
            media_type="" if is_raw else result.media_type,
            image=_raw_image(result.images[part]) if is_raw else pb.Image(encoded=result.images[part]),
        )
        for part in Part
        if part in result.images
    ]
    timings = pb.Timings(total_s=time.monotonic() - started_s)
    for stage, seconds in result.timings_s.items():
        setattr(timings, f"{stage}_s", seconds)
    return pb.Fusion(
        pictures=pictures,
        width=result.width,
        height=result.height,
        model=pb.Model(name=result.model_name, version=result.model_version),
        timings=timings,
        batch_size=result.batch_size,
        job_id=result.job_id,
        infrared_source=_SOURCES.get(result.ir_source, pb.INFRARED_SOURCE_UNSPECIFIED),
        warnings=result.warnings,
    )


def _job_id(request: pb.JobRequest) -> str:
    """The id of a job. Raises InvalidInputError."""
    if not _JOB_ID.fullmatch(request.job_id):
        raise InvalidInputError("job_id: accepted are ids as SubmitFuse gives them")
    return request.job_id


def _job_message(view: JobView) -> pb.Job:
    """A job as clients see it."""
    error = None
    if view.error_code is not None:
        error = error_detail(error_of(view.error_code, view.error_message))
    return pb.Job(
        id=view.id,
        status=pb.JobStatus.Value(f"JOB_STATUS_{view.status.name}"),
        priority=pb.Priority.Value(f"PRIORITY_{view.priority.name}"),
        attempts=view.attempts,
        created_s=view.created_s,
        deadline_s=view.deadline_s,
        finished_s=view.finished_s,
        error=error,
    )


def _raw_image(npy: bytes) -> pb.Image:
    pixels = np.load(io.BytesIO(npy), allow_pickle=False)
    pixel_format = pb.PIXEL_FORMAT_MONO8 if pixels.ndim == 2 else pb.PIXEL_FORMAT_RGB8
    height, width = pixels.shape[:2]
    stride = pixels[0].size
    return pb.Image(
        raw=pb.RawImage(pixel_format=pixel_format, width=width, height=height, stride=stride, data=pixels.tobytes())
    )


# streams


@dataclass(slots=True)
class _Arrived:
    """A frame, and when it came (monotonic seconds). In mode `latest` a newer one may take its place."""

    frame: pb.Frame
    arrived_s: float


@dataclass(frozen=True, slots=True)
class _End:
    """After the last frame: what ends the stream, None for its client's own end."""

    error: Exception | None


class _Stream:
    """One FuseStream call. Three parts run at once: one reads, one starts frames as slots get free, one answers.

    A slot is held from a frame's start until its answer has been taken by the client, so that a client that does not
    read its answers is not read from either.
    """

    def __init__(
        self,
        gateway: Gateway,
        settings: Settings,
        metrics: Metrics,
        messages: AsyncIterator[pb.FuseStreamRequest],
        traceparent: str | None,
        line: asyncio.Lock,
    ) -> None:
        self._gateway = gateway
        self._line = line
        self._settings = settings
        self._metrics = metrics
        self._messages = messages
        self._traceparent = traceparent
        self._moved_s = time.monotonic()  # when last a message came or an answer was taken
        self._waiting: _Arrived | None = None  # read, and not started yet
        self._filled = asyncio.Event()  # a frame waits, or no more will come
        self._emptied = asyncio.Event()
        self._emptied.set()
        self._end: _End | None = None
        self._is_barred = asyncio.Event()  # its key is not valid any more
        self._ordered: asyncio.Queue[tuple[_Arrived, asyncio.Task[pb.FuseStreamResponse]] | _End] = asyncio.Queue()
        self._fusing: set[asyncio.Task[pb.FuseStreamResponse]] = set()
        self._configure(pb.StreamOptions())

    async def answers(self) -> AsyncGenerator[pb.FuseStreamResponse, None]:
        """The answers, in the order of the frames. Raises what ended the stream once all before it is answered."""
        parts = [asyncio.create_task(part) for part in (self._read_until_told(), self._start_frames())]
        try:
            while not isinstance(entry := await self._ordered.get(), _End):
                arrived, task = entry
                answer = await task
                self._stamp(answer, arrived.arrived_s)
                yield answer
                self._moved_s = time.monotonic()
                self._slots.release()
            if entry.error is not None:
                raise entry.error
        finally:
            unfinished: list[asyncio.Task[Any]] = [*parts, *self._fusing]
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
            # An error's frames refer to this stream, which would keep it with all frames of both kinds in turn.
            self._ordered, self._end, self._waiting = asyncio.Queue(), None, None

    # reading

    async def _read_until_told(self) -> None:
        """Read until the sender ends, this server stops, nothing moves any more, or the sender's key has ended."""
        reading = asyncio.create_task(self._read())
        draining = asyncio.create_task(self._gateway.drain_started())
        resting = asyncio.create_task(self._idle())
        barred = asyncio.create_task(self._is_barred.wait())
        told = {draining, resting, barred}
        try:
            await asyncio.wait({reading, *told}, return_when=asyncio.FIRST_COMPLETED)
            if barred.done():
                self._finish(UnauthenticatedError("the API key of this stream is not valid any more"))
            elif not reading.done():
                stopping = UnavailableError("this server is stopping; open the stream again", retry_after_s=1.0)
                idle_s = self._settings.grpc.stream_idle_s
                idle = TimedOutError(f"no frame came for {idle_s:g} s; open the stream again when there are some")
                self._finish(stopping if draining.done() else idle)
        finally:
            for task in (reading, *told):
                task.cancel()
            await asyncio.gather(reading, *told, return_exceptions=True)

    async def _idle(self) -> None:
        """Returns once no frame is open and nothing has moved for `stream_idle_s`; never if that is 0."""
        idle_s = self._settings.grpc.stream_idle_s
        if not idle_s:
            await asyncio.Event().wait()
        while (rest_s := self._moved_s + idle_s - time.monotonic()) > 0 or self._ledger.num_open:  # noqa: ASYNC110
            await asyncio.sleep(max(rest_s, idle_s / 10))  # seldom; an event for each message would cost more

    async def _read(self) -> None:
        is_first = True
        try:
            async for message in self._messages:
                self._moved_s = time.monotonic()
                match message.WhichOneof("message"):
                    case "frame":
                        await self._accept(message.frame)
                    case "options" if is_first:
                        self._configure(message.options)
                    case "options":
                        raise InvalidInputError("options are accepted in a stream's first message only")
                    case _:
                        raise InvalidInputError("a message holds neither options nor a frame")
                is_first = False
        except Exception as error:  # noqa: BLE001 - whatever it is ends the stream, after what came before it
            self._finish(error)
        else:
            self._finish(None)

    def _configure(self, options: pb.StreamOptions) -> None:
        self._options = _Options.of(options.fuse)
        mode = _name_of(pb.FlowControl, options.flow_control, "flow_control")
        self._mode = FlowMode.ALL if mode is None else FlowMode(mode)
        most = self._settings.grpc.max_in_flight
        if options.max_in_flight > most:
            raise InvalidInputError(f"max_in_flight: accepted are at most {most}, not {options.max_in_flight}")
        default = most if self._mode is FlowMode.ALL else min(most, IN_FLIGHT_LATEST)
        self._slots = asyncio.Semaphore(options.max_in_flight or default)
        self._ledger = StreamLedger(options.resume_after if options.HasField("resume_after") else None)

    async def _accept(self, frame: pb.Frame) -> None:
        arrived = _Arrived(frame, time.monotonic())
        if not self._ledger.arrive(frame.sequence, arrived.arrived_s):
            self._count(FrameOutcome.SKIPPED)
            return
        if self._mode is FlowMode.ALL:
            await self._emptied.wait()
        elif self._waiting is not None:
            self._drop()
        self._waiting = arrived
        self._emptied.clear()
        self._filled.set()

    def _finish(self, error: Exception | None) -> None:
        if self._end is None:
            self._end = _End(error)
            self._filled.set()

    # fusing

    async def _start_frames(self) -> None:
        while True:
            await self._filled.wait()
            if self._waiting is None:
                break
            await self._slots.acquire()
            arrived, accepted = self._take_waiting(), asyncio.Event()
            task = asyncio.create_task(self._answer(arrived, accepted))
            self._fusing.add(task)
            task.add_done_callback(self._fusing.discard)
            self._ordered.put_nowait((arrived, task))
            if self._mode is FlowMode.LATEST:
                await accepted.wait()  # one frame of a stream at a time stands in line: its newest takes that place
        self._ordered.put_nowait(self._end or _End(None))

    def _take_waiting(self) -> _Arrived:
        """The frame that waits, which there must be, and room for the next."""
        assert self._waiting is not None
        arrived, self._waiting = self._waiting, None
        self._emptied.set()
        if self._end is None:
            self._filled.clear()
        return arrived

    async def _answer(self, arrived: _Arrived, accepted: asyncio.Event) -> pb.FuseStreamResponse:
        """One frame's answer. accepted: set once the frame has a place in the queue, or will not get one."""
        answer = pb.FuseStreamResponse()
        try:
            await charge()
            result = await self._fuse(arrived, accepted)
            fusion = fusion_of(result, is_raw=self._options.is_raw, started_s=arrived.arrived_s)
            answer.fusion.CopyFrom(fusion)
        except ServiceError as error:
            self._metrics.errors.labels(error.code).inc()
            answer.error.CopyFrom(error_detail(error))
            if isinstance(error, UnauthenticatedError):
                self._is_barred.set()
        except Exception:  # the process boundary of one frame
            logger.exception("frame failed", extra={"sequence": arrived.frame.sequence})
            failure = InternalError(INTERNAL_MESSAGE)
            self._metrics.errors.labels(failure.code).inc()
            answer.error.CopyFrom(error_detail(failure))
        finally:
            accepted.set()
        answer.sequence, answer.timestamp_ns = arrived.frame.sequence, arrived.frame.timestamp_ns
        return answer

    async def _fuse(self, arrived: _Arrived, accepted: asyncio.Event) -> FusionResult:
        """The frame's result. Before a full queue it stands in line with those of all streams. Raises ServiceError."""
        pause_s, longest_s = RETRY_S
        is_refused = is_first = False

        def step_out() -> None:
            nonlocal is_first
            if is_first:
                is_first = False
                self._line.release()

        def leave() -> None:
            accepted.set()
            step_out()

        try:
            while True:
                if not is_first and (is_refused or self._line.locked()) and self._is_possible(arrived.frame):
                    await self._stand_in_line(arrived)
                    is_first = True
                if self._mode is FlowMode.LATEST and self._waiting is not None and is_first:
                    newest = self._take_waiting()
                    arrived.frame, arrived.arrived_s = newest.frame, newest.arrived_s
                    self._drop()
                try:
                    return await self._gateway.fuse(self._request(arrived), leave)
                except OverloadedError as error:
                    is_refused, is_large = True, isinstance(error, NoRoomError)
                if is_large:
                    step_out()  # and to the end of the line: smaller frames behind this one may fit
                if is_first or is_large:
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, longest_s)
        finally:
            leave()

    async def _stand_in_line(self, arrived: _Arrived) -> None:
        """Returns as the first in the line. Raises TimedOutError at the frame's deadline."""
        timeout_s = self._timeout_s(arrived.frame)
        remaining_s = arrived.arrived_s + timeout_s - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, remaining_s)):
                await self._line.acquire()
        except TimeoutError as error:
            raise TimedOutError("the frame's deadline passed before it could be queued") from error

    def _is_possible(self, frame: pb.Frame) -> bool:
        """Whether the gateway will accept the frame's timeout; it is to refuse it, not the line."""
        return 0 < self._timeout_s(frame) <= self._settings.jobs.max_timeout_s

    def _timeout_s(self, frame: pb.Frame) -> float:
        asked_s = frame.timeout_ms / 1000 if frame.HasField("timeout_ms") else self._options.timeout_s
        return self._settings.jobs.default_timeout_s if asked_s is None else asked_s

    def _request(self, arrived: _Arrived) -> FusionRequest:
        """The gateway's request for a frame. Raises TimedOutError, InvalidInputError."""
        frame, timeout_s = arrived.frame, self._timeout_s(arrived.frame)
        passed_s = time.monotonic() - arrived.arrived_s
        if 0 < timeout_s <= passed_s:
            raise TimedOutError("the frame's deadline passed before it could be queued")
        return self._options.request(
            frame.vis,
            frame.ir,
            # What the gateway will refuse, it must see as it was asked for.
            timeout_s=timeout_s if timeout_s > self._settings.jobs.max_timeout_s else timeout_s - passed_s,
            may_repeat=True,  # a frame has one result, however often it is computed
            request_id=f"{logs.request_id.get()}.{frame.sequence}",
            traceparent=self._traceparent,
        )

    # counting

    def _stamp(self, answer: pb.FuseStreamResponse, arrived_s: float) -> None:
        """Count an answer, and write into it what is only known when it is its turn."""
        now_s = time.monotonic()
        answer.age_s = now_s - arrived_s
        if (previous := self._ledger.previous_sequence) is not None:
            answer.previous_sequence = previous
        is_fused = answer.WhichOneof("outcome") == "fusion"
        self._ledger.answer(answer.sequence, is_fused=is_fused, age_s=answer.age_s, now_s=now_s)
        answer.stats.CopyFrom(pb.StreamStats(**asdict(self._ledger.snapshot(now_s))))
        self._count(FrameOutcome.FUSED if is_fused else FrameOutcome.FAILED)

    def _drop(self) -> None:
        self._ledger.drop()
        self._count(FrameOutcome.DROPPED)

    def _count(self, outcome: FrameOutcome) -> None:
        self._metrics.stream_frames.labels(self._mode, outcome).inc()
