"""BMP as Windows writes it, uncompressed: palettes of 1, 4 and 8 bits, colours of 24 and 32."""

from __future__ import annotations

import io
import struct

import numpy as np

from recofuse_images.errors import UnsupportedImageError
from recofuse_images.limits import Limits, cut_short
from recofuse_images.picture import Header, Picture

MAGIC = b"BM"

_COMPRESSIONS = {
    0: "none",
    1: "run lengths",
    2: "run lengths",
    3: "none",
    4: "JPEG",
    5: "PNG",
    6: "none",
}  # 3, 6: masks
_BITS = (1, 4, 8, 24, 32)


def read_header(data: bytes, limits: Limits) -> Header:
    """Check the header, and that all rows are there. Raises ImageError."""
    try:
        pixels_at, header_bytes = struct.unpack_from("<II", data, 10)
        if header_bytes == 12:  # OS/2
            width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
            compression = 0
        else:
            width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    except struct.error as error:
        raise cut_short("BMP") from error
    limits.check_size(width, abs(height), bytes_per_pixel=4)
    packed = _COMPRESSIONS.get(compression, f"method {compression}")
    if packed != "none":
        raise UnsupportedImageError(f"a BMP compressed by {packed} is not accepted; accepted are uncompressed ones")
    if bits not in _BITS:
        raise UnsupportedImageError(f"a BMP of {bits} bits a pixel is not accepted; accepted are 1, 4, 8, 24 and 32")
    if pixels_at < 14 + header_bytes or pixels_at + -(-width * bits // 32) * 4 * abs(height) > len(data):
        raise cut_short("BMP")
    return Header("BMP", width, abs(height))


def read_pixels(data: bytes, header: Header) -> Picture:
    """RGB (H, W, 3), uint8. Raises BadImageError."""
    from recofuse_images.codecs import Image

    try:
        with Image.open(io.BytesIO(data), formats=("BMP",)) as image:
            values = np.asarray(image.convert("RGB"))
    except Exception as error:  # the decoder meets hostile bytes here
        raise cut_short("BMP") from error
    if values.shape != (header.height, header.width, 3):
        raise cut_short("BMP")
    return Picture(values, bits=8)
