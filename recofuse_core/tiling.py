"""Overlapping tiles with blended borders, for frames whose whole would cost too much memory or attention.

A plan is made once on the latent grid; the same tiles are then cut from tensors of any scale (latent, skips, image),
and results are summed with weights that ramp linearly over the overlap and add up to one. Blending happens in the
latent at every sampling step, and the noise belongs to the whole latent, so that neighbouring tiles agree and no seam
remains.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recofuse_core.errors import ConfigError


@dataclass(frozen=True)
class TilingConfig:
    """When and how to tile. Lengths in image pixels, multiples of 16 where they are used."""

    max_pixels: int = 1280 * 1024  # larger frames are tiled
    tile: int = 640
    overlap: int = 96

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

    def cut(self, x: Tensor, scale: int) -> Tensor:
        """Cut this tile from a tensor that has `scale` pixels per latent position."""
        return x[..., self.top * scale : self.bottom * scale, self.left * scale : self.right * scale]


def plan_tiles(height: int, width: int, tile: int, overlap: int) -> tuple[Tile, ...]:
    """Tiles that cover a latent grid, in latent positions; evenly spread, neighbours share `overlap` or more."""
    rows, columns = _spread(height, tile, overlap), _spread(width, tile, overlap)
    return tuple(Tile(top, bottom, left, right) for top, bottom in rows for left, right in columns)


def _spread(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """(start, end) of tiles along one side. Starts and lengths stay even: encoders work on whole 16-pixel units."""
    if length <= tile:
        return [(0, length)]
    count = -(-(length - overlap) // (tile - overlap))
    starts = [2 * round((length - tile) * i / (2 * (count - 1))) for i in range(count)]
    return [(start, min(start + tile, length)) for start in starts]


class Mosaic:
    """Joins tile results (B, C, rows * scale, columns * scale) into (B, C, *grid * scale), ramping over the overlaps.

    Tiles are added one by one, so that only one tile's result need be alive beside the whole.
    """

    def __init__(self, tiles: Sequence[Tile], grid: tuple[int, int], scale: int) -> None:
        if not tiles:
            raise ConfigError("a tiling needs at least one tile")
        self.grid, self.scale = grid, scale
        self.rows = tuple(sorted({(tile.top, tile.bottom) for tile in tiles}))
        self.columns = tuple(sorted({(tile.left, tile.right) for tile in tiles}))
        self.whole: Tensor | None = None

    def add(self, tile: Tile, part: Tensor) -> None:
        """Add one tile's result."""
        if self.whole is None:
            shape = (*part.shape[:2], self.grid[0] * self.scale, self.grid[1] * self.scale)
            self.whole = part.new_zeros(shape).contiguous(memory_format=torch.channels_last)
        rows = _weights(self.rows, self.grid[0], self.scale, part.device)[tile.top, tile.bottom]
        columns = _weights(self.columns, self.grid[1], self.scale, part.device)[tile.left, tile.right]
        tile.cut(self.whole, self.scale).add_(part * (rows[:, None] * columns[None, :]).to(part.dtype))

    def joined(self) -> Tensor:
        """The whole, when every tile has been added."""
        if self.whole is None:
            raise ConfigError("no tile has been added")
        return self.whole


def blend(tiles: Sequence[Tile], parts: Iterator[Tensor], grid: tuple[int, int], scale: int) -> Tensor:
    """Join the results of all tiles, in their order; `parts` is consumed one by one."""
    mosaic = Mosaic(tiles, grid, scale)
    for tile, part in zip(tiles, parts, strict=True):
        mosaic.add(tile, part)
    return mosaic.joined()


@functools.lru_cache(maxsize=256)
def _weights(
    spans: tuple[tuple[int, int], ...], length: int, scale: int, device: torch.device
) -> dict[tuple[int, int], Tensor]:
    """By (start, end) along one side: 1 inside, falling linearly towards neighbours; all of them add up to one.

    Tiles are rows times columns, so a tile's window is the product of two of these. Made once for a device: a run that
    was made once copies nothing to it.
    """
    with torch.inference_mode(False):  # they may serve a run with gradients later
        ramps = {(start, end): _ramp(start, end, list(spans), length, scale) for start, end in spans}
        norm = torch.zeros(length * scale)
        for (start, end), ramp in ramps.items():
            norm[start * scale : end * scale] += ramp
        return {
            (start, end): (ramp / norm[start * scale : end * scale]).to(device) for (start, end), ramp in ramps.items()
        }


def _ramp(start: int, end: int, spans: list[tuple[int, int]], length: int, scale: int) -> Tensor:
    ramp = torch.ones((end - start) * scale)
    before = [b - start for a, b in spans if a < start < b]
    after = [end - a for a, b in spans if a < end < b]
    if start > 0 and before:
        width = min(before) * scale
        ramp[:width] *= (torch.arange(width) + 0.5) / width
    if end < length and after:
        width = min(after) * scale
        ramp[-width:] *= 1 - (torch.arange(width) + 0.5) / width
    return ramp
