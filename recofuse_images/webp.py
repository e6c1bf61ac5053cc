"""WebP: one frame, lossy or lossless, 8 bits."""

from __future__ import annotations

import struct

import numpy as np

from recofuse_images.directories import exif_orientation
from recofuse_images.errors import ImageTooLargeError
from recofuse_images.limits import MAX_CHUNKS, Limits, check_exif, cut_short, too_many
from recofuse_images.picture import Header, Picture

_ANIMATED = 0x02  # flag of the extended header


def read_header(data: bytes, limits: Limits) -> Header:
    """Check size, chunks and frames. Raises ImageError."""
    if len(data) < 30 or int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise cut_short("WebP")
    width, height = _size_of(data)
    limits.check_size(width, height, bytes_per_pixel=4)
    if data[12:16] == b"VP8X" and data[20] & _ANIMATED:
        raise ImageTooLargeError("the file holds several images; one is accepted")
    return Header("WebP", width, height, exif_orientation(_exif_of(data)))


def read_pixels(data: bytes, header: Header) -> Picture:
    """RGB (H, W, 3), uint8; alpha is dropped. Raises BadImageError."""
    from recofuse_images.codecs import imagecodecs

    try:
        values = np.asarray(imagecodecs.webp_decode(data))
    except Exception as error:  # the decoder meets hostile bytes here
        raise cut_short("WebP") from error
    if values.shape[:2] != (header.height, header.width) or values.ndim != 3:
        raise cut_short("WebP")
    return Picture(np.ascontiguousarray(values[..., :3]), bits=8)


def _size_of(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _exif_of(data: bytes) -> bytes:
    at, end = 12, int.from_bytes(data[4:8], "little") + 8
    for _ in range(MAX_CHUNKS):
        if at + 8 > end:
            return b""
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"EXIF":
            check_exif(length)
            return data[at + 8 : at + 8 + length].removeprefix(b"Exif\0\0")
        at += 8 + length + length % 2
    raise too_many("WebP", MAX_CHUNKS, "chunks")
