"""What the tone estimator learns from: features and cells of frames that are drawn once and kept, and its loss."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from recofuse_core.errors import ConfigError
from recofuse_core.losses import image_loss
from recofuse_core.networks import ToneEstimator
from recofuse_core.training.pairs import PairSource


@dataclass(frozen=True)
class ToneSamples:
    """Degraded frames, drawn once: features (N, F), and cells of the averaged frames, degraded and clean, (N, 4, P)."""

    features: Tensor
    degraded: Tensor
    clean: Tensor

    @classmethod
    def draw(cls, tone: ToneEstimator, source: PairSource, count: int, generator: Generator) -> "ToneSamples":
        """Frames of the source's context side; every seventh cell is kept, in half precision."""
        side = source.config.context
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
