"""What the veil heads of an exposure estimator learn from: frames in fog, rain and snow, and the loss.

They stand behind the weather estimator and the tone curves, so what is asked of them is what these leave of a veil. A
frame that had none is asked for as it is, whatever the tone curves made of it. Frames are drawn once, seen by the
estimator as it is, and kept, so that a step costs little: the heads alone are trained (docs/decisions/0031).
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
from recofuse_core.exposure import ExposureEstimator, Seen
from recofuse_core.losses import log_error
from recofuse_core.model import ReCoFuse
from recofuse_core.sampler import Pair
from recofuse_core.training.exposure import Frame, FrameKind, FrameSource, fogged_again, sensed


class VeilKind(StrEnum):
    """What lies over a frame."""

    FOG = "fog"
    ANY_FOG = "any_fog"  # thinner, too, and darker: at dusk
    HAZE = "haze"
    DOWNPOUR = "downpour"
    SNOWFALL = "snowfall"
    FOG_PAIR = "fog_pair"  # of others' making, from the references
    NONE = "none"


SHARES = {
    VeilKind.FOG: 0.23,
    VeilKind.ANY_FOG: 0.14,
    VeilKind.HAZE: 0.10,
    VeilKind.DOWNPOUR: 0.12,
    VeilKind.SNOWFALL: 0.12,
    VeilKind.FOG_PAIR: 0.08,
    VeilKind.NONE: 0.21,
}
STRENGTHS: tuple[Strength, ...] = ("light", "medium", "medium", "strong")
AS_IT_CAME = (VisKind.LOW_LIGHT, VisKind.LOW_LIGHT, VisKind.COLOUR_CAST, VisKind.BLUR)  # of frames without a veil
AS_IT_CAME_PROBABILITY = 0.35
DARKER_PROBABILITY = 0.2
DARKER_GAMMA, DARKER_GAIN = Range(0.7, 1.6), Range(1.0, 0.6)
FOG_DENSITY = Range(0.35, 3.6, log=True)
AIRLIGHT = Range(0.55, 1.0)
DUSK_PROBABILITY = 0.3
DUSK_GAMMA, DUSK_GAIN = Range(0.8, 1.6), Range(1.0, 0.6)
LEFT_OVER = Range(0.0, 0.35)  # of streaks and flakes, where they were taken off
SENSED_PROBABILITY = 0.7
NOISY_PROBABILITY = 0.12
CLEAN_IR_PROBABILITY = 0.4
SWAP_PROBABILITY = 0.15


class VeilFrame(NamedTuple):
    """given and clear (3, S, S) and ir (1, S, S) in [0, 1], and what lies over given."""

    given: Tensor
    clear: Tensor
    ir: Tensor
    kind: VeilKind


class VeilSource:
    """Draws frames under all kinds of veils. Every draw comes from the generator passed in."""

    def __init__(self, frames: FrameSource) -> None:
        self.frames = frames
        self.clear = frames.pools[FrameKind.KEPT]
        self.foggy = frames.pools[FrameKind.FOG_PAIR]
        self.others: list[list[Frame]] = [pool for pool in (frames.scenes, self.clear) if pool]
        self.kinds = [
            kind
            for kind in VeilKind
            if kind is VeilKind.NONE or (self.foggy if kind is VeilKind.FOG_PAIR else self.clear)
        ]

    def frame(self, side: int, generator: Generator) -> VeilFrame:
        """One square of S px as a camera delivers it; without streaks and flakes but for a rest of them."""
        weights = torch.tensor([SHARES[kind] for kind in self.kinds])
        kind = self.kinds[int(torch.multinomial(weights, 1, generator=generator))]
        strength = STRENGTHS[_index(len(STRENGTHS), generator)]
        given, clear, ir = self._scene(kind, side, generator)
        match kind:
            case VeilKind.FOG_PAIR:
                given = fogged_again(given, clear, generator) if _chance(0.45, generator) else given
            case VeilKind.FOG | VeilKind.HAZE:
                given = degrade_vis(clear, generator, strength, [kind.value]).image
            case VeilKind.DOWNPOUR | VeilKind.SNOWFALL:
                fall = draw_fall(clear, VisKind(kind.value), generator, strength)
                given = fall.scene + LEFT_OVER.draw(generator) * (fall.image - fall.scene)
            case VeilKind.ANY_FOG:
                through = (-FOG_DENSITY.draw(generator) * scene_depth(clear, generator)).exp()
                given = haze(clear, torch.full((3, 1, 1), AIRLIGHT.draw(generator)), through)
                if _chance(DUSK_PROBABILITY, generator):
                    given, clear = _darkened(given, clear, DUSK_GAMMA, DUSK_GAIN, generator)
            case VeilKind.NONE if _chance(AS_IT_CAME_PROBABILITY, generator):
                given = degrade_vis(clear, generator, strength, [AS_IT_CAME[_index(len(AS_IT_CAME), generator)]]).image
            case _:
                pass
        if _chance(SENSED_PROBABILITY, generator):
            given = sensed(given.clamp(0, 1), generator)
        elif _chance(NOISY_PROBABILITY / (1 - SENSED_PROBABILITY), generator):
            given = degrade_vis(given.clamp(0, 1), generator, strength, [VisKind.GAUSSIAN_NOISE]).image
        low_ir = degrade_ir(ir, generator, clean_probability=CLEAN_IR_PROBABILITY).image
        return VeilFrame(given.clamp(0, 1), clear.clamp(0, 1), low_ir, kind)

    def _scene(self, kind: VeilKind, side: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Given, clear and infrared squares before anything is put in, sometimes with infrared of another scene."""
        if kind is VeilKind.NONE:
            pool = self.others[_index(len(self.others), generator)]
        else:
            pool = self.foggy if kind is VeilKind.FOG_PAIR else self.clear
        frame = pool[_index(len(pool), generator)]
        given, clear, ir = self.frames.cut(frame, side, generator)
        if _chance(SWAP_PROBABILITY, generator):
            _, _, ir = self.frames.cut(frame._replace(ir=None), side, generator)
        if kind is not VeilKind.FOG_PAIR and _chance(DARKER_PROBABILITY, generator):
            given, clear = _darkened(given, clear, DARKER_GAMMA, DARKER_GAIN, generator)
        return given, clear, ir


def _darkened(given: Tensor, clear: Tensor, gammas: Range, gains: Range, generator: Generator) -> tuple[Tensor, Tensor]:
    gamma, gain = gammas.draw(generator), gains.draw(generator)
    return gain * given.clamp(1e-4, 1).pow(gamma), gain * clear.clamp(1e-4, 1).pow(gamma)


# --- samples and loss -------------------------------------------------------------------------------------------------

IS_VEIL, IS_NONE = 4e-3, 6e-4  # squared error that a veil adds: from where it is one, and up to where it is none


@dataclass(frozen=True)
class VeilSamples:
    """Frames under tone curves, averaged to cells: toned and clear (N, 3, cells, cells), half; what an estimator saw.

    squared: (N,), the squared error that the veil added; 0 where there was none.
    """

    toned: Tensor
    clear: Tensor
    squared: Tensor
    summary: Tensor
    frame: Tensor
    places: Tensor

    @classmethod
    @torch.no_grad()
    def draw(cls, model: ReCoFuse, source: VeilSource, count: int, side: int, generator: Generator) -> "VeilSamples":
        """`count` squares of `side` px. Raises ConfigError without a veil to learn, or for a side below the cells."""
        estimator = model.exposure
        if estimator is None or not estimator.config.lifts_veil:
            raise ConfigError("the model has no veil heads to train")
        if side < estimator.config.cells:
            raise ConfigError(f"frames must have at least {estimator.config.cells} px a side, got {side}")
        device = next(estimator.parameters()).device
        rows = []
        for _ in range(count):
            given, clear, ir, kind = source.frame(side, generator)
            toned = model.normalise(Pair(given[None].to(device), ir[None].to(device)))
            cells = estimator.average(*toned)
            seen = estimator.look(cells, estimator.features(cells))
            target = cells[:, :3]
            if kind is not VeilKind.NONE:
                target = F.adaptive_avg_pool2d(clear[None].to(device), estimator.config.cells)
            squared = (cells[:, :3] - target).square().mean(dim=(1, 2, 3))
            rows.append((cells[:, :3].half(), target.half(), squared, seen.summary, seen.frame, seen.places.half()))
        return cls(*(torch.cat(column) for column in zip(*rows, strict=True)))

    def take(self, batch: Tensor) -> "VeilSamples":
        """The samples with the indices `batch`."""
        return VeilSamples(*(getattr(self, field.name)[batch] for field in fields(self)))

    def every_second_cell(self, row: int, column: int) -> "VeilSamples":
        """A quarter of the cells, those from (row, column) on, which cost a quarter and tell nearly as much."""
        toned, clear = (part[..., row::2, column::2] for part in (self.toned, self.clear))
        return VeilSamples(toned, clear, self.squared, self.summary, self.frame, self.places)


LOG_WEIGHT = 0.1
SPREAD_WEIGHT = 0.1
ODDS_WEIGHT = 0.3


def veil_loss(estimator: ExposureEstimator, samples: VeilSamples) -> dict[str, Tensor]:
    """L1 of lifted cells, log of each frame's squared error, difference in std; cross entropy of there being a veil.

    What hardly veils a frame is neither: whether it is lifted matters little.
    """
    seen = Seen(samples.summary, samples.frame, samples.places.float())
    ours, clear = estimator.lifting(seen).at_cells(samples.toned.float()), samples.clear.float()
    spread = (ours.flatten(1).std(dim=1) - clear.flatten(1).std(dim=1)).abs().mean()
    is_veil = (samples.squared > IS_VEIL).float()
    is_sure = is_veil + (samples.squared < IS_NONE)
    odds = F.binary_cross_entropy_with_logits(estimator.veil_log_odds(seen), is_veil, is_sure)
    return {
        "veil": F.l1_loss(ours, clear),
        "log": LOG_WEIGHT * log_error(ours, clear),
        "spread": SPREAD_WEIGHT * spread,
        "odds": ODDS_WEIGHT * odds,
    }


def _chance(probability: float, generator: Generator) -> bool:
    return float(torch.rand((), generator=generator)) < probability


def _index(count: int, generator: Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
