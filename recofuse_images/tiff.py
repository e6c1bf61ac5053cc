"""TIFF and BigTIFF: which of its directories is the picture, whether the table accepts it, and its pixels.

The directory is read here and held against `formats.TABLE` before any library sees the file; what tifffile is given is
the same file with a directory of the tags named below alone. So neither a vendor's tag nor a nested directory is ever
followed, and a file that many readers each half understand is refused by its name.

Pixels are decoded strip by strip into an array that is filled first: OpenCV 5 returned an unwritten one for 16-bit
colour, and what lay there were other callers' pictures.
"""

from __future__ import annotations

import io
import logging
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recofuse_images import formats, jpeg
from recofuse_images.directories import Directory, Form, directories
from recofuse_images.errors import BadImageError, ImageError, ImageTooLargeError, UnsupportedImageError
from recofuse_images.limits import MAX_TAG_VALUES, Limits, cut_short
from recofuse_images.picture import Header, Picture, rgb_of_cmyk

if TYPE_CHECKING:
    import tifffile

MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_SUBFILE, _ORIENTATION, _COLOUR_MAP, _NODATA, _DNG = 254, 274, 320, 42113, 50706
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_STRIP_OFFSETS, _SAMPLES, _ROWS_PER_STRIP, _STRIP_BYTES, _PLANAR, _PREDICTOR = 273, 277, 278, 279, 284, 317
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES = 322, 323, 324, 325
_EXTRA_SAMPLES, _SAMPLE_FORMAT, _JPEG_TABLES, _SUBSAMPLING = 338, 339, 347, 530
_FOR_TIFFFILE = frozenset(
    {_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER}
    | {_STRIP_OFFSETS, _SAMPLES, _ROWS_PER_STRIP, _STRIP_BYTES, _PLANAR, _PREDICTOR}
    | {_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES}
    | {_EXTRA_SAMPLES, _SAMPLE_FORMAT, _JPEG_TABLES, _SUBSAMPLING}
)
_COMPRESSIONS = {
    1: "none", 2: "CCITT RLE", 3: "CCITT fax 3", 4: "CCITT fax 4", 5: "LZW", 6: "old-style JPEG", 7: "JPEG",
    8: "Deflate", 32773: "PackBits", 32946: "Deflate", 33003: "JPEG 2000", 33005: "JPEG 2000",
    34712: "JPEG 2000", 34887: "LERC",
    34892: "lossy JPEG (DNG)", 34925: "LZMA", 34926: "zstd", 50000: "zstd", 50001: "WebP", 50002: "JPEG XL",
    52546: "JPEG XL", 32809: "ThunderScan", 34676: "SGI LogLuv", 34677: "SGI LogLuv", 32909: "PixarLog",
}  # fmt: skip
_PHOTOMETRICS = {
    0: "grey", 1: "grey", 2: "RGB", 3: "palette", 4: "transparency mask", 5: "CMYK", 6: "YCbCr", 8: "CIELab",
    9: "ICCLab", 10: "ITULab", 32803: "colour filter array (a camera's raw file)", 32844: "LogL", 32845: "LogLuv",
    34892: "linear raw (a camera's raw file)",
}  # fmt: skip
_KINDS = {1: "unsigned", 2: "signed", 3: "floating point", 4: "unsigned", 5: "complex", 6: "complex"}
_PREDICTED = ("LZW", "Deflate")  # with any other compression, libtiff writes and reads as if the tag were not there
_COLOURS: dict[str, int] = {"grey": 1, "palette": 1, "RGB": 3, "YCbCr": 3, "CMYK": 4}  # samples without extra ones
_MAX_EXTRA = 4

logging.getLogger("tifffile").disabled = True  # a broken upload is the caller's news, not a line in our log


@dataclass(frozen=True, slots=True)
class TiffHeader(Header):
    """The picture's directory, checked. entries: the tags of it that tifffile is given, as stored."""

    pixels: str = "grey"
    kind: str = "unsigned"
    bits: int = 8
    samples: int = 1
    white_is_zero: bool = False
    nodata: float | None = None
    colour_map: tuple[int, ...] = ()
    entries: tuple[bytes, ...] = ()


def read_header(data: bytes, limits: Limits) -> TiffHeader:
    """The picture's directory; thumbnails and overviews are passed over. Raises ImageError."""
    form = Form.of(data)
    found = directories(data, form, max(MAX_TAG_VALUES, limits.max_pixels // 64))
    if any(_DNG in directory for directory in found):
        raise UnsupportedImageError("a camera's raw file (DNG) is not accepted; develop it first")
    directory = _picture_of(found)
    width, height = directory.number(_WIDTH, 0), directory.number(_HEIGHT, 0)
    limits.check_size(width, height)
    header = _described(directory, width, height)
    limits.check_size(width, height, bytes_per_pixel=header.samples * -(-header.bits // 8))
    _check_storage(directory, header, len(data), limits)
    return header


def read_pixels(data: bytes, header: TiffHeader) -> Picture:
    """The picture that `read_header` found. Raises BadImageError for a damaged file."""
    from recofuse_images.codecs import tifffile

    try:
        with tifffile.TiffFile(io.BytesIO(_bare(data, header.entries))) as file:
            values = _assembled(file.pages.first, header, data)
    except ImageError:
        raise
    except Exception as error:  # the decoders meet hostile bytes here and raise nearly anything
        raise cut_short("TIFF") from error
    return _interpreted(values, header)


def _picture_of(directories: list[Directory]) -> Directory:
    """The largest image of those that are no reduced copies and no masks; smaller ones of its shape are copies, too."""
    full = [directory for directory in directories if not directory.number(_SUBFILE, 0) & 0b101] or directories
    sizes = [(directory.number(_WIDTH, 0), directory.number(_HEIGHT, 0)) for directory in full]
    (width, height), best = max(zip(sizes, full, strict=True), key=lambda sized: sized[0][0] * sized[0][1])
    for (other_width, other_height), other in zip(sizes, full, strict=True):
        is_copy = other_width < width and abs(other_width * height - other_height * width) <= max(width, height)
        if other is not best and not is_copy:
            raise ImageTooLargeError("the file holds several images; one is accepted")
    return best


def _described(directory: Directory, width: int, height: int) -> TiffHeader:
    """What the tags say, held against the table. Raises UnsupportedImageError by the name of what is not in it."""
    photometric, samples = directory.number(_PHOTOMETRIC, -1), directory.number(_SAMPLES, 1)
    pixels = _PHOTOMETRICS.get(photometric, f"photometric interpretation {photometric}")
    all_bits = set(directory.numbers(_BITS, (1,))[: max(samples, 1)])
    kinds = set(directory.numbers(_SAMPLE_FORMAT, (1,))[: max(samples, 1)])
    storage = _compression_of(directory)
    if len(all_bits) != 1 or len(kinds) != 1:
        raise UnsupportedImageError("a TIFF whose samples differ in depth is not accepted")
    bits, kind = all_bits.pop(), _KINDS.get(kinds.pop(), "unknown")
    if pixels not in _COLOURS:
        raise UnsupportedImageError(f"a TIFF of {pixels} pixels is not accepted; accepted are {formats.ACCEPTED}")
    if storage not in {name for row in formats.TABLE if row.container == "TIFF" for name in row.storage}:
        raise UnsupportedImageError(
            f"a TIFF compressed by {storage} is not accepted; accepted are none, LZW, Deflate, PackBits and JPEG"
        )
    row = formats.row_of("TIFF", pixels, kind, bits, storage)
    if row is None:
        packed = "" if storage == "none" else f", compressed by {storage},"
        raise UnsupportedImageError(
            f"a TIFF of {bits}-bit {kind} {pixels} samples{packed} is not accepted; accepted are "
            f"{formats.accepted_bits('TIFF', pixels)}"
        )
    _check_samples(directory, pixels, samples, row)
    _check_predictor(directory, kind, bits, storage)
    orientation = directory.number(_ORIENTATION, 1)
    for_tifffile = _FOR_TIFFFILE if storage in _PREDICTED else _FOR_TIFFFILE - {_PREDICTOR}
    for code in for_tifffile & directory.entries.keys():
        directory.require(code)
    return TiffHeader(
        container="TIFF",
        width=width,
        height=height,
        orientation=orientation if orientation in range(1, 9) else 1,
        pixels=pixels,
        kind=kind,
        bits=bits,
        samples=samples,
        white_is_zero=photometric == 0,
        nodata=_number_of(directory.text(_NODATA)),
        colour_map=_colour_map_of(directory, bits) if pixels == "palette" else (),
        entries=tuple(entry for code, entry in sorted(directory.entries.items()) if code in for_tifffile),
    )


def _compression_of(directory: Directory) -> str:
    compression = directory.number(_COMPRESSION, 1)
    return _COMPRESSIONS.get(compression, f"method {compression}")


def _check_samples(directory: Directory, pixels: str, samples: int, row: formats.Row) -> None:
    num_extra = samples - _COLOURS[pixels]
    if num_extra < 0:
        raise cut_short("TIFF")
    if num_extra > (_MAX_EXTRA if pixels == "RGB" else 1) or (num_extra and not row.alpha):
        raise UnsupportedImageError(
            f"a TIFF of {samples} {pixels} channels is not accepted; send one band for infrared, three for visible"
        )
    if directory.number(_PLANAR, 1) not in (1, 2):
        raise cut_short("TIFF")


def _check_predictor(directory: Directory, kind: str, bits: int, storage: str) -> None:
    predictor = directory.number(_PREDICTOR, 1)
    if storage not in _PREDICTED or predictor == 1:
        return
    fits = (predictor == 2 and bits in (8, 16, 32)) or (predictor == 3 and kind == "floating point")
    if not fits or (predictor == 2 and kind == "floating point" and bits == 16):
        raise UnsupportedImageError(f"a TIFF of {bits}-bit {kind} samples with predictor {predictor} is not accepted")


def _colour_map_of(directory: Directory, bits: int) -> tuple[int, ...]:
    colours = directory.numbers(_COLOUR_MAP)
    if len(colours) != 3 << bits or not 0 <= min(colours) <= max(colours) <= 0xFFFF:
        raise cut_short("TIFF")
    return colours


def _number_of(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _check_storage(directory: Directory, header: TiffHeader, num_bytes: int, limits: Limits) -> None:
    """Every strip or tile of the picture is named and lies within the file."""
    is_tiled = _TILE_WIDTH in directory or _TILE_OFFSETS in directory
    if is_tiled:
        side_x, side_y = directory.number(_TILE_WIDTH, 0), directory.number(_TILE_HEIGHT, 0)
        if max(side_x, side_y) > limits.max_side + 64:
            raise ImageTooLargeError(f"the TIFF file's tiles are larger than {limits.max_side} pixels a side")
    else:
        side_x, side_y = header.width, min(directory.number(_ROWS_PER_STRIP, header.height), header.height)
    if side_x < 1 or side_y < 1:
        raise cut_short("TIFF")
    across, down = -(-header.width // side_x), -(-header.height // side_y)
    if is_tiled and across * down * side_x * side_y > 2 * limits.max_pixels:  # decoded whole, however little is used
        raise ImageTooLargeError(f"the TIFF file's tiles hold more than {2 * limits.max_pixels} pixels")
    num_segments = across * down * (header.samples if directory.number(_PLANAR, 1) == 2 else 1)
    offsets = directory.numbers(_TILE_OFFSETS if is_tiled else _STRIP_OFFSETS)
    counts = directory.numbers(_TILE_BYTES if is_tiled else _STRIP_BYTES)
    if len(offsets) != num_segments or len(counts) != num_segments:
        raise cut_short("TIFF")
    if (0, 0) in zip(offsets, counts, strict=True):
        raise UnsupportedImageError("a sparse TIFF, with strips or tiles left out, is not accepted; write all of it")
    if any(start < 8 or count < 1 or start + count > num_bytes for start, count in zip(offsets, counts, strict=True)):
        raise cut_short("TIFF")


def _bare(data: bytes, entries: tuple[bytes, ...]) -> bytes:
    """The file with one directory, of these tags alone, behind what it had."""
    form = Form.of(data)
    at = len(data) + len(data) % 2
    directory = struct.pack(form.order + form.count, len(entries)) + b"".join(entries)
    head = data[: form.first_at] + struct.pack(form.order + form.offset, at)
    return b"".join((head, memoryview(data)[len(head) :], bytes(at - len(data)), directory, bytes(8)))


def _assembled(page: tifffile.TiffPage, header: TiffHeader, data: bytes) -> NDArray[Any]:
    """All samples: (H, W, S), every one of them from the file."""
    separate, depth, length, width, contiguous = page.shaped
    if (length, width, separate * contiguous, depth) != (header.height, header.width, header.samples, 1):
        raise cut_short("TIFF")
    if page.compression == 7:
        _check_jpegs(page, data)
    values = np.zeros(page.shaped, page.dtype)
    num_written = 0
    for segment, (sample, _, row, column, _), _ in page.segments(maxworkers=1):
        if segment is None:
            raise cut_short("TIFF")
        part = values[sample, 0, row : row + segment.shape[1], column : column + segment.shape[2]]
        part[:] = segment[0, : part.shape[0], : part.shape[1]]
        num_written += part.size
    if num_written != values.size:
        raise cut_short("TIFF")
    return values.transpose(1, 2, 3, 0, 4).reshape(length, width, header.samples)


def _check_jpegs(page: tifffile.TiffPage, data: bytes) -> None:
    """The JPEG pictures within are no larger than their strips and tiles, which were held against the limits."""
    side_y, side_x = page.chunks[-3:-1] if page.planarconfig == 1 and len(page.chunks) > 2 else page.chunks[-2:]
    for start, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        frame = jpeg.frame_of(data[start : start + count])
        if frame.width > side_x or frame.height > side_y:
            raise BadImageError("the TIFF file's JPEG pictures are larger than their strips or tiles")


def _interpreted(values: NDArray[Any], header: TiffHeader) -> Picture:
    """Samples as grey or RGB, white as the highest value, alpha apart."""
    num_colours = _COLOURS[header.pixels]
    alpha = np.ascontiguousarray(values[..., num_colours]) if header.samples > num_colours else None
    values, nodata, bits = values[..., :num_colours], header.nodata, header.bits
    if header.pixels == "palette":
        colours = np.asarray(header.colour_map, np.uint16).reshape(3, -1)
        levels = (colours >> 8 if colours.max() > 255 else colours).astype(np.uint8)  # some writers fill 8 of 16 bits
        return Picture(np.ascontiguousarray(levels.T[values[..., 0].astype(np.intp)]), bits=8)
    if header.kind == "unsigned" and bits < 8:
        values, bits = values.astype(np.uint8) * np.uint8(255 // ((1 << bits) - 1)), 8
    if header.white_is_zero:
        values, nodata = _inverted(values, nodata, header.kind, bits)
    if header.pixels == "CMYK":
        values = rgb_of_cmyk(values)
    if header.pixels in ("grey", "CMYK") and values.shape[2] == 1:
        values = values[..., 0]
    is_exact = header.kind == "unsigned" and bits < 16
    return Picture(np.ascontiguousarray(values), bits if is_exact else None, nodata=nodata, alpha=alpha)


def _inverted(values: NDArray[Any], nodata: float | None, kind: str, bits: int) -> tuple[NDArray[Any], float | None]:
    if kind == "unsigned":
        highest = (1 << bits) - 1
        return values.dtype.type(highest) - values, None if nodata is None else highest - nodata
    if kind == "signed":
        return ~values, None if nodata is None else -1 - nodata
    return -values, None if nodata is None else -nodata
