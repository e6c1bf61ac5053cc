"""Batches that were degraded and encoded once, for stages that leave the autoencoder alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from recofuse_core.data import to_float, to_uint8
from recofuse_core.model import ReCoFuse
from recofuse_core.networks import Skips
from recofuse_core.sampler import Pair
from recofuse_core.training.objectives import encode_pair, reconstruct
from recofuse_core.training.pairs import PairSource, channels_last


@dataclass(frozen=True)
class Encoded:
    """A batch behind the frozen encoder.

    clean, mu: latents (B, C, h, w) float32 of the clean and the degraded images; skips: of the degraded ones;
    references: the clean latents decoded with those skips, (B, 3, H, W) each, which the published fusion loss aims at.
    """

    clean: Pair
    mu: Pair
    skips: tuple[Skips, Skips]
    references: Pair

    def to(self, device: torch.device) -> "Encoded":
        """The batch on a device."""
        return self.mapped(lambda tensor: tensor.to(device))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Encoded":
        """The batch with every tensor changed."""
        vis_skips, ir_skips = (tuple(change(skip) for skip in skips) for skips in self.skips)
        clean, mu, references = (Pair(*map(change, pair)) for pair in (self.clean, self.mu, self.references))
        return Encoded(clean, mu, (vis_skips, ir_skips), references)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, as `from_tensors` takes them."""
        names: dict[str, Tensor] = {}
        for part, pair in (("clean", self.clean), ("mu", self.mu), ("references", self.references)):
            names |= {f"{part}.vis": pair.vis, f"{part}.ir": pair.ir}
        for modality, skips in zip(("vis", "ir"), self.skips, strict=True):
            names |= {f"skips.{modality}.{index}": skip for index, skip in enumerate(skips)}
        return names

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Encoded":
        """The inverse of `tensors`."""
        clean, mu, references = (
            Pair(tensors[f"{part}.vis"], tensors[f"{part}.ir"]) for part in ("clean", "mu", "references")
        )
        count = sum(name.startswith("skips.vis.") for name in tensors)
        vis_skips, ir_skips = (
            tuple(tensors[f"skips.{modality}.{index}"] for index in range(count)) for modality in ("vis", "ir")
        )
        return cls(clean, mu, (vis_skips, ir_skips), references)


class LatentSource:
    """Batches from crops that were degraded and encoded once, for stages that leave the autoencoder alone.

    `crops` holds all of them in one `Encoded`, in half precision, the references as uint8 levels.
    """

    def __init__(self, crops: Encoded) -> None:
        self.crops = crops

    def __len__(self) -> int:
        return len(self.crops.mu.vis)

    @classmethod
    def encode(cls, model: ReCoFuse, source: PairSource, count: int, crop: int, generator: Generator) -> "LatentSource":
        """`count` crops of `crop` x `crop` drawn from pairs, normalised and encoded by the model."""
        parts = []
        for start in range(0, count, 16):
            batch = source.draw(min(16, count - start), crop, generator).to(next(model.parameters()).device)
            with torch.no_grad():
                degraded = model.normalise(batch.degraded, batch.frame)
                clean, _, _ = encode_pair(model, batch.clean)
                mu, vis_skips, ir_skips = encode_pair(model, degraded)
                references = reconstruct(model, clean, (vis_skips, ir_skips), batch.clean)
            levels = Pair(*(to_uint8(image) for image in references))
            kept = Encoded(clean, mu, (vis_skips, ir_skips), levels).mapped(_halved)
            parts.append(kept.tensors())
        return cls(Encoded.from_tensors({name: torch.cat([part[name] for part in parts]) for name in parts[0]}))

    def draw(self, batch_size: int, generator: Generator) -> Encoded:
        """A batch of different crops in float32, references in [0, 1]."""
        chosen = torch.randperm(len(self), generator=generator)[:batch_size]

        def taken(tensor: Tensor) -> Tensor:
            part = tensor[chosen]
            return channels_last(to_float(part) if part.dtype == torch.uint8 else part.float())

        return self.crops.mapped(taken)


def _halved(tensor: Tensor) -> Tensor:
    return tensor.half().cpu() if tensor.is_floating_point() else tensor.cpu()
