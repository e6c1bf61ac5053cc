"""What each kernel computes, said with torch's own operations. See operations.py and its like for the shapes."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from recofuse_core.finishing import widened
from recofuse_core.kernels import fusion_operations as operations
from recofuse_core.kernels import picture_operations
from recofuse_core.kernels.operations import TILE
from recofuse_core.losses import luma
from recofuse_core.networks import unit_range


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


# --- the fusion module, see fusion_operations.py ----------------------------------------------------------------------


def project(vis: Tensor, ir: Tensor, weight: Tensor, bias: Tensor, pool: int, swapped: bool) -> Tensor:
    """Mean and product."""
    images = torch.stack([ir, vis] if swapped else [vis, ir]).to(weight.dtype)
    means = F.avg_pool2d(images.flatten(0, 1), pool, ceil_mode=True, count_include_pad=False)
    rows = _unflat(means.flatten(2).mT, 0, images.shape[0])
    return rows @ weight[:, None] + bias[:, None, None]


def beside(mixed: Tensor, vis: Tensor, ir: Tensor) -> Tensor:
    """Addition and concatenation."""
    asked = torch.stack([vis, ir]).to(mixed.dtype).flatten(3).mT  # (2, B, N, C)
    return torch.cat(list(mixed[..., : vis.shape[1]] + asked), dim=-1)


def tile_sums(x: Tensor, bias: Tensor) -> Tensor:
    """Sums over tiles, and of squares."""
    return _tile_sums(x[None].float() + bias.float())


def norm_coefficients(
    sums: Tensor, gain: Tensor, shift: Tensor, bias: Tensor, groups: int, eps: float, num_rows: int
) -> Tensor:
    """Means and variances of groups, put together from those of tiles."""
    filled = torch.full((sums.shape[2],), float(operations.TILE), device=sums.device)
    filled[-1] = num_rows - operations.TILE * (len(filled) - 1)
    filled = filled[:, None, None]
    by_group = _unflat(sums, -1, groups)  # (n, B, T, 2, groups, members)
    total, within = by_group.unbind(3)
    count = num_rows * by_group.shape[-1]
    mean = total.sum(dim=(2, 4), keepdim=True) / count
    variance = (within + filled * (total / filled - mean).square()).sum(dim=(2, 4), keepdim=True) / count
    inverse = (variance + eps).rsqrt().expand_as(total[:, :, :1]).flatten(3)[:, :, 0]  # (n, B, W)
    times = gain.float()[:, None] * inverse
    before = bias.float()[:, None] - mean.expand_as(total[:, :, :1]).flatten(3)[:, :, 0]
    return torch.stack([times, shift.float()[:, None] + before * times], dim=2)


def norm_silu(x: Tensor, coefficients: Tensor) -> Tensor:
    """One line."""
    return F.silu(x.float() * coefficients[:, :, :1] + coefficients[:, :, 1:]).to(x.dtype)


def channel_pools(parts: Sequence[Tensor], bias: Tensor, modulation: Tensor) -> Tensor:
    """Sums and maxima over tiles."""
    rows = _modulated(parts, bias, modulation)
    missing = (0, 0, 0, -rows.shape[2] % operations.TILE)
    tiles = operations.num_tiles(rows.shape[2])
    sums = _unflat(F.pad(rows, missing), 2, tiles).sum(dim=3)
    return torch.stack([sums, _unflat(F.pad(rows, missing, value=-torch.inf), 2, tiles).amax(dim=3)], dim=3)


def channel_attention(pools: Tensor, squeeze: Tensor, excite: Tensor, num_rows: int) -> Tensor:
    """Two layers, twice."""
    both = torch.stack([pools[:, :, :, 0].sum(dim=2) / num_rows, pools[:, :, :, 1].amax(dim=2)])  # (2, n, B, W)
    logits: Tensor = (F.relu(both @ squeeze.float()) @ excite.float()).sum(dim=0)
    return logits.sigmoid()


def spatial_maps(parts: Sequence[Tensor], bias: Tensor, modulation: Tensor, attention: Tensor) -> Tensor:
    """Mean and maximum."""
    rows = _modulated(parts, bias, modulation) * attention[:, :, None]
    return torch.stack([rows.mean(dim=-1), rows.amax(dim=-1)], dim=-1)


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
    """Convolution, sigmoid, product."""
    side = weight.shape[-1]
    images = _unflat(maps, 2, height).permute(1, 0, 4, 2, 3).flatten(1, 2)  # (B, 2 n, h, w)
    logits = F.conv2d(images, weight.float(), offset.float(), padding=side // 2, groups=len(weight))
    opened = logits.sigmoid().flatten(2).mT.permute(2, 0, 1)[..., None]  # (n, B, N, 1)
    rows = _modulated(parts, bias, modulation) * attention[:, :, None] * opened
    return rows.to(parts[0].dtype), _tile_sums(rows)


def weigh(ir_logits: Tensor, vis_logits: Tensor, bias: Tensor, vis: Tensor, ir: Tensor) -> Tensor:
    """Sigmoid, product, sum."""
    shape, added = vis.shape, bias.float()
    of_ir = (ir_logits.float() + added[0]).sigmoid().mT.reshape(shape) * ir
    of_vis = (vis_logits.float() + added[1]).sigmoid().mT.reshape(shape) * vis
    return of_ir + of_vis


def _modulated(parts: Sequence[Tensor], bias: Tensor, modulation: Tensor) -> Tensor:
    shift, scale = modulation.float()[:, :, None, None].unbind(1)  # (n, 1, 1, W)
    return (torch.stack(list(parts)).float() + bias.float()[:, None, None]) * (scale + 1) + shift


def _tile_sums(rows: Tensor) -> Tensor:
    """Of (n, B, N, W) in float32."""
    num_rows = rows.shape[2]
    is_there = torch.arange(num_rows + -num_rows % operations.TILE, device=rows.device) < num_rows
    is_there = is_there.view(-1, operations.TILE, 1)
    tiles = _unflat(F.pad(rows, (0, 0, 0, -num_rows % operations.TILE)), 2, operations.num_tiles(num_rows))
    total = tiles.sum(dim=3)
    apart = (tiles - (total / is_there.sum(dim=1))[:, :, :, None]) * is_there
    return torch.stack([total, apart.square().sum(dim=3)], dim=3)


def _unflat(x: Tensor, dim: int, count: int) -> Tensor:
    """One dimension as two, of which the first is of `count`."""
    made: Tensor = x.unflatten(dim, (count, -1))  # type: ignore[no-untyped-call]
    return made


# --- both ends of a run, see picture_operations.py --------------------------------------------------------------------


def unshuffled(image: Tensor, factor: int, middle: float, dtype: torch.dtype) -> Tensor:
    """Every pixel to its place."""
    return F.pixel_unshuffle(unit_range(image) - middle, factor).to(dtype)


def luma_cells(image: Tensor, grid: int) -> Tensor:
    """Clamp, luma, mean."""
    return F.adaptive_avg_pool2d(luma(image.clamp(0.0, 1.0)), grid).flatten(1)


def ranked(values: Tensor, first: int, last: int) -> Tensor:
    """All of it sorted."""
    return values.sort(dim=1).values[:, [first, last]]


def paint(
    image: Tensor, ends: Tensor | None, share: float, gain: float, grey: bool, levels: bool
) -> tuple[Tensor, Tensor]:
    """As `Finish`, with the ends known."""
    missing = -image[0, 0].numel() % picture_operations.TILE
    tiles = F.pad(torch.isfinite(image).all(dim=1).flatten(1), (0, missing), value=True)
    made = image.clamp(0.0, 1.0)
    if ends is not None:
        low, high = (end.view(-1, 1, 1, 1) for end in ends.unbind(1))
        made = widened(made, luma(made), low, high, share, gain)
    made = made.mean(dim=1, keepdim=True) if grey else made
    return (made * 255).round().byte() if levels else made, tiles.view(len(tiles), -1, picture_operations.TILE).all(
        dim=-1
    )
