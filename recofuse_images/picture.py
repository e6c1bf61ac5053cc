"""What a file says about itself, and what its pixels are, before anything is scaled to 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TRANSPOSED = frozenset({5, 6, 7, 8})  # EXIF orientations that swap width and height


@dataclass(frozen=True, slots=True)
class Header:
    """What can be told without decoding. width, height: as stored; orientation: EXIF's, 1 to 8.

    upright_size: (width, height) once the orientation is applied.
    """

    container: str
    width: int
    height: int
    orientation: int = 1

    @property
    def upright_size(self) -> tuple[int, int]:
        """(width, height) of the picture as it is meant to be seen."""
        return (self.height, self.width) if self.orientation in _TRANSPOSED else (self.width, self.height)


@dataclass(frozen=True, slots=True)
class Picture:
    """Decoded pixels at the file's own depth: grey (H, W) or RGB (H, W, 3), unsigned, signed or floating point.

    bits: of unsigned values, the depth that the file stores; None for a container of 16 that may be filled in part,
    where likely_bits is what the file says of it. nodata: the value that the file itself calls no measurement. alpha:
    (H, W) of the same type, if the file has it; it takes part in nothing but MFNet's layout, where it is the infrared
    image.
    """

    values: NDArray[Any]
    bits: int | None = None
    likely_bits: int | None = None
    nodata: float | None = None
    alpha: NDArray[Any] | None = None


def upright(values: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Undo an EXIF orientation (1 to 8) of (H, W) or (H, W, C)."""
    if orientation in _TRANSPOSED:
        values = values.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values


def grey_of(rgb: NDArray[Any]) -> NDArray[Any]:
    """BT.601 luma of (H, W, 3) at its own depth: (H, W)."""
    from recofuse_images.codecs import cv2

    if rgb.dtype in (np.uint8, np.uint16, np.float32):
        return np.asarray(cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2GRAY), rgb.dtype)
    weighted = rgb.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    if rgb.dtype.kind != "f":
        weighted = np.rint(weighted)
    return np.asarray(weighted, rgb.dtype)


def rgb_of_cmyk(inks: NDArray[Any]) -> NDArray[Any]:
    """RGB (H, W, 3) of ink amounts (H, W, 4), both unsigned of one depth, without a colour profile."""
    highest = np.iinfo(inks.dtype).max
    rgb = np.zeros((*inks.shape[:2], 3), inks.dtype)
    for row, stored in zip(rgb, inks, strict=True):  # whole pictures of wider numbers take much memory
        light = (highest - stored).astype(np.uint32)
        row[:] = (light[:, :3] * light[:, 3:] + highest // 2) // highest
    return rgb
