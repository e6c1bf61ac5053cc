"""The veil of fog, rain and snow: what is left of one over a visible frame, told from both frames and lifted.

It stands behind the tone curves and before lighting: whatever curves made of a frame, a veil that differs over it,
thicker with distance, is left, and infrared sees through it. A `VeilEstimator` looks at the pair averaged to some
thousand cells and gives a `Veil`, by Koschmieder's law: the light of the veil, which is a mean of the frame's own
colours, the contrast that was lost, and how much of it is to be lifted: nothing where none is probable. Rain and snow
always bring one, thinner than fog, so it is told besides what was taken off of them.
docs/decisions/0035, 0041, 0043, 0044 and 0055.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recofuse_core.bilateral import BilateralGrid, as_grid, guide_of
from recofuse_core.errors import ConfigError
from recofuse_core.layers import average_to, mixed, ramp, scaled, stretched
from recofuse_core.losses import luma

DOUBTFUL, CERTAIN = -0.85, 0.4  # log-odds of a veil: where lifting it begins, and from where all of it is lifted
NEUTRAL, BRIGHT = 0.25, 0.326  # mean level as it came: what tells nothing of a veil, from where more tells no more
LIGHT_TELLS = 25.0  # by how much the log-odds rise with the mean level
FRESH_LOG_ODDS = -4.0  # before the judge is trained: there is none
MOST_CONTRAST = 2.4  # the logarithm of the most that contrast is multiplied by
MOST_COLOUR = 3.3  # what colour is multiplied by at most
COLOUR_ERROR = 0.05  # of the colour of a veil's light, in shares of what colour there is to a luma of 1
LITTLE = 2.0  # below zero, from where the logistic function of contrast is begun
LIGHT_REACH = 0.25  # std, in sides of a frame, of how far away a place still tells a veil's light
NIGHT_LIGHT, DAY_LIGHT = 0.45, 0.6  # luma of a veil's light: up to where it is grey, and from where it has a colour
MOST_LIFTED = 0.95  # of a veil: lighting gives blacks that were cut, and hold nothing, a grey or a purple of its own
DARKENED, BY = 1.6, 0.08  # how many times the toned mean, and how much more, came where curves took a veil off
LEAST_WEIGHT = 1e-4  # of a place that does not show it
MOST_BRIGHTENED = 0.3  # the logarithm of what the light of a veil is multiplied by at most
FALLEN = 5.0  # by which the luma of what fell is multiplied, so that it is about one


@dataclass(frozen=True)
class VeilConfig:
    """Sizes of the veil estimator."""

    cells: int = 128  # a side that both frames are averaged to
    channels: tuple[int, int, int] = (20, 32, 48)  # at 1/2, 1/4 and 1/8 of the cells
    num_levels: int = 8  # of the bilateral grid, from black to white
    knows_fall: bool = False  # whether it is told what rain or snow was taken off; weights before 2.10.0 are not

    def __post_init__(self) -> None:
        if self.cells < 16 or self.cells % 8:
            raise ConfigError(f"cells must be a multiple of 8 and at least 16, got {self.cells}")
        if min(self.channels) < 1 or self.num_levels < 2:
            raise ConfigError("channels must be positive, and levels 2 at least")


class Veil(NamedTuple):
    """What takes the veil off visible frames of a batch, and how much of that is applied.

    share: (B,) in [0, 1]. light: (B, 3, h, w), the veil's own light, smooth over a frame and of colours that are in
    it. left: (B, 3, h, w), what becomes of that light. grid: (B, 1, levels, h, w), logarithms of the contrast lost.
    darkened: (B,) in [0, 1], how much the curves alone took a veil off, which leaves a frame much darker than it came;
    None for not at all.
    """

    share: Tensor
    light: Tensor
    left: Tensor
    grid: BilateralGrid
    darkened: Tensor | None = None

    def lifted(self, vis: Tensor, onto: Tensor) -> Tensor:
        """Toned visible frames (B, 3, H, W) in [0, 1] without it; where there was none, `onto`, the same in shape."""
        y = luma(vis)
        gain, offset = stretched(torch.cat(self._looked_up(guide_of(y)), dim=1), vis.shape[-2:], 1, 3)
        if self.darkened is not None:
            onto = mixed(onto, vis, self.darkened[:, None, None, None])
        return mixed(onto, _applied(vis, y, gain, offset), self.share[:, None, None, None])

    def at_cells(self, cells: Tensor) -> Tensor:
        """All of it lifted from averaged frames (B, 3, h, w): for training, where there is no noise left to avoid."""
        y = luma(cells)
        return _applied(cells, y, *self._looked_up(y))

    def _looked_up(self, guide: Tensor) -> tuple[Tensor, Tensor]:
        """Gain (B, 1, h', w') and offsets (B, 3, h', w') at the brightness (B, 1, h', w') of every place."""
        gain = self.grid.look_up(guide).exp()
        lights = torch.cat([self.light, self.left], dim=1)
        light, left = F.interpolate(lights, guide.shape[-2:], mode="bilinear", align_corners=False).chunk(2, dim=1)
        return gain, _spread(light, luma(light), gain, left, sign=-1)


def _applied(frame: Tensor, y: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """Levels (B, 3, h, w) of luma y without a veil, nor the colour that an error in the colour of its light would give.

    That error is multiplied as colour is. What is dark behind the veil has less colour than that, and came out red or
    blue by night; of what is bright it is nothing (a Wiener filter of colours that are about as strong as their luma).
    """
    lifted = _spread(frame, y, gain, offset)
    y = luma(lifted).clamp(1e-4, 1.0)
    error = scaled(gain.clamp_max(MOST_COLOUR), COLOUR_ERROR, -COLOUR_ERROR) / y
    return mixed(y, lifted, 1 / (1 + error.square())).clamp(0.0, 1.0)


def _spread(frame: Tensor, y: Tensor, gain: Tensor, offset: Tensor, sign: int = 1) -> Tensor:
    """Levels (B, 3, h, w) times a gain, and their colour times no more than what keeps its noise from showing.

    y: the luma of the levels. offset: what all of that is added to, or taken from.
    """
    grey = torch.addcmul(offset, y, gain, value=sign)
    return torch.addcmul(grey, frame - y, gain.clamp_max(MOST_COLOUR), value=sign)


class Fall(NamedTuple):
    """Streaks and flakes that were taken off frames: how far, (B,) in [0, 1], and vis before that, (B, 3, H, W)."""

    share: Tensor
    before: Tensor


class Fallen(NamedTuple):
    """The same averaged to cells: share (B,), and `FALLEN` times the luma that was taken off, (B, 1, cells, cells)."""

    share: Tensor
    luma: Tensor


class VeilFound(NamedTuple):
    """What would take a veil off, were there any, and log-odds that there is one, by its looks, (B,).

    The share is 1 until `VeilEstimator.forward` has judged it.
    """

    veil: Veil
    log_odds: Tensor


class OfFall(nn.Module):
    """What rain or snow that was taken off adds to a veil estimator's features and heads: nothing where none was."""

    def __init__(self, config: VeilConfig) -> None:
        super().__init__()
        fine, middle, coarse = config.channels
        self.stem = _conv(2, fine, stride=2, bias=False)
        self.frame = nn.Linear(4, coarse, bias=False)
        self.grid = nn.Conv2d(middle, config.num_levels + 1, 1)
        self.fade = nn.Linear(coarse, 1)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def of_frame(self, fallen: Fallen, cells: Tensor) -> Tensor:
        """What is told of all that fell and of the cells under it, (B, 4)."""
        spread, mean = torch.var_mean(fallen.luma, dim=(1, 2, 3), correction=0)
        brightness = fallen.share * cells[:, :3].mean(dim=(1, 2, 3))
        return torch.stack([fallen.share, mean, spread.sqrt(), brightness], dim=1)


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
        self.grid = nn.Conv2d(middle, config.num_levels + 1, 1)
        self.judge = nn.Linear(2 * coarse, 1)
        self.fade = nn.Linear(coarse, 1)
        self.of_fall = OfFall(config) if config.knows_fall else None
        for head in (self.grid, self.judge, self.fade):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]
        nn.init.constant_(self.judge.bias, FRESH_LOG_ODDS)

    def average(self, vis: Tensor, ir: Tensor) -> Tensor:
        """Both frames averaged to cells, (B, 4, cells, cells). vis: (B, 3, H, W), ir: (B, 1, H, W) in [0, 1]."""
        return average_to(self.config.cells, vis, ir)

    def averages(self, vis: Tensor, ir: Tensor, seen: Tensor, fall: Fall | None) -> tuple[Tensor, Fallen | None]:
        """`average`, and what fell, for who knows what to make of it. seen: vis before the curves, without weather."""
        if fall is None or self.of_fall is None:
            return self.average(vis, ir), None
        cells = average_to(self.config.cells, vis, ir, FALLEN * luma(fall.before - seen))
        return cells[:, :4], Fallen(fall.share, cells[:, 4:])

    def find(self, cells: Tensor, fallen: Fallen | None = None) -> VeilFound:
        """What is told from cells (B, 4, cells, cells) of a pair, and of the rain or snow that was taken off."""
        batch, _, height, width = cells.shape
        row = torch.linspace(-1, 1, height, device=cells.device).view(1, 1, -1, 1).expand(batch, 1, height, width)
        planes = [cells - self.MIDDLE, row]
        of_fall = None if fallen is None else self.of_fall
        if fallen is not None and of_fall is not None:
            planes += [fallen.luma, fallen.share[:, None, None, None].expand_as(row)]
            # One convolution of all planes: another one, its borders and a sum would be four kernels more.
            weight = torch.cat([self.stem.weight, of_fall.stem.weight], dim=1)
            padded = F.pad(torch.cat(planes, dim=1), (1, 1, 1, 1), mode="replicate")
            fine = F.silu(F.conv2d(padded, weight, self.stem.bias, stride=2))
        else:
            fine = F.silu(self.stem(torch.cat(planes, dim=1)))
        fine = fine + F.silu(self.fine(fine))
        middle = F.silu(self.halve_fine(fine))
        middle = middle + self.middle(middle)
        coarse = F.silu(self.halve_middle(middle))
        coarse = coarse + F.silu(self.coarse(coarse))
        spread, mean = torch.var_mean(coarse, dim=(2, 3), correction=0)
        frame = torch.cat([mean, torch.log(spread + 1e-3)], dim=1)
        whole = self.of_frame(frame)
        if fallen is not None and of_fall is not None:
            whole = torch.addmm(whole, of_fall.of_frame(fallen, cells), of_fall.frame.weight.T)
        coarse = F.silu(coarse + whole[:, :, None, None])
        wide = F.interpolate(self.double_coarse(coarse), middle.shape[-2:], mode="bilinear", align_corners=False)
        joined, whole = F.silu(self.join(middle + wide)), F.silu(whole)
        heads, fade = self.grid(joined), self.fade(whole)
        if fallen is not None and of_fall is not None:
            share = fallen.share[:, None]
            heads = torch.addcmul(heads, of_fall.grid(joined), share[..., None, None])
            fade = torch.addcmul(fade, of_fall.fade(whole), share)
        log_odds = self.judge(frame)[:, 0]
        light = self._light(cells[:, :3], heads[:, -1:])
        left = light * fade.clamp_max(MOST_BRIGHTENED).exp()[:, :, None, None]
        gains = MOST_CONTRAST * torch.sigmoid(heads[:, :-1] - LITTLE)
        veil = Veil(torch.ones_like(log_odds), light, left, as_grid(gains, self.config.num_levels))
        return VeilFound(veil, log_odds)

    def _light(self, vis: Tensor, score: Tensor) -> Tensor:
        """The light of a veil, (B, 3, h, w): means of the cells (B, 3, cells, cells) that show nothing else.

        score: (B, 1, h, w), how much each place does. Near places count more than far ones, so light may differ over a
        frame, but only slowly.
        """
        height, width = score.shape[-2:]
        weight = (score - score.amax(dim=(2, 3), keepdim=True)).exp() + LEAST_WEIGHT
        weighed = torch.cat([weight * F.avg_pool2d(vis, vis.shape[-1] // width), weight], dim=1)
        near = _nearness(height, vis)
        sums = near @ weighed @ (near if width == height else _nearness(width, vis))
        light = sums[:, :3] / sums[:, 3:]
        y = luma(light)
        # By night what is brightest is a lamp: its colour, taken off as that of a veil, would leave its opposite.
        return mixed(light, y, ramp(y, DAY_LIGHT, NIGHT_LIGHT))

    def forward(self, vis: Tensor, ir: Tensor, seen: Tensor, fall: Fall | None = None) -> Veil:
        """The veil over whole toned frames: vis (B, 3, H, W), ir (B, 1, H, W), float32 in [0, 1].

        seen: (B, 3, H, W), vis before the curves, which make of a frame that is too dark one as flat and bright as in
        fog, and of a hazy night a clear one. A veil is light: the less of it came, the surer a veil must be to be
        lifted, and where the curves took most of it, there was one. fall: what was taken off for `seen`, if anything
        was. Where rain or snow fell there is a veil, whatever it looks like.
        """
        cells, fallen = self.averages(vis, ir, seen, fall)
        veil, log_odds = self.find(cells, fallen)
        came, toned = seen.mean(dim=(1, 2, 3)), cells[:, :3].mean(dim=(1, 2, 3))
        log_odds = torch.add(log_odds, came.clamp_max(BRIGHT) - NEUTRAL, alpha=LIGHT_TELLS)
        share = ramp(log_odds, DOUBTFUL, CERTAIN, MOST_LIFTED)
        if fallen is not None:
            share = share.maximum(MOST_LIFTED * fallen.share)
        darkened = ramp(torch.sub(came, toned, alpha=DARKENED), 0.0, BY, MOST_LIFTED)
        return veil._replace(share=share, darkened=darkened)


def _nearness(count: int, like: Tensor) -> Tensor:
    """How much each of `count` places in a row counts for each other, (count, count)."""
    places = torch.arange(count, device=like.device, dtype=like.dtype)
    return ((places[:, None] - places).square() * (-0.5 / (LIGHT_REACH * count) ** 2)).exp()


def _conv(channels_in: int, channels_out: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, padding_mode="replicate", bias=bias)
