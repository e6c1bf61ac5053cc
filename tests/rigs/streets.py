"""Generated streets as two cameras see them that are not registered: sizes, depth and aspect ratio of their own."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from recofuse_core.scenes.scene import make_scene
from recofuse_rigs.rig import Rig

IR_SIZE = (200, 160)  # 5:4 beside 4:3, as thermal cameras have it


@dataclass(frozen=True)
class Street:
    """vis (H, W, 3), and ir (H, W) as a registered camera would see it; moved: counts of 16 bits of the real one."""

    vis: NDArray[np.uint8]
    ir: NDArray[np.uint8]
    moved: NDArray[np.uint16]
    rig: Rig


def street(seed: int, *, cover: float, degrees: float = 4.0, size: tuple[int, int] = (256, 192)) -> Street:
    """A street by its seed. cover: how wide infrared's picture lies in the visible one; above 1.2 it covers all."""
    width, height = size
    scene = make_scene(seed, height, width)
    vis = np.ascontiguousarray((scene.vis.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    heat = scene.ir[0].numpy()
    zoom = cover * width / IR_SIZE[0]
    cosine, sine = zoom * np.cos(np.deg2rad(degrees)), zoom * np.sin(np.deg2rad(degrees))
    turn = np.array([[cosine, -sine, width / 2 + 4], [sine, cosine, height / 2 - 3], [0, 0, 1]])
    centred = turn @ [[1, 0, -IR_SIZE[0] / 2], [0, 1, -IR_SIZE[1] / 2], [0, 0, 1]]
    matrix = centred @ [[1, 0, 0], [0, 1, 0], [1e-4, -5e-5, 1]]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    seen = cv2.warpPerspective(heat, matrix, IR_SIZE, flags=flags, borderMode=cv2.BORDER_REFLECT_101)
    counts = np.rint(7000 + 2550 * seen).astype(np.uint16)
    rig = Rig(size, IR_SIZE, tuple(float(value) for value in (matrix / matrix[2, 2]).ravel()), name="roof")
    return Street(vis, (heat * 255).round().astype(np.uint8), counts, rig)


COUNTS = (7000.0, 9550.0)  # what is black and white of them
