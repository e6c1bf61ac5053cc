"""Messages of proto/recofuse/v1 to what the gateway takes, and what it gives to messages."""

from __future__ import annotations

import io
import re
import time
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import grpc
import numpy as np
from pydantic import ValidationError

from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from recofuse_rigs.rig import Rig
from service.faces.gateway import FusionRequest
from service.terms.errors import InvalidInputError, ServiceError, error_of
from service.terms.jobs import (
    FusionOptions,
    FusionResult,
    IrSource,
    JobView,
    Part,
    PixelFormat,
    Priority,
    RawLayout,
)
from service.terms.measures import Alarm, Unit
from service.terms.records import problems_of
from service.watch import logs

Range = tuple[float, float]

_JOB_ID = re.compile(r"[0-9a-zA-Z_-]{1,64}")
_SOURCES = {source: pb.InfraredSource.Value(f"INFRARED_SOURCE_{source.upper()}") for source in get_args(IrSource)}

_UNITS: dict[Unit | None, pb.Unit.ValueType] = {"counts": pb.UNIT_COUNTS, "celsius": pb.UNIT_CELSIUS}


# what comes


@dataclass(frozen=True, slots=True)
class CheckedOptions:
    """A FuseOptions message, checked. is_raw: the answer's pictures are wanted without a codec.

    rig: as it was asked for; the gateway judges it, which knows the sizes.
    """

    fusion: FusionOptions
    priority: Priority
    timeout_s: float | None
    is_raw: bool
    rig: str

    @classmethod
    def of(cls, message: pb.FuseOptions) -> CheckedOptions:
        """Raises InvalidInputError."""
        image_format = name_of(pb.ImageFormat, message.format, "format")
        is_raw = image_format == "raw"
        named = {
            "output": name_of(pb.Output, message.output, "output"),
            "format": "npy" if is_raw else image_format,
            "sampler": name_of(pb.Sampler, message.sampler, "sampler"),
            "exposure": name_of(pb.Exposure, message.exposure, "exposure"),
            "align": name_of(pb.Align, message.align, "align"),
            "colour": name_of(pb.Colour, message.colour, "colour"),
            "colour_range": _range_of(message, "colour_range"),
            "values": name_of(pb.ValuesFormat, message.values, "values"),
            "degrees": (message.degrees.gain, message.degrees.offset) if message.HasField("degrees") else None,
            "alarm": message.alarm or None,
            "outline": message.outline,
            "metadata": "keep" if message.keep_metadata else "drop",
            "steps": message.steps if message.HasField("steps") else None,
            "vis_range": _range_of(message, "vis_range"),
            "ir_range": _range_of(message, "ir_range"),
        }
        values = {name: value for name, value in named.items() if value is not None}
        try:
            fusion = FusionOptions.model_validate({**values, "seed": message.seed})
        except ValidationError as error:
            raise InvalidInputError(problems_of(error)) from error
        priority = name_of(pb.Priority, message.priority, "priority")
        return cls(
            fusion=fusion,
            priority=Priority.NORMAL if priority is None else Priority(priority),
            timeout_s=message.timeout_ms / 1000 if message.HasField("timeout_ms") else None,
            is_raw=is_raw,
            rig=message.rig,
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
        vis_bytes, vis_layout = content_of(vis, "vis")
        ir_bytes, ir_layout = content_of(ir, "ir")
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
            rig=self.rig,
        )


def _range_of(message: pb.FuseOptions, name: Literal["vis_range", "ir_range", "colour_range"]) -> Range | None:
    if not message.HasField(name):
        return None
    given = getattr(message, name)
    return given.low, given.high


class _Enum(Protocol):
    """What protobuf's enum wrappers offer."""

    def Name(self, number: Any) -> str: ...  # noqa: N802
    def items(self) -> list[tuple[str, Any]]: ...


def name_of(kind: _Enum, number: int, field: str) -> str | None:
    """The short name of an enum's value, None for the unspecified one. Raises InvalidInputError for unknown numbers."""
    prefix = kind.Name(0).removesuffix("UNSPECIFIED")
    try:
        name = kind.Name(number)
    except ValueError as error:
        accepted = ", ".join(name for name, value in kind.items() if value != 0)
        raise InvalidInputError(f"{field}: there is no value {number}; accepted are {accepted}") from error
    return None if number == 0 else name.removeprefix(prefix).lower()


def content_of(image: pb.Image, role: str) -> tuple[bytes, RawLayout | None]:
    """An image's bytes, and their layout if they are raw pixels. Raises InvalidInputError."""
    match image.WhichOneof("content"):
        case "encoded":
            return image.encoded, None
        case "raw":
            raw = image.raw
        case _:
            raise InvalidInputError(f"{role}: the image is missing; vis and ir are required, encoded or raw")
    name = name_of(pb.PixelFormat, raw.pixel_format, f"{role}.pixel_format")
    if name is None:
        raise InvalidInputError(f"{role}.pixel_format is missing; accepted are {', '.join(PixelFormat)}")
    pixel_format = PixelFormat(name)
    stride = raw.stride or raw.width * pixel_format.bytes_per_pixel
    try:
        layout = RawLayout(pixel_format=pixel_format, width=raw.width, height=raw.height, stride=stride)
    except ValidationError as error:
        raise InvalidInputError(f"{role}: {problems_of(error)}") from error
    return raw.data, layout


def job_id_of(request: pb.JobRequest) -> str:
    """The id of a job. Raises InvalidInputError."""
    if not _JOB_ID.fullmatch(request.job_id):
        raise InvalidInputError("job_id: accepted are ids as SubmitFuse gives them")
    return request.job_id


# what goes


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
        values=result.values,
        values_type=result.values_type,
        values_unit=_UNITS.get(result.values_unit, pb.UNIT_UNSPECIFIED),
        alarm=None if result.alarm is None else _alarm_message(result.alarm),
        alignment=None if result.alignment is None else pb.Alignment(**result.alignment.model_dump()),
    )


def _alarm_message(alarm: Alarm) -> pb.Alarm:
    regions = []
    for region in alarm.regions:
        left, top, width, height = region.box
        x, y = region.centroid
        regions.append(
            pb.Region(
                left=left,
                top=top,
                width=width,
                height=height,
                area=region.area,
                hottest=region.hottest,
                centroid_x=x,
                centroid_y=y,
            )
        )
    return pb.Alarm(
        threshold=alarm.threshold,
        unit=_UNITS[alarm.unit],
        num_regions=alarm.num_regions,
        area=alarm.area,
        hottest=alarm.hottest,
        regions=regions,
    )


def job_message(view: JobView) -> pb.Job:
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


def rig_message(rig: Rig) -> pb.Rig:
    """A rig as clients see it."""
    told = ("name", "is_sure", "spread_px", "residual_px", "num_pairs", "method", "date", "matrix", "parallax_px")
    (vis_width, vis_height), (ir_width, ir_height) = rig.vis_size, rig.ir_size
    return pb.Rig(
        vis_width=vis_width,
        vis_height=vis_height,
        ir_width=ir_width,
        ir_height=ir_height,
        overlap=round(rig.overlap, 3),
        has_distortion=rig.distortion is not None,
        **{name: getattr(rig, name) for name in told},
    )


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


def _raw_image(npy: bytes) -> pb.Image:
    pixels = np.load(io.BytesIO(npy), allow_pickle=False)
    pixel_format = pb.PIXEL_FORMAT_MONO8 if pixels.ndim == 2 else pb.PIXEL_FORMAT_RGB8
    height, width = pixels.shape[:2]
    stride = pixels[0].size
    return pb.Image(
        raw=pb.RawImage(pixel_format=pixel_format, width=width, height=height, stride=stride, data=pixels.tobytes())
    )
