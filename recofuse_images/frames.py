"""Raw frames, as cameras and tensors bring them: rows of pixels in one of five layouts, each row with its stride."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from recofuse_images.errors import BadImageError
from recofuse_images.limits import Limits
from recofuse_images.picture import Picture, grey_of


class Layout(Protocol):
    """How a frame's bytes lie.

    pixel_format: mono8, mono16 (little endian), rgb8, bgr8 or nv12. stride: bytes from one row to the next.
    """

    @property
    def pixel_format(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def stride(self) -> int: ...


def check_frame(data: bytes, layout: Layout, limits: Limits) -> None:
    """Raises BadImageError and ImageTooLargeError for a frame that does not fit its layout."""
    limits.check_size(layout.width, layout.height)
    if layout.pixel_format == "nv12" and (layout.width % 2 or layout.height % 2):
        raise BadImageError(f"NV12 needs an even width and height, not {layout.width}x{layout.height}")
    row_bytes, num_rows = _rows_of(layout)
    if layout.stride < row_bytes:
        raise BadImageError(f"a stride of {layout.stride} bytes is shorter than a row of {row_bytes}")
    needed = layout.stride * (num_rows - 1) + row_bytes  # the last row need not be padded
    if not needed <= len(data) <= layout.stride * num_rows:
        raise BadImageError(f"a frame of this layout has {layout.stride * num_rows} bytes, not {len(data)}")


def read_frame(data: bytes, layout: Layout, limits: Limits, *, as_grey: bool = False) -> Picture:
    """RGB (H, W, 3) or grey (H, W); NV12 is expanded from its video range. Raises like `check_frame`.

    as_grey: the luma of NV12 instead of its colours.
    """
    check_frame(data, layout, limits)
    rows = _array_of(data, layout)
    if layout.pixel_format == "mono8":
        return Picture(rows, bits=8)
    if layout.pixel_format == "mono16":
        return Picture(rows.view("<u2").astype(np.uint16, copy=False))
    if layout.pixel_format == "nv12":
        return Picture(_luma_of(rows[: layout.height]) if as_grey else _colours_of(rows), bits=8)
    colours = rows.reshape(layout.height, layout.width, 3)
    if layout.pixel_format == "bgr8":
        colours = np.ascontiguousarray(colours[..., ::-1])
    return Picture(grey_of(colours) if as_grey else colours, bits=8)


def _rows_of(layout: Layout) -> tuple[int, int]:
    """Bytes of one row without padding, and the number of rows."""
    num_rows = layout.height * 3 // 2 if layout.pixel_format == "nv12" else layout.height
    bytes_per_pixel = {"mono16": 2, "rgb8": 3, "bgr8": 3}.get(layout.pixel_format, 1)
    return layout.width * bytes_per_pixel, num_rows


def _array_of(data: bytes, layout: Layout) -> NDArray[np.uint8]:
    row_bytes, num_rows = _rows_of(layout)
    flat = np.frombuffer(data, np.uint8)
    if len(flat) < layout.stride * num_rows:
        flat = np.concatenate([flat, np.zeros(layout.stride * num_rows - len(flat), np.uint8)])
    return np.ascontiguousarray(flat.reshape(num_rows, layout.stride)[:, :row_bytes])


def _luma_of(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Video range (16 to 235) as full range."""
    levels = np.clip((np.arange(256) - 16) * (255 / 219), 0, 255)
    return np.take(np.rint(levels).astype(np.uint8), rows)


def _colours_of(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    from recofuse_images.codecs import cv2

    return np.asarray(cv2.cvtColor(rows, cv2.COLOR_YUV2RGB_NV12), np.uint8)
