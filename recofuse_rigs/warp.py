"""Infrared onto the visible grid, once and at its own depth, and how far it can be believed there.

Values are interpolated linearly: between two measured values lies what was measured, never beyond them, so that a
temperature stays one. A camera of more pixels than the visible one is averaged first. Where infrared does not reach,
the value of its nearest edge goes on: no camera saw it, but a black border would be a thing to the model. `coverage`
says where that is, and `blended` leaves the fused picture for the restored visible one before it comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recofuse_images.codecs import cv2
from recofuse_rigs.errors import BadRigError
from recofuse_rigs.rig import Matrix, Rig, Size, corners_of, mapped, resizing

Weights = NDArray[np.float32]

FEATHER = 0.08  # of the visible frame's shorter side: how far inside the border infrared counts in full
_BY_AREA = 0.75  # infrared pixels smaller than this are averaged before they are interpolated
_REMAPPED = (np.uint8, np.uint16, np.int16, np.float32, np.float64)


@dataclass(frozen=True, eq=False)
class Warp:
    """What a rig does to each frame, worked out once. Safe to use from several threads.

    shrunk: the size to which infrared is averaged before anything else. columns, rows: where each visible pixel lies in
    that picture, (H, W). coverage: (H, W), where infrared was measured. weights: (H, W), how far infrared counts, from
    0 at the border of the coverage to 1 inside; the frame's own edges are no border.
    """

    rig: Rig
    shrunk: Size
    columns: NDArray[np.float32]
    rows: NDArray[np.float32]
    coverage: NDArray[np.bool_]
    weights: Weights

    def apply(self, infrared: NDArray[Any]) -> NDArray[Any]:
        """(H, W) or (H, W, C) of the infrared camera, any depth, on the visible grid at the same depth.

        32-bit integers come back as float64. Raises BadRigError for a picture of another size.
        """
        height, width = infrared.shape[:2]
        if (width, height) != self.rig.ir_size:
            raise BadRigError(f"ir is {width}x{height}, and the rig is for {self.rig.ir_size[0]}x{self.rig.ir_size[1]}")
        values = np.ascontiguousarray(infrared)
        if values.dtype not in _REMAPPED:
            values = values.astype(np.float64)
        if self.shrunk != (width, height):
            values = cv2.resize(values, self.shrunk, interpolation=cv2.INTER_AREA)
        warped = cv2.remap(values, self.columns, self.rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return np.asarray(warped, values.dtype)

    def blended(self, fused: NDArray[np.uint8], vis: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The fused picture where infrared counts, the restored visible one elsewhere: (H, W, 3)."""
        if self.weights.min() == 1:
            return fused
        share = self.weights[..., None]
        return np.asarray(np.rint(fused * share + vis * (1 - share)), np.uint8)


def warp_of(rig: Rig) -> Warp:
    """How to lay a rig's infrared frames on its visible ones."""
    width, height = rig.vis_size
    shrunk, to_shrunk = _shrunk(rig)
    back = np.linalg.inv(rig.array)
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64))
    depth = back[2, 0] * columns + back[2, 1] * rows + back[2, 2]
    is_before = depth > 1e-9  # a ray that both cameras can see; of the others, the edge that is nearest
    depth = np.where(is_before, depth, 1e-9)
    x = (back[0, 0] * columns + back[0, 1] * rows + back[0, 2]) / depth
    y = (back[1, 0] * columns + back[1, 1] * rows + back[1, 2]) / depth
    if rig.distortion is not None:
        far = 2.0 * max(rig.ir_size)  # beyond its own picture a lens's polynomial may come back
        is_before &= (np.abs(x) < far) & (np.abs(y) < far)
        bent = rig.distortion.apply(np.stack([np.clip(x, -far, far).ravel(), np.clip(y, -far, far).ravel()], axis=1))
        x, y = bent[:, 0].reshape(x.shape), bent[:, 1].reshape(y.shape)
    right, bottom = rig.ir_size[0] - 1, rig.ir_size[1] - 1
    slack = 1e-6
    coverage = is_before & (x >= -slack) & (x <= right + slack) & (y >= -slack) & (y <= bottom + slack)
    x, y = np.clip(x, 0, right), np.clip(y, 0, bottom)
    x, y = to_shrunk[0, 0] * x + to_shrunk[0, 2], to_shrunk[1, 1] * y + to_shrunk[1, 2]
    return Warp(
        rig,
        shrunk,
        np.ascontiguousarray(x, np.float32),
        np.ascontiguousarray(y, np.float32),
        coverage,
        feathered(coverage, max(2.0, FEATHER * min(width, height))),
    )


def feathered(coverage: NDArray[np.bool_], width: float) -> Weights:
    """From 0 at the first covered pixel beside an uncovered one to 1 at `width` pixels from it, with smooth ends."""
    if coverage.all():
        return np.ones(coverage.shape, np.float32)
    distance = cv2.distanceTransform(coverage.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    share = np.clip((distance - 1) / width, 0, 1)
    return np.asarray(share * share * (3 - 2 * share), np.float32)


def _shrunk(rig: Rig) -> tuple[Size, Matrix]:
    """The size in which infrared pixels are about as large as visible ones, if they are much smaller."""
    placed = mapped(rig.array, corners_of(rig.ir_size))
    sides = np.linalg.norm(placed - np.roll(placed, 1, axis=0), axis=1)  # left, top, right, bottom
    width, height = rig.ir_size
    zooms = max(sides[1], sides[3]) / max(width - 1, 1), max(sides[0], sides[2]) / max(height - 1, 1)
    sizes = [
        max(2, round(side * zoom)) if zoom < _BY_AREA else side for side, zoom in zip(rig.ir_size, zooms, strict=True)
    ]
    size = sizes[0], sizes[1]
    return size, resizing(rig.ir_size, size)
