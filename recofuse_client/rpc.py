"""gRPC: messages of proto/recofuse/v1 out and back, statuses with an ErrorDetail for errors.

What a newcomer would get wrong: UNAVAILABLE with an ErrorDetail is the server's own refusal, without one it is gRPC's
word for a connection that could not be made or that broke, and only the text tells which. A broken one may have carried
the request out, so whatever is not known to be the harmless kind is taken for the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2
from numpy.typing import NDArray

from recofuse_client.errors import (
    BadAnswerError,
    CancelledError,
    ConnectionFailedError,
    ConnectionLostError,
    InternalError,
    OverloadedError,
    PayloadTooLargeError,
    PermissionDeniedError,
    RecofuseError,
    RouteNotFoundError,
    TimedOutError,
    UnauthenticatedError,
    error_of,
)
from recofuse_client.pictures import ImageLike, checked_array, file_of, npy_pixels, png_of
from recofuse_client.protocols import Target
from recofuse_client.retries import Operation, Send
from recofuse_client.values import (
    Alarm,
    Alignment,
    Fusion,
    Health,
    Job,
    JobStatus,
    Model,
    Options,
    Part,
    Picture,
    Region,
    Rig,
    Timings,
    Unit,
    Values,
    ir_source_of,
    rig_text,
    unit_of,
)
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["FusionService"].full_name
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
NPY = "application/x-npy"

_ANSWERS: dict[str, Any] = {  # of unary methods
    f"/{SERVICE}/Fuse": pb.FuseResponse,
    f"/{SERVICE}/SubmitFuse": pb.Job,
    f"/{SERVICE}/GetJob": pb.Job,
    f"/{SERVICE}/GetJobResult": pb.FuseResponse,
    f"/{SERVICE}/CancelJob": pb.Job,
    f"/{SERVICE}/ListModels": pb.ListModelsResponse,
    f"/{SERVICE}/ListRigs": pb.ListRigsResponse,
    HEALTH_CHECK: health_pb2.HealthCheckResponse,
}
_IR_SOURCES: dict[int, str] = {
    number: name.removeprefix("INFRARED_SOURCE_").lower() for name, number in pb.InfraredSource.items()
}
# What a status without an ErrorDetail means: gRPC's own, or that of a proxy in between.
_OF_GRPC: dict[grpc.StatusCode, type[RecofuseError]] = {
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.DEADLINE_EXCEEDED: TimedOutError,
    grpc.StatusCode.INTERNAL: InternalError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.UNIMPLEMENTED: RouteNotFoundError,
}
# How gRPC describes a call that never left, since no connection could be made for it.
_NEVER_LEFT = ("failed to connect to all addresses", "DNS resolution failed", "empty address list")
# How it describes a call whose connection broke, beside UNAVAILABLE.
_BROKEN = ("RST_STREAM", "Stream removed", "Internal error from Core")
# How it describes a call that its own side gave up.
_GIVEN_UP_HERE = "Locally cancelled"


@dataclass(frozen=True, slots=True)
class GrpcRequest:
    """A call: method with its service's name, message, metadata."""

    method: str
    message: Any
    metadata: tuple[tuple[str, str], ...] = field(default_factory=tuple)


ImagePair = tuple[pb.Image, pb.Image]


class GrpcProtocol:
    """How each call is put, and what its answer means. See `recofuse_client.protocols.ApiProtocol`."""

    def prepare(self, vis: ImageLike, ir: ImageLike, *, bgr: bool) -> ImagePair:
        """Both images as messages: pixels raw, which costs no codec, and files as they are."""
        return image_message(vis, "vis", bgr=bgr), image_message(ir, "ir", bgr=bgr)

    def fuse(
        self, pair: ImagePair, options: Options, key: str | None, timeout_s: float
    ) -> Operation[GrpcRequest, Fusion]:
        """Fuse. The call's deadline is the job's."""
        request = _request("Fuse", pb.FuseRequest(vis=pair[0], ir=pair[1], options=options_message(options)), key)
        answer = yield Send(request, timeout_s)
        return fusion_of(answer.fusion, answer.request_id)

    def submit(
        self, pair: ImagePair, options: Options, key: str, job_timeout_s: float | None, timeout_s: float
    ) -> Operation[GrpcRequest, Job]:
        """SubmitFuse."""
        chosen = options_message(options, job_timeout_s)
        answer = yield Send(
            _request("SubmitFuse", pb.FuseRequest(vis=pair[0], ir=pair[1], options=chosen), key), timeout_s
        )
        return _job(answer)

    def job(self, job_id: str, timeout_s: float) -> Operation[GrpcRequest, Job]:
        """GetJob."""
        return _job((yield Send(_request("GetJob", pb.JobRequest(job_id=job_id)), timeout_s)))

    def result(self, job_id: str, timeout_s: float) -> Operation[GrpcRequest, Fusion]:
        """GetJobResult."""
        answer = yield Send(_request("GetJobResult", pb.JobRequest(job_id=job_id)), timeout_s)
        return fusion_of(answer.fusion, answer.request_id)

    def cancel(self, job_id: str, timeout_s: float) -> Operation[GrpcRequest, Job]:
        """CancelJob."""
        return _job((yield Send(_request("CancelJob", pb.JobRequest(job_id=job_id)), timeout_s)))

    def models(self, timeout_s: float) -> Operation[GrpcRequest, list[Model]]:
        """ListModels."""
        answer = yield Send(_request("ListModels", pb.ListModelsRequest()), timeout_s)
        return [
            Model(
                name=model.name,
                version=model.version,
                default_steps=model.default_steps,
                default_sampler=model.default_sampler,
                devices=tuple(model.devices),
                num_workers=model.num_workers,
                # A server of an older release does not say, and knows this one alone.
                default_exposure=model.default_exposure or "as_shot",
                exposures=tuple(model.exposures) or ("as_shot",),
            )
            for model in answer.models
        ]

    def rigs(self, timeout_s: float) -> Operation[GrpcRequest, list[Rig]]:
        """ListRigs."""
        answer = yield Send(_request("ListRigs", pb.ListRigsRequest()), timeout_s)
        return [
            Rig(
                name=rig.name,
                vis_size=(rig.vis_width, rig.vis_height),
                ir_size=(rig.ir_width, rig.ir_height),
                overlap=rig.overlap,
                is_sure=rig.is_sure,
                spread_px=rig.spread_px,
                residual_px=rig.residual_px,
                num_pairs=rig.num_pairs,
                method=rig.method,
                date=rig.date,
                matrix=tuple(rig.matrix),
                has_distortion=rig.has_distortion,
                parallax_px=rig.parallax_px if rig.HasField("parallax_px") else None,
            )
            for rig in answer.rigs
        ]

    def health(self, timeout_s: float) -> Operation[GrpcRequest, Health]:
        """The standard health service, which gives no reasons."""
        answer = yield Send(GrpcRequest(HEALTH_CHECK, health_pb2.HealthCheckRequest(service=SERVICE)), timeout_s)
        is_ready = answer.status == health_pb2.HealthCheckResponse.SERVING
        return Health(is_ready, "ready" if is_ready else "the health service does not say why")


def _request(method: str, message: Any, key: str | None = None) -> GrpcRequest:
    return GrpcRequest(f"/{SERVICE}/{method}", message, () if key is None else (("idempotency-key", key),))


def image_message(image: ImageLike, role: str, *, bgr: bool) -> pb.Image:
    """An image as a message. Raises like `recofuse_client.pictures.file_of`."""
    if not isinstance(image, np.ndarray):
        return pb.Image(encoded=file_of(image, role))
    array = checked_array(image, role)
    is_deep, is_colour = array.dtype == np.uint16, array.ndim == 3
    if is_deep and is_colour:  # the contract has no raw format for it
        return pb.Image(encoded=png_of(array, role, bgr=bgr))
    if is_colour:
        pixel_format = pb.PIXEL_FORMAT_BGR8 if bgr else pb.PIXEL_FORMAT_RGB8
    else:
        pixel_format = pb.PIXEL_FORMAT_MONO16 if is_deep else pb.PIXEL_FORMAT_MONO8
    height, width = array.shape[:2]
    data = (array.astype("<u2", copy=False) if is_deep else array).tobytes()
    return pb.Image(raw=pb.RawImage(pixel_format=pixel_format, width=width, height=height, data=data))


def options_message(options: Options, timeout_s: float | None = None) -> pb.FuseOptions:
    """Options as a message. Raises ValueError for names that the contract does not have, TypeError for odd numbers."""
    image_format = "raw" if options.format == "array" else options.format
    message = pb.FuseOptions(
        output=pb.Output.Value(f"OUTPUT_{options.output.upper()}"),
        format=pb.ImageFormat.Value(f"IMAGE_FORMAT_{image_format.upper()}"),
        steps=options.steps,
        sampler=pb.SAMPLER_UNSPECIFIED
        if options.sampler is None
        else pb.Sampler.Value(f"SAMPLER_{options.sampler.upper()}"),
        exposure=pb.EXPOSURE_UNSPECIFIED
        if options.exposure is None
        else pb.Exposure.Value(f"EXPOSURE_{options.exposure.upper()}"),
        rig="" if options.rig is None else rig_text(options.rig),
        align=pb.Align.Value(f"ALIGN_{options.align.upper()}"),
        colour=pb.Colour.Value(f"COLOUR_{options.colour.upper()}"),
        values=pb.ValuesFormat.Value(f"VALUES_FORMAT_{(options.values or 'unspecified').upper()}"),
        alarm="" if options.alarm is None else str(options.alarm),
        outline=options.outline,
        keep_metadata=options.metadata == "keep",
        seed=options.seed,
        priority=pb.Priority.Value(f"PRIORITY_{options.priority.upper()}"),
        timeout_ms=None if timeout_s is None else max(1, round(timeout_s * 1000)),
    )
    if options.vis_range is not None:
        message.vis_range.low, message.vis_range.high = options.vis_range
    if options.ir_range is not None:
        message.ir_range.low, message.ir_range.high = options.ir_range
    if options.colour_range is not None:
        message.colour_range.low, message.colour_range.high = options.colour_range
    if options.degrees is not None:
        message.degrees.gain, message.degrees.offset = options.degrees
    return message


def fusion_of(message: pb.Fusion, request_id: str) -> Fusion:
    """The server's answer. Raises BadAnswerError."""
    pictures = {}
    for picture in message.pictures:
        try:
            part = Part(pb.Part.Name(picture.part).removeprefix("PART_").lower())
        except ValueError as error:
            raise BadAnswerError(f"the answer has a picture of unknown kind {picture.part}") from error
        pictures[part] = _picture(part, picture)
    timings = message.timings
    return Fusion(
        pictures=pictures,
        model_name=message.model.name,
        model_version=message.model.version,
        timings=Timings(timings.decode_s, timings.queue_s, timings.batch_s, timings.model_s, timings.encode_s),
        job_id=message.job_id,
        request_id=request_id,
        ir_source=ir_source_of(_IR_SOURCES.get(message.infrared_source, "")),
        warnings=tuple(message.warnings),
        values=Values(message.values_type, _unit(message.values_unit), message.values) if message.values else None,
        alarm=_alarm(message.alarm) if message.HasField("alarm") else None,
        alignment=_alignment(message.alignment) if message.HasField("alignment") else None,
    )


def _alignment(message: pb.Alignment) -> Alignment:
    return Alignment(message.residual_px if message.HasField("residual_px") else None, message.moved_px)


def _alarm(message: pb.Alarm) -> Alarm:
    regions = [
        Region(
            box=(region.left, region.top, region.width, region.height),
            area=region.area,
            hottest=region.hottest,
            centroid=(region.centroid_x, region.centroid_y),
        )
        for region in message.regions
    ]
    return Alarm(
        threshold=message.threshold,
        unit=_unit(message.unit),
        num_regions=message.num_regions,
        area=message.area,
        hottest=message.hottest if message.HasField("hottest") else None,
        regions=tuple(regions),
    )


def _unit(number: pb.Unit.ValueType) -> Unit:
    """Raises BadAnswerError."""
    try:
        return unit_of(pb.Unit.Name(number).removeprefix("UNIT_").lower())
    except ValueError as error:
        raise BadAnswerError(f"the answer has values in an unknown unit {number}") from error


def _picture(part: Part, picture: pb.Picture) -> Picture:
    if picture.image.HasField("raw"):
        return Picture(part, "", _raw_pixels(picture.image.raw))
    if picture.media_type == NPY:
        return Picture(part, "", npy_pixels(picture.image.encoded))
    return Picture(part, picture.media_type, picture.image.encoded)


def _raw_pixels(raw: pb.RawImage) -> NDArray[np.uint8]:
    channels = {pb.PIXEL_FORMAT_MONO8: 1, pb.PIXEL_FORMAT_RGB8: 3}.get(raw.pixel_format)
    row_bytes = raw.width * (channels or 0)
    stride = raw.stride or row_bytes
    if not channels or not row_bytes or stride < row_bytes or len(raw.data) < stride * (raw.height - 1) + row_bytes:
        raise BadAnswerError("the answer has a raw picture whose layout does not fit its bytes")
    rows = np.lib.stride_tricks.as_strided(
        np.frombuffer(raw.data, np.uint8), (raw.height, row_bytes), (stride, 1), writeable=False
    )
    pixels = rows.reshape(raw.height, raw.width, channels) if channels > 1 else rows
    return pixels.copy()  # writeable, and free of the message


def _job(message: pb.Job) -> Job:
    def time_of(name: str) -> datetime | None:
        return datetime.fromtimestamp(getattr(message, name), UTC) if message.HasField(name) else None  # type: ignore[arg-type]

    try:
        status = JobStatus(pb.JobStatus.Name(message.status).removeprefix("JOB_STATUS_").lower())
        priority: Any = pb.Priority.Name(message.priority).removeprefix("PRIORITY_").lower()
    except ValueError as error:
        raise BadAnswerError("the description of a job cannot be understood") from error
    return Job(
        id=message.id,
        status=status,
        priority=priority,
        attempts=message.attempts,
        created_at=datetime.fromtimestamp(message.created_s, UTC),
        deadline_at=time_of("deadline_s"),
        finished_at=time_of("finished_s"),
        error=error_of_detail(message.error) if message.HasField("error") else None,
    )


# errors


def error_of_detail(detail: pb.ErrorDetail) -> RecofuseError:
    """The error that the server describes."""
    advice_s = detail.retry_after_s if detail.HasField("retry_after_s") else None
    return error_of(detail.code, detail.message, request_id=detail.request_id, retry_after_s=advice_s)


def error_of_call(error: grpc.RpcError) -> RecofuseError:
    """What a call ended with, as an error of this package."""
    call: Any = error  # what is raised is also the call
    detail, request_id = _detail_of(call.trailing_metadata())
    if detail is not None:
        return error_of_detail(detail)
    code, text = call.code(), call.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE:
        if any(words in text for words in _NEVER_LEFT):
            return ConnectionFailedError(f"no connection to the server: {text}")
        return ConnectionLostError(f"the connection was lost while the server was at work: {text}")
    if any(words in text for words in _BROKEN):
        return ConnectionLostError(f"the connection was lost while the server was at work: {text}")
    if code is grpc.StatusCode.CANCELLED and _GIVEN_UP_HERE not in text:
        # A service that means a job says so in a detail; this is gRPC's core, in the moment in which a server closes.
        return ConnectionLostError(f"the connection was lost while the server was at work: {text}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:  # gRPC's limits: one of sizes, the other of calls at once
        if "larger than max" in text:
            return PayloadTooLargeError(text, request_id=request_id)
        return OverloadedError(text, request_id=request_id)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimedOutError("there was no answer before the deadline", request_id=request_id)
    kind = _OF_GRPC.get(code, BadAnswerError)
    return kind(f"{text} ({code.name})", request_id=request_id)


def _detail_of(metadata: Any) -> tuple[pb.ErrorDetail | None, str]:
    """The ErrorDetail in trailing metadata, if there is one, and the request's id."""
    pairs = dict(tuple(metadata or ()))
    request_id = str(pairs.get("x-request-id", ""))
    packed = pairs.get("grpc-status-details-bin")
    if packed is None:
        return None, request_id
    detail = pb.ErrorDetail()
    try:
        is_there = any(entry.Unpack(detail) for entry in Status.FromString(packed).details)
    except DecodeError:
        return None, request_id
    return (detail, request_id) if is_there else (None, request_id)


# connections


def channel_arguments(target: Target) -> tuple[str, grpc.ChannelCredentials | None, list[tuple[str, Any]]]:
    """Address, credentials and options of a channel. Raises OSError for TLS files that cannot be read."""
    credentials = None
    if target.has_tls:
        ca, key, cert = target.tls_files()
        credentials = grpc.ssl_channel_credentials(ca, key, cert)
    options = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        ("grpc.enable_http_proxy", int(target.trust_env)),
        ("grpc.keepalive_time_ms", 20_000),  # above the server's min_ping_interval_s
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 0),
        # After a failure; gRPC's own 1 s to 2 min would make a restarted server look dead.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.primary_user_agent", "recofuse-client"),
    ]
    return target.address, credentials, options


def call_metadata(target: Target, extra: tuple[tuple[str, str], ...] = ()) -> tuple[tuple[str, str], ...]:
    """A call's metadata with the API key."""
    return (("authorization", f"Bearer {target.api_key}"), *extra) if target.api_key else extra


class GrpcConnection:
    """Makes calls, blocking. One may serve many threads."""

    def __init__(self, target: Target) -> None:
        address, credentials, options = channel_arguments(target)
        self.channel = (
            grpc.insecure_channel(address, options)
            if credentials is None
            else grpc.secure_channel(address, credentials, options)
        )
        self._target = target
        self._methods: dict[str, Any] = {
            name: self.channel.unary_unary(name, None, answer.FromString) for name, answer in _ANSWERS.items()
        }

    def send(self, request: GrpcRequest, timeout_s: float) -> Any:
        """The answer's message. Raises RecofuseError."""
        data = request.message.SerializeToString()
        metadata = call_metadata(self._target, (*request.metadata, _announcement(data)))
        try:
            return self._methods[request.method](data, timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            raise error_of_call(error) from error

    def close(self) -> None:
        """Close the connection; calls that still run end."""
        self.channel.close()


class AsyncGrpcConnection:
    """Makes calls, awaiting. Belongs to one event loop: the one that is running when it is made."""

    def __init__(self, target: Target) -> None:
        address, credentials, options = channel_arguments(target)
        self.channel = (
            grpc.aio.insecure_channel(address, options)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options)
        )
        self._target = target
        self._methods: dict[str, Any] = {
            name: self.channel.unary_unary(name, None, answer.FromString) for name, answer in _ANSWERS.items()
        }

    async def send(self, request: GrpcRequest, timeout_s: float) -> Any:
        """The answer's message. Raises RecofuseError."""
        data = request.message.SerializeToString()
        metadata = call_metadata(self._target, (*request.metadata, _announcement(data)))
        try:
            return await self._methods[request.method](data, timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            raise error_of_call(error) from error

    async def close(self) -> None:
        """Close the connection; calls that still run end."""
        await self.channel.close(None)


def _announcement(data: bytes) -> tuple[str, str]:
    """The size of a message, so that a server need not keep room for the largest that there may be."""
    return "recofuse-request-bytes", str(len(data))
