"""What the veil estimator learns from: frames in fog, rain and snow, and the loss.

It stands behind the weather estimator and the tone curves, so what is asked of it is what these leave of a veil. A
frame that had no veil is asked for as it is, whatever the curves made of it. Frames are drawn once, averaged to cells
and kept, so that a step costs little (docs/decisions/0035, 0041). What the estimator makes of rain and snow that were
taken off is learnt last, by itself, from frames through which they fell (0055).
"""

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from recofuse_core.degradations.physics import haze
from recofuse_core.degradations.recipes import Range, Strength, VisKind, degrade_ir, degrade_vis, draw_fall
from recofuse_core.degradations.weather import scene_depth
from recofuse_core.errors import ConfigError
from recofuse_core.losses import luma
from recofuse_core.model import ReCoFuse
from recofuse_core.sampler import Pair
from recofuse_core.training.draws import chance, index
from recofuse_core.training.exposure import CROP, Frame, FrameKind, FrameSource, fogged_again, sensed
from recofuse_core.veil import Fallen, VeilEstimator


class VeilKind(StrEnum):
    """What lies over a frame."""

    FOG = "fog"
    GREY_FOG = "grey_fog"  # by day, thinner too, and as dark as a fog at night may be bright
    HAZE = "haze"
    DOWNPOUR = "downpour"
    SNOWFALL = "snowfall"
    FOG_PAIR = "fog_pair"  # of others' making, from the references
    NONE = "none"


SHARES = {
    VeilKind.FOG: 0.22,
    VeilKind.GREY_FOG: 0.30,
    VeilKind.HAZE: 0.03,
    VeilKind.DOWNPOUR: 0.06,
    VeilKind.SNOWFALL: 0.06,
    VeilKind.FOG_PAIR: 0.12,
    VeilKind.NONE: 0.21,
}
# Through what frames are seen that something is taken off of. Rain and snow of these two kinds bring no veil.
FALL_SHARES: dict[VisKind, float] = {
    VisKind.DOWNPOUR: 0.44,
    VisKind.SNOWFALL: 0.44,
    VisKind.RAIN: 0.03,
    VisKind.SNOW: 0.03,
    VisKind.GAUSSIAN_NOISE: 0.06,
}
FALL_POOLS = (0.28, 0.27, 0.12, 0.33)  # nights, crisp days, photographs and any scenes
FALL_SENSED_PROBABILITY = 0.4
LEAST_FALL = 0.1  # of what was seen: a frame of which less is taken off teaches nothing
# What is veiled: mostly what is well exposed and crisp. With that alone, nights and bright days come out grey; without
# grey fog by day, over photographs too, a grey sky comes out as a night's.
NIGHT_PROBABILITY, GREY_NIGHT_PROBABILITY = 0.28, 0.08
PHOTO_PROBABILITY = 0.4  # of grey fog
ANY_PROBABILITY = 0.2
STRENGTHS: tuple[Strength, ...] = ("light", "medium", "medium", "strong")
AS_IT_CAME = (VisKind.LOW_LIGHT, VisKind.LOW_LIGHT, VisKind.COLOUR_CAST, VisKind.BLUR)  # of frames without a veil
AS_IT_CAME_PROBABILITY = 0.35
DARKER_PROBABILITY, BRIGHTER_PROBABILITY = 0.2, 0.25
DARKER_GAMMA, DARKER_GAIN = Range(0.7, 1.6), Range(1.0, 0.6)
BRIGHTER_GAMMA, BRIGHTER_GAIN = Range(0.55, 1.0), Range(1.0, 1.0)
FOG_DENSITY = Range(0.35, 3.6, log=True)
AIRLIGHT = Range(0.45, 0.95)
AIRLIGHT_SLOPE = Range(0.0, 0.3)
AIRLIGHT_TINT = 0.02  # std
SMOG_PROBABILITY = 0.3
SMOG = (0.05, 0.0, -0.06)  # what it adds to red, green and blue: warm as dust, or the other way round
SUN_PROBABILITY = 0.25
SUN, SUN_RADIUS = Range(0.05, 0.45), Range(0.1, 0.5)  # what it adds, and how far, in sides
DUSK_PROBABILITY = 0.15
DUSK_GAMMA, DUSK_GAIN = Range(0.8, 1.6), Range(1.0, 0.6)
LEFT_OVER = Range(0.0, 0.35)  # of streaks and flakes, where they were taken off
SENSED_PROBABILITY = 0.7
NOISY_PROBABILITY = 0.12
CLEAN_IR_PROBABILITY = 0.4
SWAP_PROBABILITY = 0.15
CLOSE_UP_PROBABILITY = 0.5
CLOSE_UP = Range(0.25, 0.8)  # share of a frame's sides: flat and near things, which are no fog
# By day, an unseen sky is asked for as bright as its veil: see `_kept_bright`.
UNSEEN = (0.10, 0.22)  # how much light gets through: up to where nothing of a scene is seen, and from where it is
AIRLIGHT_QUANTILE = 0.97
SKY_LUMA = (0.10, 0.04)  # below the airlight: from where a place may be sky, and from where it is
DAY_MEAN = (0.20, 0.26)  # of a clear frame's luma: up to where it is night, and from where day
KEPT_SHARE = 0.95  # of a sky's luma


class VeilFrame(NamedTuple):
    """given and clear (3, S, S) and ir (1, S, S) in [0, 1], and what lies over given."""

    given: Tensor
    clear: Tensor
    ir: Tensor
    kind: VeilKind


class VeilSource:
    """Draws frames under all kinds of veils. Every draw comes from the generator passed in.

    through_fall: frames through rain or snow that nobody took off yet, and now and then noise that is taken for snow.
    """

    def __init__(self, frames: FrameSource, *, through_fall: bool = False) -> None:
        self.frames = frames
        self.through_fall = through_fall
        self.clear = frames.pools[FrameKind.KEPT]
        self.foggy = frames.pools[FrameKind.FOG_PAIR]
        self.nights = frames.pools[FrameKind.NIGHT]
        self.scenes = frames.scenes
        self.photos = [Frame(photo, photo) for photo in frames.photos]
        dark = frames.pools[FrameKind.DARK_PAIR]
        self.others: list[list[Frame]] = [pool for pool in (self.scenes, self.clear, self.photos, dark) if pool]
        self.kinds = [
            kind
            for kind in VeilKind
            if kind is VeilKind.NONE or (self.foggy if kind is VeilKind.FOG_PAIR else self.clear)
        ]

    def frame(self, side: int, generator: Generator) -> VeilFrame:
        """One square of S px as a camera delivers it; of streaks and flakes with a rest alone, or with all."""
        if self.through_fall:
            return self._fallen(side, generator)
        weights = torch.tensor([SHARES[kind] for kind in self.kinds])
        kind = self.kinds[int(torch.multinomial(weights, 1, generator=generator))]
        strength = STRENGTHS[index(len(STRENGTHS), generator)]
        given, clear, ir = self._scene(kind, side, generator)
        match kind:
            case VeilKind.FOG_PAIR:
                given = fogged_again(given, clear, generator) if chance(0.45, generator) else given
            case VeilKind.FOG | VeilKind.HAZE:
                given = degrade_vis(clear, generator, strength, [kind.value]).image
            case VeilKind.DOWNPOUR | VeilKind.SNOWFALL:
                fall = draw_fall(clear, VisKind(kind.value), generator, strength)
                given = fall.scene + LEFT_OVER.draw(generator) * (fall.image - fall.scene)
            case VeilKind.GREY_FOG:
                through = (-FOG_DENSITY.draw(generator) * scene_depth(clear, generator)).exp()
                given = haze(clear, uneven_airlight(side, generator), through)
                if float(luma(clear[None]).mean()) > DAY_MEAN[0]:
                    clear = _kept_bright(given[None], clear[None], _ramp(-through, -UNSEEN[1], -UNSEEN[0]))[0]
                if chance(DUSK_PROBABILITY, generator):
                    given, clear = _exposed(given, clear, DUSK_GAMMA, DUSK_GAIN, generator)
            case VeilKind.NONE if chance(AS_IT_CAME_PROBABILITY, generator):
                given = degrade_vis(clear, generator, strength, [AS_IT_CAME[index(len(AS_IT_CAME), generator)]]).image
            case _:
                pass
        if chance(SENSED_PROBABILITY, generator):
            given = sensed(given.clamp(0, 1), generator)
        elif chance(NOISY_PROBABILITY / (1 - SENSED_PROBABILITY), generator):
            given = degrade_vis(given.clamp(0, 1), generator, strength, [VisKind.GAUSSIAN_NOISE]).image
        low_ir = degrade_ir(ir, generator, clean_probability=CLEAN_IR_PROBABILITY).image
        return VeilFrame(given.clamp(0, 1), clear.clamp(0, 1), low_ir, kind)

    def _fallen(self, side: int, generator: Generator) -> VeilFrame:
        kinds = list(FALL_SHARES)
        kind = kinds[int(torch.multinomial(torch.tensor(list(FALL_SHARES.values())), 1, generator=generator))]
        pools = (self.nights, self.clear, self.photos, self.scenes)
        pool = pools[int(torch.multinomial(torch.tensor(FALL_POOLS), 1, generator=generator))] or self.scenes
        _, clear, ir = self._cut(pool, side, generator)
        strength = STRENGTHS[index(len(STRENGTHS), generator)]
        given = degrade_vis(clear.clamp(0, 1), generator, strength, [kind]).image
        if chance(FALL_SENSED_PROBABILITY, generator):
            given = sensed(given.clamp(0, 1), generator)
        low_ir = degrade_ir(ir, generator, clean_probability=CLEAN_IR_PROBABILITY).image
        over = VeilKind(kind.value) if kind in (VisKind.DOWNPOUR, VisKind.SNOWFALL) else VeilKind.NONE
        return VeilFrame(given.clamp(0, 1), clear.clamp(0, 1), low_ir, over)

    def _scene(self, kind: VeilKind, side: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Given, clear and infrared squares before anything is put in."""
        pool = self._pool(kind, generator)
        is_close_up = kind is VeilKind.NONE and chance(CLOSE_UP_PROBABILITY, generator)
        return self._cut(pool, side, generator, CLOSE_UP if is_close_up else CROP, kind is not VeilKind.FOG_PAIR)

    def _cut(
        self, pool: list[Frame], side: int, generator: Generator, crop: Range = CROP, may_vary: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same of a pool, sometimes with infrared of another scene, or, if it may be, of another exposure."""
        frame = pool[index(len(pool), generator)]
        given, clear, ir = self.frames.cut(frame, side, generator, crop)
        if chance(SWAP_PROBABILITY, generator):
            _, _, ir = self.frames.cut(frame._replace(ir=None), side, generator)
        if may_vary:
            if chance(DARKER_PROBABILITY, generator):
                given, clear = _exposed(given, clear, DARKER_GAMMA, DARKER_GAIN, generator)
            elif pool is not self.nights and chance(BRIGHTER_PROBABILITY, generator):
                given, clear = _exposed(given, clear, BRIGHTER_GAMMA, BRIGHTER_GAIN, generator)
        return given, clear, ir

    def _pool(self, kind: VeilKind, generator: Generator) -> list[Frame]:
        """What a frame of a kind is made of."""
        if kind is VeilKind.NONE:
            return self.others[index(len(self.others), generator)]
        if kind is VeilKind.FOG_PAIR:
            return self.foggy
        is_grey = kind is VeilKind.GREY_FOG
        if self.nights and chance(GREY_NIGHT_PROBABILITY if is_grey else NIGHT_PROBABILITY, generator):
            return self.nights
        if is_grey and self.photos and chance(PHOTO_PROBABILITY, generator):
            return self.photos
        return self.scenes if chance(ANY_PROBABILITY, generator) else self.clear


def uneven_airlight(side: int, generator: Generator) -> Tensor:
    """The light of a fog, (3, S, S): brighter on one side than on the other, and where the sun stands behind it."""
    slope = F.interpolate(torch.rand(1, 1, 3, 3, generator=generator) * 2 - 1, side, mode="bicubic", align_corners=True)
    light = AIRLIGHT.draw(generator) * (1 + AIRLIGHT_SLOPE.draw(generator) * slope[0])
    if chance(SUN_PROBABILITY, generator):
        places = torch.linspace(0, 1, side)
        row, column = 0.6 * torch.rand((), generator=generator), torch.rand((), generator=generator)
        squared = (places.view(-1, 1) - row).square() + (places - column).square()
        light = light + SUN.draw(generator) * (-squared / (2 * SUN_RADIUS.draw(generator) ** 2)).exp()
    tint = AIRLIGHT_TINT * torch.randn(3, 1, 1, generator=generator)
    if chance(SMOG_PROBABILITY, generator):
        tint = tint + Range(-1.0, 1.3).draw(generator) * torch.tensor(SMOG).view(3, 1, 1)
    return (light + tint).clamp(0, 1)


def _exposed(given: Tensor, clear: Tensor, gammas: Range, gains: Range, generator: Generator) -> tuple[Tensor, Tensor]:
    gamma, gain = gammas.draw(generator), gains.draw(generator)
    return gain * given.clamp(1e-4, 1).pow(gamma), gain * clear.clamp(1e-4, 1).pow(gamma)


# --- samples and loss -------------------------------------------------------------------------------------------------

IS_VEIL, IS_NONE = 4e-3, 6e-4  # squared error that a veil adds: from where it is one, and up to where it is none


@dataclass(frozen=True)
class VeilSamples:
    """What an estimator sees, (N, 4, cells, cells), and what should come of vis, (N, 3, cells / 2, cells / 2); half.

    squared: (N,), the squared error that the veil added; 0 where there was none. share (N,) and fallen, (N, 1, cells,
    cells), half: how much rain or snow was taken off, see `Fallen`; 0 where frames are drawn without any.
    """

    cells: Tensor
    clear: Tensor
    squared: Tensor
    share: Tensor
    fallen: Tensor

    @classmethod
    @torch.no_grad()
    def draw(cls, model: ReCoFuse, source: VeilSource, count: int, side: int, generator: Generator) -> "VeilSamples":
        """`count` squares of `side` px, of those through rain or snow the ones that the model takes some off of.

        Raises ConfigError without a veil to learn, for a side below the cells, or if the model takes hardly any off.
        """
        estimator = model.veil
        if estimator is None:
            raise ConfigError("the model has no veil estimator to train")
        if side < estimator.config.cells:
            raise ConfigError(f"frames must have at least {estimator.config.cells} px a side, got {side}")
        device = next(estimator.parameters()).device
        none = torch.zeros(1, 1, 1, 1, dtype=torch.half, device=device)
        rows: list[tuple[Tensor, ...]] = []
        passed = 0
        while len(rows) < count:
            given, clear, ir, kind = source.frame(side, generator)
            frames = Pair(given[None].to(device), ir[None].to(device))
            wanted = Pair(clear[None].to(device), frames.ir)
            fall = None
            if source.through_fall:
                frames, fall = model.cleared(frames)
                if fall is None or float(fall.share) < LEAST_FALL:
                    passed += 1
                    if passed > TRIES * (1 + len(rows)):
                        raise ConfigError("the model takes hardly any rain or snow off; train the stage weather first")
                    continue
            cells, fallen = estimator.averages(*model.normalise(frames), frames.vis, fall)
            share, luma_of_it = (none[:, 0, 0, 0], none) if fallen is None else fallen
            seen = F.avg_pool2d(cells[:, :3], 2)
            is_none = kind is VeilKind.NONE
            target = seen if is_none else F.adaptive_avg_pool2d(wanted.vis, estimator.config.cells // 2)
            squared = (seen - target).square().mean(dim=(1, 2, 3))
            rows.append((cells.half(), target.half(), squared, share.float(), luma_of_it.half()))
        return cls(*(torch.cat(column) for column in zip(*rows, strict=True)))

    def take(self, batch: Tensor) -> "VeilSamples":
        """The samples with the indices `batch`."""
        return VeilSamples(*(getattr(self, field.name)[batch] for field in fields(self)))

    def flipped(self) -> "VeilSamples":
        """The mirror images."""
        return VeilSamples(self.cells.flip(-1), self.clear.flip(-1), self.squared, self.share, self.fallen.flip(-1))


TRIES = 20  # frames for one that rain or snow is taken off of
TOO_DARK = 1.4  # what an error weighs where a place comes out too dark
NO_VEIL_WEIGHT = 0.25  # of what becomes of a frame without a veil, which is left alone anyway if it is told
LOG_WEIGHT = 0.15
SPREAD_WEIGHT = 0.1
ODDS_WEIGHT = 0.15
LEAST_SQUARED = 1e-4  # below it, an error hardly counts


def veil_loss(estimator: VeilEstimator, samples: VeilSamples) -> dict[str, Tensor]:
    """L1 of lifted cells, log of each frame's squared error, difference in std; cross entropy of there being a veil.

    What hardly veils a frame is neither: whether it is lifted matters little. Behind rain and snow all frames count
    alike, and skies are asked for as they are: such a veil is thin, and whether there is one is not asked.
    """
    cells, clear = samples.cells.float(), samples.clear.float()
    toned = F.avg_pool2d(cells[:, :3], 2)
    is_fall = samples.share > 0
    clear = _with_bright_skies(clear, toned, samples.squared * ~is_fall)
    found = estimator.find(cells, Fallen(samples.share, samples.fallen.float()) if bool(is_fall.any()) else None)
    ours = found.veil.at_cells(toned)
    is_veil = (samples.squared > IS_VEIL).float()
    weight = torch.where(is_fall, 1.0, is_veil + NO_VEIL_WEIGHT)
    error = ours - clear
    error = torch.where(error < 0, TOO_DARK * error, error)
    log = torch.log10(error.square().mean(dim=(1, 2, 3)) + LEAST_SQUARED)
    spread = (ours.flatten(1).std(dim=1) - clear.flatten(1).std(dim=1)).abs()
    is_sure = is_veil + (samples.squared < IS_NONE)
    odds = F.binary_cross_entropy_with_logits(found.log_odds, is_veil, is_sure)
    return {
        "veil": (weight * error.abs().mean(dim=(1, 2, 3))).mean(),
        "log": LOG_WEIGHT * (weight * log).mean(),
        "spread": SPREAD_WEIGHT * (weight * spread).mean(),
        "odds": ODDS_WEIGHT * odds,
    }


def _with_bright_skies(clear: Tensor, toned: Tensor, squared: Tensor) -> Tensor:
    """`_kept_bright` where it is not known what was seen of (N, 3, h, w): near the brightest of each veiled frame."""
    seen, wanted = luma(toned), luma(clear)
    airlight = seen.flatten(1).quantile(AIRLIGHT_QUANTILE, dim=1).view(-1, 1, 1, 1)
    is_day = _ramp(wanted.mean(dim=(1, 2, 3), keepdim=True), *DAY_MEAN)
    is_veiled = (squared > IS_NONE).view(-1, 1, 1, 1)
    return _kept_bright(toned, clear, _ramp(seen - airlight, -SKY_LUMA[0], -SKY_LUMA[1]) * is_day * is_veiled)


def _kept_bright(veiled: Tensor, clear: Tensor, unseen: Tensor) -> Tensor:
    """What is asked for, (N, 3, h, w), where nothing is seen of a scene: nearly the light of the veil itself.

    What lies behind, mostly a sky, nobody knows. Asked for as it was, real skies over haze come out as dusk, for the
    mean of all skies is dark; left as they are, they look like skies. unseen: (N, 1, h, w) in [0, 1].
    """
    return (clear + unseen * (KEPT_SHARE * luma(veiled) - luma(clear)).clamp_min(0)).clamp(0, 1)


def _ramp(value: Tensor, low: float, high: float) -> Tensor:
    return ((value - low) / (high - low)).clamp(0, 1)
