"""PNG: every chunk there, up to the closing one; one picture of 1 to 16 bits a sample.

Checksums of the pixels' chunks are the decoder's to check: they cover nearly all of the file, in pieces of some 8 kB,
and Python gives its lock away and wants it back for each.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recofuse_images import formats
from recofuse_images.directories import exif_orientation
from recofuse_images.errors import BadImageError, ImageTooLargeError
from recofuse_images.limits import MAX_CHUNKS, Limits, check_exif, cut_short, too_many
from recofuse_images.picture import Header, Picture

MAGIC = b"\x89PNG\r\n\x1a\n"
_MAX_CHUNK_BYTES = 1 << 31
_MAX_UNPACKED_BYTES = 8 << 20  # of rows that are unpacked here: they and a copy of them are in memory for a while
Pack = Callable[[NDArray[np.uint8]], bytes | bytearray]
Checksum = Callable[[bytes | bytearray, int], int]  # of bytes, going on from that of what came before them
_CHUNK_HEAD = struct.Struct(">I4s")  # length and kind; a checksum of four bytes ends it

_COLOUR_TYPES: dict[int, tuple[formats.Pixels, int]] = {  # pixels of the table, samples a pixel
    0: ("grey", 1), 2: ("RGB", 3), 3: ("palette", 1), 4: ("grey", 2), 6: ("RGB", 4),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PngHeader(Header):
    """bits: of a sample as stored; significant_bits: what `sBIT` says, 0 where it is missing. channels: with alpha."""

    bits: int = 8
    significant_bits: int = 0
    channels: int = 3


def read_header(data: bytes, limits: Limits) -> PngHeader:
    """Check all chunks but what is in those of the pixels. Raises ImageError."""
    if len(data) < 33 or data[8:16] != b"\0\0\0\x0dIHDR":
        raise cut_short("PNG")
    width, height, bits, colour_type = struct.unpack_from(">IIBB", data, 16)
    pixels, channels = _COLOUR_TYPES.get(colour_type, ("", 0))
    if formats.row_of("PNG", pixels, "unsigned", bits, "Deflate") is None:
        raise BadImageError(
            f"the PNG file says that it has colour type {colour_type} of {bits} bits, which does not exist"
        )
    decoded_channels = 4 if pixels == "palette" else channels + 1  # a transparent colour makes an alpha channel
    limits.check_size(width, height, bytes_per_pixel=decoded_channels * -(-bits // 8))
    exif, significant_bits = _check_chunks(data)
    return PngHeader(
        container="PNG",
        width=width,
        height=height,
        orientation=exif_orientation(exif),
        bits=bits,
        significant_bits=significant_bits if significant_bits <= bits else 0,  # more than are stored is no word
        channels=channels,
    )


def is_rgba(data: bytes) -> bool:
    """Whether a file is a PNG of four 8-bit channels, as MFNet packs a visible and an infrared image."""
    return data.startswith(MAGIC) and data[12:16] == b"IHDR" and data[24:26] == b"\x08\x06"


def read_pixels(data: bytes, header: PngHeader) -> Picture:
    """Grey (H, W) or RGB (H, W, 3), uint8 or uint16, and alpha. Raises BadImageError."""
    from recofuse_images.codecs import imagecodecs

    try:
        bare = _bare(data)
        values = np.asarray(imagecodecs.png_decode(_unpacked(bare) or bare))
    except Exception as error:  # the decoder meets hostile bytes here
        raise cut_short("PNG") from error
    if values.shape[:2] != (header.height, header.width):
        raise cut_short("PNG")
    depth, likely_depth = (8, None) if values.dtype == np.uint8 else (None, header.significant_bits or None)
    if values.ndim == 2:
        return Picture(values, depth, likely_depth)
    num_colours = 1 if values.shape[2] == 2 else 3
    colours = np.ascontiguousarray(values[..., 0] if num_colours == 1 else values[..., :3])
    alpha = np.ascontiguousarray(values[..., num_colours]) if values.shape[2] > num_colours else None
    return Picture(colours, depth, likely_depth, alpha=alpha)


def write_pixels(pixels: NDArray[Any]) -> bytes:
    """(H, W) grey or (H, W, 3) RGB, uint8 or uint16, as a file, without a codec: clients go without one.

    Raises BadImageError.
    """
    return packed_file(pixels, _packed_by_runs)


def packed_file(
    pixels: NDArray[Any], pack: Pack, *, is_filtered: bool = True, checksum: Checksum = zlib.crc32
) -> bytes:
    """The file of `write_pixels`; pack makes a stream of zlib's format of the rows, filtered by Up or not at all.

    Raises BadImageError.
    """
    height, width = pixels.shape[:2]
    if pixels.nbytes >= _MAX_CHUNK_BYTES:
        raise BadImageError(f"{width}x{height} is too large for one PNG")
    bits, colour_type = pixels.dtype.itemsize * 8, 2 if pixels.ndim == 3 else 0
    rows = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder(">")).view(np.uint8).reshape(height, -1)
    named = np.empty((height, 1 + rows.shape[1]), np.uint8)  # every row behind the name of its filter
    if is_filtered:
        named[:, 0] = 2  # Up: what a row differs in from the one above
        named[0, 1:] = rows[0]
        np.subtract(rows[1:], rows[:-1], out=named[1:, 1:])
    else:
        named[:, 0] = 0
        named[:, 1:] = rows
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", pack(named)), (b"IEND", b"")
    return b"".join((MAGIC, *(part for chunk in chunks for part in _chunk(*chunk, checksum))))


def _packed_by_runs(rows: NDArray[np.uint8]) -> bytes:
    packer = zlib.compressobj(level=1, strategy=zlib.Z_RLE)
    return packer.compress(rows.data) + packer.flush()


def _chunk(kind: bytes, content: bytes | bytearray, checksum: Checksum) -> tuple[bytes | bytearray, ...]:
    return struct.pack(">I", len(content)), kind, content, struct.pack(">I", checksum(content, checksum(kind, 0)))


def _bare(data: bytes) -> bytes:
    """The file without what the picture does not need: libpng unpacks every text, however many, and takes minutes."""
    at, view = 8, memoryview(data)
    parts: list[bytes | memoryview] = [MAGIC]
    while at < len(data):
        end = at + 12 + int.from_bytes(view[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if kind[:1].isupper() or kind == b"tRNS":  # critical chunks, among them those that no decoder may pass over
            parts.append(view[at:end])
        if kind == b"IEND":
            break
        at = end
    return b"".join(parts)


def _unpacked(bare: bytes) -> bytes | None:
    """The file with its rows unpacked by libdeflate, which takes half of libpng's time; for libpng to read and check.

    None for what is not sound, exactly as long as its header says, and of middling size: libpng judges that by itself.
    """
    from recofuse_images.codecs import imagecodecs

    codec: Any = imagecodecs  # views and arrays are as good as bytes, though its annotations do not say so
    width, height, bits, colour_type, *_, interlacing = struct.unpack_from(">IIBBBBB", bare, 16)
    row_bytes = 1 + (width * bits * _COLOUR_TYPES[colour_type][1] + 7) // 8
    if interlacing or row_bytes * height > _MAX_UNPACKED_BYTES:
        return None
    view, at, start, end = memoryview(bare), 8, 0, 0
    packed: list[memoryview] = []
    while at < len(bare):
        length, kind = _CHUNK_HEAD.unpack_from(bare, at)
        following = at + 12 + length
        if kind == b"IDAT":
            if packed and end != at:
                return None  # another chunk lies between them
            checksum = int.from_bytes(view[following - 4 : following])
            if codec.deflate_crc32(view[at + 4 : following - 4]) != checksum:
                return None
            start, end = start or at, following
            packed.append(view[at + 8 : following - 4])
        at = following
    rows = np.empty(row_bytes * height, np.uint8)
    try:
        found = codec.deflate_decode(b"".join(packed), out=rows, raw=False)
    except Exception:  # noqa: BLE001 - it meets hostile bytes here, and libpng has a word for each of them
        return None
    if len(found) != len(rows):
        return None
    stored = codec.deflate_encode(rows, 0, raw=False)
    chunk = _chunk(b"IDAT", stored, imagecodecs.deflate_crc32)
    return b"".join((view[:start], *chunk, view[end:]))


def _check_chunks(data: bytes) -> tuple[bytes, int]:
    """The EXIF chunk's content and the most significant bits of a colour. Raises ImageError."""
    at, view, exif, significant_bits, num_chunks = 8, memoryview(data), b"", 0, 0
    while at + 12 <= len(data):
        if (num_chunks := num_chunks + 1) > MAX_CHUNKS:
            raise too_many("PNG", MAX_CHUNKS, "chunks")
        length, kind = _CHUNK_HEAD.unpack_from(data, at)
        start, at = at + 4, at + 12 + length
        if at > len(data):
            break
        if kind == b"IDAT":
            continue
        content = view[start + 4 : at - 4]
        if zlib.crc32(view[start : at - 4]) != int.from_bytes(view[at - 4 : at], "big"):
            break
        if kind == b"IEND":
            return exif, significant_bits
        if kind == b"eXIf":
            check_exif(length)
            exif = bytes(content)
        elif kind == b"sBIT" and length:
            significant_bits = max(content[:3])
        elif kind == b"acTL" and int.from_bytes(content[:4], "big") > 1:
            raise ImageTooLargeError("the file holds several images; one is accepted")
    raise cut_short("PNG")
