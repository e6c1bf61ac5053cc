"""The kernels of the fusion module (TIM) as operations of torch; see operations.py for what all of them share.

Letters: B batch, C latent channels, W channels of the module, n branches with weights of their own (1, or 2: infrared
and visible, in the order of the time vector's parts), N positions, T tiles of positions. Latents are float32
(B, C, h, w) of any strides, all else contiguous.

A modulation is (n, 2, W), shift and then scale: rows plus bias are taken times (scale + 1) plus shift. The rows of the
branches come as `parts`, n of (B, N, W), as convolutions without bias leave them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, library

from recofuse_core.kernels.operations import NAMESPACE

TILE = 64  # positions of one tile of what goes through memory


def num_tiles(num_rows: int) -> int:
    """Tiles that hold so many positions."""
    return -(-num_rows // TILE)


@library.custom_op(f"{NAMESPACE}::project", mutates_args=())
def project(vis: Tensor, ir: Tensor, weight: Tensor, bias: Tensor, pool: int, swapped: bool) -> Tensor:
    """Latents averaged over squares of `pool`, times weight (2, C, D) plus bias (2, D): (2, B, N, D), vis first.

    swapped: the first weight is for ir.
    """
    from recofuse_core.kernels import latent_fusion

    return latent_fusion.project(vis, ir, weight, bias, pool, swapped)


@project.register_fake
def _(vis: Tensor, ir: Tensor, weight: Tensor, bias: Tensor, pool: int, swapped: bool) -> Tensor:
    batch, _, height, width = vis.shape
    return weight.new_empty(2, batch, -(-height // pool) * -(-width // pool), weight.shape[-1])


@library.custom_op(f"{NAMESPACE}::beside", mutates_args=())
def beside(mixed: Tensor, vis: Tensor, ir: Tensor) -> Tensor:
    """What both latents attended to, (2, B, N, D) with D >= C, plus the latents themselves: (B, N, 2C)."""
    from recofuse_core.kernels import latent_fusion

    return latent_fusion.beside(mixed, vis, ir)


@beside.register_fake
def _(mixed: Tensor, vis: Tensor, ir: Tensor) -> Tensor:
    return mixed.new_empty(mixed.shape[1], mixed.shape[2], 2 * vis.shape[1])


@library.custom_op(f"{NAMESPACE}::tile_sums", mutates_args=())
def tile_sums(x: Tensor, bias: Tensor) -> Tensor:
    """Of x (B, N, W) plus bias (W), for each tile its sum and its squared distance from its own mean: (1, B, T, 2, W).

    In float32.
    """
    from recofuse_core.kernels import latent_fusion

    return latent_fusion.tile_sums(x, bias, TILE)


@tile_sums.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    batch, num_rows, channels = x.shape
    return x.new_empty(1, batch, num_tiles(num_rows), 2, channels, dtype=torch.float32)


@library.custom_op(f"{NAMESPACE}::norm_coefficients", mutates_args=())
def norm_coefficients(
    sums: Tensor, gain: Tensor, shift: Tensor, bias: Tensor, groups: int, eps: float, num_rows: int
) -> Tensor:
    """Group norms of what the sums (n or 1, B, T, 2, W) are of, as factor and summand: (n, B, 2, W) in float32.

    gain, shift: (n, W). bias (n, W): what the sums have and the rows, to which the result is applied, have not.
    """
    from recofuse_core.kernels import latent_fusion

    return latent_fusion.norm_coefficients(sums, gain, shift, bias, groups, eps, num_rows, TILE)


@norm_coefficients.register_fake
def _(sums: Tensor, gain: Tensor, shift: Tensor, bias: Tensor, groups: int, eps: float, num_rows: int) -> Tensor:
    return sums.new_empty(len(gain), sums.shape[1], 2, sums.shape[-1])


@library.custom_op(f"{NAMESPACE}::norm_silu", mutates_args=())
def norm_silu(x: Tensor, coefficients: Tensor) -> Tensor:
    """SiLU of x (n or 1, B, N, W) times the first coefficients plus the second, (n, B, 2, W)."""
    from recofuse_core.kernels import latent_fusion

    return latent_fusion.norm_silu(x, coefficients)


@norm_silu.register_fake
def _(x: Tensor, coefficients: Tensor) -> Tensor:
    return x.new_empty(len(coefficients), *x.shape[1:])


@library.custom_op(f"{NAMESPACE}::channel_pools", mutates_args=())
def channel_pools(parts: Sequence[Tensor], bias: Tensor, modulation: Tensor) -> Tensor:
    """Sums and greatest values of the modulated rows over each tile: (n, B, T, 2, W) in float32. bias: (n, W)."""
    from recofuse_core.kernels import latent_fusion

    return latent_fusion.channel_pools(parts, bias, modulation, TILE)


@channel_pools.register_fake
def _(parts: Sequence[Tensor], bias: Tensor, modulation: Tensor) -> Tensor:
    batch, num_rows, channels = parts[0].shape
    return parts[0].new_empty(len(parts), batch, num_tiles(num_rows), 2, channels, dtype=torch.float32)


@library.custom_op(f"{NAMESPACE}::channel_attention", mutates_args=())
def channel_attention(pools: Tensor, squeeze: Tensor, excite: Tensor, num_rows: int) -> Tensor:
    """CBAM's attention to channels (n, B, W) in float32. squeeze: (n, W, R), excite: (n, R, W)."""
    from recofuse_core.kernels import latent_fusion

    return latent_fusion.channel_attention(pools, squeeze, excite, num_rows)


@channel_attention.register_fake
def _(pools: Tensor, squeeze: Tensor, excite: Tensor, num_rows: int) -> Tensor:
    return pools.new_empty(*pools.shape[:2], pools.shape[-1])


@library.custom_op(f"{NAMESPACE}::spatial_maps", mutates_args=())
def spatial_maps(parts: Sequence[Tensor], bias: Tensor, modulation: Tensor, attention: Tensor) -> Tensor:
    """Mean and greatest value over the channels of the modulated rows times attention: (n, B, N, 2) in float32."""
    from recofuse_core.kernels import latent_fusion

    return latent_fusion.spatial_maps(parts, bias, modulation, attention)


@spatial_maps.register_fake
def _(parts: Sequence[Tensor], bias: Tensor, modulation: Tensor, attention: Tensor) -> Tensor:
    return attention.new_empty(len(parts), *parts[0].shape[:2], 2)


@library.custom_op(f"{NAMESPACE}::spatial_gate", mutates_args=())
def spatial_gate(
    parts: Sequence[Tensor],
    bias: Tensor,
    modulation: Tensor,
    attention: Tensor,
    maps: Tensor,
    weight: Tensor,
    offset: Tensor,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """CBAM's attention to positions, a convolution of both maps: weight (n, 2, side, side), offset (n).

    Returns the modulated rows times both attentions, (n, B, N, W), and of these what `tile_sums` gives.
    """
    from recofuse_core.kernels import latent_fusion

    return latent_fusion.spatial_gate(parts, bias, modulation, attention, maps, weight, offset, height, width, TILE)


@spatial_gate.register_fake
def _(
    parts: Sequence[Tensor],
    bias: Tensor,
    modulation: Tensor,
    attention: Tensor,
    maps: Tensor,
    weight: Tensor,
    offset: Tensor,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    batch, num_rows, channels = parts[0].shape
    sums = attention.new_empty(len(parts), batch, num_tiles(num_rows), 2, channels)
    return parts[0].new_empty(len(parts), batch, num_rows, channels), sums


@library.custom_op(f"{NAMESPACE}::weigh", mutates_args=())
def weigh(ir_logits: Tensor, vis_logits: Tensor, bias: Tensor, vis: Tensor, ir: Tensor) -> Tensor:
    """Each latent times the sigmoid of its logits (B, N, C) plus bias (2, C; of ir first), summed: (B, C, h, w).

    Channels last, in float32: the latents themselves are never rounded.
    """
    from recofuse_core.kernels import latent_fusion

    return latent_fusion.weigh(ir_logits, vis_logits, bias, vis, ir)


@weigh.register_fake
def _(ir_logits: Tensor, vis_logits: Tensor, bias: Tensor, vis: Tensor, ir: Tensor) -> Tensor:
    batch, channels, height, width = vis.shape
    return vis.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)
