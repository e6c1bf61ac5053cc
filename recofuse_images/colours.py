"""The fused picture in the colours that a viewer wants: grey, or the heat over what the visible camera saw.

An overlay is drawn from the two restored pictures: the luma of the visible one, and over it infrared in a palette, from
not at all at the low end of a range to in full at its high end. The palette runs over the same range. Ranges are in
the values of the infrared file, so the black and the white that its levels were scaled to are needed, too.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from recofuse_images.codecs import cv2
from recofuse_images.palettes import palette_colours
from recofuse_images.picture import grey_of
from recofuse_images.scale import Range

Overlay = Literal["white_hot", "iron", "rainbow"]
Pixels = NDArray[np.uint8]

OVERLAYS: tuple[Overlay, ...] = get_args(Overlay)
FROM = 0.5  # of the way from black to white: where an overlay begins if nobody says

_PALETTES = {"iron": "iron", "rainbow": "rainbow (camera)"}


def greyed(fused: Pixels) -> Pixels:
    """The luma of (H, W, 3) in three equal channels."""
    return np.asarray(cv2.cvtColor(grey_of(fused), cv2.COLOR_GRAY2RGB), np.uint8)


def overlaid(
    vis: Pixels,
    ir: Pixels,
    overlay: Overlay,
    scale: Range,
    colour_range: Range | None = None,
    weights: NDArray[np.float32] | None = None,
) -> Pixels:
    """Infrared in colours over the luma of the visible picture: (H, W, 3).

    vis: (H, W, 3), ir: (H, W), both restored. scale: the values of the infrared file that are black and white in ir.
    colour_range: in the same values; the upper half of the scale if None. weights: (H, W), from 0 where infrared was
    not measured to 1; None if it was everywhere.
    """
    luma = grey_of(vis)
    pairs = ir.astype(np.uint16)
    pairs <<= 8
    pairs |= luma
    shown = np.take(_table(overlay, *scale, colour_range), pairs, axis=0)
    if weights is None or not (weights < 1).any():
        return shown
    plain = luma[..., None].astype(np.float32)
    return np.rint(plain + weights[..., None] * (shown - plain)).astype(np.uint8)


@functools.lru_cache(maxsize=8)
def _table(overlay: Overlay, black: float, white: float, colour_range: Range | None) -> Pixels:
    """(65536, 3): the colour of each infrared level, in the upper byte, over each luma, in the lower one."""
    heat = _heat(black, white, colour_range)
    colours: NDArray[Any] = _palette(overlay)[np.rint(255 * heat).astype(np.uint8)]
    luma = np.arange(256, dtype=np.float32)
    share = heat.astype(np.float32)[:, None, None]
    mixed = luma[None, :, None] + share * (colours[:, None, :] - luma[None, :, None])
    table = np.rint(mixed).astype(np.uint8).reshape(1 << 16, 3)
    table.setflags(write=False)
    return table


@np.errstate(over="ignore", invalid="ignore")  # both ranges may be of any finite numbers
def _heat(black: float, white: float, colour_range: Range | None) -> NDArray[np.float64]:
    """How far each of the 256 levels is on its way from the low to the high end of the range, 0 to 1."""
    share = np.linspace(0, 1, 256)
    values = black * (1 - share) + white * share
    low, high = colour_range or (black * (1 - FROM) + white * FROM, white)
    if not high > low:  # a flat frame without a range of its own
        return np.zeros(256)
    span = high / 2 - low / 2  # halves, whose difference is a number; of the smallest ones it is 0
    return np.clip((values / 2 - low / 2) / span, 0, 1) if span > 0 else (values >= high).astype(np.float64)


def _palette(overlay: Overlay) -> Pixels:
    if overlay == "white_hot":
        return np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    return palette_colours(_PALETTES[overlay])
