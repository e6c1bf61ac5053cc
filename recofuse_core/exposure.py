"""Exposure: what makes a dark frame the photograph that it would have been, before anything is restored.

An `ExposureEstimator` looks at a pair averaged to a few thousand cells, so that noise hardly moves it, and gives a
`Lighting`: one curve a channel for the whole visible frame, and behind it a bilateral grid for what differs over the
frame. Both start as the identity and are trained to leave a well exposed frame alone, and fog to who lifts veils.
docs/decisions/0015 and 0041 tell why and how well. What follows from how much brighter a frame became, and from no
weight, stands here, too: relief (0053, 0054), contrast, and how bright infrared has to be beside it (0046).

What a newcomer would get wrong: this is not the tone estimator. Tone curves undo what acted on a clean frame and keep
the scene as dark as it was; lighting decides how bright a scene should be, and is only used where that is asked for.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recofuse_core.bilateral import BilateralGrid, as_grid
from recofuse_core.brightening import Brightening
from recofuse_core.errors import ConfigError
from recofuse_core.layers import average_to, block_means, mixed, ramp, scaled, stretched
from recofuse_core.losses import luma
from recofuse_core.networks import ToneCurves
from recofuse_core.sampler import Pair


@dataclass(frozen=True)
class ExposureConfig:
    """Sizes of the exposure estimator."""

    cells: int = 64  # a side that both frames are averaged to
    num_quantiles: int = 24
    width: int = 256  # of the layers between the quantiles and the curves
    channels: tuple[int, int, int] = (24, 32, 48)  # of the convolutions over the cells, at 1/2, 1/4 and 1/4 of them
    num_levels: int = 8  # of the bilateral grid, from black to white

    def __post_init__(self) -> None:
        if self.cells < 8 or self.cells % 8:
            raise ConfigError(f"cells must be a multiple of 8, got {self.cells}")
        if min(self.num_quantiles, self.num_levels) < 2:
            raise ConfigError("quantiles and levels must be 2 at least")


class Averaged(NamedTuple):
    """Frames averaged over blocks: their levels (B, 3, h, w) and the luma of those, (B, 1, h, w)."""

    levels: Tensor
    y: Tensor


def averaged(frame: Tensor) -> Averaged:
    """A frame (B, 3, H, W) averaged over blocks of BLOCK x BLOCK pixels."""
    blocks = _blocks(frame)
    return Averaged(blocks, luma(blocks))


class Lighting(NamedTuple):
    """How to light the visible frames of a batch.

    curves: for whole frames, of three channels. grid: for what they make of a frame, of three channels, too.
    """

    curves: ToneCurves
    grid: BilateralGrid

    def __call__(self, vis: Tensor) -> Tensor:
        """Whole visible frames (B, 3, H, W) in [0, 1] to the same: blacks grey, highlights kept, colour calm, crisp."""
        before = averaged(vis)
        greyed = self._replace(curves=self.curves._replace(shift=self.curves.shift - self._tint(before)))
        lit = self._hold_highlights(vis, before, greyed.levels(vis))
        return contrasted(before, calm_colour(before, with_relief(vis, before, lit)))

    def levels(self, vis: Tensor) -> Tensor:
        """The bare curves and grid, a place by itself: (B, 3, H, W) in [0, 1] to the same."""
        return self.grid(self.curves(vis))

    def at_cells(self, cells: Tensor) -> Tensor:
        """Averaged frames (B, 3, cells, cells) lit as they are: for training, where there is no noise left to avoid."""
        return self.grid.at_cells(self.curves(cells))

    def _tint(self, frames: Averaged) -> Tensor:
        """By how much the blacks of frames differ from grey, (B, 3, 1, 1): nothing if they are not lifted.

        The black of a camera at night is a few levels of green, which lighting would make a green sky and green
        shadows. Blacks of another colour are those of a warm room or of a dusk, and keep it. The colour is a mean over
        the darkest places, but for those that no sensor saw: bars beside a frame, and what stands behind its time.
        """
        around = _box(torch.cat([frames.levels, (frames.y / UNSEEN).clamp(0.0, 1.0)], dim=1), 2)
        places, is_seen = around[:, :3], around[:, 3:]
        y = luma(places)
        stops = _stops(y, luma(self.levels(places))).clamp_min(0)
        darkness = (y + ramp(is_seen, 1.0, 0.95)) / -BLACK_RANGE
        share = darkness.flatten(2).softmax(dim=-1).mT  # (B, h w, 1)
        black, stops = ((values.flatten(2) @ share)[..., None] for values in (places, stops))
        red, green, blue = black.chunk(3, dim=1)
        is_green = ((green - torch.maximum(red, blue)) / GREEN).clamp(0.0, 1.0)
        is_lifted = ramp(stops, 0.7, 1.3)
        return (black - luma(black)).clamp(-TINT, TINT) * (TINT_TAKEN * is_green * is_lifted)

    def _hold_highlights(self, vis: Tensor, before: Averaged, lit: Tensor) -> Tensor:
        """Lit frames (B, 3, H, W) with what would burn out at its share of the brightest places beside it.

        before: the frames `vis`, averaged.

        Levels that end at white for a whole frame swallow the writing on a lamp-lit sign. There, the more the closer to
        white, a place is lifted as much as its surroundings' maximum is, so that shares between neighbours stay.
        """
        y = luma(lit)
        brightest = _box(F.max_pool2d(before.levels, 3, stride=1, padding=1), 1)
        lift = _rise(luma(brightest), luma(self.levels(brightest)))
        is_lifted = (_stops(before.y, _blocks(y)) / 0.3).clamp(0.0, 1.0)  # what got darker is no highlight
        lift, is_lifted = stretched(torch.cat([lift, is_lifted], dim=1), vis.shape[-2:], 1, 1)
        share = ramp(y, 0.8, 1.0).mul_(is_lifted)
        # No lower than a part of what it was: around a lamp the glow, burnt out too, would else become a dark ring.
        held = torch.minimum(vis * lift, lit).maximum(HELD * lit)
        return mixed(lit, held, share)


class ExposureEstimator(nn.Module):
    """Gives the `Lighting` of a pair.

    The curves come from quantiles of all four averaged channels; the grid from convolutions over the cells, before and
    under the curves, and over their summary. The infrared frame tells what stands in a black.
    """

    CHANNELS = 4  # vis, then ir
    SHIFT_UNIT = 0.3
    GAMMA_UNIT = 0.5
    MIDDLE = 0.4  # taken from all that the convolutions see, which is about centred then

    def __init__(self, config: ExposureConfig) -> None:
        super().__init__()
        self.config = config
        num_features = self.CHANNELS * (config.num_quantiles + 1)
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))
        self.summary = nn.Sequential(
            nn.Linear(num_features, config.width), nn.SiLU(), nn.Linear(config.width, config.width), nn.SiLU()
        )
        self.curve_head = nn.Linear(config.width, 3 * 3)
        first, second, third = config.channels
        self.near = nn.Sequential(
            nn.Conv2d(self.CHANNELS + 3 + 1, first, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(first, second, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(second, third, 3, padding=1),
            nn.SiLU(),
        )
        self.far = nn.Sequential(
            nn.Conv2d(third, third, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(third, third, 3, padding=1), nn.SiLU()
        )
        self.of_frame = nn.Linear(third + config.width, third)
        self.join = nn.Conv2d(third, third, 3, padding=1)
        self.grid_head = nn.Conv2d(third, 6 * config.num_levels, 1)
        for head in (self.curve_head, self.grid_head):  # the identity to start from
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]

    def average(self, vis: Tensor, ir: Tensor) -> Tensor:
        """Both frames averaged to cells, (B, 4, cells, cells). vis: (B, 3, H, W), ir: (B, 1, H, W) in [0, 1]."""
        return average_to(self.config.cells, vis, ir)

    def features(self, cells: Tensor) -> Tensor:
        """Quantiles of every channel of cells, then their std: (B, features)."""
        ordered = cells.flatten(2).sort(dim=-1).values
        last = ordered.shape[-1] - 1
        ranks = [round(rank * last / (self.config.num_quantiles - 1)) for rank in range(self.config.num_quantiles)]
        quantiles = torch.stack([ordered[..., rank] for rank in ranks], dim=-1)
        return torch.cat([quantiles.flatten(1), ordered.std(dim=-1)], dim=1)

    def infrared_features(self) -> Tensor:
        """Which features are of the infrared frame: (features,) booleans."""
        is_ir = torch.arange(self.CHANNELS) == self.CHANNELS - 1
        return torch.cat([is_ir.repeat_interleave(self.config.num_quantiles), is_ir])

    def calibrate(self, features: Tensor) -> None:
        """Take the scale of the features (N, F) of a training set over, so that all weigh alike."""
        self.get_buffer("mean").copy_(features.mean(dim=0))
        self.get_buffer("std").copy_(features.std(dim=0) + 1e-3)

    def curves(self, features: Tensor) -> tuple[ToneCurves, Tensor]:
        """The curves of three channels for (B, features), and the summary (B, width) that they come from."""
        scaled = (features - self.get_buffer("mean")) / self.get_buffer("std")
        summary = self.summary(scaled)
        return self._curves(self.curve_head(summary)), summary

    def lighting(self, cells: Tensor, features: Tensor) -> Lighting:
        """Curves and grid for cells (B, 4, cells, cells) and their features."""
        curves, summary = self.curves(features)
        batch, _, height, width = cells.shape
        row = torch.linspace(-1, 1, height, device=cells.device).view(1, 1, -1, 1).expand(batch, 1, height, width)
        seen = torch.cat([cells - self.MIDDLE, curves(cells[:, :3]) - self.MIDDLE, row], dim=1)
        near = self.near(seen)
        far = self.far(near)
        of_frame = self.of_frame(torch.cat([far.mean(dim=(2, 3)), summary], dim=1))
        far = F.interpolate(far + of_frame[:, :, None, None], near.shape[-2:], mode="bilinear", align_corners=False)
        places = F.silu(self.join(near + far))
        return Lighting(curves, as_grid(self.grid_head(places), self.config.num_levels))

    def forward(self, vis: Tensor, ir: Tensor) -> Lighting:
        """The lighting of whole frames: vis (B, 3, H, W), ir (B, 1, H, W), float32 in [0, 1]."""
        cells = self.average(vis, ir)
        return self.lighting(cells, self.features(cells))

    def _curves(self, values: Tensor) -> ToneCurves:
        shift, gain, gamma = values[:, :, None, None].chunk(3, dim=1)
        return ToneCurves(self.SHIFT_UNIT * shift, gain.exp(), (self.GAMMA_UNIT * gamma).exp())


DARK = 0.02  # added where ratios are taken: below it levels are noise
SEEN = 0.004  # the same for means over a wide place, which have no noise
UNSEEN = 0.004  # of luma: what is darker for certain was seen by no sensor
BLACK_RANGE = 0.006  # of luma, above the darkest block: what counts as black
TINT = 0.02  # the most that blacks are taken to differ from grey: more is a colour
TINT_TAKEN = 0.85  # of it
GREY = (0.001, 0.004)  # mean colour in shares of the mean luma: up to where a frame is grey, and from where it is not
GREEN = 0.004  # by how much green is above red and blue for certain
HELD = 0.75  # of what a place was lit to, kept at least where highlights are held
LONE = (0.7, 0.85)  # of what is around a place is noise: from where more of its own counts as such, and wholly
BLOCK = 4  # pixels a side that neighbourhoods are looked at in
RELIEF = 0.8  # of luma that is lit by the gain of places like it, at most
DARKEST, SHADE = -7.0, 2.0  # of the shades that places are told apart by, and from one to the next, in doublings
ANY = 0.07  # of each shade in every place: one that shares none counts for a seventh of one that shares all
VIVID = 0.3  # times as much as that share more of its colour
CLIMB = 0.2  # of what is left to white, at most: a red lamp stays red
LIT = (1.3, 2.0)  # how many times as bright a frame became: from where a night was lit, and certainly
CONTRAST = 0.08  # by how much middle tones of a lit night differ more from its mean, at most
FAR_ABOVE = 0.25  # the mean: from there on no more than there, or what is written on lit signs would lose contrast
IR_AIM = 0.18  # mean of an infrared frame that is bright enough beside one
IR_MOST = 2.0  # of the amount of brightening: blacks, and the noise in them, become three times as bright at most


def with_relief(vis: Tensor, before: Averaged, lit: Tensor) -> Tensor:
    """Lit frames (B, 3, H, W) in which a place differs from places like it more as it did before it was lit.

    A curve that lifts a dusk is flat where most of the scene is: bricks, twigs and windows go grey in grey. A gain
    keeps how places relate to each other (Land's Retinex). So up to four fifths of a place's luma are lit by the mean
    gain of the frame's places of its shade in place of the curve, which still says how bright these are; and colours,
    which go pale by it, too, are a little stronger. Less the more those rose above one and a half doublings, and
    nothing at three and a half, since that multiplies noise. vis: the frames as they came, before: those, averaged.
    """
    y_before, y = luma(vis), luma(lit)
    levels = torch.cat([before.y, _blocks(y)], dim=1) + SEEN
    shades = _shades(levels[:, :1]).flatten(2)
    was, became = (levels.flatten(2) @ shades.mT @ shades).chunk(2, dim=1)  # sums over as much: only their ratio counts
    lift = (became / was).view_as(before.y)
    stops = torch.log2(lift)
    rising, falling = scaled(stops, 1.25, -0.25), scaled(stops, -RELIEF / 2, 3.5 * RELIEF / 2)  # from 0.2, to 3.5
    share = rising.minimum(falling).clamp(0.0, RELIEF)
    gain, share = stretched(torch.cat([share * lift, share], dim=1), vis.shape[-2:], 1, 1)
    differs = (gain * y_before).addcmul_(y, share, value=-1)
    differs = differs.minimum(scaled(lit.amax(dim=1, keepdim=True), -CLIMB, CLIMB))
    return torch.addcmul(lit, lit - y, share, value=VIVID).add_(differs).clamp_(0.0, 1.0)


def calm_colour(before: Averaged, lit: Tensor) -> Tensor:
    """Lit frames (B, 3, H, W) whose colour noise is smoothed along their luma where they were lifted most.

    before: the frames as they came, averaged. Their colour noise and JPEG's colour blocks, invisible in the dark, come
    up with the shadows in blotches wider than the branches see. A guided filter (He et al., 2010) over some fifty
    pixels takes them. What was not lifted by a stop or so, such as a lamp, keeps its colour, and so does what differs
    from the filter's by more than a frame's noise does: a red coat stays red, and the street beside it as it was. Noise
    has a few such places as well, but alone: up to eight times as much is noise where hardly any place around differs.
    """
    radius, edge = 6, 1e-3
    small, y_lit = _blocks(lit), luma(lit)
    y = _blocks(y_lit)
    parts = torch.cat([y, small - y], dim=1)  # luma, then colour
    means, products = _box(torch.cat([parts, y * parts], dim=1), radius).chunk(2, dim=1)
    mean_y = means[:, :1]
    covariance = torch.addcmul(products, mean_y, means, value=-1)  # with luma: the first is its variance
    slope = covariance[:, 1:] / (covariance[:, :1] + edge)
    line = torch.cat([slope, torch.addcmul(means[:, 1:], slope, mean_y, value=-1)], dim=1)
    slope, offset = _box(line, radius).chunk(2, dim=1)

    left_over = torch.addcmul(parts[:, 1:] - offset, slope, y, value=-1)
    noise = _mean(left_over.square()).sqrt() + 1e-4
    largest = torch.linalg.vector_norm(left_over, torch.inf, dim=1, keepdim=True)
    near = scaled(largest / noise, -0.5, 2.0)  # 1 at twice the noise, 0 at four times
    is_lone = ramp(_box(near.clamp(0.0, 1.0), 2), *LONE)
    is_noise = near.add(is_lone, alpha=3).clamp_(0.0, 1.0)  # at eight and ten times
    stops = _stops(before.y, y)
    smoothed = ramp(stops, 0.7, 1.9) * is_noise
    kept = _coloured(before) / scaled(stops, 0.05, 0.95).clamp_min(1)  # of all colour
    # Everything that changes slowly is multiplied in blocks, since only this line is paid for at every pixel.
    drawn = smoothed * kept
    own = kept - drawn
    applied = torch.cat([torch.addcmul(1 - own, slope, drawn), offset * drawn, own], dim=1)
    slope, offset, own = stretched(applied, lit.shape[-2:], 3, 3, 1)
    return torch.addcmul(offset, slope, y_lit).addcmul_(lit, own).clamp_(0.0, 1.0)


def contrasted(before: Averaged, lit: Tensor) -> Tensor:
    """Lit frames (B, 3, H, W) in [0, 1] with the contrast that an estimator trained on squared errors leaves out.

    It is unsure how bright a place was, so it keeps to the mean. Black and white stay, and days, which were not lit.
    before: the frames as they came, averaged.
    """
    came, mean = _mean(before.levels), _mean(lit)
    more = (4 * CONTRAST) * _is_lit(came, mean) * (lit - mean).clamp_max(FAR_ABOVE)
    return torch.addcmul(lit, more, torch.addcmul(lit, lit, lit, value=-1))


def is_lit(before: Tensor, after: Tensor) -> Tensor:
    """Whether frames (B, 3, h, w), of any sizes, are nights that were lit, 0 to 1, (B, 1, 1, 1)."""
    return _is_lit(_mean(before), _mean(after))


def brightened(images: Pair, seen: Tensor) -> tuple[Pair, Brightening]:
    """Lit images under tone curves with infrared as bright as they ask for, and by what made it so.

    images: vis (B, 3, H, W) and ir (B, 1, H, W) in [0, 1]. seen: vis before it was lit.
    """
    by = brightening_for(images.ir, seen, images.vis)
    return Pair(images.vis, by(images.ir)), by


def brightening_for(ir: Tensor, seen: Tensor, lit: Tensor) -> Brightening:
    """How much brighter infrared (B, 1, H, W) has to be beside `lit`, which was `seen` before, both (B, 3, H, W)."""
    level = _mean(ir).clamp_min(1e-3)
    wanted = scaled(level.reciprocal(), IR_AIM / (1 - IR_AIM), -1 / (1 - IR_AIM))  # even frames get there
    share = is_lit(seen, lit)
    return Brightening(wanted.clamp(0.0, IR_MOST) * share, share)


def _mean(frames: Tensor) -> Tensor:
    """Over all channels and places: (B, C, h, w) to (B, 1, 1, 1)."""
    return frames.mean(dim=(1, 2, 3), keepdim=True)


def _is_lit(came: Tensor, became: Tensor) -> Tensor:
    return ramp(became / came.clamp_min(1e-3), *LIT)


def _shades(levels: Tensor) -> Tensor:
    """How much of each shade is in luma (B, 1, h, w), SEEN above black: (B, shades, h, w), ANY and up to 1 more."""
    shades = torch.arange(DARKEST, 0, SHADE, dtype=levels.dtype, device=levels.device).view(-1, 1, 1)
    return scaled((torch.log2(levels) - shades).abs(), -1 / SHADE, 1 + ANY).clamp_min(ANY)


def _rise(before: Tensor, after: Tensor) -> Tensor:
    """How many times as bright luma (B, 1, H, W) became: the same."""
    return (after + DARK) / (before + DARK)


def _stops(before: Tensor, after: Tensor) -> Tensor:
    """By how many doublings luma (B, 1, H, W) rose, below 0 where it fell: the same."""
    return torch.log2(_rise(before, after))


def _coloured(frames: Averaged) -> Tensor:
    """Whether frames have any colour, 0 to 1, (B, 1, 1, 1): grey ones would get a tint."""
    colour = _mean((frames.levels - frames.y).abs())
    return ramp(colour / (_mean(frames.y) + 0.005), *GREY)


def _blocks(frame: Tensor) -> Tensor:
    """Means over blocks of BLOCK x BLOCK pixels."""
    return block_means(frame, BLOCK)


def _box(blocks: Tensor, radius: int) -> Tensor:
    """Means over squares of 2 radius + 1 blocks a side, cut at the border."""
    return _convolved(blocks, radius) if blocks.device.type == "cpu" else _pooled(blocks, radius)


def _pooled(blocks: Tensor, radius: int) -> Tensor:
    side = 2 * radius + 1
    across = F.avg_pool2d(blocks, (1, side), stride=1, padding=(0, radius), count_include_pad=False)
    return F.avg_pool2d(across, (side, 1), stride=1, padding=(radius, 0), count_include_pad=False)


def _convolved(blocks: Tensor, radius: int) -> Tensor:
    """`_pooled` for processors and for other runtimes, which take several times as long for pools."""
    counted = torch.cat([blocks, torch.ones_like(blocks[:, :1])], dim=1)
    counted = counted.contiguous(memory_format=torch.channels_last)  # four times as fast for the wider squares
    ones = blocks.new_ones(counted.shape[1], 1, 2 * radius + 1, 1)
    across = F.conv2d(counted, ones.transpose(2, 3), padding=(0, radius), groups=len(ones))
    sums = F.conv2d(across, ones, padding=(radius, 0), groups=len(ones))
    return (sums[:, :-1] / sums[:, -1:]).contiguous()
