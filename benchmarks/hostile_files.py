"""Image files for the drill of hostile input: one of each layout that decoders differ in, damaged copies, and bombs.

The sound ones come with their pixels, since a wrong answer may hold what lay in memory.
"""

from __future__ import annotations

import io
import random
import struct
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from recofuse_images.writer import png_bytes

Pixels = NDArray[np.uint8]

WIDTH, HEIGHT = 64, 48
NUM_DAMAGED = 3  # copies of each


def sound_files() -> dict[str, tuple[bytes, Pixels]]:
    """A visible image in files of many kinds, and what is to come back of each: (H, W, 3), exactly."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    shown = np.stack([columns * 4, rows * 5, 255 - columns * 2 - rows * 2], axis=2).astype(np.uint8)
    deep = shown.astype(np.uint16) * 257
    grey = np.repeat(shown[..., :1], 3, axis=2)
    rgb: dict[str, Any] = {"photometric": "rgb"}
    return {
        "TIFF of 16-bit colour": (_tiff(deep, **rgb), shown),
        "TIFF of 16-bit colour in tiles": (_tiff(deep, **rgb, tile=(32, 32), compression="deflate"), shown),
        "TIFF of 16-bit planes": (_tiff(_planes(deep), **rgb, planarconfig="separate", byteorder=">"), shown),
        "TIFF of 8-bit planes": (_tiff(_planes(shown), **rgb, planarconfig="separate", compression="lzw"), shown),
        "TIFF of 16-bit colour and alpha": (
            _tiff(np.dstack([deep, deep[..., 1]]), **rgb, extrasamples=["assocalpha"]),
            shown,
        ),
        "TIFF whose 0 is white": (_tiff(65535 - deep[..., 0], photometric="miniswhite", byteorder=">"), grey),
        "TIFF of floating point": (_tiff((shown / 255).astype(np.float64), **rgb), shown),
        "BMP": (_saved(shown, "BMP"), shown),
        "PNG of 16 bits": (png_bytes(deep), shown),
        "JPEG with a preview": (_with_preview(grey), grey),
    }


def crafted_files() -> dict[str, bytes]:
    """Damaged copies of the sound ones, and files that claim more than they hold."""
    found = {}
    for name, (data, _) in sound_files().items():
        chance = random.Random(name)
        for number in range(NUM_DAMAGED):
            changed = bytearray(data)
            for _ in range(1 + number * 3):
                changed[chance.randrange(len(data))] = chance.randrange(256)
            found[f"{name}, damaged {number}"] = bytes(changed)
        found[f"{name}, cut"] = data[: len(data) * 2 // 3]
    flat = np.zeros((4000, 4000), np.uint8)
    strips = _tiff(flat, compression="deflate", rowsperstrip=1)
    return {
        **found,
        "TIFF of 16 million black pixels in 4000 strips": strips,
        "TIFF of 4000 floating-point planes": _tiff(np.zeros((40, 40, 400), np.float64), photometric="minisblack"),
        "TIFF whose tiles are huge": _renumbered(strips, {256: 8000, 257: 8000, 278: 8000}),
        "TIFF of 2**31 rows": _renumbered(strips, {257: 2**31}),
        "TIFF of no bits": _renumbered(strips, {258: 0}),
        "TIFF of 65535 samples": _renumbered(strips, {277: 65535}),
        "TIFF whose JPEG is another size": _tiff_around_a_larger_jpeg(),
        "BMP of 2**31 rows": b"BM" + struct.pack("<IIIIiiHHI", 0, 0, 54, 40, 64, -(2**31), 1, 24, 0) + bytes(99),
        "BMP of run lengths": b"BM" + struct.pack("<IIIIiiHHI", 0, 0, 54, 40, 64, 48, 1, 8, 1) + bytes(9999),
        "AVIF of boxes alone": b"\0\0\0\x14ftypavif\0\0\0\0avif" + b"\0\0\0\x10metaispe" * 9,
        "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(999),
        "FLIR segments without end": _with_segments(b"FLIR\0\x01\0\xff" + b"FFF\0" + bytes(60000), 40),
        "FLIR segments that overlap": _with_segments(b"FLIR\0\x01\0\x01" + _fff(2**31, 2**31), 2),
        "FLIR picture of 65535x65535": _with_segments(b"FLIR\0\x01\0\0" + _fff(96, 64, 65535, 65535), 1),
        "DJI block of 60 KB": _with_segments(bytes(60000), 1, b"\xff\xe3"),
    }


def _tiff(pixels: NDArray[Any], **options: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, metadata=None, **options)
    return stream.getvalue()


def _planes(pixels: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _saved(pixels: Pixels, container: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, container, **options)
    return stream.getvalue()


def _with_preview(pixels: Pixels) -> bytes:
    """Grey, and at the best quality, so that the pixels come back within a level; they are smooth."""
    shown = Image.fromarray(pixels)
    stream = io.BytesIO()
    shown.save(stream, "MPO", save_all=True, append_images=[shown.resize((32, 24))], quality=100, subsampling=0)
    return stream.getvalue()


def _renumbered(data: bytes, values: dict[int, int]) -> bytes:
    """A little-endian TIFF file with other numbers in the tags of its first directory."""
    changed = bytearray(data)
    (first,) = struct.unpack_from("<I", data, 4)
    for index in range(struct.unpack_from("<H", data, first)[0]):
        at = first + 2 + 12 * index
        code, kind = struct.unpack_from("<HH", data, at)
        if code in values:
            struct.pack_into("<I" if kind == 4 else "<H", changed, at + 8, values[code])
    return bytes(changed)


def _tiff_around_a_larger_jpeg() -> bytes:
    """A TIFF file of 64x48 pixels whose strip is a JPEG file of 4000x4000."""
    small = _tiff(np.zeros((HEIGHT, WIDTH), np.uint8), compression="jpeg")
    large = _saved(np.zeros((4000, 4000), np.uint8), "JPEG")
    moved = _renumbered(small, {273: len(small), 279: len(large)})
    return moved + large


def _with_segments(body: bytes, count: int, marker: bytes = b"\xff\xe1") -> bytes:
    """A JPEG file with more segments behind its begin."""
    jpeg = _saved(np.zeros((HEIGHT, WIDTH), np.uint8), "JPEG")
    segment = marker + struct.pack(">H", len(body) + 2) + body
    return jpeg[:2] + segment * count + jpeg[2:]


def _fff(offset: int, length: int, width: int = 64, height: int = 48) -> bytes:
    """A FLIR record file whose raw picture is said to lie there."""
    head = b"FFF\0" + b"x".ljust(16, b"\0") + struct.pack(">III", 100, 64, 1)
    entry = struct.pack(">HHIIII", 1, 0, 100, 1, offset, length)
    return head.ljust(64, b"\0") + entry.ljust(32, b"\0") + struct.pack("<HHH", 2, width, height) + bytes(64)
