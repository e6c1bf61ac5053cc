"""Patterns of a surface, each filtered by the footprint of the pixel that sees it: noise, square waves, edges, lines.

Positions and footprints are (h, w) arrays in one unit: metres, periods, or texels of the noise tile.
"""

import cv2
import numpy as np

from recofuse_core.scenes.street import TILE, Floats


def sample(tile: Floats, u: Floats, v: Floats) -> Floats:
    """The periodic noise tile at texel coordinates u, v (h, w), bilinear."""
    # The wrap is done here: OpenCV's own loses precision on coordinates far outside the tile.
    map_u, map_v = np.mod(u, np.float32(TILE)), np.mod(v, np.float32(TILE))
    drawn = cv2.remap(
        tile,
        map_u.astype(np.float32, copy=False),
        map_v.astype(np.float32, copy=False),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_WRAP,
    )
    return drawn.astype(np.float32, copy=False)


def pulse(u: Floats, share: float, footprint: Floats) -> Floats:
    """Coverage of a pixel by a square wave of period 1, on over [0, share): the wave's exact box filter."""
    half = np.maximum(footprint, 1e-4) / 2

    def integral(position: Floats) -> Floats:
        whole = np.floor(position)
        covered: Floats = whole * np.float32(share) + np.minimum(position - whole, np.float32(share))
        return covered

    return (integral(u + half) - integral(u - half)) / (2 * half)


def smooth_edge(distance: Floats, footprint: Floats) -> Floats:
    """Coverage of a pixel by the half plane distance > 0."""
    return np.clip(distance / np.maximum(footprint, 1e-4) + 0.5, 0, 1)


def stripe(u: Floats, centre: float, width: float, footprint: Floats) -> Floats:
    """Coverage of a pixel by one line of the given width; thin lines fade instead of breaking up."""
    half = np.maximum(footprint, 1e-4) / 2
    low, high = np.maximum(u - half, centre - width / 2), np.minimum(u + half, centre + width / 2)
    covered: Floats = np.maximum(high - low, 0) / (2 * half)
    return covered
