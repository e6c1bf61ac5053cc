"""Encoded bytes to uint8 arrays and back; size and format checks before anything is decoded. The only codec user.

Two steps. `inspect` reads a file's header alone, so that a decompression bomb costs nothing, and finds files that were
cut short, because the pixel decoders would quietly fill the missing part. `decode_pair` then reads the pixels.

What a newcomer would get wrong: a header may be as large as the file. Pillow makes Python objects of every tag and
segment, many times their size, and a JPEG decoder goes through the whole picture once for each scan, however empty. So
the parts of a file are counted before a library sees it.

Infrared values become 8 bits like this: 8-bit files are taken as they are; deeper files (16-bit or float, which use a
small part of their range) are stretched from their 0.5th to their 99.5th percentile, so that a few dead or glowing
pixels do not set the scale; `ir_range` replaces either rule. Deep VIS files keep their upper eight bits; `vis_range`
replaces that, in files of 8 bits as well. Alpha is dropped, palettes are expanded, EXIF orientation is applied. Arrays
are RGB, (H, W, 3) for vis and (H, W) for ir.
"""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from recofuse_images import tiff
from recofuse_images.errors import ImageError
from recofuse_images.limits import Limits
from recofuse_images.picture import grey_of, upright
from service.errors import InvalidInputError, PayloadTooLargeError, UnsupportedMediaError
from service.jobs import FusionJob, ImageFormat, IrSource, Part, PixelFormat, RawLayout
from service.settings import CodecSettings, LimitSettings

Role = Literal["vis", "ir"]
Pixels = NDArray[np.uint8]

ACCEPTED = "PNG, JPEG, WebP and TIFF, 8 or 16 bits, grey or colour"
PERCENTILES = (0.5, 99.5)

Image.MAX_IMAGE_PIXELS = None  # our own limits are checked instead, with an error that names them
cv2.setNumThreads(1)  # the worker decodes several images at once; threads below that only get in each other's way
cv2.utils.logging.setLogLevel(
    cv2.utils.logging.LOG_LEVEL_SILENT
)  # a broken upload is the caller's news, not a line on our standard error
warnings.filterwarnings("ignore", module=r"PIL\.")  # nor are tens of thousands, one for each odd tag

_ORIENTATION_TAG = 274
_TRANSPOSED = frozenset({5, 6, 7, 8})  # EXIF orientations that swap width and height
# More of them than any honest file has.
MAX_CHUNKS = 1 << 16  # of a PNG file
MAX_SEGMENTS = 4096  # of a JPEG file, before its first scan
MAX_SCANS = 100  # of a progressive JPEG file; encoders make some 10
MAX_TAGS = 4096  # of a TIFF file
MAX_TAG_VALUES = 1 << 18  # numbers in one of them; a palette of 16 bits has three quarters of that
MAX_EXIF_BYTES = 1 << 20

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")  # stuffing and restarts belong to a scan's data
# What Pillow takes for TIFF; the last two are wrong, and read all the same.
_TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"II\0*", b"MM*\0")
_TIFF_NUMBERS = frozenset({3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 16, 17, 18})  # types of values: all but text and bytes
_TIFF_OFFSETS = ((273, 279), (324, 325))  # (offsets, byte counts) of strips and of tiles


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What a file says about itself. width, height: after orientation. is_float: pixels are floating point."""

    format: str
    width: int
    height: int
    orientation: int
    is_float: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """A decoded pair on one grid: vis (H, W, 3) RGB and ir (H, W), both uint8.

    ir_source: what was read of the infrared file. warnings: sentences for people about what looks wrong.
    """

    vis: Pixels
    ir: Pixels
    ir_source: IrSource = "grey"
    warnings: tuple[str, ...] = ()


def inspect(data: bytes, role: Role, limits: LimitSettings) -> ImageHeader:
    """Check a file without decoding it.

    Raises UnsupportedMediaError (not an accepted file), PayloadTooLargeError (bytes, pixels, sides or frames) and
    InvalidInputError (empty, too small, damaged).
    """
    if not data:
        raise InvalidInputError(f"{role}: the file is empty; accepted are {ACCEPTED}")
    if len(data) > limits.max_image_bytes:
        raise PayloadTooLargeError(
            f"{role}: the file has {len(data)} bytes; at most {limits.max_image_bytes} are accepted"
        )
    if data[:4] == b"RIFF":  # Pillow sets a canvas up when it opens a WebP file, so its size is read first
        _check_size(*_webp_size(data, role), role, limits)
    elif data[:2] == b"\xff\xd8":
        _check_jpeg(data, role)
    elif data[:4] in _TIFF_MAGICS:
        _check_tiff_tags(data, role, limits)
    header = _read_header(data, role, limits)
    _check_size(header.width, header.height, role, limits)
    return header


def inspect_raw(data: bytes, layout: RawLayout, role: Role, limits: LimitSettings) -> None:
    """Check a raw frame against its layout. Raises like `inspect`."""
    _check_size(layout.width, layout.height, role, limits)
    if layout.pixel_format is PixelFormat.NV12 and (layout.width % 2 or layout.height % 2):
        raise InvalidInputError(f"{role}: NV12 needs an even width and height, not {layout.width}x{layout.height}")
    row_bytes, num_rows = _raw_rows(layout)
    if layout.stride < row_bytes:
        raise InvalidInputError(f"{role}: a stride of {layout.stride} bytes is shorter than a row of {row_bytes}")
    needed = layout.stride * (num_rows - 1) + row_bytes  # the last row need not be padded
    if not needed <= len(data) <= layout.stride * num_rows:
        raise InvalidInputError(f"{role}: a frame of this layout has {layout.stride * num_rows} bytes, not {len(data)}")


def check_pair(vis: tuple[int, int], ir: tuple[int, int], limits: LimitSettings) -> None:
    """Check that two sizes (width, height) can share a grid. Raises InvalidInputError."""
    ratio = (ir[0] * vis[1]) / (ir[1] * vis[0])
    if max(ratio, 1 / ratio) > 1 + limits.aspect_tolerance:
        raise InvalidInputError(
            f"vis is {vis[0]}x{vis[1]} and ir is {ir[0]}x{ir[1]}; accepted are registered pairs of equal aspect ratio "
            f"(within {limits.aspect_tolerance:.0%}), whose ir is then resampled to the vis size"
        )


def decode_pair(
    vis: bytes,
    ir: bytes,
    limits: LimitSettings,
    *,
    vis_range: tuple[float, float] | None = None,
    ir_range: tuple[float, float] | None = None,
    vis_layout: RawLayout | None = None,
    ir_layout: RawLayout | None = None,
) -> Pair:
    """Both images as 8-bit arrays on the vis grid. Raises like `inspect`; never returns a partly decoded image."""
    bright = _decode_vis(vis, limits) if vis_layout is None else _raw_vis(vis, vis_layout, limits)
    colour = normalise_vis(bright, vis_range)
    deep = _decode_ir(ir, limits) if ir_layout is None else _raw_ir(ir, ir_layout, limits)
    height, width = colour.shape[:2]
    check_pair((width, height), (deep.shape[1], deep.shape[0]), limits)
    grey = normalise_ir(deep, ir_range)
    if grey.shape != (height, width):
        is_smaller = grey.shape[0] > height
        grey = np.asarray(
            cv2.resize(grey, (width, height), interpolation=cv2.INTER_AREA if is_smaller else cv2.INTER_CUBIC), np.uint8
        )
    return Pair(vis=np.ascontiguousarray(colour), ir=np.ascontiguousarray(grey))


def normalise_vis(values: NDArray[Any], vis_range: tuple[float, float] | None = None) -> Pixels:
    """Visible values (H, W, 3) of 8 or 16 bits as 8 bits; the rule is in the module's text."""
    if vis_range is not None:
        return _through_a_table(values, *vis_range)
    return values if values.dtype == np.uint8 else (values >> 8).astype(np.uint8)


def normalise_ir(values: NDArray[Any], ir_range: tuple[float, float] | None = None) -> Pixels:
    """Infrared values (H, W) of any depth as 8 bits; the rule is in the module's text. Raises InvalidInputError."""
    if values.dtype == np.uint8 and ir_range is None:
        return values
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise InvalidInputError("ir: the file holds values that are not finite; accepted are finite values")
    low, high = ir_range if ir_range is not None else _robust_range(values)
    if not high > low:
        return np.zeros(values.shape, np.uint8)  # a constant image has no contrast to stretch
    if values.dtype.kind == "u":
        return _through_a_table(values, low, high)
    return _to_8_bits(values.astype(np.float64), low, high)


def encode(pixels: Pixels, image_format: ImageFormat, codec: CodecSettings) -> bytes:
    """A picture, (H, W, 3) RGB or (H, W) grey, as a file; npy is the uint8 array itself."""
    if image_format is ImageFormat.NPY:
        stream = io.BytesIO()
        np.save(stream, pixels, allow_pickle=False)
        return stream.getvalue()
    flags: dict[ImageFormat, list[int]] = {
        ImageFormat.PNG: _png_flags(codec.png_compression),
        ImageFormat.JPEG: [cv2.IMWRITE_JPEG_QUALITY, codec.jpeg_quality],
        ImageFormat.WEBP: [cv2.IMWRITE_WEBP_QUALITY, codec.webp_quality],
    }
    ordered = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if pixels.ndim == 3 else pixels
    is_done, encoded = cv2.imencode(f".{image_format.value}", ordered, flags[image_format])
    if not is_done:
        raise InvalidInputError(
            f"{pixels.shape[1]}x{pixels.shape[0]} is too large for {image_format.value}; png and npy take any size"
        )
    return encoded.tobytes()


class Codec(Protocol):
    """What a worker does between a job's bytes and pixels. Calls block, and come from several threads at once."""

    def decode(self, job: FusionJob) -> Pair:
        """A job's pair, as `decode_pair` has it. Raises like `inspect`."""

    def encode(self, job: FusionJob, part: Part, pixels: Pixels) -> bytes:
        """One picture of the answer, in the job's format. Raises InvalidInputError."""


def build_codec(settings: CodecSettings, limits: LimitSettings) -> Codec:
    """The codec that the settings ask for."""
    return ReadyBytes() if settings.kind == "ready" else FileCodec(settings, limits)


class FileCodec:
    """Reads and writes image files."""

    def __init__(self, settings: CodecSettings, limits: LimitSettings) -> None:
        self._settings = settings
        self._limits = limits

    def decode(self, job: FusionJob) -> Pair:
        """See Codec."""
        return decode_pair(
            job.vis,
            job.ir,
            self._limits,
            vis_range=job.options.vis_range,
            ir_range=job.options.ir_range,
            vis_layout=job.vis_layout,
            ir_layout=job.ir_layout,
        )

    def encode(self, job: FusionJob, part: Part, pixels: Pixels) -> bytes:
        """See Codec."""
        return encode(pixels, job.options.format, self._settings)


class ReadyBytes:
    """Reads and writes nothing: one black pixel stands for each image, and the uploaded file is the answer.

    For measuring what the service costs without its codec. Headers are still checked at admission.
    """

    def decode(self, job: FusionJob) -> Pair:
        """See Codec."""
        return Pair(vis=np.zeros((1, 1, 3), np.uint8), ir=np.zeros((1, 1), np.uint8))

    def encode(self, job: FusionJob, part: Part, pixels: Pixels) -> bytes:
        """See Codec."""
        return job.ir if part is Part.IR else job.vis


def _png_flags(level: int) -> list[int]:
    # Measured on 640x480 photographs: run-length matching after the Up filter takes 7 ms for 430 kB where the default
    # matching takes 14 ms for 392 kB (Up) or 49 ms for 370 kB (level 6, adaptive); stored, 0.6 ms for 954 kB.
    flags = [cv2.IMWRITE_PNG_COMPRESSION, level]
    if level == 0:
        return [*flags, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
    if level == 1:
        flags += [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    return [*flags, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]


# headers


def _read_header(data: bytes, role: Role, limits: LimitSettings) -> ImageHeader:
    png_exif = _check_png(data, role) if data.startswith(_PNG_MAGIC) else b""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP", "TIFF")) as image:
            image_format = image.format or ""
            width, height = image.size
            _check_size(width, height, role, limits)
            _check_exif(len(image.info.get("exif", b"")), role)
            exif = image.getexif() if image_format in ("JPEG", "WEBP") else Image.Exif()
            if image_format == "PNG":  # Pillow would decode the whole picture to look for its EXIF chunk
                exif.load(png_exif)
            # Pillow's size and OpenCV's pixels of a TIFF file are both upright already.
            orientation = int(exif.get(_ORIENTATION_TAG, 1))
            if _has_second_frame(image):
                raise PayloadTooLargeError(f"{role}: the file holds several images; one is accepted")
            if image_format == "TIFF":
                _check_tiff(image, len(data), role, limits)
            is_float = image.mode == "F"
            if role == "vis" and (is_float or image.mode == "I"):
                raise InvalidInputError(
                    f"vis: floating point and 32-bit pixels are not accepted; accepted are {ACCEPTED}"
                )
    except (InvalidInputError, PayloadTooLargeError, UnsupportedMediaError):
        raise
    except Exception as error:  # the parser meets hostile bytes here and raises nearly anything
        raise UnsupportedMediaError(f"{role}: not a readable image file; accepted are {ACCEPTED}") from error
    if orientation not in range(1, 9):
        orientation = 1
    if orientation in _TRANSPOSED:
        width, height = height, width
    return ImageHeader(format=image_format, width=width, height=height, orientation=orientation, is_float=is_float)


def _has_second_frame(image: Image.Image) -> bool:
    if image.format == "TIFF":  # counting its pages would walk a list of any length
        try:
            image.seek(1)
        except EOFError:
            return False
        return True
    return image.format != "JPEG" and int(getattr(image, "n_frames", 1)) > 1


def _check_size(width: int, height: int, role: Role, limits: LimitSettings) -> None:
    if max(width, height) > limits.max_side or width * height > limits.max_pixels:
        raise PayloadTooLargeError(
            f"{role}: the image is {width}x{height}; accepted are at most {limits.max_side} pixels a side "
            f"and {limits.max_pixels} in all"
        )
    if min(width, height) < limits.min_side:
        raise InvalidInputError(
            f"{role}: the image is {width}x{height}; accepted are at least {limits.min_side} pixels a side"
        )


def _cut_short(role: Role, kind: str) -> InvalidInputError:
    return InvalidInputError(f"{role}: the {kind} file is damaged or cut short; accepted are complete files")


def _too_many(role: Role, kind: str, most: int, what: str) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"{role}: the {kind} file has more than the accepted {most} {what}")


def _check_exif(num_bytes: int, role: Role) -> None:
    if num_bytes > MAX_EXIF_BYTES:
        raise PayloadTooLargeError(f"{role}: the file has more than the accepted {MAX_EXIF_BYTES} bytes of EXIF data")


def _check_png(data: bytes, role: Role) -> bytes:
    """Every chunk is there with its checksum, up to the closing one. Returns the EXIF chunk's content."""
    at, view, exif, num_chunks = 8, memoryview(data), b"", 0
    while at + 12 <= len(data):
        if (num_chunks := num_chunks + 1) > MAX_CHUNKS:
            raise _too_many(role, "PNG", MAX_CHUNKS, "chunks")
        length = int.from_bytes(view[at : at + 4], "big")
        end = at + 12 + length
        if end > len(data) or zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            break
        kind = data[at + 4 : at + 8]
        if kind == b"IEND":
            return exif
        if kind == b"eXIf":
            _check_exif(length, role)
            exif = data[at + 8 : end - 4]
        at = end
    raise _cut_short(role, "PNG")


def _check_jpeg(data: bytes, role: Role) -> None:
    """The image data end with an end marker; a thumbnail's own, in a segment before them, does not count."""
    at, num_exif = 2, 0
    for _ in range(MAX_SEGMENTS):
        if at + 4 > len(data) or data[at] != 0xFF:
            raise _cut_short(role, "JPEG")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xDA:  # start of scan
            if data.rfind(b"\xff\xd9", at) < 0:
                raise _cut_short(role, "JPEG")
            _check_scans(data, at, role)
            return
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xE1 and data[at + 4 : at + 8] == b"Exif":  # Pillow joins them
            num_exif += length
            _check_exif(num_exif, role)
        at += 2 + length
    raise _too_many(role, "JPEG", MAX_SEGMENTS, "segments")


def _check_scans(data: bytes, at: int, role: Role) -> None:
    """The scans, from the first one's marker on, are not too many; what follows the picture does not count."""
    if data.count(b"\xff\xda", at) <= MAX_SCANS:  # nearly always, and never fewer than there are
        return
    num_scans = num_markers = 0
    while (found := _JPEG_MARKER.search(data, at)) and data[found.end() - 1] != 0xD9:
        num_markers += 1
        num_scans += data[found.end() - 1] == 0xDA
        if num_scans > MAX_SCANS or num_markers > MAX_SEGMENTS:
            raise _too_many(role, "JPEG", MAX_SCANS, "scans")
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")


def _check_tiff_tags(data: bytes, role: Role, limits: LimitSettings) -> None:
    """One image, and no tag with more numbers than a picture needs; the fields are those that Pillow looks at."""
    order, is_big = "<" if data[:2] == b"II" else ">", data[2:3] == b"+"
    head, offset, count, entry = (4, "L", "H", "HHL4x") if not is_big else (8, "Q", "Q", "HHQ8x")
    most = max(MAX_TAG_VALUES, limits.max_pixels // 64)  # the tiles of a picture are numbers, too
    try:
        (first,) = struct.unpack_from(order + offset, data, head)
        (num_tags,) = struct.unpack_from(order + count, data, first)
        if num_tags > MAX_TAGS:
            raise _too_many(role, "TIFF", MAX_TAGS, "tags")
        at = first + struct.calcsize(order + count)
        for _ in range(num_tags):
            _, kind, num_values = struct.unpack_from(order + entry, data, at)
            if num_values > most and kind in _TIFF_NUMBERS:
                raise _too_many(role, "TIFF", most, "numbers in one tag")
            at += struct.calcsize(order + entry)
        (following,) = struct.unpack_from(order + offset, data, at)
    except struct.error as error:
        raise _cut_short(role, "TIFF") from error
    if following not in (0, first):  # Pillow would read their tags, too, to say that they are there
        raise PayloadTooLargeError(f"{role}: the file holds several images; one is accepted")


def _check_tiff(image: Image.Image, num_bytes: int, role: Role, limits: LimitSettings) -> None:
    """All strips or tiles lie within the file, in a layout that the decoder reads."""
    image.seek(0)
    tags = getattr(image, "tag_v2", {})
    if any(tags.get(tag, 1) > limits.max_side + 64 for tag in (322, 323)):  # tile width and height
        raise PayloadTooLargeError(f"{role}: the TIFF file's tiles are larger than {limits.max_side} pixels a side")
    sides = ((tags.get(256, 1), tags.get(322, 1)), (tags.get(257, 1), tags.get(323, 1)))
    decoded = math.prod(-(-image_side // tile_side) * tile_side for image_side, tile_side in sides)
    if decoded > 2 * limits.max_pixels:  # tiles are decoded whole, however little of the picture is in them
        raise PayloadTooLargeError(f"{role}: the TIFF file's tiles hold more than {2 * limits.max_pixels} pixels")
    has_data = False
    for offsets_tag, counts_tag in _TIFF_OFFSETS:
        offsets, counts = tags.get(offsets_tag, ()), tags.get(counts_tag, ())
        has_data |= bool(offsets)
        if len(offsets) != len(counts) or any(
            start + count > num_bytes for start, count in zip(offsets, counts, strict=True)
        ):
            raise _cut_short(role, "TIFF")
    if not has_data:
        raise _cut_short(role, "TIFF")


def _webp_size(data: bytes, role: Role) -> tuple[int, int]:
    if len(data) < 30 or data[8:12] != b"WEBP":
        raise UnsupportedMediaError(f"{role}: not a readable image file; accepted are {ACCEPTED}")
    if int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise _cut_short(role, "WebP")
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


# pixels


def _decode(data: bytes, flags: int, header: ImageHeader, role: Role) -> NDArray[Any]:
    if header.format == "TIFF":
        return _decode_tiff(data, role)
    try:
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        decoded = None
    if decoded is None:
        raise _cut_short(role, header.format)
    upright = _orient(np.asarray(decoded), header.orientation)
    if upright.shape[:2] != (header.height, header.width):
        raise _cut_short(role, header.format)
    return upright


def _decode_tiff(data: bytes, role: Role) -> NDArray[Any]:
    """Upright grey or RGB; OpenCV 5 hands out memory that it never wrote for 16-bit colour."""
    try:
        header = tiff.read_header(data, Limits())
        values = upright(tiff.read_pixels(data, header).values, header.orientation)
    except ImageError as error:
        raise InvalidInputError(f"{role}: {error}") from error
    if role == "vis":
        return values if values.ndim == 3 else np.repeat(values[..., None], 3, axis=2)
    return grey_of(values) if values.ndim == 3 else values


def _decode_vis(data: bytes, limits: LimitSettings) -> NDArray[Any]:
    header = inspect(data, "vis", limits)
    pixels = _decode(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH, header, "vis")
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels
    raise InvalidInputError(f"vis: pixels of type {pixels.dtype} are not accepted; accepted are {ACCEPTED}")


def _decode_ir(data: bytes, limits: LimitSettings) -> NDArray[Any]:
    header = inspect(data, "ir", limits)
    pixels = _decode(data, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH, header, "ir")
    if pixels.dtype not in (np.uint8, np.uint16, np.float32):
        raise InvalidInputError(
            f"ir: pixels of type {pixels.dtype} are not accepted; accepted are {ACCEPTED} or float32"
        )
    return pixels


def _orient(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Undo an EXIF orientation (1 to 8)."""
    if orientation in _TRANSPOSED:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _raw_rows(layout: RawLayout) -> tuple[int, int]:
    """Bytes of one row without padding, and the number of rows."""
    num_rows = layout.height * 3 // 2 if layout.pixel_format is PixelFormat.NV12 else layout.height
    return layout.width * layout.pixel_format.bytes_per_pixel, num_rows


def _raw_array(data: bytes, layout: RawLayout) -> Pixels:
    row_bytes, num_rows = _raw_rows(layout)
    flat = np.frombuffer(data, np.uint8)
    if len(flat) < layout.stride * num_rows:
        flat = np.concatenate([flat, np.zeros(layout.stride * num_rows - len(flat), np.uint8)])
    return np.ascontiguousarray(flat.reshape(num_rows, layout.stride)[:, :row_bytes])


def _raw_vis(data: bytes, layout: RawLayout, limits: LimitSettings) -> NDArray[Any]:
    inspect_raw(data, layout, "vis", limits)
    rows = _raw_array(data, layout)
    match layout.pixel_format:
        case PixelFormat.NV12:
            return np.asarray(cv2.cvtColor(rows, cv2.COLOR_YUV2RGB_NV12), np.uint8)
        case PixelFormat.RGB8:
            return rows.reshape(layout.height, layout.width, 3)
        case PixelFormat.BGR8:
            return rows.reshape(layout.height, layout.width, 3)[..., ::-1]
        case PixelFormat.MONO16:
            grey: NDArray[Any] = rows.view("<u2")
        case PixelFormat.MONO8:
            grey = rows
    return np.repeat(grey[..., None], 3, axis=2)


def _raw_ir(data: bytes, layout: RawLayout, limits: LimitSettings) -> NDArray[Any]:
    inspect_raw(data, layout, "ir", limits)
    rows = _raw_array(data, layout)
    match layout.pixel_format:
        case PixelFormat.MONO8:
            return rows
        case PixelFormat.MONO16:
            return rows.view("<u2")
        case PixelFormat.NV12:
            return rows[: layout.height]
        case PixelFormat.RGB8:
            return np.asarray(cv2.cvtColor(rows.reshape(layout.height, layout.width, 3), cv2.COLOR_RGB2GRAY))
        case PixelFormat.BGR8:
            return np.asarray(cv2.cvtColor(rows.reshape(layout.height, layout.width, 3), cv2.COLOR_BGR2GRAY))


def _robust_range(values: NDArray[Any]) -> tuple[float, float]:
    if values.dtype.kind == "u":  # counting is much cheaper than sorting
        cumulated = np.cumsum(np.bincount(values.ravel()))
        wanted = np.array(PERCENTILES) / 100 * (cumulated[-1] - 1)
        low, high = np.searchsorted(cumulated, wanted, side="right")
        return float(low), float(high)
    low, high = np.percentile(values, PERCENTILES)
    return float(low), float(high)


def _through_a_table(values: NDArray[Any], low: float, high: float) -> Pixels:
    """Unsigned integers as 8 bits: a table over all values is several times faster than arithmetic on pixels."""
    levels = np.arange(1 << (8 * values.dtype.itemsize), dtype=np.float64)
    return np.take(_to_8_bits(levels, low, high), values)


def _to_8_bits(values: NDArray[np.float64], low: float, high: float) -> Pixels:
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)
