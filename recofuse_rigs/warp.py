"""Infrared onto the visible grid, once and at its own depth, and how far it can be believed there.

Values are interpolated linearly: between two measured values lies what was measured, never beyond them, so that a
temperature stays one. A camera of more pixels than the visible one is averaged first. Where infrared does not reach,
the value of its nearest edge goes on: no camera saw it, but a black border would be a thing to the model, and what is
made up from the visible picture would change the tone of the whole frame. `coverage` says where that is.

`blended` makes the fused picture the restored visible one there, in two bands: detail ends within a narrow feather
inside of the border, and what the two pictures differ in as a whole (a night road is dark to one camera and bright to
the other) fades out over a wide stretch outside of it. One feather for both would show the border as a step of tone.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recofuse_images.codecs import cv2
from recofuse_rigs.errors import BadRigError
from recofuse_rigs.rig import Matrix, Rig, Size, corners_of, mapped, resizing

Weights = NDArray[np.float32]

FEATHER = 0.05  # of the visible frame's shorter side: how far inside the border infrared counts in full
FADE = 0.3  # likewise: how far outside the tone of the fused picture goes on
MAX_KEPT_BYTES = 96 << 20  # of `Warps`
MAX_KEPT_PIXELS = 1 << 21  # of a warp whose maps are kept; those of larger frames would hold more than their pictures
_COARSE_SIDE = 60  # pixels of the shorter side, at which tone is told from detail
_TONE = 0.06  # of the shorter side: the sigma of what is tone
_BY_AREA = 0.75  # infrared pixels smaller than this are averaged before they are interpolated
_BAND = 1 << 18  # pixels that are worked on at once in double precision
_REMAPPED = (np.uint8, np.uint16, np.int16, np.float32, np.float64)


@dataclass(frozen=True, eq=False)
class Warp:
    """What a rig does to each frame, worked out once. Safe to use from several threads.

    shrunk: the size to which infrared is averaged before anything else. coverage: (H, W), where infrared was measured.
    maps: (2, H, W), the column and the row of each visible pixel in the averaged picture; None if they are made anew
    each time, to save memory. shifts: (2, rows, columns), what one frame adds to the maps, at nodes spread evenly over
    it, to the warp of_rig; None for the rig as it is.
    """

    rig: Rig
    shrunk: Size
    coverage: NDArray[np.bool_]
    maps: NDArray[np.float32] | None
    shifts: NDArray[np.float32] | None = None
    of_rig: Warp | None = None

    @functools.cached_property
    def is_whole(self) -> bool:
        """Whether infrared covers all of the visible frame."""
        return bool(self.coverage.all())

    @property
    def weights(self) -> Weights:
        """(H, W): how far infrared counts, from 0 at the border of the coverage to 1 inside.

        The frame's own edges are no border.
        """
        return self._both_weights[0]

    @property
    def tone_weights(self) -> Weights:
        """(H, W): how far the tone of the fused picture counts, from 1 at the border of the coverage to 0 outside."""
        return self._both_weights[1]

    @property
    def overlap(self) -> NDArray[np.uint8]:
        """(H, W, 2): both weights as levels, 255 for 1: how a model is told where infrared counts."""
        if self.of_rig is not None:
            return self.of_rig.overlap
        return self._kept_overlap if self.maps is not None else self._made_overlap()

    @functools.cached_property
    def _kept_overlap(self) -> NDArray[np.uint8]:
        return self._made_overlap()

    def _made_overlap(self) -> NDArray[np.uint8]:
        return np.rint(np.stack(self._made_weights(), axis=-1) * 255).astype(np.uint8)

    @property
    def _both_weights(self) -> tuple[Weights, Weights]:
        if self.of_rig is not None:
            return self.of_rig._both_weights
        return self._kept_weights if self.maps is not None else self._made_weights()

    @functools.cached_property
    def _kept_weights(self) -> tuple[Weights, Weights]:
        return self._made_weights()

    def _made_weights(self) -> tuple[Weights, Weights]:
        side = min(self.coverage.shape)
        inner = feathered(self.coverage, max(2.0, FEATHER * side))
        return inner, 1 - feathered(~self.coverage, max(2.0, FADE * side))

    @property
    def size_bytes(self) -> int:
        """Bytes of all that is kept, weights included that are not made yet."""
        return self.coverage.size * (1 if self.maps is None else 1 + 2 * 4 + 2 * 4 + 2)

    def apply(self, infrared: NDArray[Any]) -> NDArray[Any]:
        """(H, W) or (H, W, C) of the infrared camera, any depth, on the visible grid at the same depth.

        32-bit integers come back as float64. Raises BadRigError for a picture of another size.
        """
        height, width = infrared.shape[:2]
        if (width, height) != self.rig.ir_size:
            raise BadRigError(f"ir is {width}x{height}, and the rig is for {self.rig.ir_size[0]}x{self.rig.ir_size[1]}")
        values = np.ascontiguousarray(infrared)
        if values.dtype not in _REMAPPED:
            values = values.astype(np.float64)
        if self.shrunk != (width, height):
            values = cv2.resize(values, self.shrunk, interpolation=cv2.INTER_AREA)
        warped = np.empty((*self.coverage.shape, *values.shape[2:]), values.dtype)
        for band in _bands(*self.coverage.shape):
            columns, rows = _maps(self.rig, band)[0] if self.maps is None else self.maps[:, band]
            if self.shifts is not None:
                change = _spread_over(self.shifts, self.coverage.shape, band)
                columns, rows = columns + change[0], rows + change[1]
            warped[band] = cv2.remap(values, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return warped

    def moved(self, field: NDArray[np.floating[Any]]) -> Warp:
        """The warp of a frame in which infrared lies off by a smooth field: still one interpolation.

        field: (rows, columns, 2), x before y, at nodes in the middles of equal cells of the frame, two of each side and
        more: what the rig lays at a pixel plus this displacement belongs at that pixel. The coverage stays the rig's:
        where infrared comes to end sooner, by as much as it is moved, its edge's values go on, within the feather.
        """
        num_rows, num_columns = field.shape[:2]
        height, width = self.coverage.shape
        x, y = np.meshgrid(
            (np.arange(num_columns) + 0.5) * (width / num_columns) - 0.5,
            (np.arange(num_rows) + 0.5) * (height / num_rows) - 0.5,
        )
        before, _ = _unclipped(self.rig, x, y)
        after, is_sound = _unclipped(self.rig, x + field[..., 0], y + field[..., 1])
        _, to_shrunk = _shrunk(self.rig)
        zoom = np.array([to_shrunk[0, 0], to_shrunk[1, 1]])[:, None, None]
        shifts = np.where(is_sound, (np.stack(after) - np.stack(before)) * zoom, 0).astype(np.float32)
        return replace(self, shifts=shifts, of_rig=self.of_rig or self)

    def blended(self, fused: NDArray[np.uint8], vis: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The fused picture where infrared counts, the restored visible one far from it, no border between: (H, W, 3).

        Inside of the feather it is `fused` to the bit, and beyond the fade `vis`.
        """
        if self.is_whole:
            return fused
        height, width = self.coverage.shape
        weights, tone_weights = self._both_weights
        tone = cv2.resize(self._tone_of(fused, vis), (width, height), interpolation=cv2.INTER_CUBIC)
        blended = np.empty_like(fused)
        for band in _bands(height, width):
            own, share = vis[band].astype(np.float32), weights[band, :, None]
            change = share * (fused[band] - own) + (tone_weights[band, :, None] - share) * tone[band]
            blended[band] = np.clip(np.rint(own + change), 0, 255)
        return blended

    def _tone_of(self, fused: NDArray[np.uint8], vis: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What the fused picture differs from the visible one in, smoothed and carried on outwards: (h, w, 3)."""
        height, width = self.coverage.shape
        step = max(1.0, min(height, width) / _COARSE_SIDE)
        size = max(1, round(width / step)), max(1, round(height / step))
        known = cv2.resize(self.coverage.astype(np.float32), size, interpolation=cv2.INTER_AREA)
        seen = cv2.copyTo(
            fused, self.coverage.astype(np.uint8), vis.copy()
        )  # no difference where there was no infrared
        coarse = [cv2.resize(picture, size, interpolation=cv2.INTER_AREA).astype(np.float32) for picture in (seen, vis)]
        difference = coarse[0] - coarse[1]
        sigma = _TONE * min(size)

        def smoothed(values: NDArray[Any], sigma: float) -> NDArray[Any]:
            return np.asarray(cv2.GaussianBlur(values, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE))

        # Far from all that is known the means of a wider neighbourhood take over.
        wide = smoothed(difference, 4 * sigma) / np.maximum(smoothed(known, 4 * sigma), 1e-6)[..., None]
        near, trust = smoothed(difference, sigma), smoothed(known, sigma)[..., None]
        return np.asarray((near + 0.01 * wide) / (trust + 0.01), np.float32)


class Warps:
    """The warps that were used last, so that a stream's is worked out once. Safe to use from several threads."""

    def __init__(self, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Rig, Warp] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, rig: Rig) -> Warp:
        """See `warp_of`. The one that was used longest ago goes first."""
        with self._lock:
            if (warp := self._kept.get(rig)) is not None:
                self._kept.move_to_end(rig)
                return warp
        warp = warp_of(rig)  # outside of the lock: two threads may do it at once, and nobody waits
        with self._lock:
            self._kept[rig] = warp
            while sum(kept.size_bytes for kept in self._kept.values()) > self._max_bytes:
                self._kept.popitem(last=False)
        return warp


def warp_of(rig: Rig) -> Warp:
    """How to lay a rig's infrared frames on its visible ones."""
    width, height = rig.vis_size
    coverage = np.empty((height, width), bool)
    maps = np.empty((2, height, width), np.float32) if width * height <= MAX_KEPT_PIXELS else None
    for band in _bands(height, width):
        found, coverage[band] = _maps(rig, band)
        if maps is not None:
            maps[:, band] = found
    return Warp(rig, _shrunk(rig)[0], coverage, maps)


def _bands(height: int, width: int) -> Iterator[slice]:
    """The rows of a frame, few at a time."""
    num_rows = max(1, _BAND // width)
    for top in range(0, height, num_rows):
        yield slice(top, min(top + num_rows, height))


def _maps(rig: Rig, band: slice) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The maps of some rows, (2, H, W), and their coverage."""
    x, y, coverage = _places(rig, band)
    _, to_shrunk = _shrunk(rig)
    columns, rows = to_shrunk[0, 0] * x + to_shrunk[0, 2], to_shrunk[1, 1] * y + to_shrunk[1, 2]
    return np.stack([columns, rows]).astype(np.float32), coverage


def _places(rig: Rig, band: slice) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_]]:
    """Where the visible pixels of some rows lie in the infrared picture, moved to its edge if beyond; which do not."""
    columns, rows = np.meshgrid(
        np.arange(rig.vis_size[0], dtype=np.float64), np.arange(band.start, band.stop, dtype=np.float64)
    )
    (x, y), is_before = _unclipped(rig, columns, rows)
    right, bottom = rig.ir_size[0] - 1, rig.ir_size[1] - 1
    slack = 1e-6
    coverage = is_before & (x >= -slack) & (x <= right + slack) & (y >= -slack) & (y <= bottom + slack)
    return np.clip(x, 0, right), np.clip(y, 0, bottom), coverage


def _unclipped(
    rig: Rig, columns: NDArray[Any], rows: NDArray[Any]
) -> tuple[tuple[NDArray[Any], NDArray[Any]], NDArray[np.bool_]]:
    """Where visible points lie in the infrared picture or beyond it, and which of them both cameras can see."""
    back = np.linalg.inv(rig.array)
    depth = back[2, 0] * columns + back[2, 1] * rows + back[2, 2]
    is_before = depth > 1e-9  # a ray that both cameras can see; of the others, the edge that is nearest
    depth = np.where(is_before, depth, 1e-9)
    x = (back[0, 0] * columns + back[0, 1] * rows + back[0, 2]) / depth
    y = (back[1, 0] * columns + back[1, 1] * rows + back[1, 2]) / depth
    if rig.distortion is not None:
        far = 2.0 * max(rig.ir_size)  # beyond its own picture a lens's polynomial may come back
        is_before &= (np.abs(x) < far) & (np.abs(y) < far)
        bent = rig.distortion.apply(np.stack([np.clip(x, -far, far).ravel(), np.clip(y, -far, far).ravel()], axis=1))
        x, y = bent[:, 0].reshape(x.shape), bent[:, 1].reshape(y.shape)
    return (x, y), is_before


def hat_weights(count: int, num_nodes: int, span: slice | None = None) -> NDArray[np.float64]:
    """(count, num_nodes): interpolation between nodes in the middles of equal parts, level beyond the outer ones.

    span: which of the `count` are wanted.
    """
    places = np.arange(count)[span or slice(None)]
    at = np.clip((places + 0.5) * (num_nodes / count) - 0.5, 0, num_nodes - 1)
    return np.asarray(np.maximum(0, 1 - np.abs(at[:, None] - np.arange(num_nodes))))


def _spread_over(nodes: NDArray[np.float32], shape: tuple[int, ...], band: slice) -> NDArray[np.float32]:
    """Values at nodes (2, rows, columns), between them, for some rows of a frame: (2, H, W)."""
    down = hat_weights(shape[0], nodes.shape[1], band).astype(np.float32)
    rows = np.einsum("hi,cij->hjc", down, nodes)
    spread = cv2.resize(rows, (shape[1], len(rows)), interpolation=cv2.INTER_LINEAR)  # by columns alone
    return np.asarray(np.moveaxis(spread, 2, 0), np.float32)


def feathered(coverage: NDArray[np.bool_], width: float) -> Weights:
    """From 0 at the first covered pixel beside an uncovered one to 1 at `width` pixels from it, with smooth ends."""
    if coverage.all():
        return np.ones(coverage.shape, np.float32)
    distance = cv2.distanceTransform(coverage.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    share = np.clip((distance - 1) / width, 0, 1)
    return np.asarray(share * share * (3 - 2 * share), np.float32)


def _shrunk(rig: Rig) -> tuple[Size, Matrix]:
    """The size in which infrared pixels are about as large as visible ones, if they are much smaller."""
    placed = mapped(rig.array, corners_of(rig.ir_size))
    sides = np.linalg.norm(placed - np.roll(placed, 1, axis=0), axis=1)  # left, top, right, bottom
    width, height = rig.ir_size
    zooms = max(sides[1], sides[3]) / max(width - 1, 1), max(sides[0], sides[2]) / max(height - 1, 1)
    sizes = [
        max(2, round(side * zoom)) if zoom < _BY_AREA else side for side, zoom in zip(rig.ir_size, zooms, strict=True)
    ]
    size = sizes[0], sizes[1]
    return size, resizing(rig.ir_size, size)
