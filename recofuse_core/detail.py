"""Detail: what a decoder took for noise, given back where the frame shows that it is none.

A decoder that has learnt on noisy frames is unsure of whatever is fine: tiles of a roof, twigs, writing. That a whole
frame is free of noise, it hardly uses. So behind every decoded picture stands a `DetailGate`. It compares the picture
with the frames that were encoded, block by block, and sees how much they differ where the frame is calmest, which is
noise. It tells by what share the difference comes back. docs/decisions/0052.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recofuse_core.errors import ConfigError
from recofuse_core.layers import block_means, ramp, stretched
from recofuse_core.losses import luma
from recofuse_core.picture import OutputName
from recofuse_core.sampler import Pair

BLOCK = 4  # pixels a side that a share is told for
COARSE = 8  # pixels a side whose means are no detail
LEAST = 1e-6  # added to variances: a quarter of a level
CALM = 1.3  # the power of the mean that listens to the calmest blocks
DARK = 0.02  # added to a level before a variance is divided by it: noise of photons varies as their number
SEEN = (4e-7, 1e-6)  # x (1 - x) times a variance: below, levels are cut or rounded to one, and tell of no noise
FRESH, FRESH_FUSED = -4.0, -2.0  # logits of shares before training: from more, it closes gates before they tell
TYPICAL = {"level": 0.4, "log": -4.0, "calm": 4.0, "share": 0.5}  # of what a gate sees, to begin with


@dataclass(frozen=True)
class DetailConfig:
    """Size of the gates. width: channels between the two convolutions."""

    width: int = 16

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"width must be positive, got {self.width}")


class DetailGate(nn.Module):
    """Gives a decoded picture back what it lacks of its source, in two bands: fine, and coarser than COARSE pixels.

    has_colour: whether the source has colour, which gets shares of its own. is_fused: whether it is that of a fused
    picture beside infrared, which is looked at; what is coarse stays as it was fused then.
    """

    def __init__(self, width: int, *, has_colour: bool, is_fused: bool = False) -> None:
        super().__init__()
        self.has_colour = has_colour
        self.is_fused = is_fused
        count = 1 + is_fused  # of sources
        seen = [
            *[TYPICAL["level"]] * (1 + count),
            *[TYPICAL["log"]] * (1 + 2 * count + count + has_colour),
            *[TYPICAL["calm"]] * (2 * count),
            *[TYPICAL["share"]] * count,
            *[TYPICAL["log"]] * count,
        ]
        self.near = nn.Conv2d(len(seen), width, 3, padding=1)
        self.far = nn.Conv2d(width, width, 3, padding=2, dilation=2)
        self.head = nn.Conv2d(width, (1 + has_colour) * (1 if is_fused else 2), 1)
        with torch.no_grad():
            self.near.bias.copy_(-self.near.weight.sum(dim=(2, 3)) @ torch.tensor(seen))  # type: ignore[union-attr]
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, FRESH_FUSED if is_fused else FRESH)  # type: ignore[arg-type]

    def forward(self, decoded: Tensor, treated: Tensor | None, *sources: Tensor) -> Tensor:
        """A decoded picture (B, 3, H, W), not clamped, sides multiples of COARSE, to the same.

        treated: how far visible frames are others than they came, (B, 1, 1, 1), 0 to 1; None for not at all.
        sources: as they were encoded, (B, 3, H, W) if it has colour or (B, 1, H, W), and infrared beside a fused one.
        """
        y = luma(decoded)
        greys = torch.cat([luma(source) if source.shape[1] == 3 else source for source in sources], dim=1)
        differences = greys - y
        planes = torch.cat([y, greys, differences], dim=1)
        means, variances = _in_blocks(planes)
        levels, shifts = torch.split(means, [1 + len(sources), len(sources)], dim=1)
        shifted = _log(shifts.square())
        features = [levels, torch.log10(variances), shifted]
        lacking = [differences[:, :1]]
        if self.has_colour:
            lacking.append(sources[0] - decoded - lacking[0])
            features.append(_log(block_means(lacking[1], BLOCK).square().mean(dim=1, keepdim=True)))
        of_frame = *_calmest(variances[:, 1:], levels[:, 1:]), shifted.mean(dim=(2, 3), keepdim=True)
        seen = torch.cat([*features, *(each.expand(-1, -1, *levels.shape[-2:]) for each in of_frame)], dim=1)
        told = self.head(F.silu(self.far(F.silu(self.near(seen))))).float().sigmoid()
        if treated is not None:
            told = torch.addcmul(told, told, treated, value=-1)
        shares = iter(stretched(told, y.shape[-2:], *(1 for _ in range(told.shape[1]))))
        for difference in lacking:
            (coarse,) = stretched(block_means(difference, COARSE), y.shape[-2:], difference.shape[1])
            decoded = torch.addcmul(decoded, next(shares), difference - coarse)
            if not self.is_fused:
                decoded = torch.addcmul(decoded, next(shares), coarse)
        return decoded


class Detail(nn.Module):
    """A gate for every picture."""

    def __init__(self, config: DetailConfig) -> None:
        super().__init__()
        self.vis = DetailGate(config.width, has_colour=True)
        self.ir = DetailGate(config.width, has_colour=False)
        self.fused = DetailGate(config.width, has_colour=True, is_fused=True)

    def forward(self, name: OutputName, decoded: Tensor, frames: Pair, treated: Tensor | None = None) -> Tensor:
        """A picture (B, 3, H, W), not clamped, to the same.

        frames: as they were encoded, ir of one channel. treated: see DetailGate; of infrared it says nothing.
        """
        gate: DetailGate = self.get_submodule(name)  # type: ignore[assignment]
        sources = frames if name == "fused" else (getattr(frames, name),)
        result: Tensor = gate(decoded, None if name == "ir" else treated, *sources)
        return result


def _log(squared: Tensor) -> Tensor:
    return torch.log10(squared + LEAST)


def own_noise(frames: Tensor) -> Tensor:
    """How much the calm blocks of grey frames (B, 1, H, W) in [0, 1] vary at a level of about 1: (B,), std, of 255."""
    means, variances = _in_blocks(frames)
    return 255 * 10 ** (-0.5 / CALM * _calmest(variances, means)[0].flatten())


def _in_blocks(planes: Tensor) -> tuple[Tensor, Tensor]:
    means, squares = (block_means(each, BLOCK) for each in (planes, planes.square()))
    return means, torch.addcmul(squares, means, means, value=-1) + LEAST


def _calmest(variances: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """How much the calm ones of the blocks that a sensor saw vary, (B, k n, 1, 1), and how many it saw, (B, n, 1, 1).

    The logarithm of the mean of negative powers of their variances, by their light. variances: (B, k n, h, w), first
    those of the frames; levels: (B, n, h, w), means of these.
    """
    count = levels.shape[1]
    is_seen = ramp(torch.addcmul(levels, levels, levels, value=-1) * variances[:, :count], *SEEN)
    by_light = torch.unflatten(variances, 1, (-1, count)) / (levels + DARK)[:, None]
    weighed = by_light.pow(-CALM) * is_seen[:, None]
    share = is_seen.mean(dim=(2, 3), keepdim=True)
    calm = weighed.mean(dim=(3, 4), keepdim=True) / (share + LEAST)[:, None]
    return _log(calm).flatten(1, 2), share
