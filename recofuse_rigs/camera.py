"""What a rig's infrared camera would see of a scene that is known on the visible grid: the other way of `warp`.

For simulated cameras, so that a server which is told the rig finds registered pairs in what they send.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recofuse_images.codecs import cv2
from recofuse_rigs.errors import BadRigError
from recofuse_rigs.rig import Distortion, Rig, corners_of, mapped

_NUM_ROUNDS = 20  # of undoing a lens
_BY_AREA = 1.33  # visible pixels to an infrared one from which they are averaged before they are interpolated


def seen_by(rig: Rig, infrared: NDArray[Any]) -> NDArray[Any]:
    """Infrared (H, W) on the rig's visible grid, as its infrared camera has it: (h, w), at the same depth.

    Beyond the visible frame, where nothing is known, the scene is mirrored. Raises BadRigError for another size.
    """
    height, width = infrared.shape
    if (width, height) != rig.vis_size:
        raise BadRigError(f"the scene is {width}x{height}, and the rig is for {rig.vis_size[0]}x{rig.vis_size[1]}")
    columns, rows = np.meshgrid(*(np.arange(side, dtype=np.float64) for side in rig.ir_size))
    points = np.stack([columns.ravel(), rows.ravel()], axis=1)
    if rig.distortion is not None:
        points = _undistorted(rig.distortion, points)
    x, y = (axis.reshape(columns.shape) for axis in mapped(rig.array, points).T)
    scene = np.ascontiguousarray(infrared)
    sides = np.ptp(mapped(rig.array, corners_of(rig.ir_size)), axis=0) / (np.array(rig.ir_size) - 1)
    if sides.min() > _BY_AREA:
        size = tuple(max(2, round(side / zoom)) for side, zoom in zip(rig.vis_size, sides, strict=True))
        scene = cv2.resize(scene, size, interpolation=cv2.INTER_AREA)
        x, y = ((axis + 0.5) * now / old - 0.5 for axis, now, old in zip((x, y), size, rig.vis_size, strict=True))
    maps = x.astype(np.float32), y.astype(np.float32)
    return np.asarray(cv2.remap(scene, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101))


def _undistorted(lens: Distortion, pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where a lens's pixels (N, 2) would lie without it: what `Distortion.apply` puts there."""
    points = pixels
    for _ in range(_NUM_ROUNDS):
        points = points + (pixels - lens.apply(points))
    return points
