"""What the weather estimator learns from: frames, what streaks and flakes add to them, and the loss.

A frame that a camera saw through rain is veiled and noisy as well, and neither is asked for here: the target is what
the streaks added, and nothing where there were none, however dark, veiled or noisy a frame is. A crop does not tell a
veil from a grey wall; taught to take both off, the estimator learnt neither (docs/decisions/0028).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from recofuse_core.degradations.recipes import Range, Strength, VisKind, degrade_ir, degrade_vis, draw_fall
from recofuse_core.training.draws import chance, index, part_of, unit
from recofuse_core.training.exposure import sensed
from recofuse_core.training.pairs import PairSource
from recofuse_core.weather import WeatherEstimator

SHARES = {VisKind.DOWNPOUR: 0.48, VisKind.SNOWFALL: 0.44, VisKind.RAIN: 0.04, VisKind.SNOW: 0.04}  # of what falls
FALL_PROBABILITY = 0.76
EVEN_ODDS = 0.5  # the same where nothing but whether there is weather is learnt
STRENGTHS: tuple[Strength, ...] = ("light", "medium", "medium", "strong")
NOISES = (VisKind.GAUSSIAN_NOISE, VisKind.GAUSSIAN_NOISE, VisKind.POISSON_NOISE)
OTHER_KINDS = (
    VisKind.LOW_LIGHT,
    VisKind.JPEG,
    VisKind.HAZE,
    VisKind.FOG,
    VisKind.COLOUR_CAST,
    VisKind.BLUR,
)
PHOTO_PROBABILITY = 0.22  # of a photograph in place of a pair; it meets the infrared frame of another scene
DARKER_PROBABILITY = 0.3
DARKER_LOG_GAMMA = Range(-0.3, 0.8)
DARKER_LOG_GAIN = Range(-0.9, 0.1)
GREY_PROBABILITY = 0.1
SENSED_PROBABILITY = 0.3
NOISY_PROBABILITY = 0.35  # of plain noise in place of a camera's, behind weather or none: it looks like far snow
OTHER_PROBABILITY = 0.3  # of another degradation, of a frame that neither weather nor noise was put on
CLEAN_IR_PROBABILITY = 0.4
PHOTO_ZOOM = Range(0.8, 2.2)  # of the part of a photograph that is taken, in sides of the square


class WeatherFrame(NamedTuple):
    """given (3, S, S) and ir (1, S, S) in [0, 1], and what streaks and flakes added to given, (3, S, S)."""

    given: Tensor
    ir: Tensor
    added: Tensor


class WeatherSource:
    """Draws frames from pairs and from photographs (H, W, 3), uint8. Every draw comes from the generator passed in."""

    def __init__(self, pairs: PairSource, photos: Sequence[np.ndarray] = (), probability: float | None = None) -> None:
        self.pairs = pairs
        self.photos = photos
        self.probability = FALL_PROBABILITY if probability is None else probability

    def draw(self, batch_size: int, side: int, generator: Generator) -> WeatherFrame:
        """A batch of squares: each part with a first dimension of `batch_size`."""
        frames = [self.frame(side, generator) for _ in range(batch_size)]
        return WeatherFrame(*(torch.stack(column) for column in zip(*frames, strict=True)))

    def frame(self, side: int, generator: Generator) -> WeatherFrame:
        """One square."""
        clear, ir = self.pairs.square(side, generator)
        if self.photos and chance(PHOTO_PROBABILITY, generator):
            clear = self._photo(side, generator)
        if chance(DARKER_PROBABILITY, generator):
            power, gain = (np.exp(span.draw(generator)) for span in (DARKER_LOG_GAMMA, DARKER_LOG_GAIN))
            clear = (clear.pow(power) * gain).clamp(0, 1)
        if chance(GREY_PROBABILITY, generator):
            clear = clear.mean(dim=0, keepdim=True).expand(3, -1, -1).contiguous()
        low_ir = degrade_ir(ir, generator, clean_probability=CLEAN_IR_PROBABILITY).image
        strength = STRENGTHS[index(len(STRENGTHS), generator)]
        given, added = clear, torch.zeros_like(clear)
        kind = _kind(generator) if chance(self.probability, generator) else None
        if kind is not None:
            fall = draw_fall(clear, kind, generator, strength)
            given, added = fall.image, fall.image - fall.scene
        if chance(SENSED_PROBABILITY, generator):
            given = sensed(given, generator)
        elif chance(NOISY_PROBABILITY, generator):
            noise, amount = NOISES[index(len(NOISES), generator)], STRENGTHS[index(len(STRENGTHS), generator)]
            given = degrade_vis(given.clamp(0, 1), generator, amount, [noise]).image
        elif kind is None and chance(OTHER_PROBABILITY, generator):
            given = degrade_vis(clear, generator, strength, [OTHER_KINDS[index(len(OTHER_KINDS), generator)]]).image
        return WeatherFrame(given.clamp(0, 1), low_ir, added)

    def _photo(self, side: int, generator: Generator) -> Tensor:
        photo = self.photos[index(len(self.photos), generator)]
        return part_of(photo, int(side * PHOTO_ZOOM.draw(generator)), side, generator)


FLOOR = 3e-4  # of the squared error: below it, less of it hardly counts
CLEAR_WEIGHT = 0.4  # of what is found in frames without weather: `log_odds` keep it from them
ODDS_WEIGHT = 0.3


def weather_loss(estimator: WeatherEstimator, batch: WeatherFrame) -> dict[str, Tensor]:
    """log10 of the squared error and `FLOOR`, mean over frames; and cross entropy (nats) of whether there is weather.

    batch: parts (B, 3, S, S) and (B, 1, S, S), S a multiple of 16. L1 has its least at the median, and most pixels lie
    between the streaks; and without the floor a frame that has none outweighs a hundred that have. Both taught the
    estimator to find nothing.
    """
    found = estimator.find(batch.given, batch.ir)
    squared = (found.added - batch.added).square().flatten(1).mean(dim=1)
    present = _has_weather(batch)
    weights = CLEAR_WEIGHT + (1 - CLEAR_WEIGHT) * present
    return {
        "log": (weights * torch.log10(squared + FLOOR)).mean(),
        "odds": ODDS_WEIGHT * F.binary_cross_entropy_with_logits(found.log_odds, present),
    }


@dataclass(frozen=True)
class OddsSamples:
    """Frames that are drawn once: their features (N, C, h, w), half, and which have weather, (N,), 0 or 1.

    Large frames tell better than squares of a few streaks whether there is weather.
    """

    features: Tensor
    present: Tensor

    @classmethod
    def draw(
        cls, estimator: WeatherEstimator, source: WeatherSource, count: int, side: int, generator: Generator
    ) -> "OddsSamples":
        """Squares of `side` pixels, seen by the estimator as it is."""
        features: list[Tensor] = []
        present: list[Tensor] = []
        parameter = next(estimator.parameters())
        with torch.no_grad():
            for _ in range(count):
                frame = source.draw(1, side, generator)
                features.append(
                    estimator.look(frame.given.to(parameter.device), frame.ir.to(parameter.device)).coarse.half()
                )
                present.append(_has_weather(frame))
        return cls(torch.cat(features), torch.cat(present).to(parameter.device))

    def take(self, batch: Tensor) -> "OddsSamples":
        """The samples with the indices `batch`."""
        return OddsSamples(self.features[batch], self.present[batch])


def odds_loss(estimator: WeatherEstimator, samples: OddsSamples) -> dict[str, Tensor]:
    """The second part of `weather_loss` alone, of features that stay."""
    log_odds = estimator.log_odds(samples.features.float())
    return {"odds": F.binary_cross_entropy_with_logits(log_odds, samples.present)}


def _has_weather(frames: WeatherFrame) -> Tensor:
    return frames.added.flatten(1).any(dim=1).float()


def _kind(generator: Generator) -> VisKind:
    pick = unit(generator)
    for kind, share in SHARES.items():
        if pick < share:
            return kind
        pick -= share
    return kind
