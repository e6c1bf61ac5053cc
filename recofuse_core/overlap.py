"""Two cameras of which infrared sees less: the fused picture becomes the restored visible one where infrared ends.

Both are latents and skips before they are decoded, and blended there, so that one decoding gives the picture. There are
two bands. Detail of the fused one counts by a narrow share, which ends at the border of what infrared covers; what both
differ in as a whole, their tone, counts by a wide one, which fades far outside of it (docs/decisions/0029).

All of it is linear in the features and separates into rows and columns: averaging, blurring and spreading are matrices
that are made here with numpy. The rest is arithmetic that torch's tensors and numpy's arrays have alike, so that with
torch all of it runs where the features lie, and can be recorded.

Letters: B batch, H and W image size, C channels, h and w size of a latent or a skip.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recofuse_core.errors import ShapeError
from recofuse_core.picture import padded
from recofuse_core.sampler import Pair

Floats = NDArray[np.float32]
Array = Any  # of the runtime
Size = tuple[int, int]  # rows, columns
Matrices = tuple[Floats, Floats]  # of the rows and of the columns, (new, old) each

COARSE_SIDE = 60  # cells of the shorter side, at which tone is told from detail
TONE_SIGMA = 0.06  # of the shorter side: what is tone
WIDER = 4  # times as far: the neighbourhood that counts where nothing near is known
_TRUST = 0.01  # of that neighbourhood
_IN_FULL = 0.998  # more than 254 of 255, and no more than what division makes of 255


class Overlap:
    """Where infrared of one batch was measured (picture.Partial); `tone` (B, 1, H, W) is the wide share, by pixels.

    shares: (B, 2, H, W) float32, how far detail and tone of the fused picture count, 0 to 1: detail not at all where
    infrared was not measured, tone in full where it was. matrix: from one of numpy to one of the runtime.
    """

    def __init__(self, shares: Array, matrix: Callable[[Floats], Array]) -> None:
        self._matrix = matrix
        self._shares = shares
        self.tone: Array = shares[:, 1:]

    def blend(self, fused: Array, vis: Array) -> Array:
        """The features (B, C, h, w) of both pictures as those of one, in the type and layout of `vis`."""
        size = (vis.shape[-2], vis.shape[-1])
        cells = _coarse(size)
        detail, tone, known, near_share, wide_share = self._at(size, cells)
        difference = fused - vis
        seen = self._through(_averaging(cells, size), known * difference)
        near, wide = (self._through(_blurring(cells, reach), seen) for reach in (1, WIDER))
        smooth = self._through(_spreading(size, cells), near_share * near + wide_share * wide)
        blended = vis * 1  # a copy
        blended += detail * difference + (tone - detail) * smooth
        return blended

    def shown(self, frames: Pair) -> Pair:
        """See picture.Partial: where infrared's detail counts by a share, so does its frame."""
        red, green, blue = (frames.vis[:, channel : channel + 1] for channel in range(3))
        grey = 0.299 * red + 0.587 * green + 0.114 * blue
        shares = self._shares[:, :1]
        inside = (..., slice(shares.shape[-2]), slice(shares.shape[-1]))
        grey[inside] += shares * (frames.ir - grey)[inside]
        return Pair(frames.vis, grey)

    def _at(self, size: Size, cells: Size) -> tuple[Array, ...]:
        """Both shares and what is known, at the size of features; what the means of both reaches count for by cell."""
        narrowing = _narrowing(size, (self._shares.shape[-2], self._shares.shape[-1]))
        shares = self._through(narrowing, self._shares)
        known = self._through(narrowing, self.tone * (self.tone > _IN_FULL))
        seen = self._through(_averaging(cells, size), known)
        near, wide = (self._through(_blurring(cells, reach), seen) for reach in (1, WIDER))
        near_share = 1 / (near + _TRUST)
        wide_share = near_share * _TRUST / wide.clip(min=1e-6)
        return shares[:, :1], shares[:, 1:], known, near_share, wide_share

    def _through(self, matrices: Matrices, array: Array) -> Array:
        down, across = map(self._matrix, matrices)
        return down @ array @ across.T


def shares_of(levels: NDArray[np.uint8]) -> Floats:
    """The shares that `Overlap` takes, of (B, H, W, 2) in 255 steps."""
    shares: Floats = np.ascontiguousarray(levels.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)
    return shares


def require_overlap(shape: Sequence[int], batch: int, height: int, width: int) -> None:
    """Raise ShapeError unless levels of this shape are those of a batch of pictures of a size."""
    if tuple(shape) != (batch, height, width, 2):
        raise ShapeError(f"the overlap must be (B, H, W, 2), here ({batch}, {height}, {width}, 2), got {tuple(shape)}")


def _coarse(size: Size) -> Size:
    step = max(1.0, min(size) / COARSE_SIDE)
    return max(1, round(size[0] / step)), max(1, round(size[1] / step))


def _averaging(new: Size, old: Size) -> Matrices:
    return _areas(new[0], old[0]), _areas(new[1], old[1])


def _narrowing(new: Size, old: Size) -> Matrices:
    """From a picture, filled up as far as its features' frames are, with its outer values, to features."""
    return _padded_areas(new[0], old[0]), _padded_areas(new[1], old[1])


def _blurring(size: Size, reach: int) -> Matrices:
    sigma = reach * TONE_SIGMA * min(size)
    return _blur(size[0], sigma), _blur(size[1], sigma)


def _spreading(new: Size, old: Size) -> Matrices:
    return _hats(new[0], old[0]), _hats(new[1], old[1])


@functools.lru_cache(maxsize=64)
def _areas(new: int, old: int) -> Floats:
    """(new, old): means over equal parts."""
    edges = np.arange(new + 1) * (old / new)
    starts = np.arange(old)
    covered = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    return np.asarray(np.maximum(covered, 0) * (new / old), np.float32)


@functools.lru_cache(maxsize=64)
def _padded_areas(new: int, old: int) -> Floats:
    """(new, old): `_areas` of a side that is filled up with its last value."""
    areas = _areas(new, padded(old))
    matrix = areas[:, :old].copy()
    matrix[:, -1] += areas[:, old:].sum(axis=1)
    return matrix


@functools.lru_cache(maxsize=64)
def _hats(new: int, old: int) -> Floats:
    """(new, old): interpolation between values in the middles of equal parts, level beyond the outer ones."""
    at = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
    return np.asarray(np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old))), np.float32)


@functools.lru_cache(maxsize=64)
def _blur(count: int, sigma: float) -> Floats:
    """(count, count): a Gaussian of sigma cells, the outer values going on beyond the sides."""
    reach = int(np.ceil(4 * sigma))
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    matrix = np.zeros((count, count))
    rows = np.arange(count)
    for offset, weight in zip(offsets, weights / weights.sum(), strict=True):
        matrix[rows, np.clip(rows + offset, 0, count - 1)] += weight
    return matrix.astype(np.float32)
