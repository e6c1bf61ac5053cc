"""A pair of files through a rig: like `recofuse_images.reader.read_pair`, for cameras that are not registered.

Infrared is warped at its own depth, before it is scaled to 8 bits, so that neither the resampling nor the border that
it leaves sets the scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recofuse_images import reader, scale
from recofuse_images.errors import BadImageError
from recofuse_images.frames import Layout
from recofuse_images.limits import Limits
from recofuse_images.picture import Picture
from recofuse_images.reader import DEFAULT_LIMITS, Infrared, Pair
from recofuse_rigs.parallax import Refined, Track, refined_warp
from recofuse_rigs.rig import Rig
from recofuse_rigs.warp import Warp, warp_of

_UNSURE = "rig: its calibration was unsure; look whether the edges of both pictures meet"


@dataclass(frozen=True, eq=False)
class AlignedPair:
    """A pair on the visible grid. infrared: at the depth of its file; warp: how it came there.

    refined: what was seen of what the rig leaves, if that was asked for.
    """

    pair: Pair
    infrared: Infrared
    warp: Warp
    refined: Refined | None = None


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
    is_refined: bool = False,
    track: Track | None = None,
) -> AlignedPair:
    """Read both files, or raw frames by their layouts, and lay infrared on the visible grid.

    is_measured: whether the infrared values are wanted too. is_refined: whether what the rig leaves in this frame is to
    be measured and put right; track: what the frames before it have shown.

    Raises ImageError like `read_pair`, and BadRigError for pictures of other aspect ratios than the rig's.
    """
    check_two_sides(vis, ir)
    visible = reader.read_vis(vis, limits, vis_range, vis_layout)
    infrared = reader.read_infrared(ir, limits, ir_layout)
    height, width = visible.shape[:2]
    ir_height, ir_width = infrared.picture.values.shape[:2]
    warp = find_warp(rig.resized((width, height), (ir_width, ir_height)))
    refined = None
    if is_refined:
        values = _without_nodata(infrared.picture)
        refined = refined_warp(visible, values, warp, track=track, find_warp=find_warp)
        warp = refined.warp
    warped = replace(infrared, picture=warped_picture(infrared.picture, warp))
    grey, ir_scale = scale.ir_scaled(warped.picture, ir_range, warp.coverage)
    warnings = infrared.warnings if rig.is_sure else (*infrared.warnings, _UNSURE)
    measured = warped.measured((width, height), ir_scale, warp.coverage) if is_measured else None
    pair = Pair(
        np.ascontiguousarray(visible), np.ascontiguousarray(grey), infrared.source, warnings, ir_scale, measured
    )
    return AlignedPair(pair, warped, warp, refined)


def check_two_sides(vis: bytes, ir: bytes) -> None:
    """Raises BadImageError for one file as both sides."""
    if vis == ir:
        raise BadImageError("vis and ir are the same file; what holds both sides is registered, and needs no rig")


def warped_picture(picture: Picture, warp: Warp) -> Picture:
    """A grey picture on the visible grid. What the file calls no measurement becomes NaN, which spreads to no value."""
    values = _without_nodata(picture)
    if values is not picture.values:
        return Picture(warp.apply(values))
    return replace(picture, values=warp.apply(values), alpha=None)


def _without_nodata(picture: Picture) -> NDArray[Any]:
    """NaN for what the file calls no measurement, if it calls something so."""
    values = picture.values
    if picture.nodata is None or not np.isfinite(picture.nodata):
        return values
    is_none = np.isclose(values, picture.nodata, rtol=1e-6, atol=0)
    return np.asarray(np.where(is_none, np.nan, values.astype(np.float32)), np.float32)
