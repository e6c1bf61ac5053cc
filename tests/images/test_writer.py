"""Pictures that are written are read by other libraries, to the pixel where the format keeps it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from recofuse_images.errors import BadImageError
from recofuse_images.writer import bmp_bytes, jpeg_bytes, npy_bytes, png_bytes, tiff_bytes, webp_bytes
from tests.images.files import IR, VIS

WRITERS = {
    "png": png_bytes,
    "jpeg": jpeg_bytes,
    "webp": webp_bytes,
    "npy": npy_bytes,
    "bmp": bmp_bytes,
    "tiff": tiff_bytes,
}


@pytest.mark.parametrize("pixels", [VIS, IR], ids=["colour", "grey"])
@pytest.mark.parametrize("image_format", sorted(WRITERS))
def test_answers_are_readable_by_others(image_format: str, pixels: NDArray[np.uint8]) -> None:
    data = WRITERS[image_format](pixels)
    if image_format == "npy":
        read = np.load(io.BytesIO(data), allow_pickle=False)
    else:
        with Image.open(io.BytesIO(data)) as image:
            read = np.asarray(image.convert("RGB" if pixels.ndim == 3 else "L"))
    if image_format in ("png", "npy", "bmp", "tiff"):
        np.testing.assert_array_equal(read, pixels)
    else:
        assert np.abs(read.astype(int) - pixels).mean() < 6


@pytest.mark.parametrize("level", range(0, 10, 3))
def test_every_png_level_is_lossless(level: int) -> None:
    data = png_bytes(VIS, level)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), VIS)


def test_a_picture_too_large_for_its_format_is_refused() -> None:
    with pytest.raises(BadImageError, match="webp"):
        webp_bytes(np.zeros((32, 17_000), np.uint8))
