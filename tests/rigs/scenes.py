"""Scenes that two cameras see, small and quick: shapes that are bright in one and dark in the other."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from recofuse_rigs.rig import Matrix, Size

Grey = NDArray[np.uint8]

VIS_SIZE, IR_SIZE = (320, 240), (160, 128)


def scene(seed: int) -> tuple[Grey, Grey]:
    """A registered pair of VIS_SIZE: polygons and discs, each of its own brightness to each camera."""
    rng = np.random.default_rng(seed)
    width, height = VIS_SIZE
    vis, ir = np.full((height, width), 90, np.uint8), np.full((height, width), 120, np.uint8)
    for _ in range(45):
        light, heat = (int(value) for value in rng.integers(10, 245, 2))
        centre = rng.integers(0, (width, height))
        if rng.random() < 0.3:
            place, radius = (int(centre[0]), int(centre[1])), int(rng.integers(5, 20))
            cv2.circle(vis, place, radius, light, -1, cv2.LINE_AA)
            cv2.circle(ir, place, radius, heat, -1, cv2.LINE_AA)
        else:
            corners = (centre + rng.integers(-35, 35, (4, 2))).astype(np.int32)
            cv2.fillConvexPoly(vis, cv2.convexHull(corners), light, cv2.LINE_AA)
            cv2.fillConvexPoly(ir, cv2.convexHull(corners), heat, cv2.LINE_AA)
    return vis, ir


def truth(scale: float = 0.8, degrees: float = 5.0, shift: tuple[float, float] = (12.0, -9.0)) -> Matrix:
    """Infrared pixels of IR_SIZE to visible ones, with a little perspective."""
    base = VIS_SIZE[0] / IR_SIZE[0] * scale
    cosine, sine = base * np.cos(np.deg2rad(degrees)), base * np.sin(np.deg2rad(degrees))
    x, y = VIS_SIZE[0] / 2 + shift[0], VIS_SIZE[1] / 2 + shift[1]
    turn = np.array([[cosine, -sine, x], [sine, cosine, y], [0, 0, 1]])
    centred = turn @ [[1, 0, -IR_SIZE[0] / 2], [0, 1, -IR_SIZE[1] / 2], [0, 0, 1]]
    return np.asarray(centred @ [[1, 0, 0], [0, 1, 0], [1e-4, -5e-5, 1]], np.float64)


def moved(ir: NDArray[Any], matrix: Matrix, size: Size = IR_SIZE) -> NDArray[Any]:
    """What an infrared camera sees of a scene on the visible grid."""
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpPerspective(ir, matrix, size, flags=flags, borderMode=cv2.BORDER_REFLECT_101))
