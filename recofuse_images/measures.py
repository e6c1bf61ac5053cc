"""The restored infrared picture in the values of its source again, and the regions that are hotter than an alarm.

What a newcomer would get wrong: the way back is not the inverse of the scale that made 8 bits of the values. The model
may widen the contrast of a dull frame, so that its levels lie elsewhere than those that it was shown; between both runs
a straight line, fitted to the pixels of the frame itself. Noise and what was repaired are outliers of that fit. Values
beyond the ends of the scale were never shown to the model, so there the source's own are kept: a fire stays as hot as
it was measured. Nor does black or white of the restored picture say how far beyond it a value is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recofuse_images.codecs import cv2
from recofuse_images.picture import Picture
from recofuse_images.scale import Range, measured

MAX_REGIONS = 32  # that are told one by one
MIN_AREA = 4  # pixels of a region: a glowing pixel is none

_MAX_FITTED = 1 << 15  # pixels that the line is fitted to
_MIN_FITTED = 64
_ROUNDS = 8
_HUBER = 1.5  # of a robust deviation, from which on a pixel counts less
_DOUBT = 0.1  # of the scale: a median difference from which on the values are in doubt

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Measured:
    """What an infrared file holds, on the visible grid: (H, W), NaN where nothing was measured.

    scale: the values that are black and white in 8 bits. is_celsius: degrees, rather than counts or levels. is_whole:
    whole numbers that 16 bits hold.
    """

    values: Floats
    scale: Range
    is_celsius: bool
    is_whole: bool


class Region(NamedTuple):
    """A connected region of hot pixels, places and area in pixels. hottest: its highest value."""

    left: int
    top: int
    width: int
    height: int
    area: int
    hottest: float
    centroid: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Regions:
    """What is hotter than a threshold. mask: (H, W); regions: the largest first, at most MAX_REGIONS of num_regions.

    area: pixels of them all. hottest: the highest value; None if there is no region.
    """

    mask: NDArray[np.bool_]
    regions: tuple[Region, ...]
    num_regions: int
    area: int
    hottest: float | None


def on_grid(picture: Picture, size: tuple[int, int], coverage: NDArray[np.bool_] | None = None) -> Floats:
    """(H, W): the values of a grey picture on a grid of (width, height), NaN where nothing was measured."""
    seen = measured(picture)
    values = np.asarray(picture.values, np.float32)
    values = np.where(seen if coverage is None else seen & coverage, values, np.float32(np.nan))
    if values.shape != size[::-1]:
        method = cv2.INTER_AREA if values.shape[0] > size[1] else cv2.INTER_LINEAR  # nothing beyond what was measured
        values = np.asarray(cv2.resize(values, size, interpolation=method), np.float32)
    return values


def fitted_scale(source: Measured, ir: NDArray[np.uint8]) -> tuple[Range, bool]:
    """The values that are black and white in the restored picture (H, W), and whether that is in doubt.

    In doubt: the picture follows the source nowhere near, so that what it shows was not measured.
    """
    low, high = source.scale
    if not high > low:  # a flat frame, of which the model saw nothing
        return source.scale, False
    is_told = _inside(source) & (ir > 0) & (ir < 255)  # black and white may stand for anything beyond
    slope, offset, is_doubtful = _line(ir[is_told], source.values[is_told], low, high)
    return (offset, offset + 255 * slope), is_doubtful


def restored_values(source: Measured, ir: NDArray[np.uint8], scale: Range) -> Floats:
    """The restored picture (H, W) in the values of its source. scale: as `fitted_scale` has it."""
    low, high = source.scale
    if not high > low:
        return source.values
    table = np.clip(np.linspace(*scale, 256), low, high).astype(np.float32)
    values = np.take(table, ir)
    values = np.where(ir == 255, np.maximum(values, source.values), values)
    values = np.where(ir == 0, np.minimum(values, source.values), values)
    return np.where(_inside(source), values, source.values)


def _inside(source: Measured) -> NDArray[np.bool_]:
    """Which pixels the model saw the values of, rather than black or white."""
    low, high = source.scale
    with np.errstate(invalid="ignore"):
        return (source.values > low) & (source.values < high)


def _line(ir: NDArray[np.uint8], values: Floats, low: float, high: float) -> tuple[float, float, bool]:
    """Slope and offset from levels to values, and whether they are in doubt: Huber's line, by repeated weighting."""
    slope, offset = (high - low) / 255, low
    step = max(1, -(-ir.size // _MAX_FITTED))
    x, y = ir[::step].astype(np.float64), values[::step].astype(np.float64)
    if len(x) < _MIN_FITTED:
        return slope, offset, False
    weights = np.ones(len(x))
    for _ in range(_ROUNDS):
        total = weights.sum()
        centre_x, centre_y = (weights * x).sum() / total, (weights * y).sum() / total
        spread = (weights * (x - centre_x) ** 2).sum()
        rise = (weights * (x - centre_x) * (y - centre_y)).sum()
        if not spread > 1e-6 * total or not rise > 0:  # nothing to be seen, or nothing alike
            return slope, offset, bool(np.median(np.abs(y - offset - slope * x)) > _DOUBT * (high - low))
        found = rise / spread
        off = np.abs(y - centre_y - found * (x - centre_x))
        deviation = max(1.4826 * float(np.median(off)), (high - low) / 1e4)
        weights = np.minimum(1.0, _HUBER * deviation / np.maximum(off, 1e-300))
    return found, centre_y - found * centre_x, bool(np.median(off) > _DOUBT * (high - low))


def regions_above(values: Floats, threshold: float) -> Regions:
    """The connected regions of values at or above a threshold that have at least MIN_AREA pixels."""
    with np.errstate(invalid="ignore"):
        hot = (values >= threshold).astype(np.uint8)
    _, labels, stats, centroids = cv2.connectedComponentsWithStats(hot, connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA]
    kept = areas >= MIN_AREA
    kept[0] = False  # the rest
    mask = kept[np.asarray(labels)]
    numbers = np.flatnonzero(kept)
    numbers = numbers[np.argsort(-areas[numbers], kind="stable")]
    regions = []
    for number in numbers[:MAX_REGIONS]:
        left, top, width, height, area = (int(value) for value in stats[number])
        box = np.s_[top : top + height, left : left + width]
        hottest = _told(values[box][labels[box] == number].max())
        x, y = (round(float(place), 2) for place in centroids[number])
        regions.append(Region(left, top, width, height, area, hottest, (x, y)))
    hottest_of_all = _told(values[mask].max()) if len(numbers) else None
    return Regions(mask, tuple(regions), len(numbers), int(areas[numbers].sum()), hottest_of_all)


def _told(value: np.floating[Any]) -> float:
    return round(float(value), 3)  # single precision knows no more of degrees


def outlined(picture: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """(H, W, 3) with a bright line around the regions of a mask, and a dark one around that."""
    width = 1 + min(mask.shape) // 600
    inner = _grown(mask.astype(np.uint8), width)
    outer = _grown(inner, width)
    drawn = picture.copy()
    drawn[outer.astype(bool)] = (0, 0, 0)
    drawn[inner.astype(bool)] = (0, 255, 255)
    drawn[mask] = picture[mask]
    return drawn


def _grown(mask: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    kernel = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    return np.asarray(cv2.dilate(mask, kernel), np.uint8)


def counts_of(values: Floats) -> NDArray[Any]:
    """Whole counts as 16 bits; 0 where nothing was measured."""
    return np.rint(np.clip(np.nan_to_num(values, nan=0.0), 0, 65535)).astype(np.uint16)
