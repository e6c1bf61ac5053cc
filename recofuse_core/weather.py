"""Weather: the streaks of rain and the flakes of snow in front of a visible frame, taken off before anything else.

They have shapes that a network of convolutions tells from a scene, and infrared sees through most of them, so a
`WeatherEstimator` looks at both frames and gives what they added to the visible one. Everything behind it (lighting,
tone curves, both branches, and the skips of the fused picture) meets a frame without them. The veil of rain and fog is
not its business: that is told from the whole frame, by the curves and the veil estimator. docs/decisions/0028 tells why
this is a stage of its own, and how well it works.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recofuse_core.errors import ConfigError
from recofuse_core.layers import ramp

STRIDE = 16  # frames are reduced by as much; their sides must be multiples of it
CELL = 4  # pixels a side that the first layer reads and the last one writes at once
FAINT = 0.05  # of what is seen in the mean of a frame; less of it hardly counts
DOUBTFUL, CERTAIN = 0.6, 0.9  # how probable weather is where taking it off begins, and from where all of it is taken


@dataclass(frozen=True)
class WeatherConfig:
    """Channels and residual blocks at 1/4, 1/8 and 1/16 of a frame's sides, on the way down; one more at the end."""

    channels: tuple[int, int, int] = (32, 64, 88)
    blocks: tuple[int, int, int] = (1, 2, 2)

    def __post_init__(self) -> None:
        if min(self.channels) < 1 or min(self.blocks) < 0:
            raise ConfigError(f"channels must be positive and blocks not negative, got {self.channels}, {self.blocks}")


class WeatherFound(NamedTuple):
    """What weather added to a visible frame, were there any, (B, 3, H, W); and log-odds that there is any, (B,)."""

    added: Tensor
    log_odds: Tensor


class WeatherSeen(NamedTuple):
    """What is seen of a pair at 1/4, 1/8 and 1/16 of its sides, each (B, C, h, w)."""

    fine: Tensor
    middle: Tensor
    coarse: Tensor


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, and the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to the same."""
        result: Tensor = x + self.conv2(F.relu(self.conv1(x)))
        return result


class WeatherEstimator(nn.Module):
    """What streaks and flakes added to the visible frame, from both frames: nothing, before it was trained."""

    def __init__(self, config: WeatherConfig) -> None:
        super().__init__()
        self.config = config
        (fine, middle, coarse), (few, some, many) = config.channels, config.blocks
        self.stem = nn.Conv2d(4, fine, CELL, stride=CELL)
        self.encoder_fine = _blocks(fine, few)
        self.halve_fine = nn.Conv2d(fine, middle, 2, stride=2)
        self.encoder_middle = _blocks(middle, some)
        self.halve_middle = nn.Conv2d(middle, coarse, 2, stride=2)
        self.bottom = _blocks(coarse, many)
        self.witness = nn.Conv2d(coarse, coarse, 1)
        self.judge = nn.Linear(coarse, 1)
        self.double_coarse = nn.Conv2d(coarse, 4 * middle, 1)
        self.decoder_middle = _blocks(middle, some)
        self.double_middle = nn.Conv2d(middle, 4 * fine, 1)
        self.decoder_fine = _blocks(fine, few + 1)
        self.head = nn.Conv2d(fine, 3 * CELL**2, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, vis: Tensor, ir: Tensor) -> Tensor:
        """Both frames to what weather added to the visible one: (B, 3, H, W) float32, 0 in a frame without any.

        vis: (B, 3, H, W), ir: (B, 1, H, W), in [0, 1]; H and W multiples of 16. Computed in the dtype of the weights.
        """
        seen = self.look(vis, ir)
        return self.added(seen) * self.share(seen.coarse)[:, None, None, None]

    def find(self, vis: Tensor, ir: Tensor) -> WeatherFound:
        """See forward. Whether there is any is told from the whole frame: one streak may be a wire or a scratch."""
        seen = self.look(vis, ir)
        return WeatherFound(self.added(seen), self.log_odds(seen.coarse))

    def look(self, vis: Tensor, ir: Tensor) -> WeatherSeen:
        """What the rest is told from; see forward."""
        fine = self.encoder_fine(self.stem(torch.cat([vis, ir], dim=1).to(self.stem.weight.dtype)))
        middle = self.encoder_middle(self.halve_fine(fine))
        return WeatherSeen(fine, middle, self.bottom(self.halve_middle(middle)))

    def share(self, coarse: Tensor) -> Tensor:
        """How much of what was found is taken off each frame, (B,) in [0, 1]; 0 where there is hardly any weather."""
        return ramp(torch.sigmoid(self.log_odds(coarse)), DOUBTFUL, CERTAIN)

    def added(self, seen: WeatherSeen) -> Tensor:
        """What weather added to the visible frames, were there any, (B, 3, H, W) float32: most of the work."""
        middle = self.decoder_middle(seen.middle + F.pixel_shuffle(self.double_coarse(seen.coarse), 2))
        fine = self.decoder_fine(seen.fine + F.pixel_shuffle(self.double_middle(middle), 2))
        return F.pixel_shuffle(self.head(fine), CELL).float()

    def log_odds(self, features: Tensor) -> Tensor:
        """Log-odds that there is weather in a frame of such features, (B,) float32."""
        seen = F.relu(self.witness(features)).mean(dim=(2, 3))
        log_odds: Tensor = self.judge(torch.log(seen + FAINT))[:, 0].float()
        return log_odds

    def judges(self) -> list[nn.Parameter]:
        """The weights of `log_odds`."""
        return [*self.witness.parameters(), *self.judge.parameters()]


def without(vis: Tensor, added: Tensor, share: Tensor) -> Tensor:
    """Visible frames (B, 3, H, W) in [0, 1] without a share (B,) of what weather added to them, to the same."""
    return torch.addcmul(vis, share[:, None, None, None], added, value=-1).clamp(0.0, 1.0)


def _blocks(channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(channels) for _ in range(count)))
