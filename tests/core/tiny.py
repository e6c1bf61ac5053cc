"""Models small enough for a test to run whole, with weights that do something: a fresh block is the identity."""

from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor, nn

from recofuse_core.model import ModelConfig, ReCoFuse, build_model
from recofuse_core.networks import (
    DenoiserConfig,
    FusionConfig,
    GatedAutoencoderConfig,
    PaperAutoencoderConfig,
)
from recofuse_core.picture import FusionOutput
from recofuse_core.sde import SDEConfig

GATED = ModelConfig(
    GatedAutoencoderConfig(8, 16, (1, 1), (1, 1), latent_channels=4),
    DenoiserConfig(4, 8, (1, 1), 1, (1, 1), sinusoid_dim=16, time_dim=16, prediction="clean"),
    FusionConfig(4, width=16, time_dim=64, num_groups=4),
    SDEConfig(),
    sampler="ode2",
    steps=3,
)
PUBLISHED = ModelConfig(
    PaperAutoencoderConfig(4, (1, 2, 2, 2), latent_channels=4),
    DenoiserConfig(4, 8, (1, 2), 1, (1, 1), sinusoid_dim=16, time_dim=16),
    FusionConfig(4, width=16, time_dim=64, num_groups=4),
    SDEConfig(),
    sampler="euler",
    steps=4,
)

CONFIGS = pytest.mark.parametrize("config", [GATED, PUBLISHED], ids=["gated", "published"])

LAST_LAYERS = ("autoencoder.head.weight", "autoencoder.final_conv.weight")


def tiny_model(config: ModelConfig = GATED, seed: int = 0) -> ReCoFuse:
    generator = Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # fresh weights are drawn from the global generator
        model = build_model(config, name="tiny", version="1").eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2 and "beta" not in name and "gamma" not in name:
            last = name in LAST_LAYERS  # so that pictures stay within [0, 1], where clamping hides nothing
            parameter.data = (0.1 if last else 1) * noise / parameter[0].numel() ** 0.5
        elif name == "autoencoder.final_conv.bias":
            parameter.data.fill_(0.5)
        else:
            parameter.data += 0.1 * noise
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def images_of(output: FusionOutput) -> list[Tensor]:
    return [image for image in (output.fused, output.vis, output.ir) if image is not None]


def largest_difference(one: FusionOutput, other: FusionOutput) -> float:
    together = zip(images_of(one), images_of(other), strict=True)
    return max(float((a.float() - b.float()).abs().max()) for a, b in together)


def rms_difference(one: FusionOutput, other: FusionOutput) -> float:
    """The largest of the pictures' root mean squares of the difference."""
    together = zip(images_of(one), images_of(other), strict=True)
    return max(float((a.float() - b.float()).square().mean().sqrt()) for a, b in together)


def pairs(batch: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images with some structure: vis (B, 3, H, W) and ir (B, 1, H, W) in [0, 1]."""
    generator = Generator().manual_seed(seed)
    coarse = torch.rand(batch, 4, 5, 6, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    images = (images + 0.05 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    return images[:, :3].contiguous(), images[:, 3:].contiguous()


class _Called(nn.Module):
    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(*inputs)


def exported(call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """What a function gives as it is written for other runtimes."""
    result: Tensor = torch.export.export(_Called(call), inputs, strict=False).module()(*inputs)
    return result


def psnr_of(image: Tensor, target: Tensor) -> float:
    return float(-10 * torch.log10((image - target).square().mean()))
