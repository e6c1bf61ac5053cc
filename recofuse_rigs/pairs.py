"""A pair of files through a rig: like `recofuse_images.reader.read_pair`, for cameras that are not registered.

Infrared is warped at its own depth, before it is scaled to 8 bits, so that neither the resampling nor the border that
it leaves sets the scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from recofuse_images import reader, scale
from recofuse_images.errors import BadImageError
from recofuse_images.frames import Layout
from recofuse_images.limits import Limits
from recofuse_images.picture import Picture
from recofuse_images.reader import DEFAULT_LIMITS, Infrared, Pair
from recofuse_rigs.rig import Rig
from recofuse_rigs.warp import Warp, warp_of

_UNSURE = "rig: its calibration was unsure; look whether the edges of both pictures meet"


@dataclass(frozen=True, eq=False)
class AlignedPair:
    """A pair on the visible grid. infrared: at the depth of its file; warp: how it came there."""

    pair: Pair
    infrared: Infrared
    warp: Warp


def read_aligned(
    vis: bytes,
    ir: bytes,
    rig: Rig,
    limits: Limits = DEFAULT_LIMITS,
    *,
    vis_range: scale.Range | None = None,
    ir_range: scale.Range | None = None,
    vis_layout: Layout | None = None,
    ir_layout: Layout | None = None,
    find_warp: Callable[[Rig], Warp] = warp_of,
    is_measured: bool = False,
) -> AlignedPair:
    """Read both files, or raw frames by their layouts, and lay infrared on the visible grid.

    is_measured: whether the infrared values are wanted too.

    Raises ImageError like `read_pair`, and BadRigError for pictures of other aspect ratios than the rig's.
    """
    check_two_sides(vis, ir)
    visible = reader.read_vis(vis, limits, vis_range, vis_layout)
    infrared = reader.read_infrared(ir, limits, ir_layout)
    height, width = visible.shape[:2]
    ir_height, ir_width = infrared.picture.values.shape[:2]
    warp = find_warp(rig.resized((width, height), (ir_width, ir_height)))
    warped = replace(infrared, picture=warped_picture(infrared.picture, warp))
    grey, ir_scale = scale.ir_scaled(warped.picture, ir_range, warp.coverage)
    warnings = infrared.warnings if rig.is_sure else (*infrared.warnings, _UNSURE)
    measured = warped.measured((width, height), ir_scale, warp.coverage) if is_measured else None
    pair = Pair(
        np.ascontiguousarray(visible), np.ascontiguousarray(grey), infrared.source, warnings, ir_scale, measured
    )
    return AlignedPair(pair, warped, warp)


def check_two_sides(vis: bytes, ir: bytes) -> None:
    """Raises BadImageError for one file as both sides."""
    if vis == ir:
        raise BadImageError("vis and ir are the same file; what holds both sides is registered, and needs no rig")


def warped_picture(picture: Picture, warp: Warp) -> Picture:
    """A grey picture on the visible grid. What the file calls no measurement becomes NaN, which spreads to no value."""
    values = picture.values
    if picture.nodata is not None and np.isfinite(picture.nodata):
        values = np.where(np.isclose(values, picture.nodata, rtol=1e-6, atol=0), np.nan, values.astype(np.float32))
        return Picture(warp.apply(np.asarray(values, np.float32)))
    return replace(picture, values=warp.apply(values), alpha=None)
