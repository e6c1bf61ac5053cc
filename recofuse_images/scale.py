"""Values of any depth as the 8 bits that the model takes.

Visible. 8-bit files are taken as they are. Deeper unsigned ones are divided by the highest value of their depth: the
file's own word (TIFF's BitsPerSample, PNG's sBIT), else the smallest of 8, 10, 12, 14 and 16 bits that holds the
picture, because cameras write 10 to 14 bits into 16. Of 32 bits, signed or floating point, they are stretched like
infrared; floating point within [0, 1] is taken as it is. `vis_range` replaces all of it.

Infrared. 8-bit files are taken as they are; deeper ones are stretched from the 0.5th to the 99.5th percentile of what
the camera saw, so that a few dead or glowing pixels do not set the scale. `ir_range` replaces that. What is no
measurement takes no part and comes out black: values that are not finite, the file's own nodata value, and the border
that warping leaves (one value far from all others that reaches the picture's edge). A frame that is flat but for one
hot spot keeps the spot; beside a scene it is white, and the scene keeps its contrast.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recofuse_images.picture import Picture

Pixels = NDArray[np.uint8]
Range = tuple[float, float]

PERCENTILES = (0.5, 99.5)
FULL_RANGE: Range = (0.0, 255.0)  # of what is 8 bits already

_DEPTHS = (8, 10, 12, 14, 16)
_MAX_SORTED = 1 << 22  # values that percentiles are taken of; of larger pictures, every nth
_MAX_SCALED = 1 << 20  # values that are scaled at once
_MIN_FILL = 0.0025  # share of the pixels that a border's value holds
_FAR_BELOW, _FAR_ABOVE = 0.2, 0.5  # how far it lies from the scene, in spans of the scene
_MIN_SCENE = 0.1  # share of the pixels that are left to be the scene
_MIN_EDGE = 0.5  # share of one of the picture's sides that a fill brighter than the scene holds
_SPOT = 4.0  # how many spans of the percentiles a hot spot stands out by to be let into the range of a flat frame
_SPOT_IN_SCENE = 64.0  # of a frame that shows something, which a fire or a few dead pixels must not hide
_NOISE = 0.1  # mean step between neighbours, in spans: 0.22 of white noise, 0.01 to 0.05 of scenes
_HIGHEST = frozenset({9999.0, 99999.0, 32767.0, 65535.0, 2147483647.0, 4294967295.0})  # what stands for nothing


@np.errstate(invalid="ignore", over="ignore")  # floating point may hold anything
def vis_levels(picture: Picture, vis_range: Range | None = None) -> Pixels:
    """(H, W, 3), uint8, of a grey or RGB picture; the rule is in the module's text."""
    levels = _vis_levels(picture, vis_range)
    return np.repeat(levels[..., None], 3, axis=2) if levels.ndim == 2 else levels


def _vis_levels(picture: Picture, vis_range: Range | None) -> Pixels:
    """As many channels as the picture has."""
    values = picture.values
    if values.dtype in (np.uint8, np.uint16) and picture.nodata is not None:
        is_nodata = values == picture.nodata
        if values.ndim == 3:
            is_nodata = is_nodata.all(axis=2, keepdims=True)
        values = np.where(is_nodata, values.dtype.type(0), values)
    if values.dtype == np.uint8 and vis_range is None:
        return values
    if values.dtype in (np.uint8, np.uint16):
        full = 0, (1 << (picture.bits or _significant_bits(values, picture.likely_bits))) - 1
        return _levels(values, *(vis_range or full))
    seen = _seen_in_colour(values, picture.nodata)
    if vis_range is not None:
        low, high = vis_range
    elif values.dtype.kind == "f" and seen.any() and values[seen].min() >= 0 and values[seen].max() <= 1:
        low, high = 0.0, 1.0
    else:
        low, high = _robust_range(values, seen)
    levels = _levels(values, low, high)
    if not seen.all():
        levels[~seen] = 0
    return levels


def _seen_in_colour(values: NDArray[Any], nodata: float | None) -> NDArray[np.bool_]:
    """Which samples the camera saw, of the values' shape; of a pixel that is a border in all colours, none."""
    if values.ndim == 2:
        return _measured(values, nodata)
    channels = [_measured(values[..., channel], nodata) for channel in range(values.shape[2])]
    seen = np.repeat(np.any(channels, axis=0)[..., None], values.shape[2], axis=2)
    return seen & np.isfinite(values) if values.dtype.kind == "f" else seen


def ir_levels(picture: Picture, ir_range: Range | None = None, within: NDArray[np.bool_] | None = None) -> Pixels:
    """(H, W), uint8, of a grey picture; the rule is in the module's text. within: (H, W), what may set the scale."""
    return ir_scaled(picture, ir_range, within)[0]


@np.errstate(invalid="ignore", over="ignore")
def measured(picture: Picture) -> NDArray[np.bool_]:
    """Which pixels of a grey picture are measurements: (H, W)."""
    return _measured(picture.values, picture.nodata)


@np.errstate(invalid="ignore", over="ignore")
def ir_scaled(
    picture: Picture, ir_range: Range | None = None, within: NDArray[np.bool_] | None = None
) -> tuple[Pixels, Range]:
    """As `ir_levels`, with the values that became black and white; equal ones for a frame without contrast."""
    values = picture.values
    if values.dtype == np.uint8 and ir_range is None and picture.nodata is None:
        return values, FULL_RANGE
    seen = _measured(values, picture.nodata)
    if values.dtype == np.uint8 and ir_range is None:
        return np.where(seen, values, np.uint8(0)), FULL_RANGE
    low, high = ir_range or _scene_range(values, seen if within is None else seen & within)
    levels = _levels(values, low, high)
    if not seen.all():
        levels[~seen] = 0
    return levels, (low, high)


def _levels(values: NDArray[Any], low: float, high: float) -> Pixels:
    if not high > low:
        return np.zeros(values.shape, np.uint8)  # a constant image has no contrast to stretch
    if values.dtype in (np.uint8, np.uint16):  # a table of all values is much faster than arithmetic on pixels
        all_values = np.arange(1 << (8 * values.dtype.itemsize), dtype=np.float64)
        return np.take(_levels(all_values, low, high), values)
    levels = np.zeros(values.shape, np.uint8)
    num_rows = max(1, _MAX_SCALED * len(values) // max(values.size, 1))
    for top in range(0, len(values), num_rows):  # in double precision, whole pictures take a gigabyte
        rows = slice(top, top + num_rows)
        scaled = np.nan_to_num((values[rows].astype(np.float64) - low) / (high - low))
        levels[rows] = np.rint(np.clip(scaled, 0, 1) * 255)
    return levels


def _significant_bits(values: NDArray[np.uint16], said: int | None) -> int:
    """How many of 16 bits count.

    PNG asks writers to spread few bits over the whole container, which many do not: what has low bits set where such a
    picture would have none, or does not repeat its upper byte, stands at the low end.
    """
    highest = int(values.max(initial=0))
    bits = said if said is not None and highest < 1 << said else next(n for n in _DEPTHS if highest < 1 << n)
    if bits == 16:
        return 16
    is_spread = not np.any(values & ((1 << (16 - bits)) - 1)) or np.array_equal((values >> 8) * 257, values)
    return 16 if is_spread and highest else bits


def _measured(values: NDArray[Any], nodata: float | None) -> NDArray[np.bool_]:
    """Which pixels the camera saw: (H, W)."""
    seen = np.isfinite(values) if values.dtype.kind == "f" else np.ones(values.shape, bool)
    if nodata is not None and np.isfinite(nodata):
        seen &= ~np.isclose(values, nodata, rtol=1e-6, atol=0)
    if values.dtype == np.uint8:
        return seen
    for _ in range(2):  # a border of zeros within one of nodata
        fill = _fill_of(values, seen)
        if fill is None:
            break
        value, is_low = fill
        seen &= values > value if is_low else values < value
    return seen


def _fill_of(values: NDArray[Any], seen: NDArray[np.bool_]) -> tuple[Any, bool] | None:
    """The value of a border that no camera saw, and whether it is below the scene (and all below it no scene)."""
    if not seen.any():
        return None
    # Cubic interpolation overshoots beside a border, so its value need not be the lowest.
    for fill, is_low in ((values[seen].min(), True), (_edge_value(values, seen), True), (values[seen].max(), False)):
        held = seen & (values == fill)
        if held.mean() < _MIN_FILL:
            continue
        edges = (held[0], held[-1], held[:, 0], held[:, -1])
        rest = seen & ~held
        if rest.mean() < _MIN_SCENE or not max(edge.mean() for edge in edges) > (0 if is_low else _MIN_EDGE):
            continue
        if not is_low and not (float(fill) in _HIGHEST or abs(float(fill)) >= 1e30):
            continue
        inner = _shrunk(rest)
        low, high = np.percentile(_sample(values, inner if inner.mean() >= _MIN_SCENE else rest), (2.0, 99.5))
        distance = low - float(fill) if is_low else float(fill) - high
        if distance > (_FAR_BELOW if is_low else _FAR_ABOVE) * (high - low) and distance > 0:
            return fill, is_low
    return None


def _edge_value(values: NDArray[Any], seen: NDArray[np.bool_]) -> Any:
    """The commonest value at the picture's edges; any value where nothing was seen there."""
    sides = (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1])
    found, counts = np.unique(np.concatenate([values[side][seen[side]] for side in sides]), return_counts=True)
    return found[counts.argmax()] if len(found) else values[seen][0]


def _scene_range(values: NDArray[Any], seen: NDArray[np.bool_]) -> Range:
    inner = seen if seen.all() else _shrunk(seen)
    low, high = _robust_range(values, inner if inner.any() else seen)
    if not seen.any():
        return low, high
    if not high > low:  # flat, but perhaps for a spot
        return float(values[seen].min()), float(values[seen].max())
    spot = _hottest_spot(values, inner, values[seen].min())
    spans = (spot - low) / (high - low)
    stands_out = spans > _SPOT and (spans > _SPOT_IN_SCENE or _is_noise(values, inner, high - low))
    return low, spot if stands_out else high


def _hottest_spot(values: NDArray[Any], seen: NDArray[np.bool_], lowest: Any) -> float:
    """The highest value that is two pixels wide and high: a glowing pixel or line is none."""
    num_rows, hottest = max(1, _MAX_SCALED // values.shape[1]), float(lowest)
    for top in range(0, len(values) - 1, num_rows):  # whole pictures in double precision take half a gigabyte
        rows = slice(top, top + num_rows + 1)
        masked = np.where(seen[rows], values[rows], lowest)
        pairs = np.minimum(masked[:-1], masked[1:])
        hottest = max(hottest, float(np.minimum(pairs[:, :-1], pairs[:, 1:]).max(initial=lowest)))
    return hottest


def _is_noise(values: NDArray[Any], seen: NDArray[np.bool_], span: float) -> bool:
    """Whether neighbours differ as pixels taken at random do: a flat frame, whose noise is nothing to be seen."""
    both = seen[:, 1:] & seen[:, :-1]
    if not both.any():
        return False
    steps = np.abs(_sample(values[:, 1:], both) - _sample(values[:, :-1], both))
    return float(np.minimum(steps, span).mean()) > _NOISE * span


def _shrunk(seen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Without the two pixels beside a border, which warping mixes with it."""
    from recofuse_images.codecs import cv2

    kernel = np.ones((5, 5), np.uint8)
    padded = cv2.erode(seen.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=1)
    return np.asarray(padded, bool)


def _robust_range(values: NDArray[Any], seen: NDArray[np.bool_]) -> Range:
    if not seen.any():
        return 0.0, 0.0
    if values.dtype == np.uint16:  # counting is much cheaper than sorting
        cumulated = np.cumsum(np.bincount((values if seen.all() else values[seen]).ravel()))
        wanted = np.array(PERCENTILES) / 100 * (cumulated[-1] - 1)
        low, high = np.searchsorted(cumulated, wanted, side="right")
        return float(low), float(high)
    low, high = np.percentile(_sample(values, seen), PERCENTILES)
    return float(low), float(high)


def _sample(values: NDArray[Any], seen: NDArray[np.bool_]) -> NDArray[np.float64]:
    found = values[seen].ravel()
    return found[:: max(1, -(-found.size // _MAX_SORTED))].astype(np.float64)
