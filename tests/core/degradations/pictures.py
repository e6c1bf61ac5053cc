"""Seeded generators and a smooth picture, for the tests of degradations."""

import torch
from torch import Generator, Tensor


def seeded(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


def smooth_image(channels: int, height: int = 48, width: int = 64) -> Tensor:
    """A structured image in [0.1, 0.9] with distinct channels."""
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 4, width), indexing="ij")
    return torch.stack([0.5 + 0.4 * torch.sin(x + c) * torch.cos(y * (1 + c)) for c in range(channels)])
