"""Pictures to files: the answers of the service, what the client sends, what training degrades."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recofuse_images.codecs import cv2, imagecodecs
from recofuse_images.errors import BadImageError
from recofuse_images.png import packed_file


def png_bytes(pixels: NDArray[Any], compression: int = 1) -> bytes:
    """(H, W) grey or (H, W, 3) RGB, uint8 or uint16, as PNG of a level from 0, stored, to 9. Raises BadImageError."""
    # docs/decisions/0023: what the Up filter leaves, by libdeflate, in half the time that zlib's run lengths take.

    def pack(rows: Any) -> bytes | bytearray:  # an array is as good as bytes, though its annotation does not say so
        return imagecodecs.deflate_encode(rows, compression, raw=False)

    return packed_file(
        pixels,
        pack,
        is_filtered=compression > 0,
        checksum=imagecodecs.deflate_crc32,
    )


def jpeg_bytes(pixels: NDArray[np.uint8], quality: int = 92) -> bytes:
    """(H, W) grey or (H, W, 3) RGB as JPEG of a quality from 1 to 100. Raises BadImageError."""
    return _encoded(pixels, "jpeg", [cv2.IMWRITE_JPEG_QUALITY, quality])


def webp_bytes(pixels: NDArray[np.uint8], quality: int = 90) -> bytes:
    """(H, W) grey or (H, W, 3) RGB as WebP of a quality from 1 to 100, 101 for lossless. Raises BadImageError."""
    return _encoded(pixels, "webp", [cv2.IMWRITE_WEBP_QUALITY, quality])


def bmp_bytes(pixels: NDArray[np.uint8]) -> bytes:
    """(H, W) grey or (H, W, 3) RGB as BMP. Raises BadImageError."""
    return _encoded(pixels, "bmp", [])


def tiff_bytes(pixels: NDArray[Any]) -> bytes:
    """(H, W) grey or (H, W, 3) RGB, uint8, uint16 or float32, as TIFF. Raises BadImageError."""
    return _encoded(pixels, "tiff", [])


def npy_bytes(pixels: NDArray[Any]) -> bytes:
    """An array as a file of NumPy's format."""
    stream = io.BytesIO()
    np.save(stream, pixels, allow_pickle=False)
    return stream.getvalue()


def encoded(pixels: NDArray[Any], suffix: str) -> bytes:
    """(H, W) grey or (H, W, 3) RGB in the format of a file name's suffix, such as ".png". Raises BadImageError."""
    written = _WRITERS.get(suffix.lower())
    if written is None:
        raise BadImageError(f"{suffix!r} names no format that is written; accepted are {', '.join(sorted(_WRITERS))}")
    return written(pixels)


def _encoded(pixels: NDArray[Any], name: str, flags: list[int]) -> bytes:
    ordered = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2BGR) if pixels.ndim == 3 else pixels
    try:
        is_done, content = cv2.imencode(f".{name}", np.ascontiguousarray(ordered), flags)
    except cv2.error:
        is_done = False
    if not is_done:
        raise BadImageError(f"{pixels.shape[1]}x{pixels.shape[0]} is too large for {name}; png and npy take any size")
    return content.tobytes()


_WRITERS: dict[str, Callable[[NDArray[Any]], bytes]] = {
    ".png": png_bytes,
    ".jpg": jpeg_bytes,
    ".jpeg": jpeg_bytes,
    ".webp": webp_bytes,
    ".bmp": bmp_bytes,
    ".tif": tiff_bytes,
    ".tiff": tiff_bytes,
    ".npy": npy_bytes,
}
