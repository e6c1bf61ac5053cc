"""The kernels as operations of torch, so that whatever watches operations sees each as one.

Their shapes are known without Triton; it is imported when the first one is run. On a CPU they run where Triton
interprets kernels (TRITON_INTERPRET=1), for tests. Nothing here is differentiated. All tensors are contiguous.

Letters: n branches with weights of their own, P planes (n times the batch), N rows of a plane, C channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, library

NAMESPACE = "recofuse"
WIDEST_WHOLE = 256  # channels of a row that `finish` can hold at once

TILE = 64  # positions of one tile of the sums that go through memory


@library.custom_op(f"{NAMESPACE}::norm_product", mutates_args=())
def norm_product(
    x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float, gated: bool
) -> Tensor:
    """Layer norm of rows (n, N, C) times gain plus shift, (n, C) each, times weight (n, C, D) plus bias (n, D).

    gated: the first half of the D results times the second.
    """
    from recofuse_core.kernels import gated_block

    return gated_block.norm_product(x, gain, shift, weight, bias, eps, gated)


@norm_product.register_fake
def _(x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float, gated: bool) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[-1] // (2 if gated else 1))


@library.custom_op(f"{NAMESPACE}::depthwise_gate", mutates_args=())
def depthwise_gate(wide: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Depthwise 3x3 convolution of (P, h w, 2C), weight (n, 9, 2C), bias (n, 2C); first half of it times the second.

    Returns that, (P, h w, C), and its float32 sums over tiles of positions, (P, tiles, C).
    """
    from recofuse_core.kernels import gated_block

    return gated_block.depthwise_gate(wide, weight, bias, height, width, TILE)


@depthwise_gate.register_fake
def _(wide: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    planes, num_rows, twice = wide.shape
    sums = wide.new_empty(planes, -(-num_rows // TILE), twice // 2, dtype=torch.float32)
    return wide.new_empty(planes, num_rows, twice // 2), sums


@library.custom_op(f"{NAMESPACE}::attend", mutates_args=())
def attend(sums: Tensor, weight: Tensor, bias: Tensor, num_positions: int) -> Tensor:
    """The means (P, C) from the sums over tiles (P, tiles, C), times weight (n, C, C) plus bias (n, C), in float32."""
    from recofuse_core.kernels import gated_block

    return gated_block.attend(sums, weight, bias, num_positions)


@attend.register_fake
def _(sums: Tensor, weight: Tensor, bias: Tensor, num_positions: int) -> Tensor:
    return sums.new_empty(sums.shape[0], sums.shape[2])


@library.custom_op(f"{NAMESPACE}::product_add", mutates_args=())
def product_add(x: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """X (P, N, C), times scale (P, C) if there is one, times weight (n, C, C) plus bias (n, C) plus residual."""
    from recofuse_core.kernels import gated_block

    return gated_block.product_add(x, scale, weight, bias, residual)


@product_add.register_fake
def _(x: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return torch.empty_like(x)


@library.custom_op(f"{NAMESPACE}::finish", mutates_args=())
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
    """What follows a block's attention: `product_add` of gated and attention, gated `norm_product`, `product_add`.

    For rows of at most WIDEST_WHOLE channels. x, gated: (P, N, C); attention: (P, C);
    weights: (n, C, C), (n, C, 2C), (n, C, C); biases: (n, C), (n, 2C), (n, C).
    """
    from recofuse_core.kernels import gated_block

    first, second, third = weights
    return gated_block.finish(gated, attention, x, (first, second, third), tuple(biases), gain, shift, eps)  # type: ignore[arg-type]


@finish.register_fake
def _(
    gated: Tensor,
    attention: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    gain: Tensor,
    shift: Tensor,
    eps: float,
) -> Tensor:
    return torch.empty_like(x)
