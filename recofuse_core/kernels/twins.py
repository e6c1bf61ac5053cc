"""What each kernel computes, said with torch's own operations. See operations.py for the shapes."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from recofuse_core.kernels.operations import TILE


def norm_product(
    x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float, gated: bool
) -> Tensor:
    """Layer norm, modulation, product, gate."""
    normed = torch.addcmul(shift[:, None], F.layer_norm(x, x.shape[-1:], eps=eps), gain[:, None])
    made = normed @ weight + bias[:, None]
    return _gated(made) if gated else made


def depthwise_gate(wide: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Depthwise convolution, gate, sums over tiles of positions."""
    planes, num_rows, channels = wide.shape
    branches = len(weight)
    images = wide.view(branches, -1, height, width, channels).permute(1, 0, 4, 2, 3).flatten(1, 2)
    kernels = weight.mT.reshape(branches * channels, 1, 3, 3)
    mixed = F.conv2d(images, kernels, bias.flatten(), padding=1, groups=branches * channels)
    gated = _gated(mixed.view(-1, branches, channels, num_rows).permute(1, 0, 3, 2).reshape(planes, num_rows, channels))
    tiles = F.pad(gated.float(), (0, 0, 0, -num_rows % TILE)).view(planes, -1, TILE, channels // 2)
    return gated, tiles.sum(dim=2)


def attend(sums: Tensor, weight: Tensor, bias: Tensor, num_positions: int) -> Tensor:
    """Mean and product."""
    means = (sums.sum(dim=1) / num_positions).view(len(weight), -1, sums.shape[-1])
    return (means @ weight.float() + bias.float()[:, None]).flatten(0, 1)


def product_add(x: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """Scale, product, residual."""
    rows = x if scale is None else (x * scale[:, None]).to(x.dtype)
    branches = rows.view(len(weight), -1, rows.shape[-1])
    return (branches @ weight + bias[:, None]).view_as(x) + residual


def finish(
    gated: Tensor,
    attention: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    gain: Tensor,
    shift: Tensor,
    eps: float,
) -> Tensor:
    """The three of them."""
    y = product_add(gated, attention, weights[0], biases[0], x)
    rows = y.view(len(gain), -1, y.shape[-1])
    v = norm_product(rows, gain, shift, weights[1], biases[1], eps, True)
    return product_add(v.view_as(y), None, weights[2], biases[2], y)


def _gated(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return first * second
