"""What crosses the queue: a job on its way in, a result on its way out, and their exact bytes.

The bytes are explicit and safe to read from anyone: a magic word, the length of a JSON header, the header, then the raw
payloads one after the other, with their lengths in the header. Nothing is pickled.

A queue that stores payloads apart from the header (Redis side keys) uses `FusionJob.header_bytes` and
`FusionJob.from_parts`; `to_bytes` and `from_bytes` join both. Times are Unix seconds, because they cross hosts.
"""

from __future__ import annotations

import hashlib
import secrets
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    Base64Bytes,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from recofuse_rigs.errors import BadRigError
from service.terms.errors import ErrorCode, MalformedRequestError, ServiceError, error_of
from service.terms.measures import Alarm, AlarmText, Alignment, Unit, ValuesFormat
from service.terms.records import announced, cut_apart, joined, parsed_header, pieces_of

if TYPE_CHECKING:
    from recofuse_rigs.rig import Rig  # brings NumPy, which the command's help goes without

JOB_MAGIC = b"RFJ1"
RESULT_MAGIC = b"RFR1"
MAX_WARNINGS = 5  # of a result, and their length: they travel as HTTP headers, of which proxies take few kilobytes
MAX_WARNING_CHARS = 240


class JobStatus(StrEnum):
    """Where a job stands. The last four are final and never change again."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_final(self) -> bool:
        """Whether the status can no longer change."""
        return self not in (JobStatus.QUEUED, JobStatus.RUNNING)


class Priority(StrEnum):
    """Priority classes, most urgent first; one Redis stream each."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"

    @property
    def rank(self) -> int:
        """0 for the most urgent class."""
        return list(Priority).index(self)


class Output(StrEnum):
    """What a request may ask for."""

    FUSED = "fused"
    VIS = "vis"
    IR = "ir"
    ALL = "all"

    @property
    def parts(self) -> tuple[Part, ...]:
        """The single pictures that this asks for, in the order of the answer."""
        return tuple(Part) if self is Output.ALL else (Part(self.value),)


class Part(StrEnum):
    """One picture of an answer: the fusion, or one of the two restored images."""

    FUSED = "fused"
    VIS = "vis"
    IR = "ir"


class ImageFormat(StrEnum):
    """Encodings of the answer."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"
    NPY = "npy"

    @property
    def media_type(self) -> str:
        """The MIME type of one picture in this format."""
        return "application/x-npy" if self is ImageFormat.NPY else f"image/{self.value}"


class PixelFormat(StrEnum):
    """Layouts of raw frames (streams and tensors); encoded files carry their own."""

    MONO8 = "mono8"
    MONO16 = "mono16"  # little endian
    RGB8 = "rgb8"
    BGR8 = "bgr8"
    NV12 = "nv12"  # video-range YUV 4:2:0 (BT.601), even width and height

    @property
    def bytes_per_pixel(self) -> int:
        """Bytes of one pixel in a row; of NV12, in a row of either plane."""
        return {PixelFormat.MONO16: 2, PixelFormat.RGB8: 3, PixelFormat.BGR8: 3}.get(self, 1)


class Stage(StrEnum):
    """The parts of a request's time, in order."""

    DECODE = "decode"
    QUEUE = "queue"
    BATCH = "batch"
    MODEL = "model"
    ENCODE = "encode"


Sampler = Literal["euler", "posterior", "ode1", "ode2"]

# What "restored" means for the visible picture: the levels as they came, or a well exposed photograph
# (docs/decisions/0015). Weights without an exposure estimator offer the first alone.
Exposure = Literal["as_shot", "lit"]

# The colours of the fused picture: its own, grey, or infrared in a palette over the visible luma.
Colour = Literal["natural", "grey", "white_hot", "iron", "rainbow"]
OVERLAYS: tuple[Colour, ...] = ("white_hot", "iron", "rainbow")

# Where infrared lies: as its rig says, or by what each frame shows that the rig leaves, too.
Align = Literal["rig", "refine"]

# What requests that name none get, of weights that offer it. To change it, change it here alone.
DEFAULT_EXPOSURE: Exposure = "lit"

# What was read of an infrared file: the counts or temperatures embedded in a thermal camera's JPEG, a false-colour
# picture turned back into intensity, or its grey values.
IrSource = Literal["raw", "palette", "grey"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FusionOptions(_Strict):
    """What the caller may choose about the computation and the answer.

    steps, sampler, exposure: None asks for the model's own default. vis_range, ir_range: the source values (lowest,
    highest) that become black and white in the visible and in the infrared image, in place of the automatic choice.
    colour: of the fused picture. colour_range: the infrared values between which an overlay goes from nothing to full.
    values: the restored infrared in the values of its source, as a file beside the pictures. degrees: (gain, offset),
    by which degrees Celsius are gain * value + offset of the source's values. alarm: 60C, or 8200 in the source's
    values; what is hotter is told. outline: whether that is drawn into the fused picture, too.
    metadata: whether what the files say of themselves (camera, time, place) goes into the pictures of the answer.
    align: whether what the rig leaves is measured in each frame and put right; without a rig, the pair is one.
    """

    output: Output = Output.FUSED
    format: ImageFormat = ImageFormat.PNG
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    sampler: Sampler | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    vis_range: tuple[float, float] | None = None
    ir_range: tuple[float, float] | None = None
    exposure: Exposure | None = None
    colour: Colour = "natural"
    colour_range: tuple[float, float] | None = None
    values: ValuesFormat | None = None
    degrees: tuple[float, float] | None = None
    alarm: AlarmText | None = None
    outline: bool = False
    metadata: Literal["drop", "keep"] = "drop"
    align: Align = "rig"

    @property
    def is_measured(self) -> bool:
        """Whether the values of the infrared image are needed: for a file, an alarm, or colours by a range of them."""
        is_coloured = self.colour_range is not None and Part.FUSED in self.output.parts
        return self.values is not None or self.alarm is not None or is_coloured

    @model_validator(mode="after")
    def _ranges_ascend(self) -> Self:
        for name, given, example in (
            ("vis_range", self.vis_range, "0,4095"),
            ("ir_range", self.ir_range, "7000,9500"),
            ("colour_range", self.colour_range, "8200,9500"),
        ):
            if given is not None and not given[0] < given[1]:
                raise ValueError(f"{name} takes two numbers, the lower one first, such as {example}")
        if self.colour_range is not None and self.colour not in OVERLAYS:
            raise ValueError(f"colour_range goes with colour={', '.join(OVERLAYS)}, not with {self.colour}")
        if self.degrees is not None and not self.degrees[0]:
            raise ValueError("degrees takes a gain that is not 0, and an offset, such as 0.04,-273.15")
        if self.degrees is not None and self.values == "png":
            raise ValueError("values: png holds whole counts; with degrees, accepted are npy and tiff")
        if self.outline and self.alarm is None:
            raise ValueError("outline goes with an alarm, such as alarm=60C")
        if self.metadata == "keep" and self.format is ImageFormat.NPY:
            raise ValueError("metadata: pixels without a file keep none; accepted are png, jpeg and webp")
        return self

    @model_serializer(mode="wrap")
    def _without_news(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # An older worker refuses a job with options that it does not know, so those that ask for nothing stay at home.
        values: dict[str, Any] = serialise(self)
        for name, default in _NEWS.items():
            if values[name] == default:
                del values[name]
        return values


_NEWS = {
    name: FusionOptions.model_fields[name].default
    for name in (
        "vis_range", "exposure", "colour", "colour_range", "values", "degrees", "alarm", "outline", "metadata", "align"
    )
}  # fmt: skip


class RawLayout(_Strict):
    """How to read a raw frame. stride: bytes from one row to the next, at least the row's own bytes."""

    pixel_format: PixelFormat
    width: Annotated[int, Field(ge=1, le=1 << 20)]
    height: Annotated[int, Field(ge=1, le=1 << 20)]
    stride: Annotated[int, Field(ge=1, le=1 << 24)]


class _JobHeader(_Strict):
    id: Annotated[str, Field(pattern=r"^[0-9a-zA-Z_-]{1,64}$")]
    options: FusionOptions
    priority: Priority
    width: Annotated[int, Field(ge=1)]
    height: Annotated[int, Field(ge=1)]
    created_s: float
    deadline_s: float | None
    request_id: str
    traceparent: str | None
    keep_result: bool
    vis_layout: RawLayout | None
    ir_layout: RawLayout | None
    sizes: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]  # bytes of vis and ir
    rig: str | None = None  # as its file
    track: str | None = None
    means: Base64Bytes | None = None
    history_bytes: Annotated[int, Field(ge=0)] | None = None  # behind the images

    @property
    def all_sizes(self) -> tuple[int, ...]:
        """Bytes of the payloads, in their order."""
        return (*self.sizes, self.history_bytes) if self.history_bytes else self.sizes

    @model_serializer(mode="wrap")
    def _without_news(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialise(self)  # as in FusionOptions: older workers know none of them
        news = ("rig", "track", "means", "history_bytes")
        return {name: value for name, value in values.items() if value is not None or name not in news}


def new_job_id() -> str:
    """A fresh, unguessable id: whoever knows it may read the result.

    Hexadecimal, because ids are typed into command lines, where a leading dash would make one an option.
    """
    return secrets.token_hex(18)


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionJob:
    """One pair to fuse.

    vis, ir: image files as they were received, or raw frames when a layout says how to read them.
    width, height: of the VIS image as it will be decoded (orientation applied), read from its header at admission, so
    that jobs of one shape can be found without decoding anything.
    created_s, deadline_s: Unix seconds; after the deadline nobody wants the result. None: no deadline.
    keep_result: whether the result stays readable after it has been delivered once (asynchronous and idempotent jobs).
    traceparent: W3C trace context of the request, if it is traced.
    rig: how infrared lies in the visible frame, the content and not its name; None for a registered pair.
    track: of a stream's frame that is to be refined, what the frames before have shown, as a result told it.
    means: of the frames before (`recofuse_images.steady`), which its pictures are held to; empty for a stream's first
    frame, None for what is no frame of a steady stream. history: of the frames before (`recofuse_images.calm`), which
    its pictures are averaged with; empty and None likewise.
    """

    id: str
    vis: bytes
    ir: bytes
    width: int
    height: int
    created_s: float
    options: FusionOptions = field(default_factory=FusionOptions)
    priority: Priority = Priority.NORMAL
    deadline_s: float | None = None
    request_id: str = ""
    traceparent: str | None = None
    keep_result: bool = False
    vis_layout: RawLayout | None = None
    ir_layout: RawLayout | None = None
    rig: Rig | None = None
    track: str = ""
    means: bytes | None = None
    history: bytes | None = None

    @property
    def payloads(self) -> tuple[bytes, ...]:
        """The images, and the history if it has one, in the order in which they are stored."""
        return (self.vis, self.ir, self.history) if self.history else (self.vis, self.ir)

    @property
    def size_bytes(self) -> int:
        """Payload bytes, which admission counts."""
        return sum(map(len, self.payloads)) + len(self.means or b"")

    def is_expired(self, now_s: float) -> bool:
        """Whether nobody waits for the result any more."""
        return self.deadline_s is not None and now_s >= self.deadline_s

    def fingerprint(self) -> str:
        """Hex digest of what the request asked for; equal for a repeated request, whatever its id and time."""
        digest = hashlib.blake2b(self.options.model_dump_json().encode(), digest_size=16)
        for payload, layout in ((self.vis, self.vis_layout), (self.ir, self.ir_layout)):
            digest.update(b"encoded" if layout is None else layout.model_dump_json().encode())
            digest.update(len(payload).to_bytes(8, "little"))
            digest.update(payload)
        if self.rig is not None:
            digest.update(_rig_text(self.rig).encode())
        return digest.hexdigest()

    def header_bytes(self) -> bytes:
        """Everything but the payloads, as JSON."""
        header = _JobHeader(
            id=self.id,
            options=self.options,
            priority=self.priority,
            width=self.width,
            height=self.height,
            created_s=self.created_s,
            deadline_s=self.deadline_s,
            request_id=self.request_id,
            traceparent=self.traceparent,
            keep_result=self.keep_result,
            vis_layout=self.vis_layout,
            ir_layout=self.ir_layout,
            sizes=(len(self.vis), len(self.ir)),
            rig=None if self.rig is None else _rig_text(self.rig),
            track=self.track or None,
            means=None if self.means is None else b64encode(self.means),
            history_bytes=None if self.history is None else len(self.history),
        )
        return header.model_dump_json().encode()

    @classmethod
    def from_parts(cls, header: bytes, *payloads: bytes) -> Self:
        """The job of `header_bytes` and its payloads. Raises MalformedRequestError."""
        return cls.from_header(header, lambda sizes: announced(payloads, sizes))

    @classmethod
    def from_header(cls, header: bytes, read: Callable[[Sequence[int]], Sequence[bytes]]) -> Self:
        """The job of `header_bytes` and its payloads, which `read` has when told their lengths.

        Raises MalformedRequestError.
        """
        parsed = parsed_header(_JobHeader, header)
        vis, ir, *others = read(parsed.all_sizes)
        history = None if parsed.history_bytes is None else b"".join(others)
        fields = {name: value for name, value in parsed if name not in ("sizes", "rig", "track", "history_bytes")}
        try:
            rig = None if parsed.rig is None else _rig_of(parsed.rig)
        except BadRigError as error:
            raise MalformedRequestError(f"a record's rig is not valid: {error}") from error
        return cls(vis=vis, ir=ir, rig=rig, track=parsed.track or "", history=history, **fields)

    def to_bytes(self) -> bytes:
        """The whole job as one string of bytes."""
        return joined(JOB_MAGIC, self.header_bytes(), self.payloads)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """The inverse of `to_bytes`. Raises MalformedRequestError for anything else."""
        header, body = cut_apart(JOB_MAGIC, raw)
        return cls.from_header(header, lambda sizes: pieces_of(body, sizes, "a job of {} payload bytes"))


class _ResultHeader(_Strict):
    model_config = ConfigDict(extra="ignore")  # a newer worker may tell more; a job with options unknown here may not

    job_id: str
    media_type: str
    parts: dict[Part, Annotated[int, Field(ge=0)]]  # bytes of each picture, in payload order
    timings_s: dict[Stage, float]
    model_name: str
    model_version: str
    batch_size: Annotated[int, Field(ge=0)]
    width: Annotated[int, Field(ge=0)]
    height: Annotated[int, Field(ge=0)]
    error_code: ErrorCode | None
    error_message: str
    ir_source: str = ""  # older workers tell neither
    warnings: tuple[str, ...] = ()
    values_bytes: Annotated[int, Field(ge=0)] = 0  # behind the pictures
    values_type: str = ""
    values_unit: Unit | None = None
    alarm: Alarm | None = None
    alignment: Alignment | None = None
    track: str = ""
    seen: Base64Bytes = b""
    history_bytes: Annotated[int, Field(ge=0)] = 0  # behind the values


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionResult:
    """What became of a job: its pictures, or the reason why there are none.

    images: encoded pictures by part, each of media_type, all of width x height. timings_s: seconds per stage.
    batch_size: how many jobs shared the forward pass; 0 if none was made. ir_source: one of IrSource, what was read of
    the infrared file; empty if an older worker did not say, another word if a newer one knows more. warnings: sentences
    for people, as `printable` has them. values: a file of values_type with the restored infrared in values_unit, empty
    if nobody asked; alarm: what is hot, if somebody did; alignment: what align=refine came to. track, seen, history:
    for the jobs of a stream's next frames, and for nobody else.
    """

    job_id: str
    images: Mapping[Part, bytes] = field(default_factory=dict)
    media_type: str = ""
    timings_s: Mapping[Stage, float] = field(default_factory=dict)
    model_name: str = ""
    model_version: str = ""
    batch_size: int = 0
    width: int = 0
    height: int = 0
    error_code: ErrorCode | None = None
    error_message: str = ""
    ir_source: str = ""
    warnings: tuple[str, ...] = ()
    values: bytes = b""
    values_type: str = ""
    values_unit: Unit | None = None
    alarm: Alarm | None = None
    alignment: Alignment | None = None
    track: str = ""
    seen: bytes = b""
    history: bytes = b""

    @classmethod
    def failed(cls, job_id: str, error: ServiceError, timings_s: Mapping[Stage, float] | None = None) -> Self:
        """The result of a job that ended with this error."""
        return cls(job_id=job_id, error_code=error.code, error_message=error.message, timings_s=timings_s or {})

    @property
    def status(self) -> JobStatus:
        """The final status that this result stands for."""
        if self.error_code is None:
            return JobStatus.SUCCEEDED
        ends = {ErrorCode.CANCELLED: JobStatus.CANCELLED, ErrorCode.TIMED_OUT: JobStatus.EXPIRED}
        return ends.get(self.error_code, JobStatus.FAILED)

    @property
    def size_bytes(self) -> int:
        """Bytes of the pictures, the values, the history and what was seen."""
        return sum(map(len, self.payloads)) + len(self.seen)

    def raise_for_error(self) -> None:
        """Raises the ServiceError that the job ended with, if it did."""
        if self.error_code is not None:
            raise error_of(self.error_code, self.error_message)

    @property
    def payloads(self) -> tuple[bytes, ...]:
        """The pictures, the values and the history, in the order in which they are stored."""
        return (*self.images.values(), self.values, self.history)

    def header_bytes(self) -> bytes:
        """Everything but the payloads, as JSON."""
        header = _ResultHeader(
            job_id=self.job_id,
            media_type=self.media_type,
            parts={part: len(image) for part, image in self.images.items()},
            timings_s=dict(self.timings_s),
            model_name=self.model_name,
            model_version=self.model_version,
            batch_size=self.batch_size,
            width=self.width,
            height=self.height,
            error_code=self.error_code,
            error_message=self.error_message,
            ir_source=self.ir_source,
            warnings=self.warnings,
            values_bytes=len(self.values),
            values_type=self.values_type,
            values_unit=self.values_unit,
            alarm=self.alarm,
            alignment=self.alignment,
            track=self.track,
            seen=b64encode(self.seen),
            history_bytes=len(self.history),
        )
        return header.model_dump_json().encode()

    def to_bytes(self) -> bytes:
        """The whole result as one string of bytes."""
        return joined(RESULT_MAGIC, self.header_bytes(), self.payloads)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """The inverse of `to_bytes`. Raises MalformedRequestError for anything else."""
        header, body = cut_apart(RESULT_MAGIC, raw)

        return cls.from_header(header, lambda sizes: pieces_of(body, sizes, "a result of {} picture bytes"))

    @classmethod
    def from_header(cls, header: bytes, read: Callable[[Sequence[int]], Sequence[bytes]]) -> Self:
        """The result of `header_bytes` and its payloads, which `read` has when told their lengths.

        Raises MalformedRequestError.
        """
        parsed = parsed_header(_ResultHeader, header)
        *images, values, history = read((*parsed.parts.values(), parsed.values_bytes, parsed.history_bytes))
        apart = ("parts", "values_bytes", "history_bytes")
        fields = {name: value for name, value in parsed if name not in apart}
        return cls(images=dict(zip(parsed.parts, images, strict=True)), values=values, history=history, **fields)


class WorkerInfo(_Strict):
    """What a worker tells the front ends about itself, again and again while it lives.

    One of a newer release may tell more than a front end knows; that is no reason to call it none.
    batch_sizes: the batch sizes that the engine prefers, ascending. is_warm: whether it can serve at full speed now.
    exposures: those that its weights offer; one of an older release does not say, and knows "as_shot" alone.
    """

    model_config = ConfigDict(extra="ignore")

    id: str
    model_name: str
    model_version: str
    device: str
    default_steps: int
    default_sampler: str
    batch_sizes: tuple[int, ...]
    is_warm: bool
    started_s: float
    default_exposure: str = "as_shot"
    exposures: tuple[str, ...] = ("as_shot",)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """What may be known about a job without reading its result. Times are Unix seconds."""

    id: str
    status: JobStatus
    created_s: float
    priority: Priority
    attempts: int
    deadline_s: float | None = None
    finished_s: float | None = None
    error_code: ErrorCode | None = None
    error_message: str = ""


def printable(warnings: Iterable[str]) -> tuple[str, ...]:
    """Warnings as every face can show them: few, each one line of bounded length, without control characters.

    They may quote what a file says of itself, and a file may say anything.
    """
    lines = []
    for warning in warnings:
        line = "".join(char if char.isprintable() else "?" for char in " ".join(warning.split()))
        if line:
            lines.append(line if len(line) <= MAX_WARNING_CHARS else f"{line[: MAX_WARNING_CHARS - 3]}...")
    return tuple(lines[:MAX_WARNINGS])


def _rig_text(rig: Rig) -> str:
    from recofuse_rigs.rig import to_json

    return to_json(rig, indent=None)


def _rig_of(text: str) -> Rig:
    """Raises BadRigError."""
    from recofuse_rigs.rig import from_json

    return from_json(text)
