"""Triton kernels of both ends of a run. Imports Triton: only `picture_operations.py` imports it, when one is run.

Images come as (B, 3, H, W) of whatever strides they have: float32 or levels at the beginning; at the end float32, in
[0, 1] or somewhat beyond.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

RED, GREEN, BLUE = tl.constexpr(0.299), tl.constexpr(0.587), tl.constexpr(0.114)  # as losses.luma
# As gated_block.SIZES. Of multiples of sixteen in others several pixels are read at once.
SIZES = ("height", "num_tiles")
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: what is added to it is rounded to whole numbers, halves to even


@triton.jit
def _clamped(x):
    """Within [0, 1]; 0 for what is no number."""
    return tl.where(x > 0.0, tl.minimum(x, 1.0), 0.0)


@triton.jit(do_not_specialize=("width", "num_rows", "item_stride"))
def _unshuffled(
    image, out, width, num_rows, middle, item_stride, channel_stride, row_stride, column_stride,
    FACTOR: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of FACTOR x FACTOR pixels less `middle`, `width` of them beside one another, channel after channel."""
    item = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    pixels = tl.arange(0, FACTOR * FACTOR)[None, :]
    is_there = rows < num_rows
    y = rows // width * FACTOR + pixels // FACTOR
    x = rows % width * FACTOR + pixels % FACTOR
    source = image + item * item_stride + y * row_stride + x * column_stride
    target = out + (item * num_rows + rows) * (3 * FACTOR * FACTOR) + pixels
    for channel in tl.static_range(3):
        value = tl.load(source + channel * channel_stride, mask=is_there, other=0).to(tl.float32)
        if LEVELS:
            value = value / 255.0
        tl.store(target + channel * FACTOR * FACTOR, (value - middle).to(out.dtype.element_ty), mask=is_there)


@triton.jit(do_not_specialize=SIZES)
def _luma_cells(
    image, cells, height, width, item_stride, channel_stride, row_stride, column_stride,
    GRID: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Luma of clamped images, averaged over one row of GRID x GRID cells."""
    row, item = tl.program_id(0), tl.program_id(1).to(tl.int64)
    top, bottom = row * height // GRID, ((row + 1) * height + GRID - 1) // GRID
    cell, offset = tl.arange(0, GRID), tl.arange(0, COLUMNS)
    left, right = cell * width // GRID, ((cell + 1) * width + GRID - 1) // GRID
    x = left[:, None] + offset[None, :]
    is_there = x < right[:, None]
    total = tl.zeros((GRID, COLUMNS), tl.float32)
    for y in range(top, bottom):
        source = image + item * item_stride + y * row_stride + x * column_stride
        red = _clamped(tl.load(source, mask=is_there, other=0.0))
        green = _clamped(tl.load(source + channel_stride, mask=is_there, other=0.0))
        blue = _clamped(tl.load(source + 2 * channel_stride, mask=is_there, other=0.0))
        total += RED * red + GREEN * green + BLUE * blue
    count = ((right - left) * (bottom - top)).to(tl.float32)
    tl.store(cells + (item * GRID + row) * GRID + cell, tl.sum(total, axis=1) / count)


@triton.jit
def _ranked(values, out, num_values, first, last, BLOCK: tl.constexpr):
    """The values of two ranks among values that are not negative: the bits of its float, the highest first.

    Floats that are not negative are in the order of their bits. A bit is set if too few values lie below it.
    """
    which, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rank = first + which * (last - first)
    places = tl.arange(0, BLOCK)
    is_there = places < num_values
    found = tl.load(values + row * num_values + places, mask=is_there, other=float("inf"))
    bits = found.to(tl.int32, bitcast=True)
    made = tl.zeros((), tl.int32)
    for step in range(31):
        higher = made | (1 << (30 - step))
        num_below = tl.sum((is_there & (bits < higher)).to(tl.int32), axis=0)
        made = tl.where(num_below <= rank, higher, made)
    tl.store(out + row * 2 + which, made.to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=SIZES)
def _paint(
    image, ends, out, is_finite, width, num_pixels, num_tiles, share, gain,
    item_stride, channel_stride, row_stride, column_stride, out_item, out_channel, out_pixel,
    WIDENED: tl.constexpr, GREY: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Clamp, widen the range of luma between both ends, take the mean if GREY, and round to LEVELS."""
    item = tl.program_id(1).to(tl.int64)
    pixels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_there = pixels < num_pixels
    source = image + item * item_stride + pixels // width * row_stride + pixels % width * column_stride
    red = tl.load(source, mask=is_there, other=0.0)
    green = tl.load(source + channel_stride, mask=is_there, other=0.0)
    blue = tl.load(source + 2 * channel_stride, mask=is_there, other=0.0)
    is_number = (tl.abs(red) < float("inf")) & (tl.abs(green) < float("inf")) & (tl.abs(blue) < float("inf"))
    all_are = tl.min(is_number.to(tl.int32), axis=0)
    tl.store(is_finite + item * num_tiles + tl.program_id(0), all_are.to(is_finite.dtype.element_ty))
    red, green, blue = _clamped(red), _clamped(green), _clamped(blue)
    if WIDENED:
        low, high = tl.load(ends + item * 2), tl.load(ends + item * 2 + 1)
        used = tl.minimum(tl.maximum(high - low, 1e-6), 1.0 - 1e-6)
        unused = 1.0 - used
        moved = tl.minimum((gain - 1.0) * used / unused, share)
        y = RED * red + GREEN * green + BLUE * blue
        between = (moved * unused / used) * (y - low) - moved * low
        change = tl.maximum(-moved * y, tl.minimum(between, moved * (1.0 - y)))
        red, green, blue = _clamped(red + change), _clamped(green + change), _clamped(blue + change)
    if GREY:
        red = (red + green + blue) / 3.0
    if LEVELS:
        red = (red * 255.0 + ROUNDER) - ROUNDER
        green = (green * 255.0 + ROUNDER) - ROUNDER
        blue = (blue * 255.0 + ROUNDER) - ROUNDER
    target = out + item * out_item + pixels.to(tl.int64) * out_pixel
    tl.store(target, red.to(out.dtype.element_ty), mask=is_there)
    if not GREY:
        tl.store(target + out_channel, green.to(out.dtype.element_ty), mask=is_there)
        tl.store(target + 2 * out_channel, blue.to(out.dtype.element_ty), mask=is_there)


def unshuffled(image: Tensor, factor: int, middle: float, dtype: torch.dtype, tile: int) -> Tensor:
    """See picture_operations.unshuffled. tile: pixels of one."""
    batch, channels, height, width = image.shape
    height, width = height // factor, width // factor
    out = image.new_empty(batch, height, width, channels * factor**2, dtype=dtype)
    block = tile // factor**2
    _unshuffled[(triton.cdiv(height * width, block), batch)](
        image, out, width, height * width, middle, *image.stride(),
        FACTOR=factor, LEVELS=image.dtype == torch.uint8, BLOCK=block,
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def luma_cells(image: Tensor, grid: int) -> Tensor:
    """See picture_operations.luma_cells. grid: a power of two."""
    batch, _, height, width = image.shape
    cells = image.new_empty(batch, grid * grid)
    columns = triton.next_power_of_2(width // grid + 2)
    _luma_cells[(grid, batch)](image, cells, height, width, *image.stride(), GRID=grid, COLUMNS=columns)
    return cells


def ranked(values: Tensor, first: int, last: int) -> Tensor:
    """See picture_operations.ranked."""
    rows, count = values.shape
    out = values.new_empty(rows, 2)
    _ranked[(2, rows)](values, out, count, first, last, BLOCK=triton.next_power_of_2(count), num_warps=8)
    return out


def paint(
    image: Tensor, ends: Tensor | None, share: float, gain: float, grey: bool, levels: bool, tile: int
) -> tuple[Tensor, Tensor]:
    """See picture_operations.paint. tile: pixels of one."""
    batch, _, height, width = image.shape
    channels = 1 if grey else 3
    if levels:
        out = image.new_empty(batch, height, width, channels, dtype=torch.uint8).permute(0, 3, 1, 2)
    else:
        out = image.new_empty(batch, channels, height, width)
    num_tiles = triton.cdiv(height * width, tile)
    is_finite = image.new_empty(batch, num_tiles, dtype=torch.uint8)
    to_item, to_channel, _, to_pixel = out.stride()
    _paint[(num_tiles, batch)](
        image, image if ends is None else ends, out, is_finite, width, height * width, num_tiles, share, gain,
        *image.stride(), to_item, to_channel, to_pixel,
        WIDENED=ends is not None, GREY=grey, LEVELS=levels, BLOCK=tile,
    )  # fmt: skip
    return out, is_finite.view(torch.bool)
