"""A bilateral grid: gains and offsets for a frame, coarse in place and in brightness (HDRNet, Gharbi et al., 2017).

What a network makes of a frame averaged to a few thousand cells acts on the frame at full size along its own edges: a
place takes the entry of its surroundings and of its own brightness.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from recofuse_core.losses import luma

OFFSET_UNIT = 0.3


class BilateralGrid(NamedTuple):
    """Gains and offsets of visible frames.

    entries: (B, 6, levels, h, w), the logarithms of three gains, then three offsets, at every brightness and place, or
    (B, 2, levels, h, w), one of each for all three channels. All of them 0 leave a frame as it is.
    """

    entries: Tensor

    def __call__(self, frame: Tensor) -> Tensor:
        """Whole frames (B, 3, H, W) in [0, 1] to the same."""
        # Looked up at half size: averaged, brightness carries less noise, and it costs a quarter.
        guide = F.avg_pool2d(luma(frame), 2, ceil_mode=True, count_include_pad=False)
        guide = F.avg_pool2d(guide, 3, stride=1, padding=1, count_include_pad=False)
        looked_up = F.interpolate(self.look_up(guide), frame.shape[-2:], mode="bilinear", align_corners=False)
        return _applied(frame, looked_up)

    def at_cells(self, cells: Tensor) -> Tensor:
        """Averaged frames (B, 3, h, w) as they are: for training, where there is no noise left to avoid."""
        return _applied(cells, self.look_up(luma(cells)))

    def look_up(self, guide: Tensor) -> Tensor:
        """The entries (B, 6 or 2, h', w') at the brightness (B, 1, h', w') in [0, 1] of every place."""
        batch, _, height, width = guide.shape
        y, x = _centres(height, guide).view(1, -1, 1), _centres(width, guide).view(1, 1, -1)
        place = (x.expand(batch, height, width), y.expand(batch, height, width), 2 * guide[:, 0] - 1)
        looked_up: Tensor = F.grid_sample(
            self.entries, torch.stack(place, -1)[:, None], padding_mode="border", align_corners=False
        )
        return looked_up[:, :, 0]


def as_grid(values: Tensor, num_levels: int) -> BilateralGrid:
    """A convolution's output (B, channels x levels, h, w) as a grid."""
    batch, channels, height, width = values.shape
    return BilateralGrid(values.view(batch, channels // num_levels, num_levels, height, width))


def _applied(frame: Tensor, looked_up: Tensor) -> Tensor:
    gain, offset = looked_up.chunk(2, dim=1)
    return (frame * gain.exp() + OFFSET_UNIT * offset).clamp(0.0, 1.0)


def _centres(count: int, like: Tensor) -> Tensor:
    """The centres of `count` places side by side, from -1 to 1."""
    return (2 * torch.arange(count, device=like.device, dtype=like.dtype) + 1) / count - 1
