"""The veil of fog, rain and snow: what is left of one over a visible frame, told from both frames and lifted.

It stands behind the tone curves, in either rendition: whatever curves or lighting made of a frame, a veil that differs
over it, thicker with distance, is left, and infrared sees through it. A `VeilEstimator` looks at the pair averaged to
some thousand cells and gives a `Veil`: a bilateral grid, alike for all channels, and how much of it is to be applied,
which is nothing where there is no veil for certain. docs/decisions/0031 and 0035.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recofuse_core.bilateral import BilateralGrid, as_grid
from recofuse_core.errors import ConfigError
from recofuse_core.layers import average_to

DOUBTFUL, CERTAIN = 0.88, 0.96  # how probable a veil is where lifting it begins, and from where all of it is lifted


@dataclass(frozen=True)
class VeilConfig:
    """Sizes of the veil estimator."""

    cells: int = 128  # a side that both frames are averaged to
    channels: tuple[int, int, int] = (20, 32, 48)  # at 1/2, 1/4 and 1/8 of the cells
    num_levels: int = 8  # of the bilateral grid, from black to white

    def __post_init__(self) -> None:
        if self.cells < 16 or self.cells % 8:
            raise ConfigError(f"cells must be a multiple of 8 and at least 16, got {self.cells}")
        if min(self.channels) < 1 or self.num_levels < 2:
            raise ConfigError("channels must be positive, and levels 2 at least")


class Veil(NamedTuple):
    """What takes the veil off visible frames of a batch, and how much of that is applied, (B,) in [0, 1]."""

    share: Tensor
    grid: BilateralGrid

    def lifted(self, vis: Tensor) -> Tensor:
        """Visible frames (B, 3, H, W) in [0, 1] without it, to the same."""
        return vis + self.share[:, None, None, None] * (self.grid(vis) - vis)


class VeilFound(NamedTuple):
    """What would take a veil off, were there any, and log-odds that there is one, (B,)."""

    grid: BilateralGrid
    log_odds: Tensor


class VeilEstimator(nn.Module):
    """A small U-Net over the cells of a pair. Before it is trained, it lifts nothing.

    Borders are carried on, for of a border of zeros it would learn how far away the corners of a frame are.
    """

    MIDDLE = 0.4  # taken from all cells, which are about centred then

    def __init__(self, config: VeilConfig) -> None:
        super().__init__()
        self.config = config
        fine, middle, coarse = config.channels
        self.stem = _conv(4 + 1, fine, stride=2)
        self.fine = _conv(fine, fine)
        self.halve_fine = _conv(fine, middle, stride=2)
        self.middle = nn.Sequential(_conv(middle, middle), nn.SiLU(), _conv(middle, middle))
        self.halve_middle = _conv(middle, coarse, stride=2)
        self.coarse = _conv(coarse, coarse)
        self.of_frame = nn.Linear(2 * coarse, coarse)
        self.double_coarse = nn.Conv2d(coarse, middle, 1)
        self.join = _conv(middle, middle)
        self.grid = nn.Conv2d(middle, 2 * config.num_levels, 1)
        self.judge = nn.Linear(2 * coarse, 1)
        for head in (self.grid, self.judge):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]

    def average(self, vis: Tensor, ir: Tensor) -> Tensor:
        """Both frames averaged to cells, (B, 4, cells, cells). vis: (B, 3, H, W), ir: (B, 1, H, W) in [0, 1]."""
        return average_to(self.config.cells, vis, ir)

    def find(self, cells: Tensor) -> VeilFound:
        """What is told from cells (B, 4, cells, cells) of a pair."""
        batch, _, height, width = cells.shape
        row = torch.linspace(-1, 1, height, device=cells.device).view(1, 1, -1, 1).expand(batch, 1, height, width)
        fine = F.silu(self.stem(torch.cat([cells - self.MIDDLE, row], dim=1)))
        fine = fine + F.silu(self.fine(fine))
        middle = F.silu(self.halve_fine(fine))
        middle = middle + self.middle(middle)
        coarse = F.silu(self.halve_middle(middle))
        coarse = coarse + F.silu(self.coarse(coarse))
        mean = coarse.mean(dim=(2, 3))
        spread = (coarse - mean[:, :, None, None]).square().mean(dim=(2, 3))
        frame = torch.cat([mean, torch.log(spread + 1e-3)], dim=1)
        coarse = F.silu(coarse + self.of_frame(frame)[:, :, None, None])
        wide = F.interpolate(self.double_coarse(coarse), middle.shape[-2:], mode="bilinear", align_corners=False)
        joined = F.silu(self.join(middle + wide))
        return VeilFound(as_grid(self.grid(joined), self.config.num_levels), self.judge(frame)[:, 0])

    def forward(self, vis: Tensor, ir: Tensor) -> Veil:
        """The veil over whole toned frames: vis (B, 3, H, W), ir (B, 1, H, W), float32 in [0, 1]."""
        found = self.find(self.average(vis, ir))
        share = ((torch.sigmoid(found.log_odds) - DOUBTFUL) / (CERTAIN - DOUBTFUL)).clamp(0.0, 1.0)
        return Veil(share, found.grid)


def _conv(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, padding_mode="replicate")
