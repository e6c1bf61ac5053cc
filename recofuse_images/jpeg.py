"""JPEG: its frame, its segments and scans counted, and its pixels.

Phones and drones write more into the file than the picture: previews and gain maps (CIPA MPF), films, thermal data.
The first picture is the one that is meant; what follows its end marker is passed over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from recofuse_images.directories import exif_orientation
from recofuse_images.errors import UnsupportedImageError
from recofuse_images.limits import MAX_SCANS, MAX_SEGMENTS, Limits, check_exif, cut_short, too_many
from recofuse_images.picture import Header, Picture, rgb_of_cmyk

MAGIC = b"\xff\xd8"

_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # stuffing and restarts belong to a scan's data
_FRAMES = {  # what a start-of-frame marker says; the table has the first three
    0xC0: "baseline", 0xC1: "baseline", 0xC2: "progressive", 0xC3: "lossless",
    0xC5: "hierarchical", 0xC6: "hierarchical", 0xC7: "hierarchical",
    0xC9: "arithmetic-coded", 0xCA: "arithmetic-coded", 0xCB: "arithmetic-coded",
    0xCD: "hierarchical", 0xCE: "hierarchical", 0xCF: "hierarchical", 0xF7: "JPEG-LS",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class JpegHeader(Header):
    """components: colour planes, 1, 3 or 4."""

    components: int = 3


@dataclass(frozen=True, slots=True)
class _Frame:
    coding: str
    bits: int
    width: int
    height: int
    components: int
    exif: bytes


def read_header(data: bytes, limits: Limits) -> JpegHeader:
    """Check the segments up to the first scan, and that the picture has an end. Raises ImageError."""
    frame = frame_of(data)
    if frame.coding not in ("baseline", "progressive") or frame.bits != 8:
        kind = f"{frame.bits}-bit" if frame.coding in ("baseline", "progressive") else frame.coding
        raise UnsupportedImageError(
            f"a {kind} JPEG is not accepted; accepted are baseline and progressive ones of 8 bits"
        )
    if frame.components not in (1, 3, 4):
        raise UnsupportedImageError(f"a JPEG of {frame.components} colours is not accepted; accepted are 1, 3 and 4")
    limits.check_size(frame.width, frame.height, bytes_per_pixel=frame.components)
    return JpegHeader(
        container="JPEG",
        width=frame.width,
        height=frame.height,
        orientation=exif_orientation(frame.exif),
        components=frame.components,
    )


def frame_of(data: bytes) -> _Frame:
    """The frame's header, with all segments counted on the way to the first scan. Raises ImageError.

    The image data end with an end marker; a thumbnail's own, in a segment before them, does not count.
    """
    at, exif, frame = 2, [], None
    for _ in range(MAX_SEGMENTS):
        if at + 4 > len(data) or data[at] != 0xFF:
            raise cut_short("JPEG")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:  # start of scan
            if frame is None or data.rfind(b"\xff\xd9", at) < 0:
                raise cut_short("JPEG")
            _check_scans(data, at)
            return _Frame(*frame, exif=b"".join(exif))
        if marker in _FRAMES and frame is None:
            if at + 10 > len(data):
                raise cut_short("JPEG")
            height, width = (int.from_bytes(data[at + 5 + side : at + 7 + side], "big") for side in (0, 2))
            frame = (_FRAMES[marker], data[at + 4], width, height, data[at + 9])
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            exif.append(data[at + 10 : at + 2 + length])
            check_exif(sum(map(len, exif)))
        at += 2 + length
    raise too_many("JPEG", MAX_SEGMENTS, "segments")


def read_pixels(data: bytes, header: JpegHeader) -> Picture:
    """The first picture of the file: grey (H, W) or RGB (H, W, 3), uint8. Raises BadImageError."""
    from recofuse_images.codecs import imagecodecs

    try:
        values = np.asarray(imagecodecs.jpeg8_decode(data))
    except Exception as error:  # the decoder meets hostile bytes here
        raise cut_short("JPEG") from error
    if values.shape[:2] != (header.height, header.width):
        raise cut_short("JPEG")
    if values.ndim == 3 and values.shape[2] == 4:
        values = rgb_of_cmyk(255 - values)  # Adobe stores light, not ink
    return Picture(values, bits=8)


def _check_scans(data: bytes, at: int) -> None:
    """The scans, from the first one's marker on, are not too many; what follows the picture does not count."""
    if data.count(b"\xff\xda", at) <= MAX_SCANS:  # nearly always, and never fewer than there are
        return
    num_scans = num_markers = 0
    while (found := _MARKER.search(data, at)) and data[found.end() - 1] != 0xD9:
        num_markers += 1
        num_scans += data[found.end() - 1] == 0xDA
        if num_scans > MAX_SCANS or num_markers > MAX_SEGMENTS:
            raise too_many("JPEG", MAX_SCANS, "scans")
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
