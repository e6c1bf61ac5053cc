"""Triton kernels of the gated block. This module imports Triton: only `operations.py` imports it, when one is run.

Activations are contiguous rows of channels, (planes, rows, C), where a plane is one item of one branch; the
branches have weights of their own, (branches, in, out). Sums are float32 whatever the dtype. Every sum has one order,
so that equal inputs give equal bytes: pooled sums go through memory by tile, not through atomic additions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# The interpreter multiplies the bits of bfloat16 as integers, so there it is given float32, which holds them exactly.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# What differs from batch to batch and from frame to frame. Left alone, Triton compiles a kernel again for a one and for
# a multiple of sixteen among these, which costs seconds for every kernel, in the middle of some client's request.
NUM_ITEMS = ("num_items",)
SIZES = (
    "num_rows", "num_items", "num_tiles", "num_positions", "height", "width", "pooled_height", "pooled_width",
)  # fmt: skip


@triton.jit
def _dot(first, second, total, EXACT: tl.constexpr):
    """Add a product to total: of float32, or of halves with sums in float32."""
    if INTERPRETED:
        total = tl.dot(first.to(tl.float32), second.to(tl.float32), total, input_precision="ieee")
    elif EXACT:
        total = tl.dot(first, second, total, input_precision="ieee")
    else:
        total = tl.dot(first, second, total)
    return total


@triton.jit(do_not_specialize=SIZES)
def _norm_product(
    x, gain, shift, weight, bias, out, num_rows, eps,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, GATED: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Norm over channels, times gain plus shift, times weight plus bias; if GATED, first half times second."""
    branch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    FULL: tl.constexpr = 2 * WIDTH if GATED else WIDTH
    is_row, is_column = rows < num_rows, columns < WIDTH
    places = x + branch * num_rows * CHANNELS + rows.to(tl.int64)[:, None] * CHANNELS
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, CHANNELS, DEPTH):
        is_there = is_row[:, None] & (start + depth < CHANNELS)[None, :]
        total += tl.sum(tl.load(places + (start + depth)[None, :], mask=is_there, other=0.0).to(tl.float32), axis=1)
    mean = total / CHANNELS
    spread = tl.zeros((ROWS,), tl.float32)
    for start in range(0, CHANNELS, DEPTH):
        is_there = is_row[:, None] & (start + depth < CHANNELS)[None, :]
        part = tl.load(places + (start + depth)[None, :], mask=is_there, other=0.0).to(tl.float32)
        part = tl.where(is_there, part - mean[:, None], 0.0)
        spread += tl.sum(part * part, axis=1)
    scale = 1.0 / tl.sqrt(spread / CHANNELS + eps)
    first = tl.zeros((ROWS, COLUMNS), tl.float32)
    second = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, CHANNELS, DEPTH):
        channels = start + depth
        is_channel = channels < CHANNELS
        is_there = is_row[:, None] & is_channel[None, :]
        part = tl.load(places + channels[None, :], mask=is_there, other=0.0).to(tl.float32)
        times = tl.load(gain + branch * CHANNELS + channels, mask=is_channel, other=0.0).to(tl.float32)
        plus = tl.load(shift + branch * CHANNELS + channels, mask=is_channel, other=0.0).to(tl.float32)
        normed = (part - mean[:, None]) * scale[:, None] * times[None, :] + plus[None, :]
        normed = normed.to(weight.dtype.element_ty)
        entries = weight + branch * CHANNELS * FULL + channels[:, None] * FULL + columns[None, :]
        is_entry = is_channel[:, None] & is_column[None, :]
        matrix = tl.load(entries, mask=is_entry, other=0.0)
        first = _dot(normed, matrix, first, EXACT)
        if GATED:
            matrix = tl.load(entries + WIDTH, mask=is_entry, other=0.0)
            second = _dot(normed, matrix, second, EXACT)
    first += tl.load(bias + branch * FULL + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if GATED:
        second += tl.load(bias + branch * FULL + WIDTH + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
        first = first * second
    target = out + branch * num_rows * WIDTH + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(target, first.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=SIZES)
def _depthwise_gate(
    wide, weight, bias, gated, sums, height, width, num_items, num_tiles,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Depthwise 3x3 over 2 CHANNELS, first half times second, and the sums of that over the tile's positions."""
    plane = tl.program_id(2).to(tl.int64)
    branch = plane // num_items
    positions = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_position, is_column = positions < height * width, columns < CHANNELS
    row, column = positions // width, positions % width
    kernel = weight + branch * 9 * 2 * CHANNELS + columns
    first = tl.zeros((POSITIONS, COLUMNS), tl.float32)
    second = tl.zeros((POSITIONS, COLUMNS), tl.float32)
    for tap in range(9):
        y, x = row + tap // 3 - 1, column + tap % 3 - 1
        is_inside = is_position & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        is_there = is_inside[:, None] & is_column[None, :]
        place = (plane * height * width + (y * width + x).to(tl.int64)) * 2 * CHANNELS
        source = wide + place[:, None] + columns[None, :]
        times = tl.load(kernel + tap * 2 * CHANNELS, mask=is_column, other=0.0).to(tl.float32)
        first += tl.load(source, mask=is_there, other=0.0).to(tl.float32) * times[None, :]
        times = tl.load(kernel + (tap * 2 + 1) * CHANNELS, mask=is_column, other=0.0).to(tl.float32)
        second += tl.load(source + CHANNELS, mask=is_there, other=0.0).to(tl.float32) * times[None, :]
    first += tl.load(bias + branch * 2 * CHANNELS + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    second += tl.load(bias + (branch * 2 + 1) * CHANNELS + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    is_there = is_position[:, None] & is_column[None, :]
    product = tl.where(is_there, first * second, 0.0)
    target = gated + (plane * height * width + positions.to(tl.int64))[:, None] * CHANNELS + columns[None, :]
    tl.store(target, product.to(gated.dtype.element_ty), mask=is_there)
    tile = plane * num_tiles + tl.program_id(0)
    tl.store(sums + tile * CHANNELS + columns, tl.sum(product, axis=0), mask=is_column)


@triton.jit(do_not_specialize=SIZES)
def _attend(
    sums, weight, bias, out, num_items, num_tiles, num_positions,
    CHANNELS: tl.constexpr, TILES: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The means of the tiles' sums, times weight plus bias."""
    plane = tl.program_id(1).to(tl.int64)
    branch = plane // num_items
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < CHANNELS
    made = tl.load(bias + branch * CHANNELS + columns, mask=is_column, other=0.0).to(tl.float32)
    for start in range(0, CHANNELS, DEPTH):
        channels = start + tl.arange(0, DEPTH)
        is_channel = channels < CHANNELS
        pooled = tl.zeros((DEPTH,), tl.float32)
        for first in range(0, num_tiles, TILES):
            tiles = first + tl.arange(0, TILES)
            source = sums + (plane * num_tiles + tiles)[:, None] * CHANNELS + channels[None, :]
            pooled += tl.sum(
                tl.load(source, mask=(tiles < num_tiles)[:, None] & is_channel[None, :], other=0.0), axis=0
            )
        entries = weight + branch * CHANNELS * CHANNELS + channels[:, None] * CHANNELS + columns[None, :]
        matrix = tl.load(entries, mask=is_channel[:, None] & is_column[None, :], other=0.0).to(tl.float32)
        made += tl.sum((pooled / num_positions)[:, None] * matrix, axis=0)
    tl.store(out + plane * CHANNELS + columns, made, mask=is_column)


@triton.jit(do_not_specialize=SIZES)
def _product_add(
    x, scale, weight, bias, residual, out, num_rows, num_items,
    CHANNELS: tl.constexpr, SCALED: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Rows, times the plane's scale if SCALED, times weight plus bias plus residual."""
    plane = tl.program_id(2).to(tl.int64)
    branch = plane // num_items
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = rows < num_rows, columns < CHANNELS
    places = (plane * num_rows + rows.to(tl.int64))[:, None] * CHANNELS
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, CHANNELS, DEPTH):
        channels = start + tl.arange(0, DEPTH)
        is_channel = channels < CHANNELS
        part = tl.load(x + places + channels[None, :], mask=is_row[:, None] & is_channel[None, :], other=0.0)
        if SCALED:
            times = tl.load(scale + plane * CHANNELS + channels, mask=is_channel, other=0.0).to(tl.float32)
            part = (part.to(tl.float32) * times[None, :]).to(weight.dtype.element_ty)
        entries = weight + branch * CHANNELS * CHANNELS + channels[:, None] * CHANNELS + columns[None, :]
        matrix = tl.load(entries, mask=is_channel[:, None] & is_column[None, :], other=0.0)
        total = _dot(part, matrix, total, EXACT)
    is_there = is_row[:, None] & is_column[None, :]
    total += tl.load(bias + branch * CHANNELS + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    total += tl.load(residual + places + columns[None, :], mask=is_there, other=0.0).to(tl.float32)
    tl.store(out + places + columns[None, :], total.to(out.dtype.element_ty), mask=is_there)


@triton.jit(do_not_specialize=SIZES)
def _finish(
    gated, attention, x, weight1, bias1, gain, shift, weight2, bias2, weight3, bias3, out, num_rows, num_items, eps,
    CHANNELS: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """All of a block after its attention, with the whole width of a row at hand: _product_add, _norm_product, again."""
    plane = tl.program_id(1).to(tl.int64)
    branch = plane // num_items
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    whole = tl.arange(0, WHOLE)
    depth = tl.arange(0, DEPTH)
    is_row, is_whole = rows < num_rows, whole < CHANNELS
    is_there = is_row[:, None] & is_whole[None, :]
    places = (plane * num_rows + rows.to(tl.int64))[:, None] * CHANNELS
    y = tl.load(x + places + whole[None, :], mask=is_there, other=0.0).to(tl.float32)
    y += tl.load(bias1 + branch * CHANNELS + whole, mask=is_whole, other=0.0).to(tl.float32)[None, :]
    for start in range(0, CHANNELS, DEPTH):
        channels = start + depth
        is_channel = channels < CHANNELS
        part = tl.load(gated + places + channels[None, :], mask=is_row[:, None] & is_channel[None, :], other=0.0)
        times = tl.load(attention + plane * CHANNELS + channels, mask=is_channel, other=0.0).to(tl.float32)
        part = (part.to(tl.float32) * times[None, :]).to(weight1.dtype.element_ty)
        entries = weight1 + branch * CHANNELS * CHANNELS + channels[:, None] * CHANNELS + whole[None, :]
        matrix = tl.load(entries, mask=is_channel[:, None] & is_whole[None, :], other=0.0)
        y = _dot(part, matrix, y, EXACT)
    mean = tl.sum(tl.where(is_there, y, 0.0), axis=1) / CHANNELS
    apart = tl.where(is_there, y - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(apart * apart, axis=1) / CHANNELS + eps)
    times = tl.load(gain + branch * CHANNELS + whole, mask=is_whole, other=0.0).to(tl.float32)
    plus = tl.load(shift + branch * CHANNELS + whole, mask=is_whole, other=0.0).to(tl.float32)
    normed = (apart * inverse[:, None] * times[None, :] + plus[None, :]).to(weight2.dtype.element_ty)
    y += tl.load(bias3 + branch * CHANNELS + whole, mask=is_whole, other=0.0).to(tl.float32)[None, :]
    for start in range(0, CHANNELS, DEPTH):
        channels = start + depth
        is_channel = channels < CHANNELS
        entries = weight2 + branch * CHANNELS * 2 * CHANNELS + whole[:, None] * 2 * CHANNELS + channels[None, :]
        is_entry = is_whole[:, None] & is_channel[None, :]
        nothing = tl.zeros((ROWS, DEPTH), tl.float32)
        matrix = tl.load(entries, mask=is_entry, other=0.0)
        first = _dot(normed, matrix, nothing, EXACT)
        matrix = tl.load(entries + CHANNELS, mask=is_entry, other=0.0)
        second = _dot(normed, matrix, nothing, EXACT)
        biases = bias2 + branch * 2 * CHANNELS + channels
        first += tl.load(biases, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        second += tl.load(biases + CHANNELS, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        product = (first * second).to(weight3.dtype.element_ty)
        entries = weight3 + branch * CHANNELS * CHANNELS + channels[:, None] * CHANNELS + whole[None, :]
        matrix = tl.load(entries, mask=is_channel[:, None] & is_whole[None, :], other=0.0)
        y = _dot(product, matrix, y, EXACT)
    tl.store(out + places + whole[None, :], y.to(out.dtype.element_ty), mask=is_there)


def norm_product(
    x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float, gated: bool
) -> Tensor:
    """See operations.norm_product."""
    branches, num_rows, channels = x.shape
    width = weight.shape[-1] // (2 if gated else 1)
    out = x.new_empty(branches, num_rows, width)
    rows, columns = _side(num_rows), min(64, _power(width))
    grid = (triton.cdiv(num_rows, rows), triton.cdiv(width, columns), branches)
    form = _product_form(x, rows, columns, channels)
    _norm_product[grid](x, gain, shift, weight, bias, out, num_rows, eps, channels, width, gated, **form)
    return out


def depthwise_gate(
    wide: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, tile: int
) -> tuple[Tensor, Tensor]:
    """See operations.depthwise_gate. tile: positions of one."""
    planes, num_rows, twice = wide.shape
    channels, num_tiles = twice // 2, triton.cdiv(num_rows, tile)
    gated = wide.new_empty(planes, num_rows, channels)
    sums = wide.new_empty(planes, num_tiles, channels, dtype=torch.float32)
    columns = min(32, _power(channels))
    grid = (num_tiles, triton.cdiv(channels, columns), planes)
    items = planes // len(weight)
    _depthwise_gate[grid](
        wide, weight, bias, gated, sums, height, width, items, num_tiles, channels, POSITIONS=tile, COLUMNS=columns
    )
    return gated, sums


def attend(sums: Tensor, weight: Tensor, bias: Tensor, num_positions: int) -> Tensor:
    """See operations.attend."""
    planes, num_tiles, channels = sums.shape
    out = sums.new_empty(planes, channels)
    columns = min(32, _power(channels))
    grid = (triton.cdiv(channels, columns), planes)
    items = planes // len(weight)
    _attend[grid](
        sums, weight, bias, out, items, num_tiles, num_positions, channels, TILES=32, COLUMNS=columns, DEPTH=32
    )
    return out


def product_add(x: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """See operations.product_add."""
    planes, num_rows, channels = x.shape
    out = torch.empty_like(x)
    rows, columns = _side(num_rows), min(64, _power(channels))
    grid = (triton.cdiv(num_rows, rows), triton.cdiv(channels, columns), planes)
    form = _product_form(x, rows, columns, channels)
    items = planes // len(weight)
    is_scaled = scale is not None
    _product_add[grid](
        x, x if scale is None else scale, weight, bias, residual, out, num_rows, items, channels, is_scaled, **form
    )
    return out


def finish(
    gated: Tensor,
    attention: Tensor,
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor, Tensor, Tensor],
    gain: Tensor,
    shift: Tensor,
    eps: float,
) -> Tensor:
    """See operations.finish."""
    planes, num_rows, channels = x.shape
    out = torch.empty_like(x)
    whole = _power(channels)
    rows = min(_side(num_rows), 32 if whole > 128 else 64)
    grid = (triton.cdiv(num_rows, rows), planes)
    parameters = (weights[0], biases[0], gain, shift, weights[1], biases[1], weights[2], biases[2])
    is_exact = x.dtype == torch.float32
    _finish[grid](
        gated, attention, x, *parameters, out, num_rows, planes // len(gain), eps, channels, is_exact,
        ROWS=rows, WHOLE=whole, DEPTH=min(32, whole), num_warps=8 if whole > 64 else 4, num_stages=2,
    )  # fmt: skip
    return out


def _product_form(x: Tensor, rows: int, columns: int, channels: int) -> dict[str, Any]:
    depth = min(64, _power(channels))
    return {"EXACT": x.dtype == torch.float32, "ROWS": rows, "COLUMNS": columns, "DEPTH": depth}


def _power(count: int) -> int:
    """The power of two that holds so many; at least 16, the least side of a product."""
    return max(16, 1 << (count - 1).bit_length())


def _side(num_rows: int) -> int:
    return min(64, _power(num_rows))
