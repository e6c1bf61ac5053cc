"""What the tone estimator learns from: features and cells of frames that are drawn once and kept, and its loss.

Pairs are streets and fields, and whoever has seen no other frame takes a wall, a table or a lamp for a degraded one. So
some visible frames are photographs and parts of them, and some infrared ones other cameras' (docs/decisions/0050).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from recofuse_core.degradations.physics import quantise
from recofuse_core.degradations.recipes import Range, Strength, degrade_ir, degrade_vis
from recofuse_core.errors import ConfigError
from recofuse_core.losses import image_loss
from recofuse_core.networks import ToneEstimator
from recofuse_core.training.draws import chance, index, part_of
from recofuse_core.training.exposure import sensed
from recofuse_core.training.pairs import DegradedFrame, PairSource


@dataclass(frozen=True)
class ToneSamples:
    """Degraded frames, drawn once: features (N, F), and cells of the averaged frames, degraded and clean, (N, 4, P)."""

    features: Tensor
    degraded: Tensor
    clean: Tensor

    @classmethod
    def draw(cls, tone: ToneEstimator, source: "ToneSource", count: int, generator: Generator) -> "ToneSamples":
        """Frames of the source's context side; every seventh cell is kept, in half precision."""
        side = source.pairs.config.context
        if side < tone.config.grid:
            raise ConfigError(f"data.context must be at least {tone.config.grid} for the tone stage, got {side}")
        features: list[Tensor] = []
        degraded: list[Tensor] = []
        clean: list[Tensor] = []
        for _ in range(count):
            target, ir, low_vis, low_ir = source.frame(side, generator)
            features.append(tone.features(low_vis[None], low_ir[None])[0])
            for kept, pair in ((degraded, (low_vis, low_ir)), (clean, (target, ir))):
                cells = F.adaptive_avg_pool2d(torch.cat(pair), tone.config.grid)
                kept.append(cells.flatten(1)[:, ::7].half())
        return cls(torch.stack(features), torch.stack(degraded), torch.stack(clean))

    def take(self, batch: Tensor) -> "ToneSamples":
        """The samples with the indices `batch`."""
        return ToneSamples(self.features[batch], self.degraded[batch], self.clean[batch])

    def with_infrared_of(self, other: "ToneSamples", where: Tensor, tone: ToneEstimator) -> "ToneSamples":
        """These samples with the infrared of `other`, as many, at the positions `where` (B,) is true.

        Every feature is of one channel, so frames of different pairs can be put together.
        """
        of_ir = tone.infrared_features().to(where.device)
        features = torch.where(where[:, None] & of_ir, other.features, self.features)
        joined = []
        for own, others in ((self.degraded, other.degraded), (self.clean, other.clean)):
            ir = torch.where(where[:, None, None], others[:, 3:], own[:, 3:])
            joined.append(torch.cat([own[:, :3], ir], dim=1))
        return ToneSamples(features, *joined)

    def to(self, device: torch.device) -> "ToneSamples":
        """The samples on a device."""
        return ToneSamples(self.features.to(device), self.degraded.to(device), self.clean.to(device))


class ToneSource:
    """Draws frames from pairs, with a share of photographs and of other cameras' infrared in place of a pair's.

    photos: levels (H, W, 3); thermal: (H, W); both uint8. Raises ConfigError if there are none of what is asked for.
    """

    def __init__(
        self,
        pairs: PairSource,
        photos: Sequence[np.ndarray] = (),
        thermal: Sequence[np.ndarray] = (),
        photo_probability: float = 0.0,
        thermal_probability: float = 0.0,
    ) -> None:
        for name, frames, probability in (
            ("photographs", photos, photo_probability),
            ("other cameras' infrared frames", thermal, thermal_probability),
        ):
            if probability and not frames:
                raise ConfigError(f"{name} for the tone stage come from data.references, where there are none")
        self.pairs = pairs
        self.photos = photos
        self.thermal = [using_its_range(levels) for levels in thermal]
        self.photo_probability = photo_probability
        self.thermal_probability = thermal_probability

    def frame(self, side: int, generator: Generator) -> DegradedFrame:
        """One square of `side` px, degraded anew; whatever stands in for a frame of a pair shows another scene."""
        vis, ir, low_vis, low_ir = self.pairs.frame(side, generator)
        if chance(self.photo_probability, generator):
            vis, low_vis = self._photograph(side, generator)
        if chance(self.thermal_probability, generator):
            ir, low_ir = self._thermogram(side, generator)
        return DegradedFrame(vis, ir, low_vis, low_ir)

    def _photograph(self, side: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """A photograph of any key and white, and the same as it is, sensed or degraded."""
        vis = _part(self.photos[index(len(self.photos), generator)], PHOTO_PART, side, generator)
        if chance(0.25, generator):
            vis = vis.pow(KEY.draw(generator))
        if chance(0.25, generator):
            vis = (vis * (1 + WHITE * torch.randn(3, 1, 1, generator=generator))).clamp(0, 1)
        if chance(0.3, generator):
            return vis, quantise(vis)
        if chance(0.43, generator):
            return vis, sensed(vis, generator)
        return vis, degrade_vis(vis, generator, self._strength(generator)).image

    def _thermogram(self, side: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """An infrared frame of another camera, and the same degraded as those of pairs, or as it is."""
        part = _part(self.thermal[index(len(self.thermal), generator)], THERMAL_PART, side, generator)
        ir = self.pairs.vary_ir(part, generator)
        return ir, degrade_ir(ir, generator, self._strength(generator), clean_probability=0.25).image

    def _strength(self, generator: Generator) -> Strength:
        strengths = self.pairs.config.strengths
        return strengths[index(len(strengths), generator)]


def using_its_range(levels: np.ndarray) -> np.ndarray:
    """An infrared frame (H, W), uint8, with up to twice the contrast where it uses less than half of its range.

    A restored thermogram is to use its range, and not to show its noise.
    """
    low, high = np.quantile(levels, (0.005, 0.995)) / 255
    if high - low >= 0.5:
        return levels
    gain = min(2, 0.8 / max(high - low, 1e-6))
    stretched: np.ndarray = (255 * ((levels / 255 - low) * gain + 0.08)).clip(0, 255).round().astype(np.uint8)
    return stretched


def _part(levels: np.ndarray, share: Range, side: int, generator: Generator) -> Tensor:
    """A square (C, side, side) of a frame: mostly of a share of its shorter side, or of all of that."""
    taken = share.draw(generator) if chance(0.6, generator) else 1.0
    return part_of(levels, int(taken * min(levels.shape[:2])), side, generator)


def tone_loss(tone: ToneEstimator, samples: ToneSamples, spread_weight: float = 0.0) -> dict[str, Tensor]:
    """Image loss of the corrected cells of samples, for both modalities.

    `spread_weight` is that of the difference in std between corrected and clean cells, all channels of a modality.
    """
    curves = tone.curves(samples.features)
    corrected = curves(samples.degraded.float()[..., None])
    clean = samples.clean.float()[..., None]
    losses: dict[str, Tensor] = {}
    for name, channels in (("vis", slice(3)), ("ir", slice(3, 4))):
        ours, wanted = corrected[:, channels], clean[:, channels]
        spread = (ours.flatten(1).std(dim=1) - wanted.flatten(1).std(dim=1)).abs().mean()
        losses[name] = image_loss(ours, wanted, TONE_LOG_WEIGHT) + spread_weight * spread
    return losses


TONE_LOG_WEIGHT = 0.05
PHOTO_PART = Range(0.25, 1.0)  # of a photograph's shorter side
THERMAL_PART = Range(0.35, 1.0)  # of another camera's infrared frame
KEY = Range(0.6, 1.7, log=True)  # powers that make a photograph brighter or darker, to be left so
WHITE = 0.08  # std of the gains that change its white
