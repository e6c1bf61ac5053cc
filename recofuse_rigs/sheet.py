"""A picture by which people see whether a rig holds: both cameras in the squares of a board, and edges on the other.

Left, squares of the visible picture and of infrared in turn: lines must go on across their borders. Right, infrared's
edges in colour on the visible picture: they must lie on what made them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from recofuse_images.codecs import cv2
from recofuse_rigs.rig import Rig
from recofuse_rigs.search import GreyPair
from recofuse_rigs.warp import warp_of

Pixels = NDArray[np.uint8]

MAX_ROWS = 6
_SQUARES = 8  # along the width
_MAX_WIDTH = 800  # of one picture
_EDGES = 0.06  # share of the pixels that are marked as edges
_EDGE_COLOUR = np.array([255, 64, 32], np.float32)
_NOT_COVERED = 0.45  # how bright the visible picture stays where infrared does not reach


def calibration_sheet(pairs: Sequence[GreyPair], rig: Rig, text: str = "") -> Pixels:
    """The first pairs as rows of two pictures, and a line of text: (H, W, 3) RGB."""
    warp = warp_of(rig)
    rows = []
    for pair in pairs[:MAX_ROWS]:
        vis = np.clip(pair.vis, 0, 255)
        ir = np.clip(warp.apply(pair.ir), 0, 255)
        row = np.hstack([_squares(vis, ir, warp.coverage), _edges(vis, ir, warp.coverage)])
        share = min(1.0, 2 * _MAX_WIDTH / row.shape[1])
        if share < 1:
            size = round(row.shape[1] * share), round(row.shape[0] * share)
            row = np.asarray(cv2.resize(row, size, interpolation=cv2.INTER_AREA), np.uint8)
        rows.append(row)
    sheet = np.vstack(rows)
    line = np.full((28, sheet.shape[1], 3), 24, np.uint8)
    cv2.putText(line, text, (8, 19), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (228, 228, 231), 1, cv2.LINE_AA)
    return np.vstack([line, sheet])


def _squares(vis: NDArray[np.float32], ir: NDArray[np.float32], coverage: NDArray[np.bool_]) -> Pixels:
    height, width = vis.shape
    side = max(8, width // _SQUARES)
    rows, columns = np.mgrid[0:height, 0:width] // side
    is_ir = (rows + columns) % 2 == 1
    shown = np.where(is_ir & coverage, ir, vis)
    return np.repeat(np.rint(shown).astype(np.uint8)[..., None], 3, axis=2)


def _edges(vis: NDArray[np.float32], ir: NDArray[np.float32], coverage: NDArray[np.bool_]) -> Pixels:
    smooth = cv2.GaussianBlur(ir, (0, 0), 1.2)
    strength = np.hypot(cv2.Scharr(smooth, cv2.CV_32F, 1, 0), cv2.Scharr(smooth, cv2.CV_32F, 0, 1))
    inside = np.asarray(cv2.erode(coverage.astype(np.uint8), np.ones((5, 5), np.uint8)), bool)
    bound = float(np.quantile(strength[inside], 1 - _EDGES)) if inside.any() else 0.0
    marked = inside & (strength > max(bound, 1e-3))
    shown = np.repeat((vis * np.where(coverage, 1, _NOT_COVERED))[..., None], 3, axis=2)
    shown[marked] = 0.3 * shown[marked] + 0.7 * _EDGE_COLOUR
    return np.rint(np.clip(shown, 0, 255)).astype(np.uint8)
