"""Files for the tests of readers: written by other libraries than the one that reads them, and bad ones."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import tifffile
from numpy.typing import NDArray
from PIL import Image

from recofuse_images.errors import BadImageError, ImageError, ImageTooLargeError, UnsupportedImageError
from tests.fakes import file_of, picture

VIS = picture(64, 48)
IR = picture(64, 48, channels=1)
VIS_FILE, IR_FILE = file_of(VIS), file_of(IR)


def saved(image: Image.Image, image_format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def tiff_of(pixels: NDArray[Any], **options: Any) -> bytes:
    """A TIFF file as tifffile writes it, without notes of its own."""
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, metadata=None, **options)
    return stream.getvalue()


BAD_FILES: dict[str, tuple[bytes, type[ImageError], str]] = {
    "empty": (b"", BadImageError, "empty"),
    "text": (b"this is not an image at all" * 9, UnsupportedImageError, "PNG, JPEG, WebP, AVIF, BMP and TIFF"),
    "gif": (saved(Image.fromarray(VIS), "GIF"), UnsupportedImageError, "a GIF file"),
    "camera raw": (b"IIRO\xff\xff\xff\xff" * 9, UnsupportedImageError, "camera's raw file"),
    "one pixel": (file_of(VIS[:1, :1]), BadImageError, "1x1"),
    "bomb": (png_header(50_000, 50_000), ImageTooLargeError, "50000x50000"),
    "long": (png_header(9000, 40), ImageTooLargeError, "9000x40"),
    "only a header": (VIS_FILE[:60], BadImageError, "cut short"),
    "several frames": (
        saved(Image.fromarray(VIS), "TIFF", save_all=True, append_images=[Image.fromarray(VIS)]),
        ImageTooLargeError,
        "several images",
    ),
    "animation": (
        saved(Image.fromarray(VIS), "WEBP", save_all=True, append_images=[Image.fromarray(255 - VIS)]),
        ImageTooLargeError,
        "several images",
    ),
    "animated png": (
        saved(Image.fromarray(VIS), "PNG", save_all=True, append_images=[Image.fromarray(255 - VIS)]),
        ImageTooLargeError,
        "several images",
    ),
    "wrong pixels": (png_header(640, 480), BadImageError, "cut short"),
}
