"""Triton kernels of the fusion module (TIM). Imports Triton: only `fusion_operations.py` imports it, when one is run.

Activations are contiguous rows of channels, as in gated_block.py, with sums in float32 and in one order. What a group
norm or a channel attention needs of a whole frame goes through memory by tile, and a small kernel puts the tiles
together. The latents come with whatever strides they have. Two branches of one shape share a launch: where their
convolutions left them apart, a kernel takes both, `first` and `second` (the same tensor twice if there is one alone).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from recofuse_core.kernels.gated_block import NUM_ITEMS, SIZES, _dot, _power


@triton.jit
def _sigmoid(x):
    """Without an exponential that overflows."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def _latent(
    vis, ir, is_ir, item, channels, y, x, is_there,
    vis_item, vis_channel, vis_row, vis_column, ir_item, ir_channel, ir_row, ir_column,
):  # fmt: skip
    """Entries of one of both latents at positions (y, x), one row of channels each; of the other nothing is read."""
    vis_at = item * vis_item + channels[None, :] * vis_channel + (y * vis_row + x * vis_column)[:, None]
    ir_at = item * ir_item + channels[None, :] * ir_channel + (y * ir_row + x * ir_column)[:, None]
    of_vis = tl.load(vis + vis_at, mask=is_there & (is_ir == 0), other=0.0)
    return of_vis + tl.load(ir + ir_at, mask=is_there & (is_ir == 1), other=0.0)


@triton.jit(do_not_specialize=(*NUM_ITEMS, "pool"))
def _project(
    vis, ir, weight, bias, out, height, width, pooled_height, pooled_width, pool, num_items,
    vis_item, vis_channel, vis_row, vis_column, ir_item, ir_channel, ir_row, ir_column,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, SWAPPED: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Means over squares of `pool` of one latent, times weight plus bias; plane 0 is of vis, or of ir if SWAPPED."""
    plane = tl.program_id(1)
    which, item = plane // num_items, (plane % num_items).to(tl.int64)
    is_ir = which ^ SWAPPED
    positions = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels, columns = tl.arange(0, DEPTH), tl.arange(0, COLUMNS)
    num_rows = pooled_height * pooled_width
    is_position, is_channel, is_column = positions < num_rows, channels < CHANNELS, columns < WIDTH
    row, column = positions // pooled_width * pool, positions % pooled_width * pool
    total = tl.zeros((ROWS, DEPTH), tl.float32)
    count = tl.zeros((ROWS,), tl.float32)
    for place in range(pool * pool):
        y, x = row + place // pool, column + place % pool
        is_inside = is_position & (y < height) & (x < width)
        part = _latent(
            vis, ir, is_ir, item, channels, y, x, is_inside[:, None] & is_channel[None, :],
            vis_item, vis_channel, vis_row, vis_column, ir_item, ir_channel, ir_row, ir_column,
        )  # fmt: skip
        total += part.to(weight.dtype.element_ty).to(tl.float32)
        count += is_inside.to(tl.float32)
    mean = (total / tl.maximum(count, 1.0)[:, None]).to(weight.dtype.element_ty)
    entries = weight + which * CHANNELS * WIDTH + channels[:, None] * WIDTH + columns[None, :]
    matrix = tl.load(entries, mask=is_channel[:, None] & is_column[None, :], other=0.0)
    made = _dot(mean, matrix, tl.zeros((ROWS, COLUMNS), tl.float32), EXACT)
    made += tl.load(bias + which * WIDTH + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    target = out + (plane * num_rows + positions)[:, None].to(tl.int64) * WIDTH + columns[None, :]
    tl.store(target, made.to(out.dtype.element_ty), mask=is_position[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=NUM_ITEMS)
def _beside(
    mixed, vis, ir, out, height, width, num_items,
    vis_item, vis_channel, vis_row, vis_column, ir_item, ir_channel, ir_row, ir_column,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """What was attended to, plus the latent that asked, both modalities beside each other."""
    plane = tl.program_id(1)
    which, item = plane // num_items, (plane % num_items).to(tl.int64)
    positions = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, DEPTH)
    num_rows = height * width
    is_there = (positions < num_rows)[:, None] & (channels < CHANNELS)[None, :]
    asked = _latent(
        vis, ir, which, item, channels, positions // width, positions % width, is_there,
        vis_item, vis_channel, vis_row, vis_column, ir_item, ir_channel, ir_row, ir_column,
    ).to(mixed.dtype.element_ty).to(tl.float32)  # fmt: skip
    source = mixed + (plane * num_rows + positions)[:, None].to(tl.int64) * WIDTH + channels[None, :]
    made = asked + tl.load(source, mask=is_there, other=0.0).to(tl.float32)
    rows = (item * num_rows + positions)[:, None] * 2 * CHANNELS
    tl.store(out + rows + which * CHANNELS + channels[None, :], made.to(out.dtype.element_ty), mask=is_there)


@triton.jit
def _keep_sums(sums, tile, y, is_there, channels, is_channel, count, CHANNELS: tl.constexpr):
    """Store the sums over a tile's positions, and the squares of what they are apart from their mean."""
    total = tl.sum(tl.where(is_there, y, 0.0), axis=0)
    apart = tl.where(is_there, y - (total / count)[None, :], 0.0)
    target = sums + tile * 2 * CHANNELS + channels
    tl.store(target, total, mask=is_channel)
    tl.store(target + CHANNELS, tl.sum(apart * apart, axis=0), mask=is_channel)


@triton.jit(do_not_specialize=SIZES)
def _tile_sums(x, bias, sums, num_rows, num_tiles, CHANNELS: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """`_keep_sums` of x plus bias."""
    plane = tl.program_id(1).to(tl.int64)
    positions = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, WHOLE)
    is_channel = channels < CHANNELS
    is_there = (positions < num_rows)[:, None] & is_channel[None, :]
    places = (plane * num_rows + positions)[:, None] * CHANNELS + channels[None, :]
    y = tl.load(x + places, mask=is_there, other=0.0).to(tl.float32)
    y += tl.load(bias + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    count = tl.minimum(num_rows - tl.program_id(0) * ROWS, ROWS).to(tl.float32)
    _keep_sums(sums, plane * num_tiles + tl.program_id(0), y, is_there, channels, is_channel, count, CHANNELS)


@triton.jit(do_not_specialize=SIZES)
def _norm_coefficients(
    sums, gain, shift, bias, out, num_items, num_rows, num_tiles, eps,
    CHANNELS: tl.constexpr, MEMBERS: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What a group norm multiplies x by and adds, of one group: times gain plus shift, for x without its bias."""
    plane = tl.program_id(1).to(tl.int64)
    which, item = plane // num_items, plane % num_items
    member = tl.arange(0, WHOLE)
    channels = tl.program_id(0) * MEMBERS + member
    is_member = member < MEMBERS
    source = plane
    if SHARED:
        source = item
    total = tl.zeros((TILES, WHOLE), tl.float32)
    for start in range(0, num_tiles, TILES):
        tiles = start + tl.arange(0, TILES)
        is_there = (tiles < num_tiles)[:, None] & is_member[None, :]
        places = sums + (source * num_tiles + tiles)[:, None] * 2 * CHANNELS + channels[None, :]
        total += tl.load(places, mask=is_there, other=0.0)
    count = num_rows.to(tl.float32) * MEMBERS
    mean = tl.sum(tl.sum(total, axis=1), axis=0) / count
    spread = tl.zeros((TILES, WHOLE), tl.float32)
    for start in range(0, num_tiles, TILES):
        tiles = start + tl.arange(0, TILES)
        is_there = (tiles < num_tiles)[:, None] & is_member[None, :]
        places = sums + (source * num_tiles + tiles)[:, None] * 2 * CHANNELS + channels[None, :]
        filled = tl.minimum(tl.maximum(num_rows - tiles * ROWS, 1), ROWS).to(tl.float32)[:, None]
        apart = tl.load(places, mask=is_there, other=0.0) / filled - mean
        within = tl.load(places + CHANNELS, mask=is_there, other=0.0)
        spread += tl.where(is_there, within + filled * apart * apart, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(tl.sum(spread, axis=1), axis=0) / count + eps)
    of_norm = which * CHANNELS + channels
    times = tl.load(gain + of_norm, mask=is_member, other=0.0).to(tl.float32) * inverse
    before = tl.load(bias + of_norm, mask=is_member, other=0.0).to(tl.float32) - mean
    plus = tl.load(shift + of_norm, mask=is_member, other=0.0).to(tl.float32) + before * times
    target = out + plane * 2 * CHANNELS + channels
    tl.store(target, times, mask=is_member)
    tl.store(target + CHANNELS, plus, mask=is_member)


@triton.jit(do_not_specialize=SIZES)
def _norm_silu(
    x, coefficients, out, num_items, num_rows,
    CHANNELS: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """SiLU of x times and plus the coefficients of its plane."""
    plane = tl.program_id(1).to(tl.int64)
    source = plane
    if SHARED:
        source = plane % num_items
    positions = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, WHOLE)
    is_channel = channels < CHANNELS
    is_there = (positions < num_rows)[:, None] & is_channel[None, :]
    times = tl.load(coefficients + plane * 2 * CHANNELS + channels, mask=is_channel, other=0.0)
    plus = tl.load(coefficients + (plane * 2 + 1) * CHANNELS + channels, mask=is_channel, other=0.0)
    places = positions[:, None] * CHANNELS + channels[None, :]
    y = tl.load(x + source * num_rows * CHANNELS + places, mask=is_there, other=0.0).to(tl.float32)
    y = y * times[None, :] + plus[None, :]
    y = y * _sigmoid(y)
    tl.store(out + plane * num_rows * CHANNELS + places, y.to(out.dtype.element_ty), mask=is_there)


@triton.jit
def _modulated(
    first, second, bias, modulation, which, item, num_rows, positions, channels, is_there, is_channel,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """A branch's rows plus its bias, times (scale + 1) plus shift."""
    places = (item * num_rows + positions)[:, None] * CHANNELS + channels[None, :]
    x = tl.load(first + places, mask=is_there & (which == 0), other=0.0)
    x += tl.load(second + places, mask=is_there & (which == 1), other=0.0)
    added = tl.load(bias + which * CHANNELS + channels, mask=is_channel, other=0.0).to(tl.float32)
    shift = tl.load(modulation + which * 2 * CHANNELS + channels, mask=is_channel, other=0.0).to(tl.float32)
    scale = tl.load(modulation + (which * 2 + 1) * CHANNELS + channels, mask=is_channel, other=0.0).to(tl.float32)
    return (x.to(tl.float32) + added[None, :]) * (scale + 1.0)[None, :] + shift[None, :]


@triton.jit(do_not_specialize=SIZES)
def _channel_pools(
    first, second, bias, modulation, pools, num_items, num_rows, num_tiles,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Sums and greatest values over a tile's positions of what `_modulated` gives."""
    plane = tl.program_id(1).to(tl.int64)
    which, item = plane // num_items, plane % num_items
    positions = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, WHOLE)
    is_channel = channels < CHANNELS
    is_there = (positions < num_rows)[:, None] & is_channel[None, :]
    y = _modulated(
        first, second, bias, modulation, which, item, num_rows, positions, channels, is_there, is_channel, CHANNELS
    )
    target = pools + (plane * num_tiles + tl.program_id(0)) * 2 * CHANNELS + channels
    tl.store(target, tl.sum(tl.where(is_there, y, 0.0), axis=0), mask=is_channel)
    tl.store(target + CHANNELS, tl.max(tl.where(is_there, y, -float("inf")), axis=0), mask=is_channel)


@triton.jit(do_not_specialize=SIZES)
def _channel_attention(
    pools, squeeze, excite, out, num_items, num_rows, num_tiles,
    CHANNELS: tl.constexpr, SQUEEZED: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """CBAM's channel attention of a plane: two layers over the means and over the greatest values, summed, sigmoid."""
    plane = tl.program_id(0).to(tl.int64)
    which = plane // num_items
    channels, squeezed = tl.arange(0, WHOLE), tl.arange(0, NARROW)
    is_channel, is_squeezed = channels < CHANNELS, squeezed < SQUEEZED
    total = tl.zeros((WHOLE,), tl.float32)
    greatest = tl.full((WHOLE,), -float("inf"), tl.float32)
    for start in range(0, num_tiles, TILES):
        tiles = start + tl.arange(0, TILES)
        is_there = (tiles < num_tiles)[:, None] & is_channel[None, :]
        places = pools + (plane * num_tiles + tiles)[:, None] * 2 * CHANNELS + channels[None, :]
        total += tl.sum(tl.load(places, mask=is_there, other=0.0), axis=0)
        found = tl.load(places + CHANNELS, mask=is_there, other=-float("inf"))
        greatest = tl.maximum(greatest, tl.max(found, axis=0))
    mean = total / num_rows
    greatest = tl.where(is_channel, greatest, 0.0)
    is_entry = is_channel[:, None] & is_squeezed[None, :]
    entries = squeeze + which * CHANNELS * SQUEEZED + channels[:, None] * SQUEEZED + squeezed[None, :]
    down = tl.load(entries, mask=is_entry, other=0.0).to(tl.float32)
    entries = excite + which * CHANNELS * SQUEEZED + squeezed[None, :] * CHANNELS + channels[:, None]
    up = tl.load(entries, mask=is_entry, other=0.0).to(tl.float32)
    hidden = tl.maximum(tl.sum(mean[:, None] * down, axis=0), 0.0)
    hidden += tl.maximum(tl.sum(greatest[:, None] * down, axis=0), 0.0)
    logits = tl.sum(hidden[None, :] * up, axis=1)
    tl.store(out + plane * CHANNELS + channels, _sigmoid(logits), mask=is_channel)


@triton.jit(do_not_specialize=SIZES)
def _spatial_maps(
    first, second, bias, modulation, attention, maps, num_items, num_rows,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Mean and greatest value over the channels of what was modulated and attended to."""
    plane = tl.program_id(1).to(tl.int64)
    which, item = plane // num_items, plane % num_items
    positions = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, WHOLE)
    is_channel = channels < CHANNELS
    is_there = (positions < num_rows)[:, None] & is_channel[None, :]
    y = _modulated(
        first, second, bias, modulation, which, item, num_rows, positions, channels, is_there, is_channel, CHANNELS
    )
    y *= tl.load(attention + plane * CHANNELS + channels, mask=is_channel, other=0.0)[None, :]
    target = maps + (plane * num_rows + positions) * 2
    tl.store(target, tl.sum(tl.where(is_there, y, 0.0), axis=1) / CHANNELS, mask=positions < num_rows)
    greatest = tl.max(tl.where(is_channel[None, :], y, -float("inf")), axis=1)
    tl.store(target + 1, greatest, mask=positions < num_rows)


@triton.jit(do_not_specialize=SIZES)
def _spatial_gate(
    first, second, bias, modulation, attention, maps, weight, offset, out, sums,
    num_items, height, width, num_tiles,
    CHANNELS: tl.constexpr, SIDE: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """CBAM's spatial attention, a convolution of both maps and a sigmoid, times the rest; and `_keep_sums` of that."""
    plane = tl.program_id(1).to(tl.int64)
    which, item = plane // num_items, plane % num_items
    num_rows = height * width
    positions = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, WHOLE)
    is_position, is_channel = positions < num_rows, channels < CHANNELS
    row, column = positions // width, positions % width
    tap = tl.arange(0, TAPS)
    is_tap = tap < SIDE * SIDE
    y = row[:, None] + (tap // SIDE - SIDE // 2)[None, :]
    x = column[:, None] + (tap % SIDE - SIDE // 2)[None, :]
    is_inside = is_position[:, None] & is_tap[None, :] & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    source = maps + (plane * num_rows + y * width + x) * 2
    kernel = weight + which * 2 * SIDE * SIDE + tap
    of_mean = tl.load(kernel, mask=is_tap, other=0.0).to(tl.float32)
    of_greatest = tl.load(kernel + SIDE * SIDE, mask=is_tap, other=0.0).to(tl.float32)
    made = tl.load(source, mask=is_inside, other=0.0) * of_mean[None, :]
    made += tl.load(source + 1, mask=is_inside, other=0.0) * of_greatest[None, :]
    logits = tl.sum(made, axis=1) + tl.load(offset + which).to(tl.float32)
    is_there = is_position[:, None] & is_channel[None, :]
    y = _modulated(
        first, second, bias, modulation, which, item, num_rows, positions, channels, is_there, is_channel, CHANNELS
    )
    y *= tl.load(attention + plane * CHANNELS + channels, mask=is_channel, other=0.0)[None, :]
    y *= _sigmoid(logits)[:, None]
    places = (plane * num_rows + positions)[:, None] * CHANNELS + channels[None, :]
    tl.store(out + places, y.to(out.dtype.element_ty), mask=is_there)
    count = tl.minimum(num_rows - tl.program_id(0) * ROWS, ROWS).to(tl.float32)
    _keep_sums(sums, plane * num_tiles + tl.program_id(0), y, is_there, channels, is_channel, count, CHANNELS)


@triton.jit(do_not_specialize=NUM_ITEMS)
def _weigh(
    first, second, bias, vis, ir, out, height, width,
    vis_item, vis_channel, vis_row, vis_column, ir_item, ir_channel, ir_row, ir_column,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Each latent times the sigmoid of its logits plus bias, summed; first is of ir."""
    item = tl.program_id(1).to(tl.int64)
    num_rows = height * width
    positions = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, DEPTH)
    is_channel = channels < CHANNELS
    is_there = (positions < num_rows)[:, None] & is_channel[None, :]
    places = (item * num_rows + positions)[:, None] * CHANNELS + channels[None, :]
    y, x = positions // width, positions % width
    of_ir = tl.load(first + places, mask=is_there, other=0.0).to(tl.float32)
    of_ir += tl.load(bias + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    of_vis = tl.load(second + places, mask=is_there, other=0.0).to(tl.float32)
    of_vis += tl.load(bias + CHANNELS + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    vis_at = item * vis_item + channels[None, :] * vis_channel + (y * vis_row + x * vis_column)[:, None]
    ir_at = item * ir_item + channels[None, :] * ir_channel + (y * ir_row + x * ir_column)[:, None]
    made = tl.load(ir + ir_at, mask=is_there, other=0.0) * _sigmoid(of_ir)
    made += tl.load(vis + vis_at, mask=is_there, other=0.0) * _sigmoid(of_vis)
    tl.store(out + places, made, mask=is_there)


def project(vis: Tensor, ir: Tensor, weight: Tensor, bias: Tensor, pool: int, swapped: bool) -> Tensor:
    """See fusion_operations.project."""
    batch, channels, height, width = vis.shape
    rows, columns = -(-height // pool), -(-width // pool)
    out = weight.new_empty(2, batch, rows * columns, weight.shape[-1])
    tile = 64
    grid = (triton.cdiv(rows * columns, tile), 2 * batch)
    _project[grid](
        vis, ir, weight, bias, out, height, width, rows, columns, pool, batch, *vis.stride(), *ir.stride(),
        channels, weight.shape[-1], int(swapped), weight.dtype == torch.float32,
        ROWS=tile, DEPTH=_power(channels), COLUMNS=_power(weight.shape[-1]),
    )  # fmt: skip
    return out


def beside(mixed: Tensor, vis: Tensor, ir: Tensor) -> Tensor:
    """See fusion_operations.beside."""
    batch, channels, height, width = vis.shape
    out = mixed.new_empty(batch, height * width, 2 * channels)
    tile = 128
    grid = (triton.cdiv(height * width, tile), 2 * batch)
    _beside[grid](
        mixed, vis, ir, out, height, width, batch, *vis.stride(), *ir.stride(),
        channels, mixed.shape[-1], ROWS=tile, DEPTH=_power(channels),
    )  # fmt: skip
    return out


def tile_sums(x: Tensor, bias: Tensor, tile: int) -> Tensor:
    """See fusion_operations.tile_sums. tile: positions of one."""
    batch, num_rows, channels = x.shape
    num_tiles = triton.cdiv(num_rows, tile)
    sums = x.new_empty(1, batch, num_tiles, 2, channels, dtype=torch.float32)
    _tile_sums[(num_tiles, batch)](x, bias, sums, num_rows, num_tiles, channels, ROWS=tile, WHOLE=_power(channels))
    return sums


def norm_coefficients(
    sums: Tensor, gain: Tensor, shift: Tensor, bias: Tensor, groups: int, eps: float, num_rows: int, tile: int
) -> Tensor:
    """See fusion_operations.norm_coefficients."""
    sources, batch, num_tiles, _, channels = sums.shape
    norms, members = len(gain), channels // groups
    out = sums.new_empty(norms, batch, 2, channels)
    _norm_coefficients[(groups, norms * batch)](
        sums, gain, shift, bias, out, batch, num_rows, num_tiles, eps,
        channels, members, sources < norms, ROWS=tile, TILES=64, WHOLE=1 << (members - 1).bit_length(),
    )  # fmt: skip
    return out


def norm_silu(x: Tensor, coefficients: Tensor) -> Tensor:
    """See fusion_operations.norm_silu."""
    sources, batch, num_rows, channels = x.shape
    norms = len(coefficients)
    out = x.new_empty(norms, batch, num_rows, channels)
    tile = 64
    _norm_silu[(triton.cdiv(num_rows, tile), norms * batch)](
        x, coefficients, out, batch, num_rows, channels, sources < norms, ROWS=tile, WHOLE=_power(channels)
    )
    return out


def channel_pools(parts: Sequence[Tensor], bias: Tensor, modulation: Tensor, tile: int) -> Tensor:
    """See fusion_operations.channel_pools."""
    batch, num_rows, channels = parts[0].shape
    num_tiles = triton.cdiv(num_rows, tile)
    pools = parts[0].new_empty(len(parts), batch, num_tiles, 2, channels, dtype=torch.float32)
    _channel_pools[(num_tiles, len(parts) * batch)](
        parts[0], parts[-1], bias, modulation, pools, batch, num_rows, num_tiles,
        channels, ROWS=tile, WHOLE=_power(channels),
    )  # fmt: skip
    return pools


def channel_attention(pools: Tensor, squeeze: Tensor, excite: Tensor, num_rows: int) -> Tensor:
    """See fusion_operations.channel_attention."""
    branches, batch, num_tiles, _, channels = pools.shape
    out = pools.new_empty(branches, batch, channels)
    squeezed = squeeze.shape[-1]
    _channel_attention[(branches * batch,)](
        pools, squeeze, excite, out, batch, num_rows, num_tiles,
        channels, squeezed, TILES=32, WHOLE=_power(channels), NARROW=_power(squeezed),
    )  # fmt: skip
    return out


def spatial_maps(parts: Sequence[Tensor], bias: Tensor, modulation: Tensor, attention: Tensor) -> Tensor:
    """See fusion_operations.spatial_maps."""
    batch, num_rows, channels = parts[0].shape
    maps = attention.new_empty(len(parts), batch, num_rows, 2)
    tile = 64
    _spatial_maps[(triton.cdiv(num_rows, tile), len(parts) * batch)](
        parts[0], parts[-1], bias, modulation, attention, maps, batch, num_rows,
        channels, ROWS=tile, WHOLE=_power(channels),
    )  # fmt: skip
    return maps


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
    tile: int,
) -> tuple[Tensor, Tensor]:
    """See fusion_operations.spatial_gate. tile: positions of one."""
    batch, num_rows, channels = parts[0].shape
    branches, num_tiles, side = len(parts), triton.cdiv(num_rows, tile), weight.shape[-1]
    out = parts[0].new_empty(branches, batch, num_rows, channels)
    sums = attention.new_empty(branches, batch, num_tiles, 2, channels)
    _spatial_gate[(num_tiles, branches * batch)](
        parts[0], parts[-1], bias, modulation, attention, maps, weight, offset, out, sums,
        batch, height, width, num_tiles, channels, side, _power(side * side), ROWS=tile, WHOLE=_power(channels),
    )  # fmt: skip
    return out, sums


def weigh(ir_logits: Tensor, vis_logits: Tensor, bias: Tensor, vis: Tensor, ir: Tensor) -> Tensor:
    """See fusion_operations.weigh."""
    batch, channels, height, width = vis.shape
    out = vis.new_empty(batch, height, width, channels)
    tile = 128
    _weigh[(triton.cdiv(height * width, tile), batch)](
        ir_logits, vis_logits, bias, vis, ir, out, height, width, *vis.stride(), *ir.stride(),
        channels, ROWS=tile, DEPTH=_power(channels),
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)
