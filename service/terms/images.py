"""The service's side of `recofuse_images`: limits from settings, errors of the one tree, what a worker does with files.

A front end calls `check_request` alone, which reads headers. The codec of a worker reads and writes pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from recofuse_images import errors, jpeg, reader
from recofuse_images.limits import Limits
from recofuse_images.reader import Pair, Role
from recofuse_rigs.errors import RigError
from recofuse_rigs.rig import Rig, Size, flat, resizing
from service.terms.errors import InvalidInputError, PayloadTooLargeError, UnsupportedMediaError
from service.terms.jobs import OVERLAYS, FusionJob, FusionOptions, ImageFormat, Part, RawLayout
from service.terms.measures import Alarm, Alignment, Region, Unit, ValuesFormat, alarm_at
from service.terms.settings import CodecSettings, LimitSettings

if TYPE_CHECKING:
    from recofuse_images.colours import Overlay
    from recofuse_images.measures import Measured
    from recofuse_rigs.warp import Warp, Warps

Pixels = NDArray[np.uint8]

_DOUBT = (
    "ir: the restored picture follows the measured values so little that they cannot be told from it, nor colours by a "
    "range; measure in the original file"
)


class _Reading(TypedDict):
    """How a job's images are to be read."""

    vis_range: tuple[float, float] | None
    ir_range: tuple[float, float] | None
    vis_layout: RawLayout | None
    ir_layout: RawLayout | None
    is_measured: bool


class _Layouts(TypedDict):
    vis_layout: RawLayout | None
    ir_layout: RawLayout | None


@dataclass(frozen=True, slots=True)
class Decoded:
    """A pair on the vis grid. warp: how infrared came there by a rig; None for a pair that was registered.

    alignment, track: what refining came to, and what it is to begin with in a stream's next frame.
    """

    pair: Pair
    warp: Warp | None = None
    alignment: Alignment | None = None
    track: str = ""


def check_request(
    vis: bytes, ir: bytes, vis_layout: RawLayout | None, ir_layout: RawLayout | None, limits: LimitSettings
) -> tuple[int, int]:
    """Check both sides without decoding them; returns the vis width and height, orientation applied.

    Raises UnsupportedMediaError, PayloadTooLargeError and InvalidInputError.
    """
    vis_size, ir_size = size_of(vis, "vis", vis_layout, limits), size_of(ir, "ir", ir_layout, limits)
    with _as_service_errors():
        if vis_layout is None and ir_layout is None:
            reader.check_sides(vis, ir)
        reader.check_sizes(vis_size, ir_size, limits_of(limits))
    return vis_size


def check_rigged_request(
    vis: bytes,
    ir: bytes,
    vis_layout: RawLayout | None,
    ir_layout: RawLayout | None,
    limits: LimitSettings,
    find_rig: Callable[[Size, Size, bool], Rig],
) -> tuple[tuple[int, int], Rig]:
    """As `check_request`, for two cameras that are not registered; their sizes may be any. Returns their rig, too.

    find_rig: takes the vis and the ir size, and whether the latter is sure.
    """
    vis_size, ir_size = size_of(vis, "vis", vis_layout, limits), size_of(ir, "ir", ir_layout, limits)
    if vis_layout is None and ir_layout is None and vis == ir:
        raise InvalidInputError("vis and ir are the same file; what holds both sides is registered, and needs no rig")
    # A thermal camera's JPEG may hold its values in another size than the picture that it shows.
    return vis_size, find_rig(vis_size, ir_size, ir_layout is not None or not ir.startswith(jpeg.MAGIC))


def check_refined_request(
    vis: bytes, ir: bytes, vis_layout: RawLayout | None, ir_layout: RawLayout | None, limits: LimitSettings
) -> tuple[tuple[int, int], Rig]:
    """As `check_request`, for a registered pair that is to be refined: returns the rig that it is, too."""
    if vis_layout is None and ir_layout is None and vis == ir:
        raise InvalidInputError("align: what holds both sides in one file is registered; accepted is rig")
    vis_size = check_request(vis, ir, vis_layout, ir_layout, limits)
    ir_size = size_of(ir, "ir", ir_layout, limits)
    with _as_service_errors():
        return vis_size, Rig(vis_size, ir_size, flat(resizing(ir_size, vis_size)))


def size_of(data: bytes, role: Role, layout: RawLayout | None, limits: LimitSettings) -> tuple[int, int]:
    """Check one side without decoding it; returns width and height. Raises like `check_request`."""
    with _as_service_errors():
        if layout is None:
            return reader.inspect(data, role, limits_of(limits)).upright_size
        reader.inspect_frame(data, layout, role, limits_of(limits))
        return layout.width, layout.height


def decode_pair(
    vis: bytes,
    ir: bytes,
    limits: LimitSettings,
    *,
    vis_range: tuple[float, float] | None = None,
    ir_range: tuple[float, float] | None = None,
    vis_layout: RawLayout | None = None,
    ir_layout: RawLayout | None = None,
    is_measured: bool = False,
) -> Pair:
    """Both images as 8 bits on the vis grid. Raises like `check_request`; never returns a partly decoded image."""
    with _as_service_errors():
        return reader.read_pair(
            vis,
            ir,
            limits_of(limits),
            vis_range=vis_range,
            ir_range=ir_range,
            vis_layout=vis_layout,
            ir_layout=ir_layout,
            is_measured=is_measured,
        )


def decode_rigged(
    vis: bytes,
    ir: bytes,
    rig: Rig,
    warps: Warps,
    limits: LimitSettings,
    *,
    vis_range: tuple[float, float] | None = None,
    ir_range: tuple[float, float] | None = None,
    vis_layout: RawLayout | None = None,
    ir_layout: RawLayout | None = None,
    is_measured: bool = False,
    is_refined: bool = False,
    track: str = "",
) -> Decoded:
    """A rig's images as 8 bits on the vis grid; infrared is warped at its own depth. Raises like `check_request`."""
    from recofuse_rigs.pairs import read_aligned  # not above: front ends warp nothing, and go without OpenCV
    from recofuse_rigs.parallax import Track

    with _as_service_errors():
        aligned = read_aligned(
            vis,
            ir,
            rig,
            limits_of(limits),
            vis_range=vis_range,
            ir_range=ir_range,
            vis_layout=vis_layout,
            ir_layout=ir_layout,
            find_warp=warps.of,
            is_measured=is_measured,
            is_refined=is_refined,
            track=Track.from_text(track) if track else None,
        )
    if (refined := aligned.refined) is None:
        return Decoded(aligned.pair, aligned.warp)
    alignment = Alignment(residual_px=refined.residual_px, moved_px=refined.moved_px)
    return Decoded(aligned.pair, aligned.warp, alignment, "" if refined.track is None else refined.track.to_text())


def decode_asked(
    vis: bytes,
    ir: bytes,
    options: FusionOptions,
    limits: LimitSettings,
    rigged: tuple[Rig, Warps] | None = None,
    *,
    vis_layout: RawLayout | None = None,
    ir_layout: RawLayout | None = None,
    track: str = "",
) -> Decoded:
    """A pair with what these options need of it. Raises like `check_request`, also for units that it does not have."""
    reading: _Reading = {
        "vis_range": options.vis_range,
        "ir_range": options.ir_range,
        "vis_layout": vis_layout,
        "ir_layout": ir_layout,
        "is_measured": options.is_measured,
    }
    if rigged is None:
        decoded = Decoded(decode_pair(vis, ir, limits, **reading))
    else:
        is_refined = options.align == "refine"
        decoded = decode_rigged(vis, ir, *rigged, limits, **reading, is_refined=is_refined, track=track)
    if decoded.pair.measured is not None:
        _check_units(options, decoded.pair.measured)
    return decoded


def _check_units(options: FusionOptions, measured: Measured) -> None:
    """Raises InvalidInputError for what these values cannot be told in."""
    is_celsius = measured.is_celsius or options.degrees is not None
    if options.alarm is not None and alarm_at(options.alarm)[1] and not is_celsius:
        raise InvalidInputError(
            f"alarm: {options.alarm} is in degrees, and the infrared file holds counts; send degrees as well, the gain "
            "and the offset that make degrees of them, or the alarm in counts"
        )
    if options.degrees is not None and measured.is_celsius:
        raise InvalidInputError("degrees: the infrared file holds degrees Celsius already; leave it out")
    if options.values == "png" and not measured.is_whole:
        raise InvalidInputError(
            "values: png holds whole counts, which this infrared file does not; accepted are npy and tiff"
        )


def is_partial(options: FusionOptions, warp: Warp | None) -> bool:
    """Whether these options ask for a fused picture in which infrared ends."""
    is_fused = Part.FUSED in options.output.parts and options.colour not in OVERLAYS
    return is_fused and warp is not None and not warp.is_whole


def needed_parts(options: FusionOptions, warp: Warp | None, *, blends: bool = False) -> tuple[Part, ...]:
    """What the model must give for what these options ask for.

    Where infrared ends, the fused picture takes the restored vis, unless the engine blends both before they are
    pictures; an overlay is made of both restored ones alone, and values of the restored ir.
    """
    parts, colour, is_measured = options.output.parts, options.colour, options.is_measured
    needed = {*parts, Part.IR} if is_measured else set(parts)
    if Part.FUSED in parts and colour in OVERLAYS:
        needed = needed - {Part.FUSED} | {Part.VIS, Part.IR}
    elif is_partial(options, warp) and not blends:
        needed |= {Part.VIS}
    return tuple(part for part in Part if part in needed)


@dataclass(frozen=True, slots=True)
class Finished:
    """What an answer shows and tells. values_file: the restored infrared in `unit`, if it was asked for."""

    pictures: dict[Part, Pixels]
    values_file: bytes = b""
    unit: Unit | None = None
    alarm: Alarm | None = None
    warnings: tuple[str, ...] = ()


def finished(
    pictures: Mapping[Part, Pixels],
    options: FusionOptions,
    warp: Warp | None,
    ir_scale: tuple[float, float],
    measured: Measured | None = None,
    *,
    blends: bool = False,
) -> Finished:
    """The wanted parts of what the model gave, the fused picture in the wanted colours, and what is told of values.

    It is without infrared where there was none. ir_scale: the source values that are black and white in ir. measured:
    those values, if options ask for something that needs them. blends: as for `needed_parts`.
    """
    parts = options.output.parts
    is_doubtful = False
    if measured is not None:
        from recofuse_images import measures  # not above: front ends measure nothing, and go without OpenCV

        ir_scale, is_doubtful = measures.fitted_scale(measured, pictures[Part.IR])
    if Part.FUSED in parts and (fused := _fused(pictures, options, warp, ir_scale, blends=blends)) is not None:
        pictures = {**pictures, Part.FUSED: fused}
    warnings = (_DOUBT,) if is_doubtful else ()
    if measured is None or (options.values is None and options.alarm is None):
        return Finished({part: pictures[part] for part in parts}, warnings=warnings)
    values = measures.restored_values(measured, pictures[Part.IR], ir_scale)
    alarm = None
    if options.alarm is not None:
        alarm, mask = _alarm_in(values, options, measured)
        if options.outline and Part.FUSED in parts:
            pictures = {**pictures, Part.FUSED: measures.outlined(pictures[Part.FUSED], mask)}
    return Finished(
        {part: pictures[part] for part in parts},
        b"" if options.values is None else _values_file(values, options.values, options.degrees, measured),
        None if options.values is None else _unit_of(options, measured),
        alarm,
        warnings,
    )


def _unit_of(options: FusionOptions, measured: Measured) -> Unit:
    return "celsius" if measured.is_celsius or options.degrees is not None else "counts"


def _alarm_in(
    values: NDArray[np.float32], options: FusionOptions, measured: Measured
) -> tuple[Alarm, NDArray[np.bool_]]:
    """What is hotter than the alarm, told in the unit that the alarm is in, and where that is."""
    from recofuse_images import measures

    threshold, is_celsius = alarm_at(options.alarm or "")
    if is_celsius and options.degrees is not None:
        values = _degrees(values, options.degrees)
    found = measures.regions_above(values, threshold)
    regions = [
        Region(
            box=(region.left, region.top, region.width, region.height),
            area=region.area,
            hottest=region.hottest,
            centroid=region.centroid,
        )
        for region in found.regions
    ]
    alarm = Alarm(
        threshold=threshold,
        unit="celsius" if is_celsius or measured.is_celsius else "counts",
        num_regions=found.num_regions,
        area=found.area,
        hottest=found.hottest,
        regions=tuple(regions),
    )
    return alarm, found.mask


def _degrees(values: NDArray[np.float32], degrees: tuple[float, float]) -> NDArray[np.float32]:
    gain, offset = degrees
    with np.errstate(over="ignore", invalid="ignore"):
        found = (gain * values.astype(np.float64) + offset).astype(np.float32)
    found[~np.isfinite(found)] = np.nan  # gain and offset may be any numbers
    return found


def _values_file(
    values: NDArray[np.float32], values_format: ValuesFormat, degrees: tuple[float, float] | None, measured: Measured
) -> bytes:
    from recofuse_images import measures, writer

    if degrees is not None:
        values = _degrees(values, degrees)
    is_whole = measured.is_whole and degrees is None
    with _as_service_errors():
        match values_format:
            case "npy":
                return writer.npy_bytes(values)
            case "tiff":
                return writer.tiff_bytes(measures.counts_of(values) if is_whole else values)
            case "png":
                return writer.png_bytes(measures.counts_of(values))


def _fused(
    pictures: Mapping[Part, Pixels],
    options: FusionOptions,
    warp: Warp | None,
    ir_scale: tuple[float, float],
    *,
    blends: bool,
) -> Pixels | None:
    """None where it is the model's own."""
    if options.colour in OVERLAYS:
        from recofuse_images.colours import overlaid  # not above: front ends draw nothing, and go without OpenCV

        weights = warp.weights if warp is not None and not warp.is_whole else None
        overlay = cast("Overlay", options.colour)
        return overlaid(pictures[Part.VIS], pictures[Part.IR], overlay, ir_scale, options.colour_range, weights)
    fused = None
    if warp is not None and not warp.is_whole and not blends:
        fused = warp.blended(pictures[Part.FUSED], pictures[Part.VIS])
    if options.colour == "grey":
        from recofuse_images.colours import greyed

        fused = greyed(pictures[Part.FUSED] if fused is None else fused)
    return fused


def encode(pixels: Pixels, image_format: ImageFormat, codec: CodecSettings) -> bytes:
    """A picture, (H, W, 3) RGB or (H, W) grey, as a file; npy is the uint8 array itself. Raises InvalidInputError."""
    from recofuse_images import writer  # not above: front ends write no pictures, and go without OpenCV

    with _as_service_errors():
        match image_format:
            case ImageFormat.NPY:
                return writer.npy_bytes(pixels)
            case ImageFormat.PNG:
                return writer.png_bytes(pixels, codec.png_compression)
            case ImageFormat.JPEG:
                return writer.jpeg_bytes(pixels, codec.jpeg_quality)
            case ImageFormat.WEBP:
                return writer.webp_bytes(pixels, codec.webp_quality)


def with_metadata(picture: bytes, source: bytes, options: FusionOptions) -> bytes:
    """A picture's file, with what its source says of itself if these options ask for that."""
    if options.metadata != "keep":
        return picture
    from recofuse_images import metadata  # not above: few ask for it

    return metadata.with_metadata(picture, metadata.metadata_of(source))


class Codec(Protocol):
    """What a worker does between a job's bytes and pixels. Calls block, and come from several threads at once."""

    def decode(self, job: FusionJob) -> Decoded:
        """A job's pair on the vis grid, laid there by its rig if it has one. Raises like `check_request`."""

    def encode(self, job: FusionJob, part: Part, pixels: Pixels) -> bytes:
        """One picture of the answer, in the job's format. Raises InvalidInputError."""


def build_codec(settings: CodecSettings, limits: LimitSettings) -> Codec:
    """The codec that the settings ask for."""
    return ReadyBytes() if settings.kind == "ready" else FileCodec(settings, limits)


class FileCodec:
    """Reads and writes image files."""

    def __init__(self, settings: CodecSettings, limits: LimitSettings) -> None:
        from recofuse_rigs.warp import Warps  # not above: front ends warp nothing, and go without OpenCV

        self._settings = settings
        self._limits = limits
        self._warps = Warps()

    def decode(self, job: FusionJob) -> Decoded:
        """See Codec."""
        rigged = None if job.rig is None else (job.rig, self._warps)
        layouts: _Layouts = {"vis_layout": job.vis_layout, "ir_layout": job.ir_layout}
        return decode_asked(job.vis, job.ir, job.options, self._limits, rigged, **layouts, track=job.track)

    def encode(self, job: FusionJob, part: Part, pixels: Pixels) -> bytes:
        """See Codec."""
        data = encode(pixels, job.options.format, self._settings)
        source, layout = (job.ir, job.ir_layout) if part is Part.IR else (job.vis, job.vis_layout)
        return data if layout is not None else with_metadata(data, source, job.options)


class ReadyBytes:
    """Reads and writes nothing: one black pixel stands for each image, and the uploaded file is the answer.

    For measuring what the service costs without its codec. Headers are still checked at admission.
    """

    def decode(self, job: FusionJob) -> Decoded:
        """See Codec."""
        return Decoded(Pair(vis=np.zeros((1, 1, 3), np.uint8), ir=np.zeros((1, 1), np.uint8)))

    def encode(self, job: FusionJob, part: Part, pixels: Pixels) -> bytes:
        """See Codec."""
        return job.ir if part is Part.IR else job.vis


def limits_of(settings: LimitSettings) -> Limits:
    """What the settings allow of a picture, as those who read files take it."""
    return Limits(
        max_image_bytes=settings.max_image_bytes,
        max_pixels=settings.max_pixels,
        max_side=settings.max_side,
        min_side=settings.min_side,
        aspect_tolerance=settings.aspect_tolerance,
    )


@contextmanager
def _as_service_errors() -> Iterator[None]:
    """The errors of `recofuse_images` and `recofuse_rigs` as those of the tree that HTTP and gRPC know."""
    try:
        yield
    except errors.UnsupportedImageError as error:
        raise UnsupportedMediaError(str(error)) from error
    except errors.ImageTooLargeError as error:
        raise PayloadTooLargeError(str(error)) from error
    except (errors.ImageError, RigError) as error:
        raise InvalidInputError(str(error)) from error
