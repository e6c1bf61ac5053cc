"""AVIF: one still picture, read at 8 bits. Its boxes are ISO/IEC 14496-12's and 23008-12's."""

from __future__ import annotations

import io
import re

import numpy as np

from recofuse_images.errors import BadImageError
from recofuse_images.limits import Limits, cut_short
from recofuse_images.picture import Header, Picture

BRAND = b"ftypavif"  # of a file, from its fourth byte on

_MAX_META_BYTES = 1 << 20
_MAX_BOXES = 64
_SIZE = re.compile(rb"ispe\0\0\0\0(.{4})(.{4})", re.DOTALL)
_ROTATION = re.compile(rb"\0\0\0\x09irot([\0-\x03])", re.DOTALL)


def read_header(data: bytes, limits: Limits) -> Header:
    """Check that all boxes are there; the size is the largest that the file names. Raises ImageError.

    A rotation and a mirror image are applied by the decoder, so the header's size is that of the upright picture.
    """
    meta = _meta_of(data)
    sizes = [tuple(int.from_bytes(side, "big") for side in found.groups()) for found in _SIZE.finditer(meta)]
    if not sizes:
        raise cut_short("AVIF")
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    limits.check_size(width, height, bytes_per_pixel=4)
    rotation = _ROTATION.search(meta)
    if rotation is not None and rotation.group(1) in b"\x01\x03":
        width, height = height, width
    return Header("AVIF", width, height)


def read_pixels(data: bytes, header: Header) -> Picture:
    """RGB (H, W, 3), uint8, upright. Raises BadImageError."""
    from recofuse_images.codecs import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=("AVIF",)) as image:
            if getattr(image, "n_frames", 1) > 1 or sorted(image.size) != sorted((header.width, header.height)):
                raise cut_short("AVIF")
            values = np.asarray(ImageOps.exif_transpose(image.convert("RGB")))
    except BadImageError:
        raise
    except Exception as error:  # the decoder meets hostile bytes here
        raise cut_short("AVIF") from error
    if values.shape != (header.height, header.width, 3):
        raise cut_short("AVIF")
    return Picture(values, bits=8)


def _meta_of(data: bytes) -> bytes:
    """The box that describes the picture; all boxes of the file lie within it."""
    at, meta = 0, b""
    for _ in range(_MAX_BOXES):
        if at == len(data):
            break
        length = int.from_bytes(data[at : at + 4], "big")
        if length == 1:
            length = int.from_bytes(data[at + 8 : at + 16], "big")
        if length == 0:
            length = len(data) - at
        if length < 8 or at + length > len(data):
            raise cut_short("AVIF")
        if data[at + 4 : at + 8] == b"meta":
            meta = data[at : at + min(length, _MAX_META_BYTES)]
        at += length
    return meta
