"""Blocks that the networks share: time embedding, channel norm, gated convolution block, attentions.

Everything is NCHW by meaning; memory may be channels_last, which is the fast layout for all of it. A block computes in
the dtype of its weights; the statistics of its norms are float32 in every dtype.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HALVES = (torch.bfloat16, torch.float16)
MAX_ROWS_OF_PRODUCT = 1024
HEAD_MULTIPLE = 16  # channels of an attention head are filled up to a multiple of it
MAX_CONTEXT_SIDE = 20  # squares a side of a pooled context: as many as a frame of 640 pixels has at a pool of 4
CHANNELS_AT_ONCE = 8  # that other runtimes take the greatest of
NORM_EPS = 1e-5  # the published code switches to 1e-3 for half inputs; statistics here are float32 in every dtype


def ramp(value: Tensor, start: float, end: float, most: float = 1.0) -> Tensor:
    """0 up to `start`, 1 from `end` on, linear between them and cut at `most`; falling where `end` is the lower one."""
    scale = 1 / (end - start)
    return scaled(value, scale, -start * scale).clamp(0.0, most)


def scaled(value: Tensor, scale: float, offset: float) -> Tensor:
    """Value times a number, plus a number, as one operation: torch has no other that does both."""
    return torch.rsub(value, offset, alpha=-scale)


def mixed(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """The first of two where share is 0, the second where it is 1, and so much of either between."""
    if not torch.compiler.is_exporting():
        return torch.lerp(first, second, share)
    return first + share * (second - first)  # of `lerp`, runtimes compute two forms and choose place by place


def average_to(grid: int, *images: Tensor) -> Tensor:
    """Images (B, C, H, W) of a size, joined and averaged to (B, C, grid, grid) cells, as `F.adaptive_avg_pool2d`.

    That has no form in ONNX for sizes that are not known beforehand; there, it is a product with the rows' and one with
    the columns' weights.
    """
    if not torch.compiler.is_compiling():
        return F.adaptive_avg_pool2d(torch.cat(images, dim=1) if len(images) > 1 else images[0], grid)
    rows, columns = (cell_weights(side, grid) for side in images[0].shape[-2:])
    return torch.cat([rows @ image @ columns.T for image in images], dim=1)


def cell_weights(length: int, grid: int) -> Tensor:
    """What every one of `length` places weighs in the mean of every cell, (grid, length): cells may share a place."""
    cells, places = torch.arange(grid)[:, None], torch.arange(length)[None]
    first, end = cells * length // grid, ((cells + 1) * length + grid - 1) // grid
    return ((places >= first) & (places < end)) / (end - first)


def block_means(image: Tensor, side: int) -> Tensor:
    """Means over blocks of side x side pixels, those at the far ends over what there is of them."""
    if not torch.compiler.is_exporting():
        return F.avg_pool2d(image, side, ceil_mode=True, count_include_pad=False)
    # Runtimes are several times as fast at convolutions as at pools.
    channels = image.shape[1]
    ones = torch.eye(channels)[:, :, None, None].expand(-1, -1, side, side)
    sums = F.conv2d(F.pad(image, (0, side - 1, 0, side - 1)), ones, stride=side)
    rows, columns = ((n - side * torch.arange(m)).clamp(max=side) for n, m in _sides(image, sums))
    return sums / (rows[:, None] * columns)


def stretched(joined: Tensor, size: tuple[int, ...], *channels: int) -> list[Tensor]:
    """Planes (B, C, h, w) at another size, linearly, and parted into so many channels each."""
    if torch.compiler.is_exporting():  # runtimes copy what is parted, which is less before it is stretched
        return [_stretched(part, size) for part in torch.split(joined, list(channels), dim=1)]
    # Three channels by themselves take torch more than twice as long on a processor: it turns their memory and back.
    return list(torch.split(_stretched(joined, size), list(channels), dim=1))


def _stretched(planes: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(planes, size, mode="bilinear", align_corners=False)


def surroundings(plane: Tensor) -> Tensor:
    """Means of every pixel and those beside it, of which there are fewer at the ends. plane: (B, 1, H, W)."""
    if not torch.compiler.is_exporting():
        return F.avg_pool2d(plane, 3, stride=1, padding=1, count_include_pad=False)
    sums = F.conv2d(plane, plane.new_ones(1, 1, 3, 3), padding=1)
    places = ((torch.arange(n), n - 1) for n, _ in _sides(plane, sums))
    rows, columns = (1 + at.clamp(max=1) + (last - at).clamp(max=1) for at, last in places)
    return sums / (rows[:, None] * columns)


def _sides(before: Tensor, after: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """Heights, then widths, of both."""
    return (before.shape[-2], after.shape[-2]), (before.shape[-1], after.shape[-1])


def channel_norm(x: Tensor, gain: Tensor, eps: float = NORM_EPS, bias: Tensor | None = None) -> Tensor:
    """Normalise every position over its channels, biased variance, times `gain` (C,) plus `bias`. x: (B, C, H, W)."""
    shift = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x.permute(0, 2, 3, 1), gain.shape, gain.to(x.dtype), shift, eps).permute(0, 3, 1, 2)


class Modulation(NamedTuple):
    """What a time vector makes of a norm's output: times `scale` plus `shift`.

    (C,) each for one step of the whole batch, the norm's gain folded into `scale`, so that it costs nothing beside
    the norm; (B, C, 1, 1) each for a step per item, applied after the gain.
    """

    scale: Tensor
    shift: Tensor


class ChannelNorm(nn.Module):
    """Layer norm over channels with a gain and no bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor, modulation: Modulation | None = None) -> Tensor:
        if modulation is None:
            return channel_norm(x, self.gain)
        if modulation.scale.ndim == 1:
            return channel_norm(x, modulation.scale, bias=modulation.shift)
        return torch.addcmul(modulation.shift, channel_norm(x, self.gain), modulation.scale)

    def modulation(self, shift: Tensor, scale: Tensor) -> Modulation:
        """The `Modulation` for x (scale + 1) + shift; shift, scale: (B, C), or (1, C) for the whole batch."""
        if len(scale) == 1:
            return Modulation(self.gain.to(scale.dtype) * (scale[0] + 1), shift[0])
        return Modulation((scale + 1)[:, :, None, None], shift[:, :, None, None])


def pointwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 1x1 convolution. With few positions in half precision a matrix product over the rows is the faster form of it.

    A CPU convolution rearranges its weights on every call, which is most of the time of a wide layer on a small grid.
    """
    if not _is_product_faster(x, conv, x.shape[0] * x.shape[2] * x.shape[3]):
        return conv(x)  # type: ignore[no-any-return]
    return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


def double(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 1x1 convolution without bias to four times the channels, shuffled to twice the sides.

    (B, C, h, w) to (B, C', 2 h, 2 w), where conv has 4 C' channels.
    """
    if not torch.compiler.is_exporting():
        return F.pixel_shuffle(pointwise(x, conv), 2)
    return doubled_by(x, conv.weight)


def doubled_by(x: Tensor, weight: Tensor) -> Tensor:
    """`double` for other runtimes, by the convolution's weight (4 C', C, 1, 1).

    There a pixel shuffle is a transpose that moves number by number; this one moves all channels of a position at once.
    """
    batch, channels, height, width = x.shape
    places = weight.view(-1, 2, 2, channels).permute(1, 2, 0, 3).reshape(-1, channels, 1, 1)  # row, column, channel
    wide = F.conv2d(x, places).permute(0, 2, 3, 1)
    rows = wide.reshape(batch, height, width, 2, -1).transpose(2, 3)  # (B, h, row, w, column and channel)
    doubled: Tensor = rows.reshape(batch, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)
    return doubled


def halve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 2x2 convolution of stride 2 over even sides, as a product where `pointwise` would be one."""
    batch, channels, height, width = x.shape
    if not _is_product_faster(x, conv, batch * height * width // 4):
        return conv(x)  # type: ignore[no-any-return]
    quads = x.permute(0, 2, 3, 1).reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(2, 3)
    rows = quads.reshape(batch, height // 2, width // 2, 4 * channels)  # (row, column, channel), as the weight below
    return F.linear(rows, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias).permute(0, 3, 1, 2)


def _is_product_faster(x: Tensor, conv: nn.Conv2d, num_rows: int) -> bool:
    return conv.weight.dtype in HALVES and (x.device.type != "cpu" or num_rows <= MAX_ROWS_OF_PRODUCT)


def gate(x: Tensor) -> Tensor:
    """SimpleGate: first half of the channels times the second."""
    first, second = x.chunk(2, dim=1)
    return first * second


def sinusoid(timesteps: Tensor, dim: int) -> Tensor:
    """[sin(t f); cos(t f)] with f_k = 10000^(-k/(dim/2 - 1)). timesteps: (B,). Returns (B, dim) float32."""
    half = dim // 2
    exponent = torch.arange(half, device=timesteps.device, dtype=torch.float32) * (-math.log(10000) / (half - 1))
    angle = timesteps.float()[:, None] * torch.exp(exponent)[None, :]
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class TimeEmbedding(nn.Module):
    """Integer steps (B,) to vectors (B, time_dim): sinusoid, linear, gate, linear."""

    def __init__(self, sinusoid_dim: int, time_dim: int) -> None:
        super().__init__()
        self.sinusoid_dim = sinusoid_dim
        self.expand = nn.Linear(sinusoid_dim, 2 * time_dim)
        self.project = nn.Linear(time_dim, time_dim)

    def forward(self, timesteps: Tensor) -> Tensor:
        wave = sinusoid(timesteps, self.sinusoid_dim).to(self.expand.weight.dtype)
        projected: Tensor = self.project(gate(self.expand(wave)))
        return projected


class TimeTable(nn.Module):
    """Integer steps (B,) from 0 to num_steps to vectors (B, time_dim): each that an embedding makes, kept itself.

    They are fewer numbers than a wide embedding has, and there is nothing to compute.
    """

    def __init__(self, num_steps: int, embedding: TimeEmbedding) -> None:
        super().__init__()
        with torch.no_grad():
            self.vectors = nn.Parameter(embedding(torch.arange(num_steps + 1)))

    def forward(self, timesteps: Tensor) -> Tensor:
        return F.embedding(timesteps, self.vectors)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x (scale + 1) + shift with shift and scale (B or 1, C, 1, 1)."""
    return torch.addcmul(shift, x, scale + 1)


class GatedConvBlock(nn.Module):
    """NAF block (Chen et al., ECCV 2022), optionally modulated by a time vector (docs/model.md, 3).

    Gated depthwise mixing with channel attention, then a gated pointwise mixing; residual gains start at zero, so a
    new block is the identity.
    """

    def __init__(self, channels: int, time_dim: int | None = None) -> None:
        super().__init__()
        self.time_projection = nn.Linear(time_dim // 2, 4 * channels) if time_dim else None
        self.norm1 = ChannelNorm(channels)
        self.expand1 = nn.Conv2d(channels, 2 * channels, 1)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.attention = nn.Conv2d(channels, channels, 1)
        self.project1 = nn.Conv2d(channels, channels, 1)
        self.norm2 = ChannelNorm(channels)
        self.expand2 = nn.Conv2d(channels, 2 * channels, 1)
        self.project2 = nn.Conv2d(channels, channels, 1)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def modulation(self, time: Tensor) -> tuple[Modulation, Modulation]:
        """What both norms are modulated by, from time vectors (B, time_dim), in the dtype of the convolutions."""
        assert self.time_projection is not None, "this block was built without a time vector"
        projected = self.time_projection(gate(time)).to(self.expand1.weight.dtype)
        shift1, scale1, shift2, scale2 = projected.chunk(4, dim=1)
        return self.norm1.modulation(shift1, scale1), self.norm2.modulation(shift2, scale2)

    def forward(self, x: Tensor, modulation: tuple[Modulation, Modulation] | None = None) -> Tensor:
        first, second = modulation or (None, None)
        u = gate(self.depthwise(pointwise(self.norm1(x, first), self.expand1)))
        u = u * pointwise(u.mean(dim=(2, 3), keepdim=True), self.attention)
        y = torch.addcmul(x, pointwise(u, self.project1), self.beta)
        v = gate(pointwise(self.norm2(y, second), self.expand2))
        return torch.addcmul(y, pointwise(v, self.project2), self.gamma)


class LinearAttention(nn.Module):
    """Attention of cost linear in positions: softmax over channels for q and over positions for k.

    Four heads of 32. The published form divides v by the number of positions; a channel norm follows, so the tiny scale
    only meets that norm's eps. It is computed in float32, where nothing underflows.
    """

    HEADS = 4
    HEAD_DIM = 32

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = self.HEADS * self.HEAD_DIM
        self.to_qkv = nn.Conv2d(channels, 3 * hidden, 1, bias=False)
        self.to_out = nn.Conv2d(hidden, channels, 1)
        self.out_norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        qkv = self.to_qkv(x)
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = qkv.float().view(batch, 3, self.HEADS, self.HEAD_DIM, height * width).unbind(1)
            q = q.softmax(dim=-2) * self.HEAD_DIM**-0.5  # (B, heads, d, n)
            context = k.softmax(dim=-1) @ (v / (height * width)).transpose(-1, -2)  # (B, heads, d, e)
            mixed = (context.transpose(-1, -2) @ q).reshape(batch, -1, height, width)
            projected = F.conv2d(mixed, self.to_out.weight.float(), _float_or_none(self.to_out.bias))
            return channel_norm(projected, self.out_norm.gain.float()).to(x.dtype)


def _float_or_none(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def context_square(pool: int, height: int, width: int) -> int:
    """The side, in positions, of the squares that a context of height x width positions is averaged over.

    The least multiple of `pool` that leaves no more than MAX_CONTEXT_SIDE along a side, so that attention costs as much
    a position in large frames as in smaller ones (docs/decisions/0045). A pool of 1, as published, stays what it is.
    """
    return pool * _times(_rounded_up(height, pool), _rounded_up(width, pool)) if pool > 1 else 1


def _times(rows: int, columns: int) -> int:
    """How many of so many squares become one along a side."""
    most: int = torch.sym_max(rows, columns)  # type: ignore[no-untyped-call]
    return _rounded_up(most, MAX_CONTEXT_SIDE)


def coarser(means: Tensor, size: tuple[int, int], side: int, times: int) -> Tensor:
    """Means over squares of `times` the side, from those of an image of this size over squares of `side`.

    (B, C, h, w) to (B, C, ceil(h / times), ceil(w / times)). A product with what each weighs in the rows and one in the
    columns, so that `times` need not be known beforehand.
    """
    rows, columns = (_merging(length, side, times) for length in size)
    return rows @ means @ columns.mT


def _merging(length: int, side: int, times: int) -> Tensor:
    """What means over `side` of `length` places weigh in means over `times` as many: 1, if it is once."""
    count = _rounded_up(length, side)
    squares = torch.arange(count)
    sizes = (length - side * squares).clamp(max=side)
    weights = (squares // times == torch.arange(_rounded_up(count, times))[:, None]) * sizes
    return weights / weights.sum(dim=1, keepdim=True)


def _rounded_up(length: int, side: int) -> int:
    """Length / side, without negative numbers, which other runtimes round towards zero."""
    return (length + side - 1) // side


class CrossAttention(nn.Module):
    """Single-head attention of every position of `query` to every position of `context`, plus `query` (TIM, step 2).

    pool: least side of the squares that `context` is averaged over first (`context_square`). 1, as published, costs the
    square of the pixels.
    """

    def __init__(self, channels: int, pool: int = 1) -> None:
        super().__init__()
        self.pool = pool
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)

    def pooled(self, context: Tensor) -> Tensor:
        """What is attended to: (B, C, h, w) to (B, C, ceil(h / s), ceil(w / s)) with s = `context_square`."""
        height, width = context.shape[-2:]
        if self.pool == 1:
            return context
        if not torch.compiler.is_exporting():
            square = context_square(self.pool, height, width)
            return F.avg_pool2d(context, square, ceil_mode=True, count_include_pad=False)
        means = F.avg_pool2d(context, self.pool, ceil_mode=True, count_include_pad=False)
        return coarser(means, (height, width), self.pool, _times(*means.shape[-2:]))

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        batch, channels, height, width = query.shape
        context = self.pooled(context)
        # Contiguous (B, 1, n, C): four times faster on a CPU than strided views. Zeros up to whole vectors change
        # nothing but the time: a third less for the eight channels of the published latents.
        missing = -channels % HEAD_MULTIPLE
        q, k, v = (
            (F.pad(rows, (0, missing)) if missing else rows).contiguous()[:, None]
            for rows in (
                pointwise(image, conv).permute(0, 2, 3, 1).flatten(1, 2)
                for image, conv in ((query, self.query), (context, self.key), (context, self.value))
            )
        )
        mixed = F.scaled_dot_product_attention(q, k, v, scale=channels**-0.5)[..., :channels]  # (B, 1, n, C)
        return mixed.reshape(batch, height, width, channels).permute(0, 3, 1, 2) + query


def mean_and_most(x: Tensor) -> tuple[Tensor, Tensor]:
    """Means and greatest values over the channels, (B, 1, H, W) each."""
    if not torch.compiler.is_exporting() or x.shape[1] % CHANNELS_AT_ONCE:
        return x.mean(1, keepdim=True), x.amax(1, keepdim=True)
    # Runtimes read all channels of a position before those of the next, and planes whose size is a multiple of 4096
    # bytes, as those of 1280x1024 and tiles of 768, share one set of a cache: as many as that holds come at a time.
    # Sums in a convolution may round otherwise than those of a mean, for more than one item.
    batch, channels, height, width = x.shape
    mean = F.conv2d(x, x.new_full((1, channels, 1, 1), 1 / channels))
    groups = x.reshape(batch, channels // CHANNELS_AT_ONCE, CHANNELS_AT_ONCE, height, width)
    return mean, groups.amax(2).amax(1, keepdim=True)


class ConvBlockAttention(nn.Module):
    """CBAM (Woo et al., ECCV 2018): channel attention, then spatial attention; no residual."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.excite = nn.Conv2d(channels // reduction, channels, 1, bias=False)
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.stack([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)  # (B, 2, C)
        batch, num_pools, channels = pooled.shape
        logits = self.excite(F.relu(self.squeeze(pooled.reshape(batch * num_pools, channels, 1, 1))))
        x = x * logits.view(batch, num_pools, channels, 1, 1).sum(dim=1).sigmoid()
        maps: Tensor = self.spatial(torch.cat(mean_and_most(x), dim=1))
        return x * maps.sigmoid()
