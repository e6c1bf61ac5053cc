"""Blocks of the networks with weights that do something, and what comes to them."""

import torch
from torch import Generator, Tensor

from recofuse_core.layers import GatedConvBlock

Modulations = tuple[Tensor, Tensor, Tensor, Tensor]


def gated_block(channels: int, seed: int = 0) -> GatedConvBlock:
    block = GatedConvBlock(channels).requires_grad_(False)
    generator = Generator().manual_seed(seed)
    for parameter in block.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 and parameter.shape[0] > 1 else 4
        parameter.data = torch.randn(parameter.shape, generator=generator) / max(fan_in, 1) ** 0.5
    return block


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed)).to(dtype)


def modulations(branches: int, channels: int, dtype: torch.dtype = torch.float32) -> Modulations:
    one, two, three, four = drawn(4, branches, 1, 1, 1, channels, dtype=dtype, seed=9)
    return 1 + one / 2, two / 2, 1 + three / 2, four / 2
