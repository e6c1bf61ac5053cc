"""Pixels to files and back, and what a server can take. Colour is RGB unless `bgr` says otherwise.

Pixels become PNG files, and npy files pixels, without a codec; decoding any other file needs the extra `images`.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recofuse_client.errors import BadAnswerError
from recofuse_images.errors import ImageError
from recofuse_images.limits import OWN_FILES
from recofuse_images.png import write_pixels

Array = NDArray[np.uint8] | NDArray[np.uint16]
ImageLike = Array | bytes | bytearray | memoryview | str | os.PathLike[str]
"""Pixels, the bytes of an image file, or the path of one."""


def file_of(image: ImageLike, role: str, *, bgr: bool = False) -> bytes:
    """An image as a file's bytes: read, passed on, or, for pixels, as a PNG.

    Raises OSError for a path that cannot be read, and TypeError and ValueError like `checked_array`.
    """
    if isinstance(image, np.ndarray):
        return png_of(image, role, bgr=bgr)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, (str, os.PathLike)):
        return Path(image).read_bytes()
    raise TypeError(f"{role}: an image is an array, the bytes of a file or a path, not {type(image).__name__}")


def checked_array(image: NDArray[Any], role: str) -> NDArray[Any]:
    """An array that a server can take, contiguous: (H, W) or (H, W, 3), uint8 or uint16; (H, W, 1) loses its last axis.

    Raises TypeError for other types of pixels and ValueError for other shapes.
    """
    if image.dtype not in (np.uint8, np.uint16):
        raise TypeError(f"{role}: pixels are uint8 or uint16, not {image.dtype}; scale floating-point images yourself")
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3) or 0 in image.shape:
        raise ValueError(f"{role}: accepted are (H, W) and (H, W, 3), not {image.shape}")
    return np.ascontiguousarray(image)


def png_of(image: NDArray[Any], role: str, *, bgr: bool = False) -> bytes:
    """A lossless file of pixels (`checked_array`), compressed little, because it is sent at once."""
    array = checked_array(image, role)
    if array.ndim == 3 and bgr:
        array = np.ascontiguousarray(array[..., ::-1])
    try:
        return write_pixels(array)
    except ImageError as error:
        raise ValueError(f"{role}: {image.shape} {image.dtype} cannot be encoded") from error


def decoded(data: bytes, media_type: str) -> NDArray[np.uint8]:
    """The pixels of an answer's file: (H, W, 3) RGB or (H, W), uint8.

    Raises BadAnswerError if it cannot be read, and ModuleNotFoundError for all but npy without the extra `images`.
    """
    if media_type == "application/x-npy":
        return npy_pixels(data)
    from recofuse_images.reader import read_picture  # not above: it knows all formats, and few answers are files

    try:
        pixels = read_picture(data, "vis", OWN_FILES).values
    except ImageError as error:
        raise BadAnswerError(f"a picture of {len(data)} bytes cannot be read as {media_type}") from error
    if pixels.dtype != np.uint8:
        raise BadAnswerError(f"a picture is of {pixels.dtype}, not of uint8")
    return np.ascontiguousarray(pixels)


def decoded_values(data: bytes, media_type: str) -> NDArray[Any]:
    """The infrared values of an answer's file, (H, W). Raises like `decoded`."""
    if media_type == "application/x-npy":
        try:
            values: NDArray[Any] = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise BadAnswerError(f"values of {len(data)} bytes cannot be read as npy") from error
        return values
    from recofuse_images.reader import read_picture  # as above

    try:
        return read_picture(data, "ir", OWN_FILES).values
    except ImageError as error:
        raise BadAnswerError(f"values of {len(data)} bytes cannot be read as {media_type}") from error


def npy_pixels(data: bytes) -> NDArray[np.uint8]:
    """The pixels of a file of NumPy's format. Raises BadAnswerError."""
    try:
        pixels = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)  # np.load takes zip archives, too
    except (ValueError, EOFError, OSError) as error:
        raise BadAnswerError(f"a picture of {len(data)} bytes cannot be read as npy") from error
    if pixels.dtype != np.uint8:
        raise BadAnswerError("a picture is not of uint8 pixels")
    return pixels
