"""What goes in and what comes out, the same for every way of talking to a server: frozen, typed, plain.

Arrays are NumPy's, uint8 or uint16, height first. Colour is RGB in both directions unless `bgr` says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from recofuse_client.errors import BadAnswerError, RecofuseError
from recofuse_client.pictures import ImageLike, decoded, decoded_values

# How infrared lies in the visible frame: the name of one of the server's rigs, or the content of a rig file, as text; a
# rig file as a Path; or the matrix itself, 3x3, from infrared pixels to visible ones.
RigLike = str | PathLike[str] | Sequence[Sequence[float]] | NDArray[np.floating[Any]]

Output = Literal["fused", "vis", "ir", "all"]
Format = Literal["array", "png", "jpeg", "webp"]
Sampler = Literal["euler", "posterior", "ode1", "ode2"]
Exposure = Literal["as_shot", "lit"]
ValuesFormat = Literal["npy", "tiff", "png"]
Unit = Literal["counts", "celsius"]
Metadata = Literal["drop", "keep"]
Align = Literal["rig", "refine"]
Colour = Literal["natural", "grey", "white_hot", "iron", "rainbow"]
Priority = Literal["high", "normal", "low"]
Mode = Literal["all", "latest"]
IrSource = Literal["raw", "palette", "grey", ""]


def ir_source_of(word: str) -> IrSource:
    """A server's word for what was read of an infrared file; empty for one that is not known here."""
    return cast("IrSource", word) if word in get_args(IrSource) else ""


def unit_of(word: str) -> Unit:
    """A server's word for what values are in. Raises ValueError for one that is not known here."""
    if word not in get_args(Unit):
        raise ValueError(f"values in {word!r}")
    return cast("Unit", word)


def rig_text(rig: RigLike) -> str:
    """A rig as it is sent. Raises ValueError for what is none, OSError for a file that cannot be read."""
    if isinstance(rig, str):
        text = rig
    elif isinstance(rig, PathLike):
        text = Path(rig).read_text("utf-8")
    else:
        matrix = np.asarray(rig, np.float64)
        if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
            raise ValueError("rig: accepted is a 3x3 matrix of finite numbers, from infrared pixels to visible ones")
        text = ",".join(f"{value:.17g}" for value in matrix.ravel())
    if not text.strip() or not text.isascii():
        raise ValueError("rig: accepted are a name, a rig file's content, a Path to one, or a 3x3 matrix")
    return text


class Part(StrEnum):
    """One picture of an answer: the fusion, or one of the two restored images."""

    FUSED = "fused"
    VIS = "vis"
    IR = "ir"


class JobStatus(StrEnum):
    """Where a job stands. The last four never change again."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What may be chosen about the computation and its answer.

    output: which pictures. format: "array" for pixels, else the encoding of the files. steps (1 to 1000), sampler,
    exposure: None asks for the model's own. seed: below 2^63; equal seeds give equal pictures. vis_range, ir_range:
    source values (low, high) of either image that become black and white, in place of the server's automatic choice.
    exposure: "lit" makes a dark scene a well exposed photograph, lamps kept, and dark infrared brighter in the fused
    picture; "as_shot" leaves the scene as dark as it came; veils are lifted in both. `Model.exposures` tells what the
    served weights offer. rig: of cameras that are not registered, whose pictures may then differ in size and shape; see
    `RigLike`, and `Client.rigs` for the server's own.
    colour: of the fused picture; "white_hot", "iron" and "rainbow" lay infrared in a palette over the visible picture
    in grey, from nothing to full between the infrared values of colour_range, in the upper half of the scale if None.

    values: also the restored infrared in the values of its source (`Fusion.values`). degrees: (gain, offset), by which
    degrees Celsius are gain * value + offset of those values. alarm: "60C", or a number in the source's values; what is
    at least so hot is told (`Fusion.alarm`), and with `outline` drawn into the fused picture.

    align: "refine" measures what the rig leaves in each frame, or a pair without a rig has, and puts it right if that
    is clear (`Fusion.alignment`); over a stream smoothly, until a cut.

    metadata: "keep" copies what the files say of themselves (camera, time, place) into the files of the answer, for a
    format other than "array".
    """

    output: Output = "fused"
    format: Format = "array"
    steps: int | None = None
    sampler: Sampler | None = None
    seed: int = 0
    vis_range: tuple[float, float] | None = None
    ir_range: tuple[float, float] | None = None
    exposure: Exposure | None = None
    rig: RigLike | None = None
    colour: Colour = "natural"
    colour_range: tuple[float, float] | None = None
    values: ValuesFormat | None = None
    degrees: tuple[float, float] | None = None
    alarm: str | float | None = None
    outline: bool = False
    metadata: Metadata = "drop"
    align: Align = "rig"
    priority: Priority = "normal"

    def __post_init__(self) -> None:
        """Raises ValueError, and OSError for a rig file that cannot be read.

        What depends on the server's limits is the server's to refuse.
        """
        if self.alarm is not None and not isinstance(self.alarm, str):
            object.__setattr__(self, "alarm", f"{self.alarm:.9f}".rstrip("0").rstrip("."))
        if self.values is not None and self.values not in get_args(ValuesFormat):
            raise ValueError(f"values: accepted are {', '.join(get_args(ValuesFormat))}, not {self.values!r}")
        object.__setattr__(self, "rig", None if self.rig is None else rig_text(self.rig))
        kinds = {
            "output": Output, "format": Format, "sampler": Sampler, "exposure": Exposure, "colour": Colour,
            "metadata": Metadata, "align": Align,
            "priority": Priority,
        }  # fmt: skip
        for name, kind in kinds.items():
            value, accepted = getattr(self, name), get_args(kind)
            if value not in accepted and not (name in ("sampler", "exposure") and value is None):
                raise ValueError(f"{name}: accepted are {', '.join(accepted)}, not {value!r}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: accepted are 0 to 2^63 - 1, not {self.seed}")
        if self.steps is not None and not 1 <= self.steps <= 1000:
            raise ValueError(f"steps: accepted are 1 to 1000, not {self.steps}")


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One picture: pixels, or a file of media_type.

    content: (H, W, 3) RGB or (H, W) grey uint8 if media_type is empty, else the file's bytes.
    """

    part: Part
    media_type: str
    content: NDArray[np.uint8] | bytes

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """The pixels, uint8: (H, W, 3) RGB, or (H, W) for the infrared picture. A file is decoded at every access."""
        if isinstance(self.content, np.ndarray):
            return self.content
        pixels = decoded(self.content, self.media_type)
        # Some formats know no grey.
        return pixels[..., 0] if self.part is Part.IR and pixels.ndim == 3 else pixels

    @property
    def encoded(self) -> bytes:
        """The file's bytes. Raises ValueError for pixels, which are none."""
        if isinstance(self.content, np.ndarray):
            raise ValueError('the picture came as pixels; ask for a format other than "array" to get a file')
        return self.content


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """The restored infrared in the values of its source: a file of media_type. unit: of the values."""

    media_type: str
    unit: Unit
    encoded: bytes

    @property
    def pixels(self) -> NDArray[Any]:
        """(H, W): float32, NaN where nothing was measured, or uint16 of a file of 16 bits.

        Raises BadAnswerError, and ModuleNotFoundError for all but npy without the extra `images`.
        """
        return decoded_values(self.encoded, self.media_type)


@dataclass(frozen=True, slots=True)
class Region:
    """A connected region of an alarm, in pixels of the answer. box: left, top, width, height."""

    box: tuple[int, int, int, int]
    area: int
    hottest: float
    centroid: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Alarm:
    """What is at or above an alarm, in `unit`. regions: the largest first, not all of num_regions if there are many.

    area: pixels of all of them. hottest: the highest value; None without a region.
    """

    threshold: float
    unit: Unit
    num_regions: int
    area: int
    hottest: float | None
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class Alignment:
    """What `align="refine"` came to, in visible pixels.

    moved_px: how far infrared was moved beyond its rig, in the mean; 0 if it was left alone. residual_px: how far off
    its parts still seem; None where there was nothing to see.
    """

    residual_px: float | None
    moved_px: float


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went at the server, in seconds. A stage that was not reached is 0."""

    decode_s: float = 0.0
    queue_s: float = 0.0
    batch_s: float = 0.0
    model_s: float = 0.0
    encode_s: float = 0.0


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Fusion:
    """An answer. pictures: what `output` asked for.

    ir_source: what was read of the infrared file: "raw", the counts or temperatures that a thermal camera's JPEG holds;
    "palette", a false-colour picture turned back into intensity; "grey", its grey values; "" if the server did not say.
    warnings: sentences for people about what looks wrong with the pair. values, alarm, alignment: if they were asked
    for.
    """

    pictures: Mapping[Part, Picture]
    model_name: str
    model_version: str
    timings: Timings
    job_id: str
    request_id: str
    ir_source: IrSource = ""
    warnings: tuple[str, ...] = ()
    values: Values | None = None
    alarm: Alarm | None = None
    alignment: Alignment | None = None

    def __getitem__(self, part: Part | Literal["fused", "vis", "ir"]) -> Picture:
        """A picture by the name of its part. Raises KeyError for one that was not asked for."""
        return self.pictures[Part(part)]

    @property
    def fused(self) -> NDArray[np.uint8]:
        """Pixels (H, W, 3) of the fused picture. Raises KeyError if it was not asked for."""
        return self[Part.FUSED].pixels

    @property
    def vis(self) -> NDArray[np.uint8]:
        """Pixels (H, W, 3) of the restored visible image. Raises KeyError if it was not asked for."""
        return self[Part.VIS].pixels

    @property
    def ir(self) -> NDArray[np.uint8]:
        """Pixels (H, W) of the restored infrared image. Raises KeyError if it was not asked for."""
        return self[Part.IR].pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Where an asynchronous job stands. error: what it ended with, if it did not succeed."""

    id: str
    status: JobStatus
    priority: Priority
    attempts: int
    created_at: datetime
    deadline_at: datetime | None = None
    finished_at: datetime | None = None
    error: RecofuseError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that is being served, and what serves it. exposures: what `exposure` may be; "as_shot" if unknown."""

    name: str
    version: str
    default_steps: int
    default_sampler: str
    devices: tuple[str, ...]
    num_workers: int
    default_exposure: str = "as_shot"
    exposures: tuple[str, ...] = ("as_shot",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    """A rig that a server keeps. Sizes are (width, height); overlap: share of the visible frame that infrared covers.

    is_sure: whether its calibration would swear to it. spread_px: how far corners move when that is repeated on parts
    of its pairs; residual_px: what is left between the edges of both; visible pixels. date: such as 2026-01-31, or
    empty. matrix: row by row, infrared pixels to visible ones of these sizes; empty from an older server.
    has_distortion: whether the infrared lens bends besides. parallax_px: bounds what `align="refine"` may move; None
    for the usual 2 % of the visible width.
    """

    name: str
    vis_size: tuple[int, int]
    ir_size: tuple[int, int]
    overlap: float
    is_sure: bool
    spread_px: float
    residual_px: float
    num_pairs: int
    method: str
    date: str
    matrix: tuple[float, ...] = ()
    has_distortion: bool = False
    parallax_px: float | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """Whether new work is welcome, and if not, why (as far as the protocol tells)."""

    is_ready: bool
    reason: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One pair of a stream.

    sequence: ascends, gaps are allowed; None counts on from the frame before. timestamp_ns: of your clock, comes back
    as it went. timeout_s: this frame's own deadline. bgr: colour arrays have blue first, as OpenCV's have.
    """

    vis: ImageLike
    ir: ImageLike
    sequence: int | None = None
    timestamp_ns: int = 0
    timeout_s: float | None = None
    bgr: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamStats:
    """Counts since a stream began, reconnections included.

    offered = fused + failed + dropped + lost + what is on its way. dropped: replaced by a newer frame before it was
    fused (mode latest), here or at the server. lost: in mode latest, without an answer when a connection broke.
    The last four are the server's, of the present connection: rates over the last 5 s, ages from a frame's arrival to
    its answer.
    """

    offered: int = 0
    fused: int = 0
    failed: int = 0
    dropped: int = 0
    lost: int = 0
    reconnects: int = 0
    received_per_s: float = 0.0
    fused_per_s: float = 0.0
    age_p50_s: float = 0.0
    age_p99_s: float = 0.0


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class FrameResult:
    """What became of one frame: a fusion, or an error.

    num_missed: frames of the sender between the result before and this one that have no result: dropped or lost.
    age_s: from the frame's arrival at the server to its answer. latency_s: from handing the frame over to gRPC here,
    the last time if it was sent more than once, to its answer's arrival.
    """

    sequence: int
    timestamp_ns: int
    fusion: Fusion | None
    error: RecofuseError | None
    num_missed: int
    age_s: float
    latency_s: float
    stats: StreamStats = field(default_factory=StreamStats)

    def unwrap(self) -> Fusion:
        """The fusion. Raises the frame's error."""
        if self.fusion is None:
            raise self.error or BadAnswerError("the frame has neither a fusion nor an error")
        return self.fusion
