"""Overlapping tiles with blended borders, for frames whose whole would cost too much memory or attention.

A plan is made once on the latent grid; the same tiles are then cut from tensors of any scale (latent, skips, image),
and results are summed with weights that ramp linearly over the overlap and add up to one. Blending happens in the
latent at every sampling step, and the noise belongs to the whole latent, so that neighbouring tiles agree and no seam
remains. What is cut and joined may be torch's tensors or numpy's arrays.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from recofuse_core.errors import ConfigError


@dataclass(frozen=True)
class TilingConfig:
    """When and how to tile. Lengths in image pixels, multiples of 16 where they are used."""

    max_pixels: int = 1280 * 1024  # larger frames are tiled
    tile: int = 768  # side of a tile at most; they are no larger than what covers a frame with this overlap
    overlap: int = 48

    def __post_init__(self) -> None:
        if self.tile % 16 or self.overlap % 16 or not 0 < self.overlap <= self.tile // 2:
            raise ConfigError("tile and overlap must be multiples of 16 with 0 < overlap <= tile / 2")


@dataclass(frozen=True)
class Tile:
    """A rectangle of the latent grid: rows top..bottom, columns left..right."""

    top: int
    bottom: int
    left: int
    right: int

    def cut(self, x: Any, scale: int) -> Any:
        """Cut this tile from an array that has `scale` pixels per latent position."""
        return x[..., self.top * scale : self.bottom * scale, self.left * scale : self.right * scale]


def plan_tiles(height: int, width: int, tile: int, overlap: int) -> tuple[Tile, ...]:
    """Tiles of one size that cover a latent grid: as few as sides of at most `tile` allow, and no larger than needed.

    All lengths are in latent positions, and even. Neighbours share `overlap`, or little more.
    """
    rows, columns = _spread(height, tile, overlap), _spread(width, tile, overlap)
    return tuple(Tile(top, bottom, left, right) for top, bottom in rows for left, right in columns)


def _spread(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """(start, end) of tiles along one side. Starts and lengths stay even: encoders work on whole 16-pixel units."""
    if length <= tile:
        return [(0, length)]
    count = -(-(length - overlap) // (tile - overlap))
    side = 2 * -(-(length + (count - 1) * overlap) // (2 * count))
    starts = [2 * round((length - side) * i / (2 * (count - 1))) for i in range(count)]
    return [(start, start + side) for start in starts]


Spans = tuple[tuple[int, int], ...]
Ramps = Mapping[tuple[int, int], Any]


class Canvas(Protocol):
    """How the arrays of a library are made that tiles are joined on."""

    def zeros(self, shape: tuple[int, ...], like: Any) -> Any:
        """A new array of zeros, of the type and on the device of `like`."""

    def ramps(self, spans: Spans, length: int, scale: int, like: Any) -> Ramps:
        """What `ramps` gives, as arrays for use with `like`."""


class Mosaic:
    """Joins tile results (B, C, rows * scale, columns * scale) into (B, C, *grid * scale), ramping over the overlaps.

    Tiles are added one by one, so that only one tile's result need be alive beside the whole.
    """

    def __init__(self, canvas: Canvas, tiles: Sequence[Tile], grid: tuple[int, int], scale: int) -> None:
        if not tiles:
            raise ConfigError("a tiling needs at least one tile")
        self.canvas, self.grid, self.scale = canvas, grid, scale
        self.rows: Spans = tuple(sorted({(tile.top, tile.bottom) for tile in tiles}))
        self.columns: Spans = tuple(sorted({(tile.left, tile.right) for tile in tiles}))
        self.whole: Any = None

    def add(self, tile: Tile, part: Any) -> None:
        """Add one tile's result."""
        if self.whole is None:
            shape = (*part.shape[:2], self.grid[0] * self.scale, self.grid[1] * self.scale)
            self.whole = self.canvas.zeros(shape, part)
        rows = self.canvas.ramps(self.rows, self.grid[0], self.scale, part)[tile.top, tile.bottom]
        columns = self.canvas.ramps(self.columns, self.grid[1], self.scale, part)[tile.left, tile.right]
        place = tile.cut(self.whole, self.scale)
        place += part * (rows[:, None] * columns[None, :])

    def joined(self) -> Any:
        """The whole, when every tile has been added."""
        if self.whole is None:
            raise ConfigError("no tile has been added")
        return self.whole


@functools.lru_cache(maxsize=256)
def ramps(spans: Spans, length: int, scale: int) -> dict[tuple[int, int], NDArray[np.float32]]:
    """By (start, end) along one side: 1 inside, falling linearly towards neighbours; all of them add up to one.

    Tiles are rows times columns, so a tile's window is the product of two of these.
    """
    bare = {(start, end): _ramp(start, end, list(spans), length, scale) for start, end in spans}
    norm = np.zeros(length * scale, np.float32)
    for (start, end), ramp in bare.items():
        norm[start * scale : end * scale] += ramp
    return {(start, end): ramp / norm[start * scale : end * scale] for (start, end), ramp in bare.items()}


def _ramp(start: int, end: int, spans: list[tuple[int, int]], length: int, scale: int) -> NDArray[np.float32]:
    ramp = np.ones((end - start) * scale, np.float32)
    before = [b - start for a, b in spans if a < start < b]
    after = [end - a for a, b in spans if a < end < b]
    if start > 0 and before:
        width = min(before) * scale
        ramp[:width] *= (np.arange(width, dtype=np.float32) + 0.5) / width
    if end < length and after:
        width = min(after) * scale
        ramp[-width:] *= 1 - (np.arange(width, dtype=np.float32) + 0.5) / width
    return ramp
