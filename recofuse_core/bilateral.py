"""A bilateral grid: gains and offsets for a frame, coarse in place and in brightness (HDRNet, Gharbi et al., 2017).

What a network makes of a frame averaged to a few thousand cells acts on the frame at full size along its own edges: a
place takes the entry of its surroundings and of its own brightness.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from recofuse_core.layers import block_means, scaled, stretched, surroundings
from recofuse_core.losses import luma

OFFSET_UNIT = 0.3


class BilateralGrid(NamedTuple):
    """Gains and offsets of visible frames.

    entries: (B, 6, levels, h, w), the logarithms of three gains, then three offsets, at every brightness and place. All
    of them 0 leave a frame as it is. What else differs over place and brightness may be looked up, too.
    """

    entries: Tensor

    def __call__(self, frame: Tensor) -> Tensor:
        """Whole frames (B, 3, H, W) in [0, 1] to the same."""
        looked_up = self.look_up(guide_of(luma(frame)))
        return _applied(frame, *stretched(looked_up, frame.shape[-2:], 3, 3))

    def at_cells(self, cells: Tensor) -> Tensor:
        """Averaged frames (B, 3, h, w) as they are: for training, where there is no noise left to avoid."""
        return _applied(cells, *self.look_up(luma(cells)).chunk(2, dim=1))

    def look_up(self, guide: Tensor) -> Tensor:
        """The entries (B, channels, h', w') at the brightness (B, 1, h', w') in [0, 1] of every place."""
        batch, _, height, width = guide.shape
        if torch.compiler.is_exporting():
            return self._summed(guide)
        y, x = _centres(height, guide).view(1, -1, 1), _centres(width, guide).view(1, 1, -1)
        place = (x.expand(batch, height, width), y.expand(batch, height, width), scaled(guide[:, 0], 2, -1))
        looked_up: Tensor = F.grid_sample(
            self.entries, torch.stack(place, -1)[:, None], padding_mode="border", align_corners=False
        )
        return looked_up[:, :, 0]

    def _summed(self, guide: Tensor) -> Tensor:
        """`look_up` as products: other runtimes look places up one by one, at six times the cost.

        All levels at every place, weighed by how near they are to its brightness. One after the other: together they
        would be most of the memory that a large frame takes.
        """
        height, width = guide.shape[-2:]
        levels, rows, columns = self.entries.shape[2:]
        down, across = _between(rows, height).T, _between(columns, width)
        at = (guide * levels - 0.5).clamp(0, levels - 1)
        weighed = (
            (down @ entries @ across) * (1 - (at - level).abs()).clamp_min(0)
            for level, entries in enumerate(self.entries.unbind(dim=2))
        )
        return functools.reduce(torch.add, weighed)


def guide_of(y: Tensor) -> Tensor:
    """What a grid is looked up at, (B, 1, H / 2, W / 2), rounded up, for frames of luma (B, 1, H, W).

    At half size: averaged, it carries less noise, and looking up costs a quarter.
    """
    return surroundings(block_means(y, 2))


def as_grid(values: Tensor, num_levels: int) -> BilateralGrid:
    """A convolution's output (B, channels x levels, h, w) as a grid."""
    batch, channels, height, width = values.shape
    return BilateralGrid(values.view(batch, channels // num_levels, num_levels, height, width))


def _applied(frame: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    return torch.add(frame * gain.exp(), offset, alpha=OFFSET_UNIT).clamp(0.0, 1.0)


def _between(entries: int, count: int) -> Tensor:
    """What every one of `entries` side by side weighs at `count` places over them, linearly: (entries, count)."""
    at = ((torch.arange(count) + 0.5) * entries / count - 0.5).clamp(0, entries - 1)
    return (1 - (at - torch.arange(entries)[:, None]).abs()).clamp_min(0)


def _centres(count: int, like: Tensor) -> Tensor:
    """The centres of `count` places side by side, from -1 to 1."""
    return torch.linspace(1 / count - 1, 1 - 1 / count, count, device=like.device, dtype=like.dtype)
